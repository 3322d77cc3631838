"""A journal on a slow disk, for benchmarks: every commit takes longer by a fixed time.

Reached by the door ``buffer.sampling``, which is what of a user's own runs in the buffer's process; trees are chosen as
the built-in sampling does.
"""

from __future__ import annotations

import time

from buffer.journal.changes import Change
from buffer.journal.chunks import Group
from buffer.journal.tables import Tables
from buffer.sampling import prioritized

_commit = Tables.commit


def make(exponent: float, *, commit_ms: float) -> prioritized.Prioritized:
    """The built-in sampling; from now on commits of this process take ``commit_ms`` longer."""

    def slow(self: Tables, group: Group) -> list[Change]:
        time.sleep(commit_ms / 1e3)
        return _commit(self, group)

    # A sampling may be made more than once.
    Tables.commit = slow  # type: ignore[method-assign]
    return prioritized.make(exponent)
