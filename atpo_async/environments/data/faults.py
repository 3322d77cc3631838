"""How a fault of a row, a column or a file is worded, and the error that costs one branch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from atpo_async.core.texts import of_type, of_value
from atpo_async.environments.values import ValueRefused

MOST_NAMES = 12


class RowRefused(ValueRefused):
    """One row cannot be used: the branches that ask for it fail, and are counted and named."""


def refuse_value(where: str, column: str, value: object, expected: str) -> RowRefused:
    """What to raise for a value of a column: ``train.jsonl, line 7: column 'question' is None (NoneType); …``."""
    return RowRefused(
        f"column {column!r}", f"{where}: column {column!r} is {of_value(value)} ({of_type(value)}); expected {expected}"
    )


def among(names: Iterable[str]) -> str:
    """A list of columns, cut."""
    every = list(names)
    shown = ", ".join(every[:MOST_NAMES])
    return f"{shown} and {len(every) - MOST_NAMES} more" if len(every) > MOST_NAMES else shown or "none"


def meant(name: str, known: Iterable[str]) -> str:
    """``; did you mean …?``, where one of ``known`` is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near else ""


def missing_file(given: str) -> str:
    """What to say of a path at which nothing lies: where it was looked for, and the nearest name there."""
    path = Path(given)
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {str(folder.absolute())!r}"
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        names = []
    return f"there is no such file in {str(folder.absolute())!r}{meant(path.name, names)}"
