"""``MessageTask``: a task that speaks in messages, over the token protocol; a user's own derives from it."""

from __future__ import annotations

import asyncio
import inspect
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_error
from atpo_async.core.vocabulary import Split
from atpo_async.environments.base import ReplayFork, StepResult
from atpo_async.environments.checked import check_optional
from atpo_async.environments.messages.chat_format import ChatFormat, NotExtended, answers_named
from atpo_async.environments.messages.checks import messages_of, reply_of
from atpo_async.environments.messages.teams import TeamTasks
from atpo_async.environments.messages.types import Action, Message, MessageEpisode, Reply, ToolSchema
from atpo_async.environments.reference import PLACE, AnswerTemplate, Reference
from atpo_async.environments.values import NOTHING, PROMPT_TOO_LONG, TOO_LONG, Reason, ValueRefused, refuse

T = TypeVar("T")

_FORMS = {"num_tasks": "num_tasks(self, split)", "begin": "async begin(self, split, index)"}

_OPTIONAL = {"replay_step": "replay_reply", "fork": "fork", "snapshot": "snapshot", "restore": "restore"}
"""Part of an episode that may be left out -> the conversation's part that it needs."""

MUCH_TEXT = 20_000
"""Characters from which on messages are encoded in a thread, so that the loop stays free for other episodes."""


MOST_TEXT = 2_000_000
"""Characters beyond which messages are refused before they are encoded, which would hold other episodes up."""

OPTIONAL = {"fork": (), "snapshot": (), "restore": ("snapshot",), "replay_reply": ("action", "recorded")}
"""What a conversation may have, and what it is called with."""


