"""``atpo task CONFIG``: one task as messages, played in the terminal; the first command for a new task."""

from __future__ import annotations

import argparse
import json
import subprocess

from rich.console import Console

from atpo_async.api.foreground import resolved_file
from atpo_async.api.policy import ensure_policy
from atpo_async.cli.common import EXIT_INTERRUPTED, LAYERS, Asked
from atpo_async.config import load
from atpo_async.run import launch


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.add_argument("config", metavar="CONFIG", nargs="+", help=LAYERS)
    parser.add_argument("--index", type=int, default=0, metavar="N", help="which task; 0 without")
    parser.add_argument("--eval", action="store_true", help="of the held-out tasks")
    parser.add_argument("--show", action="store_true", help="only show the task; ask for no action")
    parser.add_argument("--ids", action="store_true", help="print the token ids as well")
    parser.add_argument("--raw", action="store_true", help="actions are the text of their tokens, special ones by name")
    script = parser.add_mutually_exclusive_group()
    script.add_argument(
        "--actions", metavar="FILE", help="play the actions of a file, one a line; a JSON object is a message"
    )
    script.add_argument("--policy", metavar="MODULE:FUNCTION", help="play by a function: (messages) -> text or message")


def run(asked: Asked) -> int:
    """Plays in a process of its own, on this terminal."""
    args = asked.args
    config = ensure_policy(load(args.config, asked.options), Console(stderr=True))
    words = {"split": "eval" if args.eval else "train", "index": args.index, "ids": args.ids, "raw": args.raw}
    words |= {"show": args.show, "actions": args.actions, "policy": args.policy}
    with resolved_file(config) as file:
        process = subprocess.Popen(launch.command("atpo_async.api.task", str(file), json.dumps(words)))
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal sends it to both
            process.wait()
            return EXIT_INTERRUPTED
