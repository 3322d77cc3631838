"""``atpo config``: the resolved configuration, every setting that affects staleness, and the bounds that follow."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from atpo_async import config as configuration
from atpo_async.cli.common import EXIT_DONE, LAYERS, Asked
from atpo_async.config import Config


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
    if config.environments:
        console.print(_environments(config))
    return EXIT_DONE


def _environments(config: Config) -> Table:
    """What the weights of several environments come to."""
    from atpo_async.core.mixture import Mixture  # needs numpy, which other commands do without

    mixture = Mixture([each.weight for each in config.environments], config.run.seed)
    table = Table(title="environments, by weight", title_justify="left")
    for name in ("label", "environment", "training tasks", "held-out tasks"):
        table.add_column(name, no_wrap=name == "label")
    held_out = mixture.num_held_out(config.eval.num_tasks)
    for each, count, held in zip(config.environments, mixture.counts, held_out, strict=True):
        table.add_row(each.label, each.name, f"{count} of every {mixture.block}", str(held))
    return table