class MessageTask(TeamTasks, ReplayFork):
    """A task in messages: the policy's actions arrive parsed, and are answered with messages.

    Derive from it and write two methods; the third part is an object of yours, one for each conversation::

        from atpo_async.environments import MessageTask
        from atpo_async.environments.messages.types import Reply

        class Guess(MessageTask):
            def num_tasks(self, split):
                return 100 if split == "eval" else None        # None: training tasks have no end

            async def begin(self, split, index):
                return Game(number=index % 10)

        class Game:
            def __init__(self, number):
                self.number, self.tries = number, 0
                self.messages = [{"role": "user", "content": "Guess my number, 0 to 9. Say it alone."}]

            async def reply(self, action):                     # action.content, .thinking, .tool_calls
                self.tries += 1
                if action.content == str(self.number):
                    return Reply(done=True, reward=1.0, success=True)
                if self.tries == 4:
                    return Reply(done=True, reward=0.0, success=False, turn_limit=True)
                return Reply(messages=[{"role": "user", "content": "No. Again."}])

    ``environment.name = "my_task:Guess"`` trains on it.  The conversation's object may have ``async close()``, called
    once however it ended.  The same split, index and actions must give the same messages.

    Further methods that it may have, by which a branch is forked (``environments/base.py``), plain or async:
    ``fork()``, a copy of the conversation; ``snapshot()`` and ``restore(snapshot)``; and ``replay_reply(action,
    recorded)``, called in a replay in place of ``reply``: ``recorded(messages)`` are the contents that these messages
    had, a text each, or None where they had another form.

    A task that a team can solve has ``begin_synthesis`` as well (``TeamTasks``).

    A task whose answers are known may have ``right_answer(split, index) -> str | None``: what the policy's probability
    of is measured where ``search.turn_reward`` asks for it, written as ``reference_template`` says, at the place where
    the policy is to speak.

    Args:
        tokenizer: folder of the policy.
        renderer: of the chat format: ``auto``, or a family's name (``ChatFormat.load``).
        tools: schemas of the tools that the policy is shown, if any.
        options: of the renderer, such as ``enable_thinking=False``.

    Raises:
        SetupError: as ``ChatFormat.load``.
        ConfigError: likewise, and where a method is missing.

    Attributes:
        format: the chat format; ``format.cut`` shortens a text to so many tokens.
    """

    reference_template = PLACE
    """How the right answer is written; with ``{answer}`` once.  For a policy that thinks first, one that ends it:
    ``"</think>\\n\\n{answer}"``."""

    def __init__(
        self, tokenizer: str | Path, *, renderer: str = "auto", tools: Sequence[ToolSchema] = (), **options: Any
    ) -> None:
        missing = [form for name, form in _FORMS.items() if getattr(type(self), name) is getattr(MessageTask, name)]
        if missing:
            raise ConfigError(f"{type(self).__name__} lacks {' and '.join(missing)}: a MessageTask has to have them")
        self.format = ChatFormat.load(tokenizer, renderer=renderer, tools=tools, **options)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        if not hasattr(self, "format"):
            raise ConfigError(
                f"{type(self).__name__} has no chat format: call super().__init__(tokenizer) in its __init__, with the "
                "policy's folder that the factory is given"
            )
        return self.format.stop_token_ids

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids, special tokens kept."""
        return self.format.decode(ids)

    @abstractmethod
    def num_tasks(self, split: Split) -> int | None:
        """How many tasks the split has; None when there is no end."""
        raise NotImplementedError

    @abstractmethod
    async def begin(self, split: Split, index: int) -> MessageEpisode:
        """A new conversation about the task ``index``: an object with ``messages`` and ``async reply(action)``."""
        raise NotImplementedError

    def right_answer(self, split: Split, index: int) -> str | None:
        """The text that answers the task ``index``; None where there is no such text."""
        return None

    @property
    def has_references(self) -> bool:
        return type(self).right_answer is not MessageTask.right_answer

    def reference(self, split: Split, task_index: int) -> Reference | None:
        """The right answer as the policy would write it.  Raises ConfigError where ``reference_template`` is none."""
        answer = self.right_answer(split, task_index)
        if answer is None:
            return None
        template = AnswerTemplate(self.reference_template, field=f"{type(self).__name__}.reference_template")
        return template.reference(answer, self.format.encode)

    async def start(self, split: Split, task_index: int) -> TokenEpisode:
        """Raises ValueRefused for a conversation that is none; whatever else ``begin`` raises."""
        return await self._begun("begin", split, task_index)

    async def _begun(self, begin: str, split: Split, task_index: int, *more: Any) -> TokenEpisode:
        where = f"{type(self).__name__}, task {task_index} ({split})"
        begun = getattr(self, begin)(split, task_index, *more)
        if not inspect.isawaitable(begun):
            raise ValueRefused(begin, f"{where}: {begin}() is no coroutine: write async def {begin}(self, …)")
        plain = await begun
        try:
            return TokenEpisode(self.format, plain, await self._opened(plain, where, begin), where)
        except BaseException:
            await closed(plain)
            raise

    async def _opened(self, plain: Any, where: str, begin: str) -> np.ndarray:
        """int32[P], the first messages as the policy is shown them."""
        missing = [part for part in ("messages", "reply") if not hasattr(plain, part)]
        if missing:
            raise refuse(where, f"what {begin}() returned", plain, f"a conversation: it lacks {', '.join(missing)}")
        check_optional(plain, where, OPTIONAL)
        messages = messages_of(plain.messages, "messages", where, answers=False)
        _check_size(messages, "messages", where, PROMPT_TOO_LONG)
        try:
            return await in_thread_if_long(messages, lambda: self.format.render(messages))
        except Exception as exc:
            raise ValueRefused(
                "messages", f"{where}: renderer {self.format.name!r} cannot write the messages: {of_error(exc)}"
            ) from exc


class TokenEpisode:
    """A conversation as an episode of the token protocol.

    Attributes:
        prompt: int32[P], the first messages.
        plain: the user's conversation.
    """

    def __init__(self, chat: ChatFormat, plain: MessageEpisode, prompt: np.ndarray, where: str) -> None:
        self.prompt = prompt
        self.plain = plain
        self._chat = chat
        self._context = prompt
        self._where = where
        self._steps = 0
        for part, own in _OPTIONAL.items():
            if getattr(plain, own, None) is None:
                setattr(self, part, None)  # so that no turn asks for what the conversation does not have

    async def step(self, action: np.ndarray) -> StepResult:
        """Raises ValueRefused for a reply that is none; whatever else the conversation raises."""
        parsed = self._chat.parse(self._context, action)
        return await self._answered(parsed, lambda: self.plain.reply(parsed), "reply(self, action)")

    async def replay_step(self, action: np.ndarray, observation: np.ndarray) -> StepResult:
        """As ``step``, by the conversation's ``replay_reply``."""
        plain: Any = self.plain
        parsed, context = self._chat.parse(self._context, action), self._context

        def recorded(messages: Sequence[Message]) -> list[str] | None:
            return self._chat.contents(context, action, observation, answers_named(messages, parsed.tool_calls))

        return await self._answered(
            parsed, lambda: plain.replay_reply(parsed, recorded), "replay_reply(self, action, recorded)"
        )

    async def _answered(self, parsed: Action, answer: Callable[[], Awaitable[Reply]], form: str) -> StepResult:
        self._steps += 1
        where = f"{self._where}, step {self._steps}"
        said = answer()
        if not inspect.isawaitable(said):
            raise ValueRefused("reply", f"{where}: {form.partition('(')[0]}() is no coroutine: write async def {form}")
        reply = reply_of(await said, where)
        if reply.done:
            return StepResult(
                observation=NOTHING,
                done=True,
                reward=reply.reward,
                success=reply.success,
                end="turn_limit" if reply.turn_limit else "done",
                turn_reward=reply.turn_reward,
                rewards=reply.rewards,
                fingerprint=reply.fingerprint,  # type: ignore[arg-type]  # checked with the step's result
                state_value=reply.state_value,
            )
        observation, longest = await self._observation(parsed, reply, where)
        self._context = np.concatenate([self._context, parsed.ids, observation])
        return StepResult(
            observation=observation,
            done=False,
            reward=reply.reward,
            success=reply.success,
            end="continue",
            turn_reward=reply.turn_reward,
            fingerprint=reply.fingerprint,  # type: ignore[arg-type]
            state_value=reply.state_value,
            longest_answer=longest,
        )

    async def _observation(self, action: Action, reply: Reply, where: str) -> tuple[np.ndarray, int | None]:
        """int32[O], the reply's messages after the action, and of several answers the longest's tokens."""
        messages = answers_named(reply.messages, action.tool_calls)
        _check_size(messages, "messages", where, TOO_LONG)
        try:
            return await in_thread_if_long(
                messages,
                lambda: (
                    self._chat.extend(self._context, action.ids, messages),
                    self._longest(messages) if len(action.tool_calls) > 1 else None,
                ),
            )
        except NotExtended as refused:
            raise ValueRefused("messages", f"{where}: {refused}") from refused
        except Exception as exc:
            raise ValueRefused(
                "messages", f"{where}: renderer {self._chat.name!r} cannot write the messages: {of_error(exc)}"
            ) from exc

    def _longest(self, messages: Sequence[Message]) -> int:
        return max((len(self._chat.encode(message["content"])) for message in messages), default=0)

    async def fork(self) -> TokenEpisode | None:
        """A copy, where the conversation can be copied."""
        plain: Any = self.plain
        copy = await _awaited(plain.fork())
        return None if copy is None else self._at(copy)

    def _at(self, plain: Any) -> TokenEpisode:
        other = TokenEpisode(self._chat, plain, self.prompt, self._where)
        other._context, other._steps = self._context, self._steps
        return other

    async def snapshot(self) -> tuple[Any, np.ndarray, int] | None:
        """The conversation's own, and how far it has come."""
        plain: Any = self.plain
        state = await _awaited(plain.snapshot())
        return None if state is None else (state, self._context, self._steps)

    async def restore(self, snapshot: tuple[Any, np.ndarray, int]) -> None:
        """Raises what the conversation's own ``restore`` raises."""
        state, self._context, self._steps = snapshot
        plain: Any = self.plain
        await _awaited(plain.restore(state))

    async def close(self) -> None:
        """Of the user's conversation, where it has a close."""
        await closed(self.plain)


async def closed(plain: Any) -> None:
    """Calls ``close`` of a conversation that has one, async or not."""
    close = getattr(plain, "close", None)
    if callable(close):
        await _awaited(close())


async def _awaited(said: Any) -> Any:
    return await said if inspect.isawaitable(said) else said


def _check_size(messages: Sequence[Message], field: str, where: str, reason: Reason) -> None:
    """Raises ValueRefused where there is more text than any context holds."""
    characters = sum(len(message["content"]) for message in messages)
    if characters > MOST_TEXT:
        raise ValueRefused(
            field,
            f"{where}: {field} hold {characters:,} characters; expected at most {MOST_TEXT:,}: cut them, for instance "
            "by self.format.cut(text, max_tokens, notice)",
            reason=reason,
        )


async def in_thread_if_long(messages: Sequence[Message], work: Callable[[], T]) -> T:
    """What ``work`` returns."""
    if sum(len(message["content"]) for message in messages) < MUCH_TEXT:
        return work()
    return await asyncio.to_thread(work)
