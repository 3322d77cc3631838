"""``atpo trees RUN``: trees that a run was trained on, as conversations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from atpo_async.cli.common import EXIT_DONE, Asked
from atpo_async.core.errors import SetupError
from atpo_async.report.conversation import as_tree, rewards_of
from atpo_async.report.tree_samples import TreeSample, read_tree_samples
from atpo_async.status.run_folders import run_at

SHOWN_IDS = 8


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--step", type=int, metavar="N", help="the trees of this step, whole")
    parser.add_argument("--tree", metavar="ID", help="the tree of this id, whole")


def run(asked: Asked) -> int:
    """Prints a table of all recorded trees, or the conversations of those that were asked for."""
    rundir = run_at(asked.args.run)
    samples = read_tree_samples(rundir.trees_path)
    if not samples:
        raise SetupError(
            f"{rundir.trees_path} has no trees yet: the learner writes one down every few steps "
            "(metrics.trees batches of a run)"
        )
    # Lines are not wrapped in a pipe, so that words can be searched for in them.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    step, tree = asked.args.step, asked.args.tree
    if step is None and tree is None:
        console.print(_table(samples))
        console.print(f"a whole one: atpo trees {asked.args.run} --tree {samples[-1].tree_id}", style="dim")
        return EXIT_DONE
    for sample in chosen(samples, step=step, tree=tree):
        console.print(as_tree(sample))
    return EXIT_DONE


def chosen(samples: Sequence[TreeSample], *, step: int | None, tree: str | None) -> list[TreeSample]:
    """The trees asked for.  Raises SetupError naming those that there are."""
    found = [s for s in samples if step in (None, s.step) and tree in (None, s.tree_id)]
    if not found:
        asked = " and ".join(
            part for part in ("" if tree is None else f"tree {tree}", "" if step is None else f"step {step}") if part
        )
        if tree is None:
            known = "steps " + _some([str(s.step) for s in samples])
        else:
            known = "trees " + _some([s.tree_id for s in samples])
        raise SetupError(f"no tree of {asked} was written down; there are {known} (metrics.trees sets how many)")
    return found


def _some(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - SHOWN_IDS} more" if len(names) > SHOWN_IDS else ""
    return ", ".join(names[:SHOWN_IDS]) + more


def _table(samples: Sequence[TreeSample]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    several = any(sample.environment for sample in samples)
    names = (
        "step",
        "tree",
        "task",
        *(("environment",) if several else ()),
        "turns",
        "leaves",
        "rewards",
        "prompt ends",
    )
    for name in names:
        table.add_column(
            name, justify="right" if name in ("step", "task", "turns", "leaves") else "left",
            no_wrap=True, overflow="ellipsis" if name == "prompt ends" else "fold",
        )  # fmt: skip
    for sample in samples:
        table.add_row(
            str(sample.step),
            sample.tree_id,
            "–" if sample.task is None else str(sample.task),
            *((sample.environment,) if several else ()),
            str(len(sample.turns)),
            str(len(sample.leaves)),
            rewards_of(sample).removeprefix(", ").removeprefix("rewards ").removeprefix("reward ") or "–",
            _question(sample),
        )
    return table


def _question(sample: TreeSample) -> str:
    """The end of the prompt, where the task's own words are, in one line."""
    asked = next((message.text for message in reversed(sample.messages) if message.role == "user"), sample.prompt)
    words = " ".join(asked.split())
    return words if len(words) <= 60 else "…" + words[-59:]
