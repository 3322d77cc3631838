"""Which settings of an axis' files have no part in a study, because another axis or a choice decides them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from atpo_async.study.grid.names import FILES, TASK
from atpo_async.study.plan import Plan

MOST_FIELDS = 6
"""Named in a line; of more only the number is said."""


def overridden(plan: Plan) -> list[str]:
    """A line for each option of the grid that goes over what recipes or other files of an axis set."""
    decided = plan.decided()
    lines = []
    for axis in plan.axes:
        if axis.name not in FILES or axis.name == TASK:  # a task's settings are there to be laid over
            continue
        setting = {value: set(_paths(layers)) & set(decided) for value, layers in axis.layers.items()}
        for option in dict.fromkeys(decided.values()):
            names = sorted({name for found in setting.values() for name in found if decided[name] == option})
            if not names:
                continue
            count = sum(any(decided[name] == option for name in found) for found in setting.values())
            listed = ", ".join(names) if len(names) <= MOST_FIELDS else f"{len(names)} fields"
            lines.append(f"{option} goes over what {count} of {len(setting)} values of {axis.name} set: {listed}")
    return lines


def _paths(tables: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Dotted paths of what tables set, of sections and fields alike."""
    for table in tables:
        for section, entries in table.items():
            yield from _below(section, entries)


def _below(path: str, entries: Any) -> Iterator[str]:
    yield path
    if isinstance(entries, Mapping):
        for name, inner in entries.items():
            yield from _below(f"{path}.{name}", inner)
