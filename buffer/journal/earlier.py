"""The rows of journals that earlier programs wrote, in this program's layout.

Format 1 has no ``turn_reward``, the last field of ``trees.index.ROW``: no turn had one, which is 0.  Format 2 has the
rows of today; its records are of turns without fingerprints, which this program reads as such.
"""

from __future__ import annotations

import numpy as np

from buffer.trees.index import ROW

FORMATS = (b"1", b"2")
"""Those whose journals are brought to today's."""
ROWS = b"1"
"""The one of them whose rows are others: ``upgraded`` takes them."""

_ROW = np.dtype(ROW.descr[:-1])


def upgraded(rows: bytes) -> bytes:
    """Rows of format 1 as rows of ``trees.index.ROW``.  Raises ValueError where they end amid one."""
    before = np.frombuffer(rows, dtype=_ROW)
    now = np.zeros(len(before), dtype=ROW)
    for name in _ROW.names or ():
        now[name] = before[name]
    return now.tobytes()
