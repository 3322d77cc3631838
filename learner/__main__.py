"""``python -m learner RUN_DIR``: the learner, or one rank of it under ``accelerate launch -m learner RUN_DIR``."""

from __future__ import annotations

import os
import sys

from atpo_async.ops import role


def main(argv: list[str]) -> None:
    # Read when torch is loaded.  Threads that spin at a barrier take the core from the engine beside them: two
    # spinning threads on two busy cores made a step take 3 to 18 s, sleeping ones 2 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Read when CUDA is first used.  Passes have many sizes: in segments that cannot grow, memory that is free lies in
    # pieces of which none is large enough.
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    from learner.role import learn

    role.run("learner", learn, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
