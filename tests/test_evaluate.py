"""Greedy success of a model folder: what is unknown is not guessed, and what is broken stops it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from actors.evaluate import success
from atpo_async.api.evaluation import EvalResult
from atpo_async.config import build
from atpo_async.core.errors import EngineDead, EnvironmentBroken
from atpo_async.environments.base import Split, StepResult
from tests.actor_support import CountingEnvironment, CountingEpisode, ScriptedEngine

CONFIG = build({"search": {"max_action_tokens": 8}, "model": {"max_context_tokens": 64}})


class Judging(CountingEnvironment):
    """Says of its held-out tasks what ``verdicts`` has for them."""

    def __init__(self, *verdicts: bool | Exception | None) -> None:
        super().__init__()
        self.verdicts = verdicts
        self.begun = 0

    def num_tasks(self, split: Split) -> int | None:
        return len(self.verdicts)

    async def start(self, split: Split, task_index: int) -> CountingEpisode:
        verdict = self.verdicts[task_index]
        self.begun += 1

        class Judged(CountingEpisode):
            async def step(self, action: np.ndarray) -> StepResult:
                said = await super().step(action)
                if isinstance(verdict, Exception):
                    raise verdict
                return replace(said, success=verdict) if said.done else said

        return Judged(self, task_index)


async def result_of(environment: Judging, engine: ScriptedEngine | None = None) -> dict[str, float | None]:
    number = len(environment.verdicts)
    return await success(CONFIG, engine=engine or ScriptedEngine(), environment=environment, num_tasks=number)


@pytest.mark.parametrize(
    ("verdicts", "share", "unknown"),
    [
        ((True, True, False, False), 0.5, 0),
        ((True, None, False, None), 0.5, 2),
        ((True, None, OSError("no page")), 0.5, 1),
        ((None, None), None, 2),
    ],
)
async def test_success_that_the_environment_does_not_tell_is_left_out_and_not_guessed_from_the_reward(
    verdicts: tuple[bool | Exception | None, ...], share: float | None, unknown: int
) -> None:
    result = await result_of(Judging(*verdicts))
    assert result["success"] == share
    assert result["unknown"] == unknown
    assert result["reward_mean"] == 1.0


def test_the_line_about_an_evaluation_says_what_is_unknown() -> None:
    result = EvalResult(success=0.5, num_tasks=8, unknown=0, reward_mean=0.25)
    assert result.line("m") == "m: success 0.500 on 8 held-out tasks, greedy"
    assert "on 6 held-out tasks, greedy (2 more are unknown" in replace(result, unknown=2).line("m")
    none = replace(result, unknown=8, success=None).line("m")
    assert "success unknown on 8 held-out tasks" in none
    assert "mean reward 0.250" in none


async def test_an_evaluation_whose_every_chain_fails_alike_is_stopped_with_that_error() -> None:
    environment = Judging(*[OSError("no page")] * 3000)
    with pytest.raises(EnvironmentBroken, match=r"trees in a row .* OSError: no page"):
        await result_of(environment)
    await asyncio.sleep(0)
    assert environment.begun < 3000


async def test_a_dead_engine_ends_an_evaluation_with_its_own_error() -> None:
    with pytest.raises(EngineDead, match="gone"):
        await result_of(Judging(True), ScriptedEngine(lambda context, number: EngineDead("gone")))
