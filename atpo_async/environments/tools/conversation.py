"""One conversation of a ``ToolTask``: answers tool calls, and has the end, or each turn, judged."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from atpo_async.core.texts import of_error, of_type
from atpo_async.core.vocabulary import Split
from atpo_async.environments.data.task_data import TaskRow
from atpo_async.environments.fingerprints import fingerprint_of
from atpo_async.environments.messages.types import Action, Message, Reply
from atpo_async.environments.rewards.functions import RewardFunction
from atpo_async.environments.rewards.judging import Judged, judged
from atpo_async.environments.tools.arguments import Info, Row
from atpo_async.environments.tools.calls import ToolCalls
from atpo_async.environments.tools.faults import ToolFailed

Recorded = Callable[[Sequence[Message]], list[str] | None]
"""Answers without their content -> the contents that the policy was shown; None where they cannot be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What all conversations of a task have in common."""

    calls: ToolCalls
    rewards: Sequence[RewardFunction]
    turn_rewards: Sequence[RewardFunction]
    system: str | None
    max_turns: int
    success_at: float | None
    extract: Callable[[str], str]
    reward_timeout_s: float


class Conversation:
    """One task in progress.

    Args:
        rules: of the task.
        task: its row.
        split, index: which it is, for messages.
    """

    def __init__(self, rules: Rules, task: TaskRow, split: Split, index: int) -> None:
        self._rules = rules
        self._row, self._target = Row(task.row), task.answer
        self._where = f"task {index} ({split}), {task.where}"
        self._info = Info()
        self._turns = 0
        self._turn_values: Counter[str] = Counter()
        first = list(task.messages)
        if rules.system is not None and first[0]["role"] not in ("system", "developer"):
            first.insert(0, {"role": "system", "content": rules.system})
        self.messages: Sequence[Message] = first
        """What the policy is shown first."""
        self._all = list(first)

    async def reply(self, action: Action) -> Reply:
        """Raises ToolFailed, ValueRefused, NotJudged, each of which costs this branch."""
        return await self._replied(action, None)

    async def replay_reply(self, action: Action, recorded: Recorded) -> Reply:
        """As ``reply``, for an action whose answers were recorded: tools that only read are not run again."""
        return await self._replied(action, recorded)

    def fork(self) -> Conversation | None:
        """A copy; None where a tool may have changed what is not in the conversation: then a branch is replayed."""
        if not self._rules.calls.only_read:
            return None
        copied = copy.copy(self)
        copied._all, copied._turn_values = list(self._all), Counter(self._turn_values)
        copied._info = copy.deepcopy(self._info)
        return copied

    async def close(self) -> None:
        """Nothing is held open."""

    async def _replied(self, action: Action, recorded: Recorded | None) -> Reply:
        rules = self._rules
        self._turns += 1
        self._all.append(action.message)
        goes_on = bool(action.tool_calls) and self._turns < rules.max_turns
        answers: list[Message] = []
        try:
            if goes_on:
                texts = None if recorded is None else recorded(rules.calls.blank(action.tool_calls))
                answers = await rules.calls.answers(
                    action.tool_calls, info=self._info, row=self._row, recorded=texts
                )  # fmt: skip
                self._all.extend(answers)
            turn = await self._judged_turn(action, answers, done=not goes_on, replayed=recorded is not None)
            if goes_on:
                found = _found(answers)
                return Reply(messages=answers, turn_reward=turn.total, fingerprint=found)
            return await self._ended(action, turn)
        except ToolFailed as failed:
            raise failed.at(self._where) from failed.__cause__

    async def _judged_turn(self, action: Action, answers: Sequence[Message], *, done: bool, replayed: bool) -> Judged:
        """The rewards of one turn.  In a replay only functions that may fill ``info`` are called again."""
        functions = [f for f in self._rules.turn_rewards if not replayed or "info" in f.wants]
        if not functions:
            return Judged(0.0, {})
        known = self._known() | {
            "action": action,
            "answers": [message["content"] for message in answers],
            "done": done,
        }
        turn = await judged(
            functions, known, where=f"{self._where}, turn {self._turns}",
            timeout_s=self._rules.reward_timeout_s, what="reward of a turn",
        )  # fmt: skip
        self._turn_values.update(turn.values)
        return turn

    async def _ended(self, action: Action, turn: Judged) -> Reply:
        rules, limit = self._rules, bool(action.tool_calls)
        known = self._known() | {
            "answer": "" if limit else self._answer(action),
            "prompt": self.messages,
            "end": "turn_limit" if limit else "done",
        }
        final = await judged(rules.rewards, known, where=self._where, timeout_s=rules.reward_timeout_s)
        first = final.values[rules.rewards[0].name]
        return Reply(
            done=True,
            reward=final.total,
            success=None if rules.success_at is None else first >= rules.success_at,
            turn_reward=turn.total,
            rewards={**final.values, **self._turn_values},
            turn_limit=limit,
        )

    def _known(self) -> dict[str, Any]:
        return {
            "row": self._row,
            "target": self._target,
            "messages": list(self._all),
            "info": self._info,
            "turns": self._turns,
        }

    def _answer(self, action: Action) -> str:
        try:
            found = self._rules.extract(action.content.strip())
        except Exception as exc:
            raise ToolFailed(f"extract raised {of_error(exc)}", kind=f"{of_type(exc)} in extract") from exc
        if not isinstance(found, str):
            raise ToolFailed(f"extract returned {of_type(found)}; expected a str", kind="value of extract")
        return found


def _found(answers: Sequence[Message]) -> tuple[int, ...]:
    """What the tools said, line by line: a search that writes a passage a line is told from others by its passages."""
    return fingerprint_of(line for answer in answers for line in answer["content"].splitlines() if line.strip())
