"""What every source of rows offers, and the plainest ones: a list in memory, several sources one after another."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_type, of_value
from atpo_async.environments.data.faults import RowRefused

Row = dict[str, Any]

LOOKED_AT = 100
"""Rows whose columns are the columns of a source that has no schema."""


class Rows(Protocol):
    """Rows by position."""

    name: str
    """As the user gave it, for messages."""
    num_bytes: int
    """About how much has to be read to look at every row."""

    def __len__(self) -> int: ...

    def columns(self) -> tuple[str, ...]:
        """Of the schema, or of the first ``LOOKED_AT`` rows."""

    def row(self, at: int) -> Row:
        """Row ``at``, as plain Python.  Raises RowRefused where it cannot be read."""

    def where(self, at: int) -> str:
        """``train.jsonl, line 7``."""

    def parts(self, names: Sequence[str]) -> Iterator[Row]:
        """Every row in order, of which only the columns ``names`` are needed.

        Raises RowRefused where one cannot be read; ConfigError says the same of the whole.
        """


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy and pyarrow as Python's own, also inside lists and mappings."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if callable(as_python := getattr(value, "as_py", None)):
        return plain(as_python())
    return value


def columns_of(rows: Iterator[Row]) -> tuple[str, ...]:
    """The columns of the first rows, each once, in order."""
    return tuple(dict.fromkeys(name for row in itertools.islice(rows, LOOKED_AT) for name in row))


class ListedRows:
    """Rows that the user's code made.  Raises ConfigError for one that is no mapping."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        self.name = name
        self.num_bytes = 0
        for at, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ConfigError(
                    f"{name}[{at}] is {of_value(row)} ({of_type(row)}); expected a dict with the columns of a row"
                )
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def columns(self) -> tuple[str, ...]:
        return columns_of(iter(self.parts(())))

    def row(self, at: int) -> Row:
        return {str(key): plain(value) for key, value in self._rows[at].items()}

    def where(self, at: int) -> str:
        return f"{self.name}[{at}]"

    def parts(self, names: Sequence[str]) -> Iterator[Row]:
        for at in range(len(self)):
            yield self.row(at)


class JoinedRows:
    """The rows of several sources, one after another."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.name = parts[0].name if len(parts) == 1 else f"{parts[0].name} and {len(parts) - 1} more"
        self.num_bytes = sum(part.num_bytes for part in parts)
        self._parts = tuple(parts)
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def columns(self) -> tuple[str, ...]:
        """Those that every part has: a column that one lacks would be missing in each of its rows."""
        first, *others = [part.columns() for part in self._parts]
        return tuple(name for name in first if all(name in other for other in others))

    def row(self, at: int) -> Row:
        part, inner = self._find(at)
        return part.row(inner)

    def where(self, at: int) -> str:
        part, inner = self._find(at)
        return part.where(inner)

    def parts(self, names: Sequence[str]) -> Iterator[Row]:
        for part in self._parts:
            yield from part.parts(names)

    def _find(self, at: int) -> tuple[Rows, int]:
        number = bisect.bisect_right(self._ends, at)
        return self._parts[number], at - (self._ends[number - 1] if number else 0)


def unreadable(where: str, text: str) -> RowRefused:
    """A row that is none."""
    return RowRefused("row", f"{where}: {text}")
