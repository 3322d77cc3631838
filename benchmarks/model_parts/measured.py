"""An engine and a task that note when each of their calls began and ended: what a model of a run is calibrated from.

One JSON list a line: of the engine ``[began, ended, tokens]`` a request, of the task ``[replayed, [[called, returned,
waited], ...]]`` an episode, in seconds of the process's monotonic clock.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TextIO

import numpy as np

from actors.engines import base
from actors.engines.transformers.engine import TransformersEngine
from atpo_async.environments.base import Episode, Split, StepResult
from benchmarks.slow_tool import SlowEpisode, SlowHopQA


class Notes:
    """A file of JSON lines."""

    def __init__(self, path: str) -> None:
        # Open until the process ends: notes are taken until then.
        self._file: TextIO = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def add(self, line: object) -> None:
        self._file.write(json.dumps(line) + "\n")


class MeasuredEngine(TransformersEngine):
    """The transformers engine, each request noted.

    Args:
        settings: of the engine.
        log: file for the notes.
    """

    def __init__(self, settings: base.EngineSettings, *, log: str) -> None:
        super().__init__(settings)
        self._notes = Notes(log)

    async def generate(
        self, prompt: base.Tokens, sampling: base.Sampling, *, request_id: str, on_running: base.OnRunning = base.ignore
    ) -> base.Generation:
        began = time.monotonic()
        done = await super().generate(prompt, sampling, request_id=request_id, on_running=on_running)
        self._notes.add([began, time.monotonic(), len(done.token_ids)])
        return done


class MeasuredHopQA(SlowHopQA):
    """hopqa behind a slow tool, each episode noted.

    Args:
        tokenizer: as of hopqa.
        log: file for the notes.
        latency_s, latency_sigma, options: of ``SlowHopQA``.
    """

    def __init__(
        self, tokenizer: Path | str, *, log: str, latency_s: float = 0.3, latency_sigma: float = 1.0, **options: int
    ) -> None:
        super().__init__(tokenizer, latency_s=latency_s, latency_sigma=latency_sigma, **options)
        self.notes = Notes(log)

    async def start(self, split: Split, task_index: int) -> SlowEpisode:
        return MeasuredEpisode(self, await self.hopqa.start(split, task_index))


class MeasuredEpisode(SlowEpisode):
    """An episode that notes its steps when it is closed."""

    def __init__(self, environment: MeasuredHopQA, episode: Episode) -> None:
        super().__init__(environment, episode)
        self._notes, self._replayed = environment.notes, 0
        self._steps: list[tuple[float, float, float]] = []

    async def step(self, action: np.ndarray) -> StepResult:
        called, waited_s = time.monotonic(), self.waited_s
        result = await super().step(action)
        self._steps.append((called, time.monotonic(), self.waited_s - waited_s))
        return result

    async def replay_step(self, action: np.ndarray, observation: np.ndarray) -> StepResult:
        self._replayed += 1
        return await super().replay_step(action, observation)

    async def close(self) -> None:
        self._notes.add([self._replayed, self._steps])
        await super().close()
