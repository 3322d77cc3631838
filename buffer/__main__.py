"""``python -m buffer RUN_DIR``: the buffer of a run.  ``python -m buffer follow …``: a follower of its journal."""

from __future__ import annotations

import gc
import sys

from atpo_async.ops import role
from atpo_async.ops.lifeline import exit_within
from buffer.following import program
from buffer.service import serve


def main(argv: list[str]) -> None:
    if argv[:1] == ["follow"]:
        code = program.main(argv[1:])
        exit_within(role.EXIT_DEADLINE_S, code)
        sys.exit(code)
    # Turns and trees are many small objects without cycles: searching for some takes a sixth of the time at full load.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    # The thread that commits calls LMDB some thirty times for a group, and after each call has to wait until the loop
    # lets go of the interpreter, up to 5 ms otherwise.
    sys.setswitchinterval(0.0001)
    role.run("buffer", serve, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
