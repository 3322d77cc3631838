"""What a task hands over: converted where nothing is lost, else refused with task, field, value, type and way out."""

from __future__ import annotations

import enum
import itertools
import json
from collections import deque
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atpo_async.config import build
from atpo_async.config.doors import ENVIRONMENT
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.environments.base import Split, StepResult
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.making import make_environment, vocab_size
from atpo_async.environments.values import Limits, ValueRefused
from tests.actor_support import NOTHING, STOP, CountingEnvironment, CountingEpisode, ints

LIMITS = Limits(vocab_size=100, max_context_tokens=64)
GOING_ON = StepResult(observation=ints(5), done=False, reward=None, success=None, end="continue")
ENDED = StepResult(observation=NOTHING, done=True, reward=1.0, success=True, end="done")


class Id(enum.IntEnum):
    FIVE = 5


class Saying(CountingEnvironment):
    """Its episodes say ``said`` to every action, and begin with ``prompt``."""

    def __init__(self, said: Any = GOING_ON, prompt: Any = None) -> None:
        super().__init__()
        self.said = said
        self.prompt = prompt

    async def start(self, split: Split, task_index: int) -> CountingEpisode:
        episode = await super().start(split, task_index)
        if self.prompt is not None:
            episode.prompt = self.prompt
        said = self.said

        async def step(action: np.ndarray) -> StepResult:
            result: StepResult = said
            return result

        episode.step = step  # type: ignore[method-assign]
        return episode


def checked(plain: Any, limits: Limits = LIMITS) -> CheckedEnvironment:
    return CheckedEnvironment(plain, name="odd_world:make", limits=limits)


async def said(result: Any, limits: Limits = LIMITS) -> StepResult:
    episode = await checked(Saying(result), limits).start("train", 7)
    return await episode.step(ints(3, STOP))


async def refusal(result: Any, limits: Limits = LIMITS) -> ValueRefused:
    with pytest.raises(ValueRefused) as refused:
        await said(result, limits)
    text = str(refused.value)
    assert text.startswith("environment 'odd_world:make', task 7 (train), step 1: ")
    assert "\n" not in text
    assert len(text) < 500
    return refused.value


@pytest.mark.parametrize(
    ("reward", "number"),
    [
        (True, 1.0),
        (0, 0.0),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (np.array(2), 2.0),
        (np.array([0.25]), 0.25),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor([1.5], dtype=torch.bfloat16), 1.5),
        (Fraction(1, 4), 0.25),
    ],
)
async def test_a_reward_of_any_number_type_becomes_a_float(reward: Any, number: float) -> None:
    found = (await said(replace(ENDED, reward=reward))).reward
    assert type(found) is float
    assert found == number


@pytest.mark.parametrize(
    "reward",
    [None, float("nan"), float("inf"), 1e39, -(10**400), "1.0", [1.0], np.ones(2), torch.ones(2), 1j, object()],
)
async def test_a_reward_that_is_no_finite_number_is_refused_by_name(reward: Any) -> None:
    refused = await refusal(replace(ENDED, reward=reward))
    assert refused.field == "reward"
    assert f"({type(reward).__name__}); expected " in str(refused)


@pytest.mark.parametrize(
    "success", [1, 0, True, np.bool_(False), np.int64(1), 1.0, np.array(True), torch.tensor(False)]
)
async def test_success_of_any_truth_type_becomes_a_bool(success: Any) -> None:
    found = (await said(replace(ENDED, success=success))).success
    assert type(found) is bool
    assert found == bool(success)


async def test_success_that_nobody_can_tell_stays_unknown() -> None:
    assert (await said(replace(ENDED, success=None))).success is None


@pytest.mark.parametrize("success", [0.5, 2, "yes", [True], np.ones(2)])
async def test_success_that_is_no_truth_value_is_refused_by_name(success: Any) -> None:
    assert (await refusal(replace(ENDED, success=success))).field == "success"


