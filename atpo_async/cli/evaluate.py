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
    wanted = evaluation(asked.args.target, asked.args.config, asked.options, default=demo_config)
    with wanted as (config, model, name):
        engine, _ = engine_of(config)
        for option in without_effect(asked.options):
            note(f"--{option} has no effect on an evaluation")
        tasks = config.eval.num_tasks
        print(f"evaluating {name} on {tasks} held-out tasks with {engine} …", file=sys.stderr, flush=True)
        result = evaluate_policy(config, model, name)
    print(result.line(name))
    return EXIT_DONE
