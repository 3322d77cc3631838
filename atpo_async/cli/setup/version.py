"""``atpo version``: the version, and those of what it runs on."""

from __future__ import annotations

import argparse

from atpo_async.cli.common import EXIT_DONE, Asked
from atpo_async.run.installed import version_line


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """It takes none."""


def run(asked: Asked) -> int:
    """Prints one line."""
    print(version_line())
    return EXIT_DONE
