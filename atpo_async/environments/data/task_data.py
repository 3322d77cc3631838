"""Rows as tasks: opened, checked, split into training and held-out ones, and taken by index in a fixed order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import counted, of_type, of_value
from atpo_async.core.vocabulary import Split
from atpo_async.environments.data import splits
from atpo_async.environments.data.columns import Columns
from atpo_async.environments.data.faults import RowRefused
from atpo_async.environments.data.opening import open_rows
from atpo_async.environments.data.rows import Row, Rows
from atpo_async.environments.messages.types import Message

log = logging.getLogger("atpo.actor.data")

LOOKED_THROUGH_BYTES = 512 << 20
"""Data up to this size are looked through when they are opened, so that a broken line is found before the run; larger
ones only where a held-out part needs every question."""

EVAL_SEED = 0
"""Held-out rows have one order for all seeds: evaluations that take the first N of them can be compared."""


_GROUP = (
    "where rows with the same question are different tasks, name the column that tells them apart: "
    "columns = {group = '…'}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """One row as a task."""

    messages: list[Message]
    """What the policy is shown first; a system message only where the row has one."""
    answer: Any
    """As it is in the row; None where it has none."""
    row: Row
    """All columns, as plain Python."""
    where: str
    """``train.jsonl, line 7``; rows of tables and lists count from 0."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of one split."""

    rows: Rows
    columns: Columns
    order: np.ndarray
    """int32[N], positions in ``rows``."""


class TaskData:
    """Tasks of a data set.  ``load`` makes it."""

    def __init__(self, parts: Mapping[Split, _Part], name: str) -> None:
        self._parts = parts
        self._name = name

    @classmethod
    def load(
        cls,
        data: str | Path | Sequence[Any],
        *,
        eval_data: str | Path | Sequence[Any] | None = None,
        eval_share: float | None = None,
        seed: int = 0,
        split: str | None = None,
        columns: Mapping[str, str] | str | None = None,
    ) -> TaskData:
        """Open data.

        Args:
            data: a file (``.jsonl``, ``.json``, ``.parquet``, ``.jsonl.gz``), a pattern of files, a list of those, a
                folder that ``save_to_disk`` wrote, a Hugging Face data set (``owner/name``, ``owner/name:config``,
                ``owner/name:config:split``), or a list of dicts.
            eval_data: of the held-out tasks, likewise.  Rows of ``data`` that ask one of its questions are left out.
            eval_share: in (0, 1): about this share of the questions is held out in place of ``eval_data``.
            seed: of the order of training tasks, which is the same in every epoch.  Which rows are held out, and their
                order, does not depend on it.
            split: of a Hugging Face data set, for training; ``train`` by default.
            columns: what a column that the data call otherwise means: ``{"question": "q", "answer": "a"}``; ``group``
                names one whose values are never on both sides of a split.  A dotted name leads into a mapping.

        Raises:
            ConfigError: a setting, a column, or what a file holds.
            SetupError: a file or a data set that is missing or damaged.
        """
        _check(data, eval_data, eval_share, seed)
        rows = open_rows(data, split, field="data")
        train = _Opened.of(rows, columns, keys_needed=eval_data is not None or eval_share is not None)
        if eval_data is not None:
            held = _Opened.of(open_rows(eval_data, None, field="eval_data", held_out=True), columns, keys_needed=True)
            parts = cls._beside(train, held, seed)
        elif eval_share is not None:
            parts = cls._shared(train, eval_share, seed)
        else:
            every = np.arange(len(rows), dtype=np.int32)
            parts = {"train": train.part(splits.order(every, seed))}
        return cls(parts, rows.name)

    @staticmethod
    def _beside(train: _Opened, held: _Opened, seed: int) -> dict[Split, _Part]:
        kept = splits.without(train.keys, held.keys)
        if not len(kept):
            raise ConfigError(
                f"eval_data = {held.rows.name!r} asks every question of data = {train.rows.name!r}, so that none is "
                f"left for training: give other held-out data, or eval_share; {_GROUP}"
            )
        if left := len(train.rows) - len(kept):
            log.warning(
                "%s of %s ask a question of %s, and are left out of training",
                counted(left, "row"), train.rows.name, held.rows.name,
            )  # fmt: skip
        every = np.arange(len(held.rows), dtype=np.int32)
        return {"train": train.part(splits.order(kept, seed)), "eval": held.part(splits.order(every, EVAL_SEED))}

    @staticmethod
    def _shared(opened: _Opened, share: float, seed: int) -> dict[Split, _Part]:
        found = splits.by_share(opened.keys, share)
        if not len(found.train) or not len(found.held_out):
            questions = len(np.unique(opened.keys))
            raise ConfigError(
                f"eval_share = {share} leaves {opened.rows.name} no rows to train on: its "
                f"{counted(len(opened.rows), 'row')} ask {counted(questions, 'question')}; lower it; {_GROUP}"
            )
        train, held = splits.order(found.train, seed), splits.order(found.held_out, EVAL_SEED)
        return {"train": opened.part(train), "eval": opened.part(held)}

    def num_tasks(self, split: Split) -> int:
        """How many tasks a split has.  Raises ConfigError where nothing is held out."""
        return len(self._part(split).order)

    def task(self, split: Split, index: int) -> TaskRow:
        """Task ``index``; past the end they begin again, in the same order.

        Raises RowRefused, which costs the branch that asks, where the row cannot be used.
        """
        part = self._part(split)
        at = int(part.order[index % len(part.order)])
        where = part.rows.where(at)
        row = part.rows.row(at)
        return TaskRow(
            messages=part.columns.messages(row, where), answer=part.columns.answer_of(row), row=row, where=where
        )

    def _part(self, split: Split) -> _Part:
        if split not in self._parts:
            raise ConfigError(
                f"data = {self._name!r} has no held-out tasks: give eval_data, or eval_share = 0.05; or switch "
                "evaluations off (eval.at_start, eval.at_end, eval.every_steps)"
            )
        return self._parts[split]


