"""vLLM's entry point into this package, loaded in the front end, the engine core and every worker.

It does nothing unless ``VllmEngine`` started the engine: other users of vLLM in the same environment keep theirs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal

from actors.engines.vllm import stages
from atpo_async.run.processes import die_with_parent

FRONT_END_VARIABLE = "ATPO_VLLM_FRONT_END"
"""Set by ``VllmEngine`` to its process id, and inherited by the engine's processes."""

BACKEND = "atpo_file"
"""Name of our weight-transfer engine."""

PROBE_PREFIX = "atpo-probe-"
"""Requests whose id begins so are run while all others are paused."""

PROBE_PLACES = 8
"""How many of them run at once; further ones wait for those."""

UNTOUCHED, INCOMPLETE = "nothing was loaded:", "not all was taken up:"
"""Marks in a worker's errors: raised before the first layer was touched, and after the load."""

READ, LOAD = "read", "load"
"""Stages of an update: a worker reads the file ahead, and loads it."""

READ_MARK = ".read"
"""Suffix of an empty file beside a version's: its worker has read it, or cannot."""

CPU_NORMS = "atpo_cpu"
"""Name of our choice of norm kernels on a CPU."""


def register() -> None:
    """Register the weight-transfer engine; in the engine's own processes also tie their life to their parent's, and
    pass on what they are at while they start."""
    front_end = os.environ.get(FRONT_END_VARIABLE)
    if front_end is None:
        return
    if int(front_end) != os.getpid():
        parent = multiprocessing.parent_process()
        # The kernel counts the thread that forked as the parent: VllmEngine keeps the one that starts its processes.
        die_with_parent(signal.SIGKILL, int(front_end) if parent is None or parent.pid is None else parent.pid)
        stages.attach()
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    # vLLM may load plugins more than once, and refuses a name that is taken.
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "actors.engines.vllm.inside", "FileWeightTransferEngine")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from actors.engines.vllm.cpu_norms import register_norms

        register_norms(CPU_NORMS)