@pytest.mark.parametrize(
    "observation",
    [
        [5, 6],
        (5, 6),
        range(5, 7),
        np.array([5, 6]),
        np.array([5, 6], dtype=np.uint8),
        np.array([5, 6], dtype=">i4"),
        [np.int64(5), 6],
        torch.tensor([5, 6]),
        np.arange(20)[5:7],
    ],
)
async def test_token_ids_of_any_integer_type_become_int32(observation: Any) -> None:
    found = (await said(replace(GOING_ON, observation=observation))).observation
    assert found.dtype == np.dtype("<i4")
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, [5, 6])


async def test_an_observation_is_a_copy_for_an_environment_may_fill_its_array_again() -> None:
    own = ints(5, 6)
    found = (await said(replace(GOING_ON, observation=own))).observation
    own[:] = 9
    np.testing.assert_array_equal(found, [5, 6])


@pytest.mark.parametrize("empty", [[], (), np.array([]), NOTHING])
async def test_an_empty_observation_is_one_whatever_its_dtype(empty: Any) -> None:
    found = (await said(replace(GOING_ON, observation=empty))).observation
    assert found.dtype == np.int32
    assert len(found) == 0


@pytest.mark.parametrize(
    ("observation", "says"),
    [
        (None, "observation is None (NoneType); expected int32[N]"),
        ("some text", "encode the text first"),
        ({"input_ids": [1]}, "take its input_ids"),
        ([1.0, 2.0], "expected whole numbers"),
        ([True, False], "expected whole numbers"),
        (["a"], "expected whole numbers"),
        ([[1, 2], [3]], "expected a flat list"),
        (np.array([1.5]), "of dtype float64"),
        (np.array([True]), "of dtype bool"),
        (np.array([[1, 2]]), "of shape (1, 2) (ndarray); expected one dimension"),
        (np.array(3), "of shape ()"),
        ([2**70], "observation"),
        (ints(5, -1), "observation[1] is -1"),
        (ints(5, 100), "observation[1] is 100 (ndarray); expected token ids of 0 to 99"),
        (np.array([2**40]), "observation[0] is 1099511627776"),
    ],
)
async def test_an_observation_that_holds_no_token_ids_of_the_model_is_refused_by_name(
    observation: Any, says: str
) -> None:
    refused = await refusal(replace(GOING_ON, observation=observation))
    assert says in str(refused)
    assert refused.reason == "environment_failed"


async def test_an_observation_beyond_its_limit_is_counted_as_too_long_and_not_even_looked_at() -> None:
    refused = await refusal(replace(GOING_ON, observation=np.zeros(65, np.int32)))
    assert refused.reason == "observation_too_long"
    tight = Limits(vocab_size=100, max_context_tokens=64, max_observation_tokens=4)
    refused = await refusal(replace(GOING_ON, observation=ints(1, 2, 3, 4, 5)), tight)
    assert "observation has 5 tokens; expected at most 4 (search.max_observation_tokens" in str(refused)


async def test_of_several_answers_each_is_held_to_the_limit_and_their_sum_to_the_context() -> None:
    tight = Limits(vocab_size=100, max_context_tokens=64, max_observation_tokens=4)
    cases: list[tuple[Any, int]] = [(ints(1, 2, 3, 4, 5), 5), ([7] * 100, 64)]
    for observation, shown in cases:
        said = replace(GOING_ON, observation=observation, longest_answer=4)
        episode = await checked(Saying(said), tight).start("train", 0)
        result = await episode.step(ints(3, STOP))
        assert (len(result.observation), result.longest_answer) == (shown, 4)
    refused = await refusal(replace(GOING_ON, observation=ints(1, 2, 3, 4, 5, 6), longest_answer=5), tight)
    assert refused.reason == "observation_too_long"


@pytest.mark.parametrize("longest", [-1, 2.5, "4", True, [4]])
async def test_a_longest_answer_that_is_no_number_of_tokens_is_refused(longest: Any) -> None:
    refused = await refusal(replace(GOING_ON, longest_answer=longest))
    assert "longest_answer is" in str(refused)
    assert "a whole number from 0 on, or None" in str(refused)


