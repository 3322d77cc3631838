"""A made-up engine that computes nothing, and a task for it: what is left of a run's time are its hand-overs.

The engine takes its time as a GPU does: a step lasts ``step_ms`` and ``seat_us`` for each request in it, and gives each
of them one token.  Tokens are drawn uniformly, which is what a policy of random weights does; a swap takes ``swap_ms``.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actors.engines import base
from actors.engines.common.counters import RequestCounters
from atpo_async.core.tree import VersionSpan
from atpo_async.core.vocabulary import Split
from atpo_async.environments.base import Episode, ReplayFork, StepResult

VOCABULARY = 64
NOTHING = np.zeros(0, dtype=np.int32)


@dataclass(slots=True)
class _Request:
    left: int
    done: asyncio.Future[None]
    on_running: base.OnRunning


class FastEngine:
    """As ``actors.engines.base.Engine``.

    Args:
        settings: of the engine.
        step_ms, seat_us, swap_ms: its time.
        shortest: least tokens of an action; their number is drawn between this and as many as may be.
    """

    supports_stop_strings = False

    def __init__(
        self,
        settings: base.EngineSettings,
        *,
        step_ms: float = 2.5,
        seat_us: float = 5.0,
        swap_ms: float = 60.0,
        shortest: int = 2,
    ) -> None:
        self._settings = settings
        self._step_s, self._seat_s, self._swap_s = step_ms / 1e3, seat_us / 1e6, swap_ms / 1e3
        self._shortest = shortest
        self._rng = np.random.default_rng(settings.seed)
        self._version = settings.initial_version
        self._counters = RequestCounters()
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._asked = asyncio.Event()
        self._unpaused = asyncio.Event()
        self._unpaused.set()
        self._loop: asyncio.Task[None] | None = None
        self.steps = 0

    async def start(self) -> None:
        self._loop = asyncio.create_task(self._compute(), name="made-up engine")

    async def _compute(self) -> None:
        """Waits for: requests, then the clock."""
        due = time.monotonic()
        while True:
            self._running = [each for each in self._running if not each.done.done()]
            while self._waiting and len(self._running) < self._settings.max_num_seqs:
                request = self._waiting.popleft()
                if not request.done.done():
                    self._running.append(request)
                    request.on_running()
            if not self._running:
                self._asked.clear()
                await self._asked.wait()
                due = time.monotonic()
                continue
            if not self._unpaused.is_set():
                await self._unpaused.wait()
                due = time.monotonic()
            # A loop that is late catches up: a GPU would not have waited for it.
            due = max(due + self._step_s + self._seat_s * len(self._running), time.monotonic() - 2 * self._step_s)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.steps += 1
            for request in self._running:
                request.left -= 1
                if request.left <= 0 and not request.done.done():
                    request.done.set_result(None)

    async def generate(
        self, prompt: base.Tokens, sampling: base.Sampling, *, request_id: str, on_running: base.OnRunning = base.ignore
    ) -> base.Generation:
        count = int(self._rng.integers(min(self._shortest, sampling.max_tokens), sampling.max_tokens + 1))
        request = _Request(count, asyncio.get_running_loop().create_future(), on_running)
        self._waiting.append(request)
        self._asked.set()
        try:
            await request.done
        finally:
            request.done.cancel()
        made = base.Generation(
            token_ids=self._rng.integers(2, VOCABULARY, size=count, dtype=np.int32),
            logprobs=np.full(count, -math.log(VOCABULARY), dtype=np.float32),
            spans=(VersionSpan(self._version, 0, count),),
            stop_reason="stop",
            cached_prompt_tokens=0,
        )
        self._counters.finished(len(prompt), made)
        return made

    async def swap(self, weights: base.WeightsFile) -> base.SwapReport:
        in_flight = self.stats().in_flight
        self._unpaused.clear()
        await asyncio.sleep(self._swap_s)
        self._version = weights.manifest.version
        self._unpaused.set()
        return base.SwapReport(
            version=self._version, pause_s=self._swap_s, load_s=self._swap_s, probe_error=0.0, in_flight=in_flight
        )

    async def score(self, token_ids: base.Tokens) -> np.ndarray:
        return np.full(len(token_ids) - 1, -math.log(VOCABULARY), dtype=np.float32)

    def stats(self) -> base.EngineStats:
        return self._counters.stats(version=self._version, in_flight=len(self._waiting) + len(self._running))

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop


class Chains(ReplayFork):
    """Tasks whose chains have a number of turns, and end with a reward at random.

    Args:
        tokenizer: unused.
        turns: of a chain.
        prompt: tokens.
        observation: tokens.
        latency_s: mean of each step's, exponential; 0 for none.
    """

    def __init__(
        self, tokenizer: Path | str, *, turns: int = 4, prompt: int = 10, observation: int = 3, latency_s: float = 0.0
    ) -> None:
        self.turns, self.prompt, self.observation, self.latency_s = turns, prompt, observation, latency_s

    def num_tasks(self, split: Split) -> int | None:
        return None if split == "train" else 200

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return (1,)

    async def start(self, split: Split, index: int) -> Episode:
        return _Chain(self, index)


class _Chain:
    def __init__(self, task: Chains, index: int) -> None:
        self._task, self._left, self._seed = task, task.turns, index
        self._rng = np.random.default_rng(index)
        self.prompt = self._rng.integers(2, VOCABULARY, size=task.prompt, dtype=np.int32)

    async def step(self, action: np.ndarray) -> StepResult:
        if self._task.latency_s:
            await asyncio.sleep(float(np.random.default_rng().exponential(self._task.latency_s)))
        self._left -= 1
        if self._left:
            shown = np.full(self._task.observation, 2 + int(action.sum()) % (VOCABULARY - 2), dtype=np.int32)
            return StepResult(observation=shown, done=False, reward=None, success=None, end="continue")
        reward = float(int(action[0]) % 2)
        return StepResult(observation=NOTHING, done=True, reward=reward, success=reward > 0, end="done")

    async def close(self) -> None: ...
