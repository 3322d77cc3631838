"""``atpo config``: the resolved configuration, every setting that affects staleness, and the bounds that follow."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from atpo_async import config as configuration
from atpo_async.cli.common import EXIT_DONE, LAYERS, Asked


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.add_argument("config", metavar="CONFIG", nargs="+", help=LAYERS)


def run(asked: Asked) -> int:
    """Prints TOML and two tables."""
    config = configuration.load(asked.args.config, asked.options)
    print(configuration.to_toml(config))
    console = Console(highlight=False)
    table = Table(title="staleness, in learner versions, measured when a batch is consumed", title_justify="left")
    table.add_column("knob", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("what it does")
    for name, text in configuration.STALENESS_KNOBS:
        table.add_row(name, str(configuration.get(config, name)), text)
    console.print(table)
    bounds = Table(title="derived bounds", title_justify="left")
    bounds.add_column("bound", no_wrap=True)
    bounds.add_column("value", justify="right", no_wrap=True)
    bounds.add_column("from")
    for name, value, text in configuration.derived_bounds(config):
        bounds.add_row(name, str(value), text)
    console.print(bounds)
    return EXIT_DONE
