"""``ToolTask``: a task of data, tools and rewards, each a few plain functions of the user's."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atpo_async.core.bounds import MAX_REWARD_PARTS
from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_type, of_value
from atpo_async.core.vocabulary import Split
from atpo_async.environments.data.task_data import TaskData
from atpo_async.environments.messages.task import MessageTask
from atpo_async.environments.messages.teams import with_notes
from atpo_async.environments.reference import PLACE, AnswerTemplate, answer_text
from atpo_async.environments.rewards.functions import AFTER_A_TURN, AT_THE_END, reward_functions
from atpo_async.environments.tools.calls import MAX_CALLS, ToolCalls
from atpo_async.environments.tools.conversation import Conversation, Rules
from atpo_async.environments.tools.counts import Counts
from atpo_async.environments.tools.tool import Tool, as_tools

TIMEOUT_S = 30.0
"""Of one call of a tool or a reward; below the default of ``search.step_timeout_s``."""

ERROR_TEXT = "Error: {error}"

NOTES = "\n\nNotes of others who looked into it:\n{notes}"
"""What a synthesizer reads after the last of its row's messages."""


class ToolTask(MessageTask):
    """A task of data, tools and rewards::

        def make(tokenizer, **options):
            return ToolTask(tokenizer, data="train.jsonl", eval_data="dev.jsonl", tools=[lookup], rewards=[correct])

    An action without a tool call is the answer, and ends the conversation.  One with calls is answered with what the
    tools return, unless it was the last of ``max_turns``: then the conversation ends as ``turn_limit``, its calls are
    not run, and the rewards are asked with the answer ``""``.

    Args:
        tokenizer: folder of the policy.
        data, eval_data, eval_share, split, columns, seed: the tasks, as of ``TaskData.load``.
        system: a system message, for rows without one of their own.
        synthesizer: the system message of a team's synthesizer: teams (``[team]``) can solve the tasks then, and
            ``system`` is what their proposers are told.  It is shown the row's messages without their system message,
            and after the last one ``notes``.
        notes: a text with ``{notes}`` in it, what the proposers noted, numbered by seat.
        tools: functions that the policy may call (``tool``).
        rewards: functions that judge a finished conversation, each alone or as ``(function, weight)``; what they may
            ask for is in ``rewards/functions.py``.  The reward is the weighted sum.
        turn_rewards: functions that judge a single turn, likewise.
        max_turns: actions of the policy in one conversation.
        success_at: a conversation succeeds where its first reward is at least this; None: success is unknown.
        extract: what of the last action's text is the answer: a function, or a regular expression whose last match's
            first group it is (``""`` without a match).  By default all of it, stripped.
        tool_timeout_s: of a call of a tool without a limit of its own.
        reward_timeout_s: of a call of a reward.
        max_calls: tool calls that are made of one action; further ones are answered with an error.
        reference: how a row's answer (of several the first) is written where ``search.turn_reward`` asks how
            probable it is to the policy: a text with ``{answer}``, such as ``"</think> {answer}"``.
        error_text: what the policy reads of a call that cannot be made; ``{error}`` stands for the fault.
        renderer: of the chat format, and
        renderer_options: its own, such as ``{"enable_thinking": False}``.

    Raises:
        ConfigError: one of these cannot be.
        SetupError: a file that is missing.
    """

    def __init__(
        self,
        tokenizer: str | Path,
        *,
        data: Any = None,
        eval_data: Any = None,
        eval_share: float | None = None,
        split: str | None = None,
        columns: Mapping[str, str] | str | None = None,
        seed: int = 0,
        system: str | None = None,
        synthesizer: str | None = None,
        notes: str = NOTES,
        tools: Sequence[Tool | Callable[..., Any]] = (),
        rewards: Sequence[Any] | None = None,
        turn_rewards: Sequence[Any] = (),
        max_turns: int = 8,
        success_at: float | None = 1.0,
        extract: Callable[[str], str] | str | None = None,
        tool_timeout_s: float = TIMEOUT_S,
        reward_timeout_s: float = TIMEOUT_S,
        max_calls: int = MAX_CALLS,
        reference: str = PLACE,
        error_text: str = ERROR_TEXT,
        renderer: str = "auto",
        renderer_options: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        _refuse_unknown(unknown)
        if data is None:
            raise ConfigError("ToolTask has no data; give data='train.jsonl', or another file or Hugging Face data set")
        if rewards is None:
            raise ConfigError("ToolTask has no rewards; give at least one function: rewards=[correct]")
        _check_numbers(
            max_turns=max_turns, max_calls=max_calls, tool_timeout_s=tool_timeout_s, reward_timeout_s=reward_timeout_s
        )  # fmt: skip
        _check_texts(system=system, synthesizer=synthesizer, error_text=error_text, notes=notes)
        self.reference_template = AnswerTemplate(reference, field="reference").template
        is_number = isinstance(success_at, int | float) and not isinstance(success_at, bool)
        if success_at is not None and not (is_number and math.isfinite(success_at)):
            raise ConfigError(f"success_at is {of_value(success_at)}; expected a number, or None for no success")
        self.tools = as_tools(tools)
        finals = reward_functions(rewards, field="rewards", known=AT_THE_END, needed=True)
        turns = reward_functions(turn_rewards, field="turn_rewards", known=AFTER_A_TURN, needed=False)
        if twice := {f.name for f in finals} & {f.name for f in turns}:
            raise ConfigError(f"rewards and turn_rewards both have {min(twice)!r}; rename one: metrics go by name")
        if (number := len(finals) + len(turns)) > MAX_REWARD_PARTS:
            raise ConfigError(f"rewards and turn_rewards are {number} functions; at most {MAX_REWARD_PARTS} are taken")
        super().__init__(
            tokenizer, renderer=renderer, tools=[tool.schema for tool in self.tools], **dict(renderer_options or {})
        )
        self.data = TaskData.load(
            data, eval_data=eval_data, eval_share=eval_share, seed=seed, split=split, columns=columns
        )  # fmt: skip
        self._counts = Counts()
        calls = ToolCalls(
            self.tools, cut=self.format.cut, counts=self._counts, timeout_s=tool_timeout_s,
            error_text=error_text, max_calls=max_calls,
        )  # fmt: skip
        self._rules = Rules(
            calls=calls, rewards=finals, turn_rewards=turns, system=system, max_turns=max_turns,
            success_at=success_at, extract=_extracting(extract), reward_timeout_s=reward_timeout_s,
        )  # fmt: skip
        self._synthesizer, self._notes = synthesizer, notes
        if synthesizer is not None:
            self.begin_synthesis = self._synthesis

    def num_tasks(self, split: Split) -> int | None:
        """Raises ConfigError where nothing is held out."""
        return self.data.num_tasks(split)

    def right_answer(self, split: Split, index: int) -> str | None:
        """What the row's answer column says.  Raises RowRefused."""
        return answer_text(self.data.task(split, index).answer)

    async def begin(self, split: Split, index: int) -> Conversation:
        """Raises RowRefused, which costs the branch."""
        return Conversation(self._rules, self.data.task(split, index), split, index)

    async def _synthesis(self, split: Split, index: int, notes: tuple[str, ...]) -> Conversation:
        """A synthesizer's conversation.  Raises RowRefused, which costs the branch."""
        task = self.data.task(split, index)
        listed = "\n".join(f"{seat}. {note or '(none)'}" for seat, note in enumerate(notes, start=1))
        shown = with_notes(task.messages, self._notes.replace("{notes}", listed))
        rules = replace(self._rules, system=self._synthesizer)
        return Conversation(rules, replace(task, messages=shown), split, index)

    def take_counts(self) -> dict[str, float]:
        """What the tools did since this was last called: ``tool/<name>/calls`` and so on."""
        return self._counts.take()


def _refuse_unknown(found: Mapping[str, Any]) -> None:
    if found:
        name = next(iter(found))
        known = [p.name for p in inspect.signature(ToolTask).parameters.values() if p.kind is p.KEYWORD_ONLY]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        meant = f"; did you mean {near[0]!r}?  Options" if near else "; options"
        raise ConfigError(f"ToolTask has no option {name!r}{meant}: {', '.join(known)}")


def _check_numbers(**found: Any) -> None:
    for field, value in found.items():
        kinds = int | float if field.endswith("_s") else int
        if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
            expected = "seconds, above 0" if field.endswith("_s") else "a whole number of at least 1"
            raise ConfigError(f"{field} is {of_value(value)} ({of_type(value)}); expected {expected}")


def _check_texts(*, system: Any, synthesizer: Any, error_text: Any, notes: Any) -> None:
    for field, found in (("system", system), ("synthesizer", synthesizer)):
        if found is not None and not isinstance(found, str):
            raise ConfigError(f"{field} is {of_value(found)} ({of_type(found)}); expected a text")
    if not isinstance(notes, str) or "{notes}" not in notes:
        raise ConfigError(f"notes is {of_value(notes)}; expected a text with {{notes}} in it")
    if not isinstance(error_text, str) or "{error}" not in error_text:
        raise ConfigError(f"error_text is {of_value(error_text)}; expected a text with {{error}} in it")


def _extracting(found: Any) -> Callable[[str], str]:
    """What of an action's text is the answer."""
    if found is None:
        return lambda text: text
    if callable(found):
        return found  # type: ignore[no-any-return]
    if not isinstance(found, str):
        raise ConfigError(
            f"extract is {of_value(found)} ({of_type(found)}); expected a function or a regular expression"
        )
    try:
        pattern = re.compile(found, re.DOTALL)
    except re.error as exc:
        raise ConfigError(f"extract is {of_value(found)}, which is no regular expression: {exc}") from None
    if pattern.groups < 1:
        raise ConfigError(
            f"extract is {of_value(found)}; expected one group around the answer: r'<answer>(.*?)</answer>'"
        )

    def last(text: str) -> str:
        matches = list(pattern.finditer(text))
        return (matches[-1][1] or "").strip() if matches else ""

    return last