@pytest.mark.parametrize(
    ("result", "field"),
    [
        ((NOTHING, 1.0, True, {}), "what step() returned"),
        (None, "what step() returned"),
        (replace(ENDED, done="yes"), "done"),  # type: ignore[arg-type]
        (replace(ENDED, done=None), "done"),  # type: ignore[arg-type]
        (replace(ENDED, end="continue"), "end"),
        (replace(ENDED, end="over"), "end"),  # type: ignore[arg-type]
        (replace(ENDED, end="length_limit"), "end"),  # type: ignore[arg-type]
        (replace(ENDED, end=None), "end"),  # type: ignore[arg-type]
        (replace(GOING_ON, end="done"), "end"),
        (replace(GOING_ON, end="turn_limit"), "end"),
        (replace(GOING_ON, reward=0.5), "reward"),
        (replace(GOING_ON, reward=float("nan")), "reward"),
        (replace(GOING_ON, success=True), "success"),
    ],
)
async def test_a_result_that_contradicts_itself_or_is_none_is_refused_by_its_field(result: Any, field: str) -> None:
    assert (await refusal(result)).field == field


async def test_what_carries_nothing_is_taken_for_nothing() -> None:
    going_on = await said(replace(GOING_ON, done=np.bool_(False), reward=0.0, success=False))  # type: ignore[arg-type]
    assert (going_on.reward, going_on.success) == (None, None)
    ended = await said(replace(ENDED, done=1, observation=None))  # type: ignore[arg-type]
    assert len(ended.observation) == 0
    assert ended.done is True


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "prompt is empty; expected at least one token"),
        ("Find", "encode the text first"),
        (ints(100), "prompt[0] is 100"),
        (np.zeros(64, np.int32), "prompt has 64 tokens; expected below 64: raise model.max_context_tokens"),
    ],
)
async def test_a_prompt_that_cannot_be_one_is_refused_and_its_episode_closed(prompt: Any, says: str) -> None:
    plain = Saying(prompt=prompt)
    with pytest.raises(ValueRefused) as refused:
        await checked(plain).start("train", 7)
    assert str(refused.value).startswith("environment 'odd_world:make', task 7 (train): ")
    assert says in str(refused.value)
    assert plain.closed == plain.started == 1


async def test_a_prompt_of_another_integer_type_is_taken_also_for_a_fork() -> None:
    environment = checked(Saying(prompt=np.array([10, 11])))
    for episode in (await environment.start("train", 7), await environment.replay("train", 7, (ints(3, STOP),))):
        assert episode.prompt.dtype == np.int32
        np.testing.assert_array_equal(episode.prompt, [10, 11])


@pytest.mark.parametrize("episode", [None, 3, object()])
async def test_an_episode_that_is_none_is_refused_with_what_it_lacks(episode: Any) -> None:
    class Odd(CountingEnvironment):
        async def start(self, split: Split, task_index: int) -> CountingEpisode:
            result: CountingEpisode = episode
            return result

    with pytest.raises(ValueRefused, match=r"what start\(\) returned .* an Episode: it lacks prompt, step, close"):
        await checked(Odd()).start("train", 7)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


async def test_a_value_that_cannot_be_shown_is_refused_all_the_same() -> None:
    assert (await refusal(replace(ENDED, reward=Unprintable()))).field == "reward"  # type: ignore[arg-type]
    long: Any = "x" * 10_000_000
    assert (await refusal(replace(ENDED, reward=long))).field == "reward"


def with_stops(stops: Any) -> CheckedEnvironment:
    plain = CountingEnvironment()
    plain.stop_token_ids = stops
    return checked(plain)


@pytest.mark.parametrize(
    ("stops", "ids"),
    [
        (1, (1,)),
        (np.int64(1), (1,)),
        (np.array(1), (1,)),
        ([1, 2], (1, 2)),
        ((np.int64(1),), (1,)),
        ({2}, (2,)),
        (np.array([1, 2, 1]), (1, 2)),
        (torch.tensor([1]), (1,)),
        (iter([3, 4]), (3, 4)),
        (deque([3, 4]), (3, 4)),
        (Id.FIVE, (5,)),
    ],
)
def test_stop_ids_of_any_integer_type_become_a_tuple(stops: Any, ids: tuple[int, ...]) -> None:
    found = with_stops(stops).stop_token_ids
    assert found == ids
    assert {type(i) for i in found} == {int}


