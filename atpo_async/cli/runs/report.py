"""``atpo report``: write ``report.html`` into a run folder, and the learning curve where a path is named for it."""

from __future__ import annotations

import argparse
from pathlib import Path

from atpo_async.cli.common import EXIT_DONE, Asked, note
from atpo_async.report.learning_curve import write_figure
from atpo_async.report.page import write_report
from atpo_async.status.run_folders import run_at


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--figure", metavar="PATH", help="also write the learning curve, as .svg or .png")


def run(asked: Asked) -> int:
    """Prints where the files are."""
    rundir = run_at(asked.args.run)
    if asked.args.figure:
        print(write_figure(rundir, Path(asked.args.figure)))
    print(write_report(rundir, say=note))
    return EXIT_DONE
