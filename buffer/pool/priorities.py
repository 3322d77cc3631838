"""The priority of each tree in a pool: its own, or the highest where no batch has had it, aged by version.  Pure."""

from __future__ import annotations

import numpy as np

from buffer.pool.sampler import F64, I64


class Priorities:
    """Priorities by row of the pool's table.

    Args:
        freshness: factor per version of lag, that of the oldest turn that is trained on.
        max_lag: a turn older than this is not trained on.
    """

    def __init__(self, *, freshness: float, max_lag: int) -> None:
        self._freshness = freshness
        self._ages = Ages(max_lag) if freshness < 1 else None
        self._own = np.zeros(0)
        self.highest = 1.0
        """The priority of a tree that no batch has had: the highest one confirmed so far."""

    @property
    def age(self) -> bool:
        """Whether priorities change from version to version."""
        return self._ages is not None

    def put(self, row: int, own: float, versions: I64) -> None:
        """Enter a tree that came, or grew.

        Args:
            row: the tree's.
            own: priority by its own advantages.
            versions: int64[N], the oldest version of each turn.
        """
        if row >= len(self._own):
            self._own = np.concatenate([self._own, np.zeros(max(16, 2 * len(self._own), row + 1) - len(self._own))])
        self._own[row] = own
        if self._ages is not None:
            self._ages.put(row, versions)

    def remove(self, row: int) -> None:
        if self._ages is not None:
            self._ages.remove(row)

    def own(self, row: int) -> float:
        return float(self._own[row])

    def confirm(self, rows: I64, priorities: F64) -> bool:
        """The learner's own of these trees.  True if one is above all before: trees no batch has had are worth more."""
        self._own[rows] = priorities
        return self.raise_highest(float(priorities.max())) if len(priorities) else False

    def raise_highest(self, priority: float) -> bool:
        if priority <= self.highest:
            return False
        self.highest = priority
        return True

    def of(self, rows: I64, uses: I64, version: int) -> F64:
        """float64[n]: the priorities of these trees at ``version``, after ``uses`` (int64[n]) each."""
        priority: F64 = np.where(uses == 0, self.highest, self._own[rows])
        return priority if self._ages is None else priority * self._freshness ** self._ages.lags(rows, version)


class Ages:
    """How old each tree is, where priorities age: by its oldest turn that is still trained on.

    Args:
        max_lag: a turn older than this is not.
    """

    def __init__(self, max_lag: int) -> None:
        self._max_lag = max_lag
        self._versions: dict[int, I64] = {}
        """Row -> oldest versions of its turns, ascending."""
        self._since = np.zeros(0, dtype=np.int64)
        """Version of the oldest turn that is trained on, when last looked at."""

    def put(self, row: int, versions: I64) -> None:
        if row >= len(self._since):
            more = np.zeros(max(16, 2 * len(self._since), row + 1) - len(self._since), dtype=np.int64)
            self._since = np.concatenate([self._since, more])
        self._versions[row] = np.unique(versions)
        self._since[row] = self._versions[row][0]

    def remove(self, row: int) -> None:
        self._versions.pop(row, None)

    def lags(self, rows: I64, version: int) -> I64:
        """int64[n]: the greatest lag that would be trained on at ``version``."""
        since = version - self._max_lag
        # Each turn comes to its end once, and with it the version that its tree's age counts from.
        for row in rows[self._since[rows] < since].tolist():
            versions = self._versions[row]
            fresh = int(np.searchsorted(versions, since))
            self._since[row] = versions[min(fresh, len(versions) - 1)]
        lags: I64 = np.maximum(version - self._since[rows], 0)
        return lags
