"""Odd values of a task: whatever its own code does, each is converted where nothing is lost, or refused in one line."""

from __future__ import annotations

import array
import enum
import itertools
from collections import deque
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from atpo_async.core.errors import ConfigError
from atpo_async.environments.base import StepResult
from atpo_async.environments.values import ValueRefused
from tests.actor_support import STOP, CountingEnvironment, CountingEpisode, ints
from tests.test_values import ENDED, GOING_ON, Id, checked, refusal, said, with_stops, with_tasks


def _no(*args: Any) -> Any:
    raise RuntimeError("its own\ncode fails")


def unreadable() -> dict[str, Any]:
    """Objects whose own code fails: made in the tests, for pytest would read them."""
    return {
        "array": type("Array", (), {"__array__": _no})(),
        "no array": type("NoArray", (), {"__array__": lambda self, *args, **kwargs: "text"})(),
        "tensor": type("Tensor", (), {"detach": _no, "numel": _no, "__array__": _no})(),
        "number": type("Number", (float,), {"__float__": _no, "__eq__": _no, "__hash__": float.__hash__})(1.0),
        "attributes": type("Attributes", (), {"__getattr__": _no})(),
        "class": type("Class", (), {"__getattribute__": _no})(),
        "unnamed": type("Named", (type,), {"__name__": property(_no)})("Unnamed", (), {})(),
        "long name": type("N" * 1_000_000, (), {})(),
        "two lines": type("two\nlines", (), {})(),
        "masked": np.ma.array([1], mask=[1]),
        "meta": torch.empty(1, device="meta"),
        "bytes": b"x" * 20_000_000,
        "type": int,
        "tensor type": torch.Tensor,
    }


NAMES = sorted(unreadable())


@pytest.mark.parametrize("field", ["reward", "success", "done", "end", "observation"])
@pytest.mark.parametrize("name", NAMES)
async def test_a_value_whose_own_code_fails_is_refused_like_any_other(field: str, name: str) -> None:
    before = GOING_ON if field == "observation" else ENDED
    assert (await refusal(replace(before, **{field: unreadable()[name]}))).field == field


@pytest.mark.parametrize("name", NAMES)
def test_stop_ids_and_a_number_of_tasks_whose_own_code_fails_are_refused_before_anything_starts(name: str) -> None:
    for make in (with_stops, with_tasks):
        with pytest.raises(ConfigError, match=r"^environment 'odd_world:make': ") as refused:
            make(unreadable()[name])
        assert len(str(refused.value)) < 500


@pytest.mark.parametrize("part", ["__iter__", "__len__", "__getitem__"])
async def test_a_list_that_cannot_be_read_is_refused(part: str) -> None:
    odd = type("Odd", (list,), {"__iter__": _no, part: _no})([1, 2])
    assert (await refusal(replace(GOING_ON, observation=odd))).field == "observation"


async def test_a_result_whose_fields_cannot_be_read_is_refused() -> None:
    odd = type("Odd", (StepResult,), {"__getattribute__": _no})
    assert (await refusal(object.__new__(odd))).field == "what step() returned"
    assert (await refusal(object.__new__(StepResult))).field == "what step() returned"


class StrEnd(enum.StrEnum):
    DONE = "done"


class MixedEnd(str, enum.Enum):  # noqa: UP042
    DONE = "done"


class OtherText(str):
    def __str__(self) -> str:
        return "something else"


@pytest.mark.parametrize("end", [StrEnd.DONE, MixedEnd.DONE, OtherText("done"), np.str_("done")])
async def test_an_end_of_any_string_type_becomes_the_plain_string_that_it_equals(end: Any) -> None:
    found = (await said(replace(ENDED, end=end))).end
    assert type(found) is str
    assert found == "done"


class EqualToAll(str):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


@pytest.mark.parametrize("end", [EqualToAll("over"), b"done", ["done"], np.array("done"), np.array(["done"])])
async def test_an_end_that_only_resembles_a_known_one_is_refused(end: Any) -> None:
    assert (await refusal(replace(ENDED, end=end))).field == "end"


