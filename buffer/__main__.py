"""``python -m buffer RUN_DIR``: the buffer of a run."""

from __future__ import annotations

import sys

from atpo_async import role
from buffer.service import serve

if __name__ == "__main__":
    role.run("buffer", serve, sys.argv[1:])
