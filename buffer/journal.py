"""What the buffer keeps beyond its own memory: the journal of acknowledged messages, and the data cursor.

A message is committed before it is acknowledged: an acknowledgement before the commit loses the turn if we crash in
between, for its actor forgets it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from atpo_async.errors import SetupError
from atpo_async.messages import TreeClosed, TreeOpened
from atpo_async.rundir import write_atomic
from atpo_async.tree import Turn

TreeMessage = TreeOpened | Turn | TreeClosed


class Journal(Protocol):
    """Where acknowledged messages are kept."""

    async def commit(self, messages: Sequence[TreeMessage]) -> None:
        """Returns once ``messages`` survive what this journal promises to survive; then they may be acknowledged."""

    def recover(self) -> Iterator[TreeMessage]:
        """What an earlier process had committed and not let go, in order."""

    async def close(self) -> None: ...


class MemoryJournal:
    """Survives nothing: the trees in memory are all there is.  The order of commit and acknowledgement is kept."""

    async def commit(self, messages: Sequence[TreeMessage]) -> None:
        return

    def recover(self) -> Iterator[TreeMessage]:
        return iter(())

    async def close(self) -> None:
        return


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where the data stands.

    A run stopped in good order and resumed skips no task.  After a kill the tasks of the batch that was with the
    learner are taken to be trained on, and are skipped if the learner died too: trees are not kept on disk.
    """

    incarnation: int = 0
    """How often the buffer of this run was started; part of tree ids, so that none is ever given twice."""
    next_task: int = 0
    """The first training task never leased."""
    next_batch: int = 1
    unfinished: tuple[int, ...] = ()
    """Tasks below ``next_task`` whose trees were never served, or served in a batch that was given up."""


class CursorFile:
    """The cursor in the run folder, replaced atomically.

    Args:
        path: the file; None keeps nothing (a buffer without a run folder).
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def begin(self) -> Cursor:
        """The cursor of a buffer that starts now: the stored one, as the next incarnation.

        Raises:
            SetupError: the file is damaged.
        """
        cursor = Cursor()
        if self._path is not None and self._path.exists():
            try:
                data = json.loads(self._path.read_text(encoding="utf-8"))
                cursor = Cursor(**{**data, "unfinished": tuple(int(t) for t in data["unfinished"])})
            except (ValueError, TypeError, KeyError) as exc:
                raise SetupError(
                    f"{self._path} is damaged ({exc}); remove it to start the data from its first task"
                ) from exc
        cursor = replace(cursor, incarnation=cursor.incarnation + 1)
        self.save(cursor)
        return cursor

    def save(self, cursor: Cursor) -> None:
        if self._path is not None:
            write_atomic(self._path, json.dumps(asdict(cursor)) + "\n")