@pytest.mark.parametrize(
    "observation",
    [
        np.array([5, 6], dtype=object),
        [torch.tensor(5), np.array(6)],
        [Id.FIVE, 6],
        array.array("i", [5, 6]),
        deque([5, 6]),
        torch.tensor([5, 6], dtype=torch.uint16),
        torch.tensor([5, 6], requires_grad=False).to(torch.int8),
        np.ma.array([5, 6]),
    ],
)
async def test_token_ids_in_any_sequence_become_int32(observation: Any) -> None:
    found = (await said(replace(GOING_ON, observation=observation))).observation
    assert type(found) is np.ndarray
    assert found.dtype == np.dtype("<i4")
    np.testing.assert_array_equal(found, [5, 6])


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (True, "observation[20] is True (bool in list); expected whole numbers"),
        (np.bool_(True), "observation[20] is np.True_"),
        (torch.tensor(True), "observation[20] is tensor(True)"),
        (1.0, "observation[20] is 1.0 (float in list)"),
        ("1", "observation[20] is '1' (str in list)"),
        (None, "observation[20] is None"),
        ([1], "observation[20] is [1] (list in list); expected a flat list"),
        (torch.tensor([1]), "observation[20] is tensor([1])"),
        (np.timedelta64(1, "s"), "observation[20] is np.timedelta64(1,'s')"),
        (2**70, f"observation[20] is {2**70} (list); expected token ids of 0 to 99"),
        (-(2**63), f"observation[20] is {-(2**63)} (list)"),
        (2**64 - 1, f"observation[20] is {2**64 - 1} (list)"),
    ],
)
async def test_one_wrong_token_far_behind_is_found_and_named(last: Any, says: str) -> None:
    far: Any = [5] * 20 + [last]
    assert says in str(await refusal(replace(GOING_ON, observation=far)))


@pytest.mark.parametrize(
    "observation",
    [
        (i for i in range(3)),
        itertools.count(),
        {5, 6},
        b"\5\6",
        np.array([5, 6], "m8[s]"),
        np.array([2**63 + 5], np.uint64),
        np.array([2**70], object),
        np.array([[5], [6, 7]], object),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1, 0, 2]).to_sparse(),
        np.ma.array([5, 6], mask=[0, 1]),
    ],
)
async def test_what_could_be_read_as_token_ids_only_by_a_guess_is_refused(observation: Any) -> None:
    assert (await refusal(replace(GOING_ON, observation=observation))).reason == "environment_failed"


@pytest.mark.parametrize("observation", [range(10**12), [5] * 3_000_000, ["x" * 1000] * 100_000, deque([None] * 65)])
async def test_a_sequence_beyond_its_limit_is_refused_before_anything_in_it_is_looked_at(observation: Any) -> None:
    refused = await refusal(replace(GOING_ON, observation=observation))
    assert f"observation has {len(observation)} tokens" in str(refused)
    assert refused.reason == "observation_too_long"


@pytest.mark.parametrize(
    "reward", [Decimal("sNaN"), Decimal("Infinity"), np.longdouble("1e4000"), np.datetime64("NaT")]
)
async def test_a_number_that_float_cannot_hold_is_no_reward(reward: Any) -> None:
    assert (await refusal(replace(ENDED, reward=reward))).field == "reward"


@pytest.mark.parametrize("name", ["step", "start", "replay"])
async def test_a_part_that_is_a_plain_function_is_refused_with_what_to_write(name: str) -> None:
    plain = CountingEnvironment()
    episode = await plain.start("train", 0)
    if name == "step":
        plain.start = lambda *args: _just(episode)  # type: ignore[method-assign]
    setattr(episode if name == "step" else plain, name, lambda *args: None)

    async def all_parts() -> None:
        await (await checked(plain).start("train", 0)).step(ints(3, STOP))
        await checked(plain).replay("train", 0, ())

    with pytest.raises(ValueRefused, match=rf"{name}\(\) is no coroutine: write async def {name}"):
        await all_parts()


async def _just(value: Any) -> Any:
    return value


@pytest.mark.parametrize("error", [KeyError("question"), AttributeError("question")])
async def test_a_prompt_that_is_a_failing_property_is_refused_by_name_also_where_close_fails(error: Exception) -> None:
    class Odd(CountingEpisode):
        @property
        def prompt(self) -> np.ndarray:
            raise error

        @prompt.setter
        def prompt(self, value: np.ndarray) -> None: ...

        async def close(self) -> None:
            raise RuntimeError("close")

    plain = CountingEnvironment()
    plain.start = lambda split, index: _just(Odd(plain, index))  # type: ignore[method-assign,assignment]
    with pytest.raises(ValueRefused, match=r"task 7 \(train\): prompt \(Odd\) cannot be read, .*question"):
        await checked(plain).start("train", 7)
