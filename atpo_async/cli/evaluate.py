"""``atpo eval``: greedy success of a run's newest policy, or of a model folder, on held-out tasks."""

from __future__ import annotations

import argparse
import sys

from atpo_async.api.evaluation import evaluate_policy, evaluation, without_effect
from atpo_async.api.machine import engine_of
from atpo_async.cli.common import EXIT_DONE, Asked, demo_config, note


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.add_argument("target", metavar="RUN|MODEL")
    parser.add_argument(
        "config", metavar="CONFIG", nargs="*", default=[], help="for a model folder; configs/demo.toml without"
    )


def run(asked: Asked) -> int:
    """Prints one line."""
    with evaluation(asked.args.target, asked.args.config, asked.options, default=demo_config) as what:
        engine, _ = engine_of(what.config)
        for name in without_effect(asked.options):
            note(f"--{name} has no effect on an evaluation")
        tasks = what.config.eval.num_tasks
        print(f"evaluating {what.name} on {tasks} held-out tasks with {engine} …", file=sys.stderr, flush=True)
        result = evaluate_policy(what.config, what.model, what.name)
    print(result.line(what.name))
    return EXIT_DONE
