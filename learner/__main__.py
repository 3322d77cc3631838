"""``python -m learner RUN_DIR``: the learner, or one rank of it under ``accelerate launch -m learner RUN_DIR``."""

from __future__ import annotations

import sys

from atpo_async import role
from learner.loop import learn

if __name__ == "__main__":
    role.run("learner", learn, sys.argv[1:])
