"""A scripted engine and environment: no model, no clock, no randomness."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from actors.engines.base import EngineStats, Generation, OnRunning, Sampling, SwapReport, Tokens, WeightsFile, ignore
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.environments.base import ReplayFork, Split, StepResult
from atpo_async.wire.messages import Lease

STOP = 1
NOTHING = np.zeros(0, dtype=np.int32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def lease(**changes: object) -> Lease:
    fields: dict[str, object] = {
        "tree_id": "t0",
        "task_index": 0,
        "kind": "train",
        "epoch": 0,
        "lifetime_s": 60.0,
        "min_version": 0,
        "seed": 0,
        "committed": (),
    }
    return Lease(**(fields | changes))  # type: ignore[arg-type]


def turn(turn_id: int, parent_id: int, **changes: object) -> Turn:
    fields: dict[str, object] = {
        "run": "r",
        "tree_id": "t0",
        "turn_id": turn_id,
        "parent_id": parent_id,
        "lease_epoch": 0,
        "expansion_round": 0,
        "observation": NOTHING,
        "action": ints(7, STOP),
        "logprobs": np.array([-0.5, -0.5], dtype=np.float32),
        "spans": (VersionSpan(0, 0, 2),),
        "end": "continue",
        "reward": None,
        "success": None,
        "generate_s": 0.0,
        "environment_s": 0.0,
    }
    return Turn(**(fields | changes))  # type: ignore[arg-type]


def leaf(turn_id: int, parent_id: int, reward: float = 1.0, **changes: object) -> Turn:
    return turn(turn_id, parent_id, end="done", reward=reward, success=reward > 0, **changes)


class ScriptedEngine:
    """Answers every request with ``reply(context, request number)``; an exception it returns is raised."""

    def __init__(self, reply: Callable[[np.ndarray, int], np.ndarray | Exception] | None = None) -> None:
        self.reply = reply or (lambda context, number: ints(100 + number, STOP))
        self.contexts: list[np.ndarray] = []
        self.samplings: list[Sampling] = []
        self.swapped: list[int] = []
        self.version = 0
        self.hold: asyncio.Event | None = None
        """When set, requests wait for it."""

    async def start(self) -> None: ...

    async def generate(
        self, prompt: Tokens, sampling: Sampling, *, request_id: str, on_running: OnRunning = ignore
    ) -> Generation:
        on_running()
        number = len(self.contexts)
        self.contexts.append(np.asarray(prompt))
        self.samplings.append(sampling)
        if self.hold is not None:
            await self.hold.wait()
        await asyncio.sleep(0)
        answer = self.reply(np.asarray(prompt), number)
        if isinstance(answer, Exception):
            raise answer
        length = len(answer)
        return Generation(
            token_ids=answer,
            logprobs=np.full(length, -0.1 * (number + 1), dtype=np.float32),
            spans=(VersionSpan(self.version, 0, length),),
            stop_reason="stop",
            cached_prompt_tokens=0,
        )

    async def swap(self, weights: WeightsFile) -> SwapReport:
        self.version = weights.manifest.version
        self.swapped.append(self.version)
        return SwapReport(version=self.version, pause_s=0.0, load_s=0.0, probe_error=0.0, in_flight=0)

    async def score(self, token_ids: Tokens) -> np.ndarray:
        return np.zeros(len(token_ids) - 1, dtype=np.float32)

    def stats(self) -> EngineStats:
        done = len(self.contexts)
        return EngineStats(
            version=self.version,
            in_flight=0,
            prompt_tokens=done,
            cached_prompt_tokens=0,
            generated_tokens=2 * done,
            finished_requests=done,
            failed_requests=0,
        )

    async def close(self) -> None: ...


class CountingEpisode:
    """Ends with reward 1 after ``turns`` actions; each observation names how many actions came before."""

    def __init__(self, environment: CountingEnvironment, task_index: int) -> None:
        self._environment = environment
        self._actions = 0
        self.prompt = ints(10, 11, 12 + task_index)

    async def step(self, action: np.ndarray) -> StepResult:
        self._actions += 1
        fault = self._environment.fault(self._actions, action)
        if fault is not None:
            raise fault
        if self._actions >= self._environment.turns:
            return StepResult(observation=NOTHING, done=True, reward=1.0, success=True, end="done")
        seen = ints(20 + self._actions)
        return StepResult(observation=seen, done=False, reward=None, success=None, end="continue")

    async def close(self) -> None:
        self._environment.closed += 1


class CountingEnvironment(ReplayFork):
    stop_token_ids = (STOP,)

    def __init__(
        self, turns: int = 2, fault: Callable[[int, np.ndarray], Exception | None] = lambda number, action: None
    ) -> None:
        self.turns = turns
        self.fault = fault
        self.started = 0
        self.closed = 0

    def num_tasks(self, split: Split) -> int | None:
        return 4 if split == "eval" else None

    async def start(self, split: Split, task_index: int) -> CountingEpisode:
        self.started += 1
        return CountingEpisode(self, task_index)