@dataclass(frozen=True, slots=True)
class _Opened:
    """A source whose rows were looked through."""

    rows: Rows
    columns: Columns
    keys: np.ndarray
    """uint64[N], ``splits.UNUSABLE`` for a row that cannot be used; empty where it was not looked through."""

    @classmethod
    def of(cls, rows: Rows, given: Mapping[str, str] | str | None, *, keys_needed: bool) -> _Opened:
        """Raises ConfigError for a row that is no object, a missing column, or where no row can be used."""
        try:
            columns = Columns.find(rows.columns(), given, rows.name)
            looked_through = keys_needed or rows.num_bytes <= LOOKED_THROUGH_BYTES
            keys = _keys(rows, columns) if looked_through else np.zeros(0, dtype=np.uint64)
        except RowRefused as exc:
            raise ConfigError(f"{exc}; mend or remove it") from exc
        return cls(rows, columns, keys)

    def part(self, order: np.ndarray) -> _Part:
        return _Part(self.rows, self.columns, order)


def _keys(rows: Rows, columns: Columns) -> np.ndarray:
    """A key for every row.  Raises RowRefused for one that cannot be read, ConfigError where none can be used.

    Single rows with a value that cannot be are left in: each costs the branches that ask for it.
    """
    keys = np.full(len(rows), splits.UNUSABLE, dtype=np.uint64)
    unusable, first = 0, ""
    for at, row in enumerate(rows.parts(columns.names)):
        try:
            keys[at] = columns.key(row, rows.where(at))
        except RowRefused as exc:
            unusable, first = unusable + 1, first or str(exc)
    if unusable == len(rows):
        raise ConfigError(f"{rows.name}: none of its {counted(len(rows), 'row')} can be used; the first: {first}")
    if unusable:
        log.warning(
            "%d of %s of %s cannot be used, and cost the branches that ask for them; the first: %s",
            unusable, counted(len(rows), "row"), rows.name, first,
        )  # fmt: skip
    return keys


def _check(data: Any, eval_data: Any, eval_share: Any, seed: Any) -> None:
    """Raises ConfigError for settings that cannot be."""
    if eval_data is not None and eval_share is not None:
        raise ConfigError(
            f"eval_data = {of_value(eval_data)} and eval_share = {of_value(eval_share)} both name the held-out tasks: "
            "leave one out"
        )
    is_number = isinstance(eval_share, int | float) and not isinstance(eval_share, bool)
    if eval_share is not None and not (is_number and 0 < eval_share < 1):
        raise ConfigError(
            f"eval_share is {of_value(eval_share)} ({of_type(eval_share)}); expected a number between 0 and 1, the "
            "share of questions that is held out: 0.05"
        )
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"seed is {of_value(seed)} ({of_type(seed)}); expected a whole number")
    if eval_data is not None and isinstance(data, str | Path) and str(data) == str(eval_data):
        raise ConfigError(
            f"data and eval_data are both {str(data)!r}, so that nothing would be held out: give eval_share = 0.05 in "
            "place of eval_data"
        )
