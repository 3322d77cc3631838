"""A user's own engine with checks: of everything that it returns, and of its weights after each swap.

The built-in engines probe a version before it generates.  A user's engine is probed from outside: after its ``swap()``
the manifest's probe is scored with its ``score()``, and what was generated before it has passed is not returned.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np

from actors.engines import base
from actors.engines.common.checks import (
    check_model_folder,
    check_scored,
    check_weights,
    checkpoint_shapes,
    pick_device,
)
from actors.engines.probe import Probe, check_probe_fits, sequences_of
from atpo_async.core.errors import (
    AtpoError,
    EngineDead,
    GenerationFailed,
    ProbeMismatch,
    SetupError,
    WaitTimeout,
    WeightsRejected,
)
from atpo_async.core.texts import of_error
from atpo_async.wire.messages import WeightsManifest

MOST_ABOVE_ZERO = 1e-3
"""Nats: how far rounding may raise the log-prob of a certain token above 0."""


class CheckedEngine:
    """As ``Engine``.

    Args:
        engine: the user's.
        settings: of the engine.
        name: ``actor.engine``, for errors.
    """

    def __init__(self, engine: base.Engine, settings: base.EngineSettings, *, name: str) -> None:
        self._engine = engine
        self._settings = settings
        self._label = f"actor.engine = {name!r}"
        self._version = settings.initial_version
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dead: str | None = "it was not started"
        self._proven = asyncio.Event()
        """The weights in use have passed their probe."""
        self._failed_probes = 0
        self._swaps = 0
        """Begun so far."""

    async def start(self) -> None:
        """Raises SetupError if the model folder is none, or for what the engine raises."""
        settings = self._settings
        check_model_folder(settings.model)
        self._shapes = await asyncio.to_thread(checkpoint_shapes, settings.model)
        device = await asyncio.to_thread(pick_device, settings.device)
        self._probe = Probe(device=device, dtype=settings.dtype)
        try:
            await self._engine.start()
        except AtpoError:
            raise
        except Exception as exc:
            raise SetupError(f"{self._label} could not be started: {of_error(exc)}") from exc
        self._dead = None
        self._proven.set()

    async def generate(
        self, prompt: base.Tokens, sampling: base.Sampling, *, request_id: str, on_running: base.OnRunning = base.ignore
    ) -> base.Generation:
        """Waits for: weights that have passed their probe, before and after.  Unblocked by: a swap that succeeds."""
        await self._until_proven(request_id)
        failed_before = self._failed_probes
        try:
            made = await self._engine.generate(prompt, sampling, request_id=request_id, on_running=on_running)
        except GenerationFailed:
            raise
        except Exception as exc:
            raise GenerationFailed(f"request {request_id}: {self._label}: {of_error(exc)}") from exc
        await self._until_proven(request_id)
        if self._failed_probes != failed_before:
            raise GenerationFailed(f"request {request_id}: weights failed the probe while it ran")
        return self._checked(made, request_id)

    async def swap(self, weights: base.WeightsFile) -> base.SwapReport:
        """As ``Engine.swap``; whatever else the engine raises ends it (EngineDead)."""
        manifest = weights.manifest
        check_probe_fits(manifest, max_model_len=self._settings.max_model_len)
        await asyncio.to_thread(check_weights, weights, self._shapes, current=self._version)
        was_proven = self._proven.is_set()
        self._proven.clear()
        self._swaps += 1
        began = time.perf_counter()
        limit_s = self._settings.swap_deadline_s
        try:
            async with asyncio.timeout(limit_s):
                report = await self._engine.swap(weights)
                if not isinstance(report, base.SwapReport):
                    raise TypeError(f"swap() returned {type(report).__name__}, not a SwapReport")
                error = await self._judge(manifest)
        except WeightsRejected:
            if was_proven:
                self._proven.set()
            raise
        except ProbeMismatch:
            self._failed_probes += 1
            raise
        except BaseException as exc:
            # A cancelled swap counts too: it is unknown which weights are loaded then.
            label = f"weights version {manifest.version}: {self._label}"
            self._dead = f"the swap to version {manifest.version} failed: {of_error(exc)}"
            self._proven.set()  # waiting requests raise EngineDead
            if isinstance(exc, TimeoutError):
                raise WaitTimeout(f"{label} took over {limit_s:g} s to take them up (weights.swap_timeout_s)") from exc
            if isinstance(exc, Exception) and not isinstance(exc, AtpoError):
                raise EngineDead(f"{label}: {of_error(exc)}") from exc
            raise
        self._version = manifest.version
        self._proven.set()
        return replace(report, version=manifest.version, pause_s=time.perf_counter() - began, probe_error=error)

    async def score(self, token_ids: base.Tokens) -> np.ndarray:
        return await self._engine.score(token_ids)

    async def score_continuation(
        self,
        context: base.Tokens,
        continuation: base.Tokens,
        *,
        request_id: str,
        on_running: base.OnRunning = base.ignore,
    ) -> base.Scored:
        """As ``ScoringEngine``: by the engine's method of that name, or by its ``score`` where it has none.

        Waits for: weights that have passed their probe, before and after.  Unblocked by: a swap that succeeds; where
        one falls in between, all is scored again.
        """
        before, after = np.asarray(context).tolist(), np.asarray(continuation).tolist()
        check_scored(before, after, max_model_len=self._settings.max_model_len, vocab_size=None, request_id=request_id)
        while True:
            await self._until_proven(request_id)
            swaps = self._swaps
            try:
                found = await self._asked_to_score(before, after, request_id, on_running)
            except GenerationFailed:
                raise
            except Exception as exc:
                raise GenerationFailed(f"request {request_id}: {self._label}: {of_error(exc)}") from exc
            await self._until_proven(request_id)
            if swaps == self._swaps:
                return found
            on_running = base.ignore

    async def _asked_to_score(
        self, before: list[int], after: list[int], request_id: str, on_running: base.OnRunning
    ) -> base.Scored:
        """What the engine says, as arrays of the protocol's types.  Raises GenerationFailed for what is wrong in it."""
        scorer = getattr(self._engine, "score_continuation", None)
        if scorer is None:
            on_running()
            logprobs, version, cached = await self._engine.score(before + after), self._version, 0
            what, expected, first = "score", len(before) + len(after) - 1, len(before) - 1
        else:
            said = await scorer(before, after, request_id=request_id, on_running=on_running)
            what, expected, first = "score_continuation", len(after), 0
            if not isinstance(said, base.Scored):
                raise GenerationFailed(
                    f"request {request_id}: {self._label}: {what}() returned {type(said).__name__}, not a Scored"
                )
            logprobs, version, cached = said.logprobs, said.version, said.cached_prompt_tokens
        numbers = np.asarray(logprobs, dtype=np.float32)
        if numbers.shape != (expected,) or not np.all(numbers <= MOST_ABOVE_ZERO):
            raise GenerationFailed(
                f"request {request_id}: {self._label}: {what}() returned log-probs of shape {numbers.shape} for "
                f"{expected} tokens; each needs one, at most 0"
            )
        return base.Scored(
            logprobs=np.minimum(numbers[first:], 0.0), version=int(version), cached_prompt_tokens=int(cached)
        )

    def stats(self) -> base.EngineStats:
        return self._engine.stats()

    async def close(self) -> None:
        self._dead = self._dead or "it was closed"
        self._proven.set()
        await self._engine.close()

    async def _judge(self, manifest: WeightsManifest) -> float:
        """What the engine's ``score()`` is off by on the probe, nats.  Raises ProbeMismatch where it is too much."""
        found = []
        for tokens in sequences_of(manifest):
            logprobs = np.asarray(await self._engine.score(tokens), dtype=np.float32)
            if logprobs.shape != (len(tokens) - 1,):
                raise ProbeMismatch(
                    f"weights version {manifest.version}: {self._label}: score() of {len(tokens)} tokens returned "
                    f"shape {logprobs.shape}; it must return the log-prob of each token but the first, given those "
                    "before it, at temperature 1 and under the weights that swap() has taken up"
                )
            found.append(logprobs)
        try:
            return self._probe.judge(manifest, np.concatenate(found))
        except ProbeMismatch as exc:
            raise ProbeMismatch(f"{exc} (compared was what score() of {self._label} returned after swap())") from exc

    async def _until_proven(self, request_id: str) -> None:
        await self._proven.wait()
        if self._dead is not None:
            raise EngineDead(f"request {request_id}: {self._label} is dead: {self._dead}")

    def _checked(self, made: base.Generation, request_id: str) -> base.Generation:
        """The same with arrays of the protocol's types.  Raises GenerationFailed naming the field that is wrong."""
        if not isinstance(made, base.Generation):
            raise GenerationFailed(
                f"request {request_id}: {self._label}: generate() returned {type(made).__name__}, not a Generation"
            )
        tokens, logprobs = np.asarray(made.token_ids), np.asarray(made.logprobs, dtype=np.float32)
        ends = [0, *(span.end for span in made.spans)]
        wrong = None
        if tokens.ndim != 1 or not len(tokens) or not np.issubdtype(tokens.dtype, np.integer):
            wrong = f"token_ids of shape {tokens.shape} and type {tokens.dtype}; at least one integer is needed"
        elif logprobs.shape != tokens.shape or not np.all(logprobs <= MOST_ABOVE_ZERO):
            wrong = f"logprobs of shape {logprobs.shape} for {len(tokens)} tokens; each needs one, at most 0"
        elif [span.start for span in made.spans] != ends[:-1] or ends[-1] != len(tokens):
            wrong = f"spans that do not cover {len(tokens)} tokens one after another"
        elif made.stop_reason not in ("stop", "length"):
            wrong = f"stop_reason {made.stop_reason!r}; it is 'stop' or 'length'"
        if wrong is not None:
            raise GenerationFailed(f"request {request_id}: {self._label}: generate() returned {wrong}")
        return replace(made, token_ids=tokens.astype(np.int32), logprobs=np.minimum(logprobs, 0.0))
