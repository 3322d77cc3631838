"""Environments on threads of their own: their answers go on in the order of the calls: a seed gives its bits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.hosting.order import CallOrder
from atpo_async.environments import MessageEpisode, MessageTask, Reply
from atpo_async.environments.base import Episode, ReplayFork, StepResult
from atpo_async.environments.hopqa.environment import HopQA
from atpo_async.environments.messages.types import Action, Message
from tests.chat_policy import chat_policy
from tests.e2e_support import WORLD
from tests.test_in_process import small, trained

CHANCE = random.SystemRandom()


class Unsteady(ReplayFork):
    """HopQA whose every call takes another number of turns of its loop, each time that it is run."""

    def __init__(self, model: Path, **options: Any) -> None:
        self._plain: Any = HopQA(model, **options)
        self.stop_token_ids = self._plain.stop_token_ids

    def num_tasks(self, split: Any) -> int | None:
        known: int | None = self._plain.num_tasks(split)
        return known

    async def start(self, split: Any, task_index: int) -> Episode:
        await some_turns()
        return UnsteadyEpisode(await self._plain.start(split, task_index))


class UnsteadyEpisode:
    def __init__(self, plain: Episode) -> None:
        self._plain, self.prompt = plain, plain.prompt

    async def step(self, action: np.ndarray) -> StepResult:
        await some_turns()
        return await self._plain.step(action)

    async def close(self) -> None:
        await some_turns()
        await self._plain.close()


class Guessing(MessageTask):
    """The policy says something twice, and is paid by how its texts sort."""

    def num_tasks(self, split: Any) -> int | None:
        return 40

    async def begin(self, split: Any, index: int) -> MessageEpisode:
        await some_turns()
        return Guess(f"Guess {index}.")


class Guess:
    def __init__(self, question: str) -> None:
        self.messages: Sequence[Message] = [{"role": "user", "content": question}]
        self._said: list[int] = []

    async def reply(self, action: Action) -> Reply:
        await asyncio.to_thread(random.random)
        await some_turns()
        self._said.append(int(action.ids.sum()))
        if len(self._said) == 1:
            return Reply(messages=[{"role": "user", "content": "Again."}])
        return Reply(done=True, reward=float(self._said[1] > self._said[0]), success=self._said[1] > self._said[0])

    async def close(self) -> None:
        pass


async def some_turns() -> None:
    for _ in range(CHANCE.randrange(40)):
        await asyncio.sleep(0)


def test_the_same_seed_gives_the_same_bits_whatever_the_threads_of_an_environment_do(
    hopqa_policy: Path, tmp_path: Path
) -> None:
    environment: dict[str, object] = {
        "name": "tests.test_in_process_order:Unsteady",
        "options": {**WORLD, "seed": 3},
    }
    check_same_bits(hopqa_policy, tmp_path, environment, max_context=64)


def test_the_same_seed_gives_the_same_bits_with_a_task_in_messages(tmp_path: Path) -> None:
    policy = chat_policy(tmp_path / "policy")
    check_same_bits(policy, tmp_path, {"name": "tests.test_in_process_order:Guessing", "options": {}}, max_context=128)


def check_same_bits(policy: Path, out: Path, environment: dict[str, object], *, max_context: int) -> None:
    """Weights and lineage of two runs."""
    model: dict[str, object] = {"path": str(policy), "max_context_tokens": max_context}
    one, other = (
        trained(small(policy, out, name, run={"steps": 2}, environment=environment, model=model)) for name in "ab"
    )
    assert one[1] == other[1]
    assert one[2].count('"batch_id"') == other[2].count('"batch_id"') == 2


async def test_answers_are_let_go_together_in_the_order_of_the_calls() -> None:
    order, ended = CallOrder(), list[str]()
    gates = {name: asyncio.Event() for name in ("first", "second", "third")}

    async def call(name: str) -> str:
        await gates[name].wait()
        if name == "second":
            raise ValueError(name)
        return name

    async def ask(name: str) -> None:
        try:
            ended.append(await order.kept(call(name)))
        except ValueError as exc:
            ended.append(f"{exc} failed")

    async with asyncio.TaskGroup() as asking:
        for name in gates:
            asking.create_task(ask(name))
        for name in ("third", "second"):
            await asyncio.sleep(0)
            gates[name].set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert order.under_way
        assert not order.release()
        assert ended == []
        gates["first"].set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert order.release()
    assert ended == ["first", "second failed", "third"]
    assert not order.under_way
    assert not order.release()


async def test_a_call_that_is_cancelled_keeps_no_other_back() -> None:
    order = CallOrder()
    forgotten = asyncio.create_task(order.kept(asyncio.sleep(1000)))
    other = asyncio.create_task(order.kept(asyncio.sleep(0, "done")))
    for _ in range(4):
        await asyncio.sleep(0)
    assert not order.release()
    forgotten.cancel()
    with pytest.raises(asyncio.CancelledError):
        await forgotten
    assert order.release()
    assert await other == "done"
