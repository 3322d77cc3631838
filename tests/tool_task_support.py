"""A ``ToolTask`` over a small chat tokenizer, and actions as its policy would write them."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atpo_async.environments import MessageTask, ToolTask
from atpo_async.environments.base import StepResult
from tests.chat_policy import chat_tokenizer

ROWS = [{"question": f"Capital of country {i}?", "answer": f"city {i}"} for i in range(5)]


@functools.cache
def tokenizer_folder() -> Path:
    """A folder with a tokenizer and no model, until the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="atpo-chat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    chat_tokenizer().save_pretrained(folder)
    return folder


def correct(answer: str, row: dict[str, Any]) -> float:
    return float(answer == row["answer"])


def tool_task(**changes: Any) -> ToolTask:
    fields: dict[str, Any] = {"data": ROWS, "rewards": [correct]}
    return ToolTask(tokenizer_folder(), **(fields | changes))


def called(tool: str, /, **arguments: Any) -> str:
    """A tool call as the policy writes it."""
    return f'<tool_call>\n{{"name": "{tool}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def action(task: MessageTask, *texts: str) -> np.ndarray:
    """int32[T], ended by a stop token."""
    return np.append(task.format.encode("\n".join(texts)), np.int32(task.stop_token_ids[0]))


class Chat:
    """An episode of a task, in texts."""

    def __init__(self, task: ToolTask, episode: Any) -> None:
        self.task, self.episode = task, episode
        self.turns: list[tuple[np.ndarray, np.ndarray]] = []
        """(action, observation) so far."""

    @classmethod
    async def begun(cls, task: ToolTask, index: int = 0) -> Chat:
        return cls(task, await task.start("train", index))

    async def say(self, *texts: str) -> StepResult:
        ids = action(self.task, *texts)
        result: StepResult = await self.episode.step(ids)
        self.turns.append((ids, result.observation))
        return result

    async def answers(self, *texts: str) -> list[str]:
        """What the tools answer, as the policy reads it."""
        result = await self.say(*texts)
        shown = self.task.format.decode(result.observation)
        return [part.split("\n</tool_response>")[0] for part in shown.split("<tool_response>\n")[1:]]


async def replayed(task: ToolTask, turns: Sequence[tuple[np.ndarray, np.ndarray]], index: int = 0) -> list[bool]:
    """Whether each turn, replayed in a fresh episode, shows what was recorded."""
    episode = await task.start("train", index)
    return [np.array_equal((await episode.replay_step(a, shown)).observation, shown) for a, shown in turns]
