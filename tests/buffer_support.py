"""A disk for the buffer's state, in memory: what was committed is there for the next buffer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from atpo_async.config import Config
from buffer.journal.persistence import StatePersistence
from buffer.state import BufferState
from buffer.trees.index import ROW, MemoryStore, Place, Rows, TurnEntry, rows_of


class Disk(MemoryStore):
    """Records, rows and state, as the journal has them after a commit."""

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[bytes, bytes] = {}
        self._rows: dict[Place, TurnEntry] = {}

    @classmethod
    def holding(cls, *, state: Mapping[bytes, bytes], rows: Iterable[TurnEntry], records: Mapping[int, bytes]) -> Disk:
        """As an earlier buffer left it."""
        made = cls()
        made.state.update(state)
        made._rows = {entry.place: entry for entry in rows}
        made._records.update(records)
        made._next = max(records, default=0) + 1
        made.nbytes = sum(map(len, records.values()))
        return made

    def note(self, entry: TurnEntry) -> None:
        self._rows[entry.place] = entry

    def release(self, rows: Rows, *, gone: bool = False) -> None:
        for row in rows:
            place = Place(int(row["chunk"]), int(row["offset"]), int(row["nbytes"]))
            if place.chunk in self._records:
                super().release(rows[rows["chunk"] == place.chunk])
            if not gone:
                del self._rows[place]  # of a tree that is gone they stay, as in a chunk that others keep

    def put(self, key: bytes, value: bytes | None) -> None:
        if value is None:
            self.state.pop(key, None)
        else:
            self.state[key] = value

    def rows(self) -> Rows:
        rows = rows_of(list(self._rows.values())) if self._rows else np.zeros(0, dtype=ROW)
        ordered: Rows = rows[np.lexsort((rows["turn_id"], rows["tree"]))]
        return ordered

    def open(self, config: Config, *, now: float = 0.0, seed: int = 0) -> BufferState:
        """A buffer that finds what the one before it had committed."""
        made = BufferState(config, run="r", rng=np.random.default_rng(seed), now=now, store=self)
        self._persistence = StatePersistence(made)
        self._persistence.restore(self.rows(), dict(self.state), now)
        self.commit()
        return made

    def commit(self) -> None:
        """Commit what the buffer opened last has changed."""
        self._persistence.collect(self.put)
