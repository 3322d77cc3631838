"""``atpo follower``: a copy of a buffer's journal on another machine, and its promotion when the buffer's is lost."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from atpo_async.cli.common import LAYERS, Asked
from atpo_async.core.errors import ConfigError
from atpo_async.run import launch

ABOUT = """\
The run needs buffer.follower = true; the buffer logs the address for followers.  docs/clusters.md has the details.
"""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.epilog = f"{ABOUT}{parser.epilog or ''}"
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="*",
        help=f"for links.* and buffer.journal_sync; defaults if left out; {LAYERS}",
    )
    parser.add_argument(
        "--dir", metavar="FOLDER", required=True, help="where the copy is kept: an empty folder at first"
    )
    parser.add_argument(
        "--join", metavar="WHERE", help="HOST:PORT of the buffer's socket for followers, or a run folder"
    )
    parser.add_argument("--name", metavar="NAME", help="name of this follower in logs and metrics")
    parser.add_argument("--promote", action="store_true", help="make the copy the run's journal: its buffer is lost")
    parser.add_argument(
        "--into", metavar="RUN", help="with --promote: the run's folder, where only its journal is lost"
    )
    parser.add_argument(
        "--certain", action="store_true", help="with --promote: the old buffer is gone, though it was heard of lately"
    )


def run(asked: Asked) -> NoReturn:
    """Replace this process by the follower's."""
    args = asked.args
    if args.promote and args.join:
        raise ConfigError("--promote and --join: a copy that is promoted follows no buffer any more; leave --join out")
    if not args.promote and (args.into or args.certain):
        raise ConfigError(f"{'--into' if args.into else '--certain'} goes with --promote")
    argv = [*launch.command("buffer", "follow"), "--dir", args.dir]
    for name in ("join", "name", "into"):
        if (text := getattr(args, name)) is not None:
            argv += [f"--{name}", text]
    argv += [f"--{name}" for name in ("promote", "certain") if getattr(args, name)]
    argv += ["--debug"] if asked.debug else []
    argv += ["--config", *args.config] if args.config else []
    argv += [f"--{key}={text}" for key, text in asked.options.items()]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(argv[0], argv, dict(os.environ))
