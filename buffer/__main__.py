"""``python -m buffer RUN_DIR``: the buffer of a run."""

from __future__ import annotations

import gc
import sys

from atpo_async.ops import role
from buffer.service import serve

if __name__ == "__main__":
    # Turns and trees are many small objects without cycles: searching for some takes a sixth of the time at full load.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    # The thread that commits calls LMDB some thirty times for a group, and after each call has to wait until the loop
    # lets go of the interpreter, up to 5 ms otherwise.
    sys.setswitchinterval(0.0001)
    role.run("buffer", serve, sys.argv[1:])
