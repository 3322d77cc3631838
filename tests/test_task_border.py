"""What a task's functions hand over or change, at the border of tools, rewards and messages."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atpo_async.core.errors import ConfigError
from atpo_async.environments import MessageTask, Reply, tool
from atpo_async.environments.messages.task import MOST_TEXT
from atpo_async.environments.tools.faults import ToolFailed
from atpo_async.environments.values import ValueRefused
from tests.tool_task_support import Chat, action, called, correct, tokenizer_folder, tool_task


@tool(read_only=True)
def look(name: str) -> str:
    "Look it up."
    return f"about {name}"


async def test_a_function_that_changes_what_it_is_given_changes_nothing_for_others() -> None:
    seen: list[tuple[Any, Any]] = []

    def changes(row: dict[str, Any], messages: list[dict[str, Any]], prompt: list[dict[str, Any]]) -> float:
        seen.append((row["answer"], messages[0]["content"]))
        row["answer"], messages[0]["content"], prompt[0]["content"] = "changed", "changed", "changed"
        messages.clear()
        return 0.0

    def turns(row: dict[str, Any], messages: list[dict[str, Any]]) -> float:
        row["answer"], messages[0]["content"] = "changed", "changed"
        return 0.0

    task = tool_task(tools=[look], rewards=[changes, correct], turn_rewards=[turns])
    episode = await task.start("train", 0)
    right = (await task.begin("train", 0)).messages[0]["content"].rpartition(" ")[2].rstrip("?")
    await episode.step(action(task, called("look", name="x")))
    copy = await episode.fork()
    assert copy is not None
    for each in (episode, copy):
        result = await each.step(action(task, f"city {right}"))
        assert result.rewards["correct"] == 1.0
    assert seen[0] == seen[1] == (f"city {right}", f"Capital of country {right}?")


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.tensor([1]), np.float32(1), np.array([[1.0]]), True, 1])
async def test_a_reward_of_any_number_type_counts(value: Any) -> None:
    def one(answer: str) -> Any:
        return value

    chat = await Chat.begun(tool_task(rewards=[(one, np.float32(0.5))]))
    assert (await chat.say("x")).reward == 0.5


def named(number: int) -> Callable[..., float]:
    def reward(answer: str) -> float:
        return 0.0

    reward.__name__ = f"reward_{number}"
    return reward


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rewards": [named(n) for n in range(17)]}, "at most 16"),
        ({"rewards": [(correct, 1e308)]}, "weight of 'correct' is 1e+308"),
        ({"rewards": [(correct, float("nan"))]}, "weight of 'correct' is nan"),
        ({"success_at": float("nan")}, "success_at is nan"),
    ],
)
def test_what_could_only_fail_later_is_refused_when_the_task_is_made(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tool_task(**changes)
    assert said in str(caught.value)


async def test_a_decorated_function_is_a_tool_with_its_own_annotations() -> None:
    @tool
    @functools.lru_cache
    def cached(name: str) -> str:
        "Look it up."
        return f"about {name}"

    chat = await Chat.begun(tool_task(tools=[cached]))
    assert await chat.answers(called("cached", name="y")) == ["about y"]


async def test_a_tool_that_returns_what_is_to_be_awaited_says_so() -> None:
    async def later() -> str:
        return "x"

    @tool
    def forgets() -> Any:
        "Forgets to await."
        return later()

    chat = await Chat.begun(tool_task(tools=[forgets]))
    with pytest.raises(ToolFailed, match="await it inside: async def"):
        await chat.say(called("forgets"))


class Talk:
    messages = "Say something."

    def __init__(self, reply: Any) -> None:
        self._reply = reply

    async def reply(self, action: Any) -> Any:
        return self._reply


class Told(MessageTask):
    def __init__(self, folder: Path, talk: Any) -> None:
        super().__init__(folder)
        self._talk = talk

    def num_tasks(self, split: str) -> int:
        return 1

    async def begin(self, split: str, index: int) -> Any:
        return self._talk


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(done="no", reward=1.0), "done is 'no'"),  # type: ignore[arg-type]
        (Reply(done=True, reward=1.0, turn_limit="x"), "turn_limit is 'x'"),  # type: ignore[arg-type]
        (Reply(done=True, reward=1.0, messages=[{"role": "user", "content": "more"}]), "would never see them"),
        (Reply(messages=[{"role": "user", "content": "x" * (MOST_TEXT + 1)}]), "messages hold 2,000,001 characters"),
    ],
)
async def test_a_reply_that_contradicts_itself_or_is_too_long_is_refused(reply: Reply, said: str) -> None:
    task = Told(tokenizer_folder(), Talk(reply))
    episode = await task.start("train", 0)
    with pytest.raises(ValueRefused) as caught:
        await episode.step(action(task, "hello"))
    assert said in str(caught.value)


def takes_more(self: Any, more: int) -> None: ...


def takes_none(self: Any) -> None: ...


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"fork": 3}, "fork is 3"),
        ({"fork": takes_more}, "is called as fork()"),
        ({"snapshot": takes_none, "restore": takes_none}, "restore()"),
        ({"snapshot": takes_none}, "needs restore()"),
        ({"replay_reply": takes_none}, "replay_reply()"),
    ],
)
async def test_what_a_conversation_offers_for_forks_is_checked_when_it_begins(parts: dict[str, Any], said: str) -> None:
    made = type("Odd", (Talk,), parts)(None)
    with pytest.raises(ValueRefused) as caught:
        await Told(tokenizer_folder(), made).start("train", 0)
    assert said in str(caught.value)


async def test_many_episodes_at_once_keep_their_own_rows() -> None:
    task = tool_task()
    chats = [await Chat.begun(task, index) for index in range(5)]
    results = await asyncio.gather(*(chat.say("city 0") for chat in chats))
    assert sorted(result.reward or 0.0 for result in results) == [0.0, 0.0, 0.0, 0.0, 1.0]
