"""``atpo train`` and ``atpo demo``: train a run to its end, on this terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from atpo_async.api.training import train_to_the_end
from atpo_async.cli.common import EXIT_DONE, EXIT_INTERRUPTED, LAYERS, Asked, command_line, demo_config
from atpo_async.config import Config, load

DEMOS = {
    "agent": "a chat policy that calls a search engine (configs/demo_agent.toml)",
    "text": "one that reasons about plain text and predicts what it says next (configs/demo_text.toml)",
    "team": "two that note what they read, and a third that answers from their notes (configs/demo_team.toml)",
}
"""Further demos by name (``atpo demo agent``)."""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    if command == "demo":
        parser.add_argument(
            "config",
            metavar=f"{'|'.join(DEMOS)}|CONFIG",
            nargs="*",
            default=[],
            help=f"{'; '.join(f'{name}: {what}' for name, what in DEMOS.items())}; or another configuration than "
            "configs/demo.toml",
        )
        return
    parser.add_argument(
        "config", metavar="CONFIG", nargs="+", help=f"TOML file, for instance configs/demo.toml; {LAYERS}"
    )
    parser.add_argument(
        "--on",
        choices=("ray", "hosts"),
        help="where the roles run: on a Ray cluster (--ray.address, docs/clusters.md); hosts: only the buffer here, "
        "learner and actors are started elsewhere and join it (`atpo launch`); on this machine where left out",
    )
    parser.add_argument(
        "--from",
        dest="begin_from",
        metavar="RUN[:STEP]",
        help="a new run begins with the policy of another one: its newest, or that of its checkpoint of STEP",
    )


def run(asked: Asked) -> int:
    """Train; `atpo demo` in a new run each time, unless --run.name names one."""
    if asked.command == "demo":
        return _demo(asked)
    config = load(asked.args.config, asked.options)
    return train(config, again=asked.again, begin_from=asked.args.begin_from, on=asked.args.on)


def train(config: Config, *, again: str, begin_from: str | None = None, on: str | None = None) -> int:
    """Train to the end or to an interruption; returns the exit code.

    Args:
        config: resolved.
        again: the command that goes on with the run.
        begin_from: ``RUN[:STEP]`` whose policy a new run begins with.
        on: ``ray``: the cluster of ``config.ray``; ``hosts``: only the buffer is started here; None: this machine.
    """
    run = f"ray://{config.run.name}" if on == "ray" else str(config.run.dir / config.run.name)
    shown = shlex.join(["atpo", "status", run])
    console = LastingConsole(when_closed=f"the run goes on, `{shown}` shows it", highlight=False, soft_wrap=True)
    if on == "ray":
        from atpo_async.api.places.on_ray import train_on_ray

        interrupted = train_on_ray(config, console=console, again=again, begin_from=begin_from)
        return EXIT_INTERRUPTED if interrupted else EXIT_DONE
    trained = train_to_the_end(config, console=console, again=again, begin_from=begin_from, on_hosts=on == "hosts")
    return EXIT_INTERRUPTED if trained.interrupted else EXIT_DONE


def _demo(asked: Asked) -> int:
    given: list[str] = asked.args.config
    stem = "demo"
    if given and given[0] in DEMOS:
        stem = f"demo-{given[0]}"
        given = [str(demo_config(f"demo_{given[0]}")), *given[1:]]
    files = given or [str(demo_config())]
    config = load(files, asked.options)
    if "run.name" not in asked.options:
        name = _free_name(config.run.dir, f"{stem}-{config.run.seed}")
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    options = [f"--{key}={text}" for key, text in asked.options.items() if key != "run.name"]
    return train(config, again=command_line(["train", *files, *options, "--run.name", config.run.name]))


def _free_name(folder: Path, stem: str) -> str:
    """``stem-1``, or the first number that no run has."""
    number = 1
    while (folder / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


class LastingConsole(Console):
    """A console that outlives its reader (``atpo train … | head``): one note on stderr, then silence.  rich's own would
    end the process."""

    def __init__(self, *, when_closed: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._when_closed = when_closed

    def on_broken_pipe(self) -> None:
        """Note that the output is closed, and go on."""
        self.quiet = True
        _discard(sys.stdout)
        try:
            print(f"note: the terminal's output is closed; {self._when_closed}", file=sys.stderr, flush=True)
        except OSError:  # `2>&1 | head`
            _discard(sys.stderr)


def _discard(stream: Any) -> None:
    """Discard whatever is still written to a stream, also at the process's end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
