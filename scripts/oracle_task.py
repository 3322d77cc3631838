"""The oracle's task: hopqa under a reward that tells any two different chains apart, and a small policy for it."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from atpo_async.environments.base import ReplayFork, Split, StepResult
from atpo_async.environments.hopqa.environment import HopQA


class _Episode:
    """An episode of hopqa whose reward is a number made of the whole chain."""

    def __init__(self, inner: Any, pause_s: float) -> None:
        self._inner = inner
        self._pause_s = pause_s
        self._digest = hashlib.blake2b(digest_size=4)

    @property
    def prompt(self) -> np.ndarray:
        prompt: np.ndarray = self._inner.prompt
        return prompt

    async def step(self, action: np.ndarray) -> StepResult:
        await asyncio.sleep(self._pause_s)
        result: StepResult = await self._inner.step(action)
        self._digest.update(np.ascontiguousarray(action, dtype=np.int32).tobytes() + b"|")
        if not result.done:
            return result
        reward = int.from_bytes(self._digest.digest(), "big") / 2**32
        return replace(result, reward=reward)

    async def close(self) -> None:
        await self._inner.close()


class Told(ReplayFork):
    """hopqa under the reward of ``_Episode``.

    Args:
        tokenizer: of the policy.
        pause_s: of each step.
        gate: training tasks from ``open_tasks`` on begin only when this file is there; none where empty.
        open_tasks: as said.
        options: of ``HopQA``.
    """

    def __init__(
        self, tokenizer: Path | str, *, pause_s: float = 0.0, gate: str = "", open_tasks: int = 0, **options: Any
    ) -> None:
        self._pause_s = pause_s
        self._gate = Path(gate) if gate else None
        self._open_tasks = open_tasks
        self._hopqa = HopQA(tokenizer, **options)
        self.stop_token_ids = self._hopqa.stop_token_ids

    def num_tasks(self, split: Split) -> int | None:
        return self._hopqa.num_tasks(split)

    async def start(self, split: Split, task_index: int) -> Any:
        while self._gate is not None and task_index >= self._open_tasks and not self._gate.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # another process makes the file
        return _Episode(await self._hopqa.start(split, task_index), self._pause_s)


def make(tokenizer: Path | str, **options: Any) -> Told:
    """What ``environment.name`` names."""
    return Told(tokenizer, **options)


def make_policy(folder: Path) -> None:
    """Two layers of width 64; what it has learnt is of no matter."""
    from atpo_async.environments.hopqa.warm_start import Recipe
    from atpo_async.environments.hopqa.warm_start import make_policy as warm_start

    recipe = Recipe(
        steps=20, min_hops=1, max_hops=1, num_names=16, num_relations=4, mixed_up=0, layers=2, width=64
    )  # fmt: skip
    warm_start(folder, recipe, device="cpu", num_threads=1)
