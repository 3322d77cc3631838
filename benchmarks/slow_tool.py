"""hopqa behind a look-up tool that takes its time: the task of the benchmarks of asynchrony.

A look-up waits as long as a log-normal distribution says; an answer asks no tool.  The tool only reads: a replay of
recorded look-ups does not ask it again.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import numpy as np

from atpo_async.core.errors import ConfigError
from atpo_async.environments.base import Episode, ReplayFork, Split, StepResult
from atpo_async.environments.hopqa.environment import HopQA


class SlowHopQA(ReplayFork):
    """The tasks of hopqa, each of whose look-ups takes seconds.

    Args:
        tokenizer: as of hopqa.
        latency_s: mean of a look-up; 0 for none.
        latency_sigma: of its logarithm.
        options: of hopqa.

    Raises:
        ConfigError: an option is out of range.
    """

    def __init__(
        self, tokenizer: Path | str, *, latency_s: float = 0.3, latency_sigma: float = 1.0, **options: int
    ) -> None:
        if not (0 <= latency_s < math.inf and 0 <= latency_sigma <= 3):
            raise ConfigError(
                f"environment.options.latency_s = {latency_s} must be at least 0, latency_sigma = {latency_sigma} "
                "from 0 to 3"
            )
        self.hopqa = HopQA(tokenizer, **options)
        self._latency = latency_s, latency_sigma
        self._rng = np.random.default_rng(options.get("seed", 0))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self.hopqa.stop_token_ids

    def num_tasks(self, split: Split) -> int | None:
        return self.hopqa.num_tasks(split)

    async def start(self, split: Split, task_index: int) -> SlowEpisode:
        return SlowEpisode(self, await self.hopqa.start(split, task_index))

    async def tool(self) -> float:
        """Waits for: a look-up.  Returns the seconds that it takes."""
        seconds = draw_s(self._rng, mean_s=self._latency[0], sigma=self._latency[1])
        await asyncio.sleep(seconds)
        return seconds


class SlowEpisode:
    """An episode that waits before it is shown what the tool says.

    Attributes:
        waited_s: for the tool, so far.
    """

    def __init__(self, environment: SlowHopQA, episode: Episode) -> None:
        self._environment, self._episode = environment, episode
        self.waited_s = 0.0

    @property
    def prompt(self) -> np.ndarray:
        return self._episode.prompt

    async def step(self, action: np.ndarray) -> StepResult:
        result = await self._episode.step(action)
        if not result.done:
            self.waited_s += await self._environment.tool()
        return result

    async def replay_step(self, action: np.ndarray, observation: np.ndarray) -> StepResult:
        return await self._episode.step(action)

    async def close(self) -> None:
        await self._episode.close()


def draw_s(rng: np.random.Generator, *, mean_s: float, sigma: float) -> float:
    """Log-normal seconds of this mean; ``sigma`` is of the logarithm."""
    return float(rng.lognormal(math.log(mean_s) - sigma**2 / 2, sigma)) if mean_s else 0.0
