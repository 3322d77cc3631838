"""The engine on plain transformers: for machines without vLLM, and for quick tests.

One worker thread owns the model (``runner``).  Between two steps the event loop admits, drops and swaps; a step gives
every active request its next token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from actors.engines import base
from actors.engines.common.admission import Queue
from actors.engines.common.checks import (
    check_model_folder,
    check_scored,
    check_stop_strings,
    check_token_ids,
    check_weights,
)
from actors.engines.common.counters import RequestCounters
from actors.engines.probe import check_probe_fits, sequences_of
from actors.engines.transformers.requests import AnyRequest, Request, ScoreRequest
from actors.engines.transformers.runner import ModelRunner
from atpo_async.core.errors import EngineDead, GenerationFailed, ProbeMismatch, WaitTimeout, WeightsRejected
from atpo_async.status import waits

log = logging.getLogger("atpo.actor")

CLOSE_S = 5.0
"""How long close() waits for the worker thread."""

R = TypeVar("R")


class TransformersEngine:
    """Engine on transformers, batched over requests."""

    supports_stop_strings = True

    def __init__(self, settings: base.EngineSettings) -> None:
        self._settings = settings
        self._version = settings.initial_version
        self._runner: ModelRunner | None = None
        self._dead: str | None = "the engine was not started"
        self._queue = Queue(settings.max_num_seqs)
        self._counters = RequestCounters()
        self._unproven = False
        """The weights in the model failed the probe: nothing is generated until others have passed it."""
        self._waiting: list[AnyRequest] = []
        self._active: list[AnyRequest] = []
        self._work = asyncio.Event()
        self._between_steps = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transformers-engine")
        self._stuck = False
        """The thread did not return in time; waiting for it would block the event loop."""
        self._stepper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the model.  Raises SetupError if the folder or the device is not there."""
        check_model_folder(self._settings.model)
        self._runner = await self._in_thread(lambda: ModelRunner(self._settings))
        self._dead = None
        self._stepper = asyncio.create_task(self._step_to_the_end(), name="transformers-engine-steps")

    @property
    def runner(self) -> ModelRunner:
        """The model.  Raises EngineDead before start() and after close()."""
        if self._runner is None:
            raise EngineDead(f"the transformers engine is dead: {self._dead}")
        return self._runner

    async def generate(
        self, prompt: base.Tokens, sampling: base.Sampling, *, request_id: str, on_running: base.OnRunning = base.ignore
    ) -> base.Generation:
        """Sample one action after ``prompt``.  Raises GenerationFailed; cancelling it frees the request's slot."""
        self._check_alive(request_id)
        tokens = np.asarray(prompt).tolist()
        try:
            longest = self._settings.max_model_len - 1
            if not 1 <= len(tokens) <= longest:
                raise GenerationFailed(
                    f"request {request_id}: a prompt of {len(tokens)} tokens; this engine takes 1 to {longest}"
                )
            check_token_ids(tokens, vocab_size=self.runner.vocab_size, request_id=request_id)
            generator = None if sampling.seed is None else self.runner.seeded(sampling.seed)
            request = Request(tokens, sampling, request_id, asyncio.get_running_loop().create_future(), generator)
            if sampling.stop_strings:
                request.stop_strings = self.runner.stop_strings
                check_stop_strings(self._settings, request_id=request_id)
            with self._entered(request, on_running):
                return await request.done
        except GenerationFailed:
            self._counters.failed()
            raise

    async def score_continuation(
        self,
        context: base.Tokens,
        continuation: base.Tokens,
        *,
        request_id: str,
        on_running: base.OnRunning = base.ignore,
    ) -> base.Scored:
        """As ``ScoringEngine``: a request among the others, in one forward pass with all that are to be scored then."""
        self._check_alive(request_id)
        before, after = np.asarray(context).tolist(), np.asarray(continuation).tolist()
        longest, vocabulary = self._settings.max_model_len, self.runner.vocab_size
        try:
            check_scored(before, after, max_model_len=longest, vocab_size=vocabulary, request_id=request_id)
            request = ScoreRequest(before, after, request_id, asyncio.get_running_loop().create_future())
            with self._entered(request, on_running):
                return await request.done
        except GenerationFailed:
            self._counters.failed()
            raise

    @contextlib.contextmanager
    def _entered(self, request: AnyRequest, on_running: base.OnRunning) -> Iterator[None]:
        """While the request is in the engine."""
        self._waiting.append(request)
        self._work.set()
        with self._queue.entered(on_running):
            yield

    async def swap(self, weights: base.WeightsFile) -> base.SwapReport:
        """Load other weights between two steps, and reproduce the manifest's probe before the next one.

        Requests in flight keep their tokens; their keys and values are computed anew.  WeightsRejected changes nothing:
        the engine goes on.  After ProbeMismatch requests wait for a swap that succeeds.  WaitTimeout fails every
        request with EngineDead.
        """
        self._check_alive("swap")
        manifest, limit_s = weights.manifest, self._settings.swap_deadline_s
        check_probe_fits(manifest, max_model_len=self._settings.max_model_len)
        await asyncio.to_thread(check_weights, weights, self.runner.shapes, current=self._version)
        try:
            async with asyncio.timeout(limit_s):
                return await self._swap(weights)
        except TimeoutError as exc:
            reason = (
                f"the engine waited over {limit_s:g} s for a step to end and for the model to take up weights version "
                f"{manifest.version}"
            )
            # The thread cannot be interrupted: it may be in the middle of a step or of these weights.
            self._fail(reason)
            self._stuck = True
            raise WaitTimeout(reason) from exc

    async def _swap(self, weights: base.WeightsFile) -> base.SwapReport:
        manifest = weights.manifest
        began = time.perf_counter()
        async with self._between_steps:
            self._check_alive("swap")
            in_flight = len(self._active) + len(self._waiting)
            try:
                load_began = time.perf_counter()
                await self._in_thread(lambda: self._load(weights))
                loaded = time.perf_counter()
                logprobs = await self._in_thread(lambda: self.runner.score(sequences_of(manifest)))
                error = self.runner.probe.judge(manifest, logprobs)
            except WeightsRejected:
                raise
            except ProbeMismatch:
                self._unproven = True
                raise
            except BaseException as exc:
                # A cancelled swap counts too: it is unknown which weights are loaded then.
                cancelled = isinstance(exc, asyncio.CancelledError)
                reason = "out of time, or cancelled" if cancelled else exc or type(exc).__name__
                self._fail(f"the swap to version {manifest.version} failed: {reason}")
                raise
            probed = time.perf_counter()
            self.runner.slots.forget_all()
            self._version = manifest.version
            self._unproven = False
            self._work.set()
        pause_s = time.perf_counter() - began
        return base.SwapReport(
            version=manifest.version, pause_s=pause_s, load_s=loaded - load_began, probe_s=probed - loaded,
            probe_error=error, in_flight=in_flight,
        )  # fmt: skip

    async def score(self, token_ids: base.Tokens) -> np.ndarray:
        """float32[len - 1]: log-prob of each token given the ones before it, at temperature 1."""
        self._check_alive("score")
        async with self._between_steps:
            return await self._in_thread(lambda: self.runner.score(np.asarray(token_ids)[None]))

    def stats(self) -> base.EngineStats:
        return self._counters.stats(version=self._version, in_flight=len(self._active) + len(self._waiting))

    @property
    def is_dead(self) -> bool:
        """True before start(), after close(), after a failed swap and once its steps have ended."""
        return self._dead is not None

    async def close(self) -> None:
        """End the worker thread.  Idempotent; requests in flight fail."""
        self._fail("the engine was closed")
        if self._stepper is not None:
            self._stepper.cancel()
            await asyncio.wait([self._stepper])
            self._stepper = None
        if not self._stuck:
            # In a thread: a step that does not come back must hold up neither the loop nor the actor's end.
            ending = threading.Thread(target=self._thread.shutdown, name="engine-end", daemon=True)
            ending.start()
            await asyncio.to_thread(ending.join, CLOSE_S)
        self._runner = None

    # --- in the worker thread --------------------------------------------------------------------------------------

    def _load(self, weights: base.WeightsFile) -> None:
        self.runner.load(weights)

    def _step(self, batch: list[AnyRequest]) -> None:
        """One more token for every request of ``batch``."""
        self.runner.step(batch, version=self._version)

    # --- on the event loop -----------------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[], R]) -> R:
        with waits.waiting("the engine's thread", "a step, a load or a score", on=waits.ENGINE):
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _step_to_the_end(self) -> None:
        """Whatever ends the steps ends the engine: its requests fail at once, and ``is_dead`` is true."""
        try:
            await self._step_forever()
        except asyncio.CancelledError:
            self._fail("its steps were cancelled, and not by close()")
            raise
        except BaseException as exc:
            log.exception("the engine's steps ended")
            self._fail(f"its steps ended: {type(exc).__name__}: {exc}")
            if not isinstance(exc, Exception):
                raise

    async def _step_forever(self) -> None:
        """Waits for: a request.  Unblocked by: generate(); held up by: swap() and score(), one step at most."""
        while True:
            await self._work.wait()
            async with self._between_steps:
                self._drop_cancelled()
                self._admit()
                if not self._active or self._unproven:
                    self._work.clear()
                    continue
                batch = list(self._active)
                try:
                    await self._in_thread(lambda batch=batch: self._step(batch))  # type: ignore[misc]
                except Exception as exc:
                    if self._dead is not None:
                        return
                    # What the slots hold now is unknown; the requests end alone, the engine goes on.
                    for request in batch:
                        self.runner.slots.forget(request.slot)
                        self._end(request, GenerationFailed(f"request {request.request_id}: {exc!r}"))
                    continue
                if self._dead is not None:
                    # A swap gave up waiting for this step, and has failed its requests.
                    return
                for request in batch:
                    if (result := request.result(max_model_len=self._settings.max_model_len)) is not None:
                        self._end(request, result)

    def _drop_cancelled(self) -> None:
        self._waiting = [request for request in self._waiting if not request.done.done()]
        self._active = [request for request in self._active if not request.done.done()]

    def _admit(self) -> None:
        """Give waiting requests free slots, first come first served."""
        free = set(range(self._settings.max_num_seqs)) - {request.slot for request in self._active}
        while free and self._waiting:
            request = self._waiting.pop(0)
            free.remove(self.runner.slots.give(request, sorted(free)))
            self._active.append(request)

    def _end(self, request: AnyRequest, result: base.Generation | base.Scored | GenerationFailed) -> None:
        self._active.remove(request)
        if request.done.done():
            return
        if isinstance(result, GenerationFailed):
            request.done.set_exception(result)
        elif isinstance(request, ScoreRequest) and isinstance(result, base.Scored):
            self._counters.scored(len(request.prompt), result)
            request.done.set_result(result)
        elif isinstance(request, Request) and isinstance(result, base.Generation):
            self._counters.finished(len(request.prompt), result)
            request.done.set_result(result)

    def _check_alive(self, what: str) -> None:
        if self._dead is not None:
            raise EngineDead(f"{what}: the transformers engine is dead: {self._dead}")

    def _fail(self, reason: str) -> None:
        self._dead = self._dead or reason
        requests, self._active, self._waiting = self._active + self._waiting, [], []
        for request in requests:
            if not request.done.done():
                request.done.set_exception(EngineDead(f"request {request.request_id}: {self._dead}"))