@pytest.mark.parametrize("stops", [[], None, -1, [100], 1.0, "1", [True], [[1]], {"eos": 1}, itertools.count(), b"1"])
def test_stop_ids_that_are_none_of_the_model_are_refused_before_anything_starts(stops: Any) -> None:
    with pytest.raises(ConfigError, match=r"^environment 'odd_world:make': stop_token_ids"):
        with_stops(stops)


def with_tasks(number: Any) -> CheckedEnvironment:
    plain = CountingEnvironment()
    plain.num_tasks = lambda split: number  # type: ignore[method-assign]
    return checked(plain)


@pytest.mark.parametrize("number", [5, np.int64(5), np.array(5)])
def test_a_number_of_tasks_of_any_integer_type_is_taken(number: Any) -> None:
    found = with_tasks(number).num_tasks("eval")
    assert type(found) is int
    assert found == 5


@pytest.mark.parametrize("number", [0, -1, 5.0, True, "5", [5], 2**70])
def test_a_number_of_tasks_that_is_none_is_refused_before_anything_starts(number: Any) -> None:
    with pytest.raises(ConfigError, match=r"^environment 'odd_world:make': num_tasks\('train'\) is .* at least 1"):
        with_tasks(number)


def test_a_split_that_nobody_asks_for_need_not_be_there() -> None:
    plain = CountingEnvironment()
    plain.num_tasks = lambda split: {"train": 3}[split]  # type: ignore[method-assign]
    environment = checked(plain)
    assert environment.num_tasks("train") == 3
    with pytest.raises(ConfigError, match=r"num_tasks\('eval'\) failed: KeyError"):
        environment.num_tasks("eval")


@pytest.mark.parametrize(
    ("config", "size"),
    [({"vocab_size": 96}, 96), ({"text_config": {"vocab_size": 50}}, 50), ({}, None), ({"vocab_size": None}, None)],
)
def test_the_models_own_configuration_says_which_ids_there_are(tmp_path: Path, config: Any, size: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vocab_size(tmp_path) == size


def test_a_runs_environment_is_held_to_its_model_and_its_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    (tmp_path / "world_of_nine.py").write_text(
        "from tests.actor_support import CountingEnvironment\ndef make(tokenizer):\n    return CountingEnvironment()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = build(
        {
            "environment": {"name": "world_of_nine:make"},
            "model": {"max_context_tokens": 32},
            "search": {"max_observation_tokens": 7, "max_action_tokens": 8},
        }
    )
    found = make_environment(config, tmp_path)
    assert found.limits == Limits(vocab_size=9, max_context_tokens=32, max_observation_tokens=7)


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("async def make(tokenizer):\n    return 1\n", ConfigError, "its factory is async; make it a plain function"),
        ("def make(tokenizer):\n    pass\n", ConfigError, "its factory returned None"),
        ("def make():\n    return 1\n", ConfigError, "is called as .tokenizer, .* takes \\(\\)"),
        ("def make(tokenizer, *, size):\n    return 1\n", ConfigError, "missing a required argument: 'size'"),
        ("def make(tokenizer):\n    return None + 1\n", SetupError, "could not be made: TypeError"),
        (
            "class A:\n    stop_token_ids = 1\n    num_tasks = start = None\ndef make(tokenizer):\n    return A()\n",
            ConfigError,
            r"lacks replay; .*ReplayFork",
        ),
        (
            "def make(tokenizer):\n    raise ValueError('x' * 1000000)\n",
            SetupError,
            "could not be made: ValueError: x+…",
        ),
    ],
)
def test_a_factory_that_makes_no_environment_is_refused_with_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: type[Exception], says: str
) -> None:
    module = f"factory_{abs(hash(source))}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(error, match=says) as refused:
        ENVIRONMENT.make(f"{module}:make", tmp_path)
    assert len(str(refused.value)) < 800
