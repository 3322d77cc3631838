"""Finds the trees of a pool that are too old, and those to serve now so that none expires unserved.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np

from buffer.pool.sampler import F64, I64

_NO_ROWS = np.zeros(0, dtype=np.int64)


class Expiry:
    """Trees by the version from which on they are of no use.

    Args:
        max_lag: a tree leaves when all its turns are older than this.
    """

    def __init__(self, max_lag: int) -> None:
        self._max_lag = max_lag
        self._by_newest: dict[int, set[int]] = {}
        """Newest version -> rows, of trees in whatever state."""
        self._unserved: dict[int, set[int]] = {}
        """Oldest version -> rows of ready trees that no batch has had."""

    def put(self, row: int, newest: int) -> None:
        self._by_newest.setdefault(newest, set()).add(row)

    def remove(self, row: int, newest: int) -> None:
        rows = self._by_newest[newest]
        rows.discard(row)
        if not rows:
            del self._by_newest[newest]

    def put_unserved(self, row: int, oldest: int) -> None:
        self._unserved.setdefault(oldest, set()).add(row)

    def remove_unserved(self, row: int, oldest: int) -> None:
        rows = self._unserved.get(oldest, set())
        rows.discard(row)
        if not rows:
            self._unserved.pop(oldest, None)

    def unserved(self) -> I64:
        """int64[n]: rows of ready trees that no batch has had."""
        return np.fromiter(chain.from_iterable(self._unserved.values()), np.int64)

    def stale(self, version: int) -> list[int]:
        """Rows of trees without any turn that is fresh at ``version``."""
        found: list[int] = []
        for newest in sorted(self._by_newest):
            if version - newest <= self._max_lag:
                break
            found += self._by_newest[newest]
        return found

    def due(self, count: int, version: int) -> Iterator[tuple[int, I64]]:
        """Trees no batch has had, the nearest expiry first: how many of them go now, and the rows to choose from.

        With ``count`` trees a version, those that expire within k versions must be at most k·count after this batch;
        what is above that goes now.  The rows of later ones contain those of the ones before.
        """
        by_left: dict[int, list[int]] = {}
        for oldest in sorted(self._unserved):
            by_left.setdefault(max(oldest + self._max_lag - version, 0), []).append(oldest)
        taken = seen = 0
        group: list[int] = []
        for k, versions in by_left.items():
            seen += sum(len(self._unserved[v]) for v in versions)
            group += versions
            need = min(seen - count * k - taken, count - taken)
            if need > 0:
                taken += need
                yield need, np.sort(np.fromiter(chain.from_iterable(self._unserved[v] for v in group), np.int64))

    def choose_due(self, count: int, version: int, *, weigh: Callable[[I64], F64], rng: np.random.Generator) -> I64:
        """Rows of never-served trees that must go now for none to be lost; by ``weigh`` among equally old ones.

        Source: weighted draws without replacement by the largest of u^(1/w) (Efraimidis and Spirakis 2006).
        """
        chosen = _NO_ROWS
        for need, rows in self.due(count, version):
            waiting = rows[~np.isin(rows, chosen)] if len(chosen) else rows
            order = np.argsort(-(rng.random(len(waiting)) ** (1.0 / weigh(waiting))))
            chosen = np.concatenate([chosen, waiting[order[:need]]])
        return chosen
