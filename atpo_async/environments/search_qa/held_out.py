"""The questions of one test set, in the order of its file: all of them are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atpo_async.core.errors import ConfigError
from atpo_async.core.vocabulary import Split
from atpo_async.environments.data.opening import open_rows


@dataclass(frozen=True, slots=True)
class HeldOutRow:
    """One row and its place."""

    row: dict[str, Any]
    where: str


class HeldOut:
    """Rows of a file, for evaluation alone.

    Args:
        file: JSONL or parquet.
        source: take the rows with this ``data_source``; empty for all.

    Raises:
        ConfigError: no row is of that source, or what the file holds.
        SetupError: the file cannot be read.
    """

    def __init__(self, file: str, *, source: str = "") -> None:
        self._rows = open_rows(file, None, field="held_out", held_out=True)
        if source:
            parts = self._rows.parts(["data_source"])
            self._places = [at for at, row in enumerate(parts) if row.get("data_source") == source]
        else:
            self._places = list(range(len(self._rows)))
        if not self._places:
            raise ConfigError(f"{file} has no rows" + (f" with data_source = {source!r}" if source else ""))

    def num_tasks(self, split: Split) -> int:
        return len(self._places)

    def task(self, split: Split, index: int) -> HeldOutRow:
        """Raises RowRefused where the row cannot be read."""
        at = self._places[index]
        return HeldOutRow(self._rows.row(at), self._rows.where(at))
