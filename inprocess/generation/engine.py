"""The engine of a run in one process: requests wait until nothing else can go on, and are then decoded together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from actors.engines import base
from actors.engines.common.checks import check_model_folder, check_scored, check_stop_strings
from actors.engines.common.counters import RequestCounters
from atpo_async.core.errors import EngineDead, GenerationFailed
from inprocess.generation.decoder import Decoder
from inprocess.generation.requests import Request, ScoreRequest


class BatchEngine:
    """As ``Engine``, for an event loop that calls ``advance`` whenever all its coroutines wait.

    Args:
        settings: of the engine.
    """

    supports_stop_strings = True

    def __init__(self, settings: base.EngineSettings) -> None:
        self._settings = settings
        self._version = settings.initial_version
        self._decoder: Decoder | None = None
        self._counters = RequestCounters()
        self._waiting: deque[Request] = deque()
        self._futures: dict[Request, tuple[asyncio.Future[base.Generation], base.OnRunning]] = {}
        self._to_score: dict[ScoreRequest, tuple[asyncio.Future[base.Scored], base.OnRunning]] = {}

    async def start(self) -> None:
        """Load the model.  Raises SetupError as ``Engine.start``."""
        check_model_folder(self._settings.model)
        self._decoder = Decoder(self._settings)

    @property
    def decoder(self) -> Decoder:
        """The model.  Raises EngineDead before start() and after close()."""
        if self._decoder is None:
            raise EngineDead("the engine of this process is not started")
        return self._decoder

    async def generate(
        self, prompt: base.Tokens, sampling: base.Sampling, *, request_id: str, on_running: base.OnRunning = base.ignore
    ) -> base.Generation:
        """Sample one action after ``prompt``.  Raises GenerationFailed.

        Waits for: all other coroutines of the loop to wait.  Unblocked by: ``advance``.
        """
        request = self._request(np.asarray(prompt), sampling, request_id)
        future: asyncio.Future[base.Generation] = asyncio.get_running_loop().create_future()
        self._futures[request] = future, on_running
        self._waiting.append(request)
        try:
            return await future
        finally:
            self._futures.pop(request, None)

    async def score_continuation(
        self,
        context: base.Tokens,
        continuation: base.Tokens,
        *,
        request_id: str,
        on_running: base.OnRunning = base.ignore,
    ) -> base.Scored:
        """As ``ScoringEngine``; waits as ``generate`` does."""
        before, after = np.asarray(context), np.asarray(continuation)
        longest, vocabulary = self._settings.max_model_len, self.decoder.vocab_size
        try:
            check_scored(
                before.tolist(), after.tolist(), max_model_len=longest, vocab_size=vocabulary, request_id=request_id
            )
        except GenerationFailed:
            self._counters.failed()
            raise
        request = ScoreRequest(before, after)
        future: asyncio.Future[base.Scored] = asyncio.get_running_loop().create_future()
        self._to_score[request] = future, on_running
        try:
            return await future
        finally:
            self._to_score.pop(request, None)

    def _request(self, prompt: np.ndarray, sampling: base.Sampling, request_id: str) -> Request:
        decoder, longest = self.decoder, self._settings.max_model_len - 1
        fault = None
        if not 1 <= len(prompt) <= longest:
            fault = f"a prompt of {len(prompt)} tokens; this engine takes 1 to {longest}"
        elif int(prompt.min()) < 0 or int(prompt.max()) >= decoder.vocab_size:
            bad = int(prompt[(prompt < 0) | (prompt >= decoder.vocab_size)][0])
            fault = f"token id {bad}; this model has 0 to {decoder.vocab_size - 1}"
        if fault is not None:
            self._counters.failed()
            raise GenerationFailed(f"request {request_id}: {fault}")
        if sampling.stop_strings:
            check_stop_strings(self._settings, request_id=request_id)
        return Request(
            prompt=prompt,
            sampling=sampling,
            most=min(sampling.max_tokens, self._settings.max_model_len - len(prompt)),
            version=self._version,
            generator=None if sampling.seed is None else decoder.seeded(sampling.seed),
        )

    def advance(self) -> bool:
        """Decode what waits until some of it is complete; False where nothing waits."""
        decoder = self._decoder
        if decoder is None:
            return False
        self._give_up_abandoned(decoder)
        scored = self._score(decoder)
        new: list[Request] = []
        while self._waiting and len(new) + len(decoder.under_way) < decoder.max_active:
            new.append(self._waiting.popleft())
        if not new and not decoder.under_way:
            return scored
        for request in new:
            self._futures[request][1]()
        try:
            done = decoder.advance(new)
        except Exception as exc:
            self._fail(exc)
            return True
        for request in done:
            generation = request.generation()
            self._counters.finished(len(request.prompt), generation)
            if (known := self._futures.get(request)) is not None and not known[0].done():
                known[0].set_result(generation)
        return True

    def _give_up_abandoned(self, decoder: Decoder) -> None:
        """Requests that nothing waits for any more."""
        for request in [each for each in decoder.under_way if each not in self._futures]:
            decoder.give_up(request)
        self._waiting = deque(each for each in self._waiting if each in self._futures)

    def _score(self, decoder: Decoder) -> bool:
        """Score what waits for it; False where nothing does."""
        waiting, self._to_score = self._to_score, {}
        if not waiting:
            return False
        for _, on_running in waiting.values():
            on_running()
        try:
            found = decoder.score_after(list(waiting))
        except Exception as exc:
            self._to_score = waiting
            self._fail(exc)
            return True
        for (request, (future, _)), logprobs in zip(waiting.items(), found, strict=True):
            result = base.Scored(logprobs=logprobs, version=self._version)
            self._counters.scored(len(request.context), result)
            if not future.done():
                future.set_result(result)
        return True

    def _fail(self, exc: Exception) -> None:
        """What fails in the model fails every request: the state of its rows is unknown."""
        self._decoder = None
        futures: list[asyncio.Future[Any]] = [future for future, _ in self._futures.values()]
        futures += [future for future, _ in self._to_score.values()]
        for future in futures:
            if not future.done():
                error = EngineDead(f"generation failed: {type(exc).__name__}: {exc}")
                error.__cause__ = exc
                future.set_exception(error)

    def load(self, tensors: Mapping[str, Any], version: int) -> None:
        """Generate with these weights from now on.  No request may be under way but abandoned ones."""
        self._give_up_abandoned(self.decoder)
        self.decoder.load(tensors)
        self._version = version

    async def swap(self, weights: base.WeightsFile) -> base.SwapReport:
        """Weights come by ``load``."""
        raise NotImplementedError("an engine of this process takes up weights by load()")

    async def score(self, token_ids: base.Tokens) -> np.ndarray:
        """As ``Engine.score``."""
        found: np.ndarray = self.decoder.score(np.asarray(token_ids)[None])[0]
        return found

    def stats(self) -> base.EngineStats:
        return self._counters.stats(version=self._version, in_flight=len(self._futures))

    async def close(self) -> None:
        self._decoder = None
