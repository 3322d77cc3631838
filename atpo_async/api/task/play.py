"""Plays one task: asks for actions, steps the environment as an actor does, and shows what each step says."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from atpo_async.api.task.scripts import Actions
from atpo_async.api.task.voice import Voice
from atpo_async.config import Config
from atpo_async.core.errors import AtpoError, ConfigError
from atpo_async.core.texts import of_error, own_line
from atpo_async.core.vocabulary import Split
from atpo_async.environments.base import NotJudged, StepResult
from atpo_async.environments.checked import CheckedEnvironment, CheckedEpisode
from atpo_async.environments.messages.task import MessageTask
from atpo_async.environments.messages.types import Message

T = TypeVar("T")


class Shows(Protocol):
    """Prints a played task, step by step."""

    def opened(self, messages: Sequence[Message], prompt: np.ndarray) -> None:
        """The first messages, and the ids of them."""

    def acted(self, message: Message, ids: np.ndarray) -> None:
        """An action."""

    def answered(self, messages: Sequence[Message], result: StepResult) -> None:
        """What the task answered."""

    def note(self, line: str) -> None:
        """What would happen in training."""

    def ended(self, result: StepResult) -> None:
        """The end, with its rewards."""

    def failed(self, text: str, where: str) -> None:
        """The environment failed; ``where`` is a line of the user's code, or empty."""


@dataclass
class Player:
    """Plays tasks of one environment.

    Args:
        config: of the run.
        environment: checked, as an actor has it.
        voice: writes and reads the policy's tokens.
        shows: prints.
        raw: actions are the text of their tokens, also where the task speaks in messages.
    """

    config: Config
    environment: CheckedEnvironment
    voice: Voice
    shows: Shows
    raw: bool = False
    _history: list[Message] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._listener = Listener(self.environment.plain)

    async def play(self, split: Split, index: int, actions: Actions | None) -> bool:
        """One task from its prompt to its end; without ``actions`` it is only shown.

        Returns whether everything went well: False where the environment failed, as it would in training.
        """
        try:
            episode = await self._within(self.environment.start(split, index), "start")
        except Exception as exc:
            self._failed(exc)
            return False
        try:
            heard = self._listener.heard
            self._history = heard.opening() or [{"role": "", "content": self.voice.text(episode.prompt)}]
            self.shows.opened(self._history, episode.prompt)
            self._note_space(len(episode.prompt))
            return True if actions is None else await self._turns(episode, heard, actions)
        finally:
            await self._close(episode)

    async def _turns(self, episode: CheckedEpisode, heard: Heard, actions: Actions) -> bool:
        used = len(episode.prompt)
        while True:
            try:
                said = await actions.next(self._history)
                if said is None:
                    break
                ids = self.voice.action(said, raw=self.raw)
            except ConfigError as exc:
                if not actions.asks_again:
                    raise ConfigError(f"{actions.where()}{exc}") from exc
                self.shows.note(str(exc))
                continue
            used += len(ids)
            self._note_length(ids)
            try:
                result = await self._within(episode.step(ids), "step")
            except NotJudged as exc:
                why = f": {exc}" if str(exc) else ""
                self.shows.note(f"not judged{why}; in training this leaf is left out and counted (not_judged)")
                return True
            except Exception as exc:
                self.shows.acted(heard.action() or {"role": "", "content": self.voice.text(ids)}, ids)
                self._failed(exc)
                return False
            spoken = heard.action() or {"role": "", "content": self.voice.text(ids)}
            self.shows.acted(spoken, ids)
            if result.done:
                self.shows.ended(result)
                return True
            answer = heard.answer() or [{"role": "", "content": self.voice.text(result.observation)}]
            self._history = [*self._history, spoken, *answer]
            self.shows.answered(answer, result)
            used += len(result.observation)
            self._note_space(used)
        self.shows.note("no further action: the task was left before its end")
        return True

    def _note_length(self, ids: np.ndarray) -> None:
        most = self.config.search.max_action_tokens
        if len(ids) > most:
            self.shows.note(f"this action has {len(ids)} tokens; training cuts it at search.max_action_tokens = {most}")

    def _note_space(self, used: int) -> None:
        most = self.config.model.max_context_tokens
        if used >= most:
            self.shows.note(
                f"{used} tokens so far; training ends the chain here (length_limit): model.max_context_tokens = {most}"
            )

    async def _within(self, call: Awaitable[T], what: str) -> T:
        limit_s = self.config.search.step_timeout_s
        try:
            async with asyncio.timeout(limit_s) as limit:
                return await call
        except TimeoutError:
            if limit.expired():
                raise ConfigError(f"the environment's {what} took over {limit_s:g} s (search.step_timeout_s)") from None
            raise

    async def _close(self, episode: CheckedEpisode) -> None:
        try:
            await self._within(episode.close(), "close")
        except Exception as exc:
            self.shows.note(f"close() failed, which is counted and has no other effect: {of_error(exc)}")

    def _failed(self, exc: BaseException) -> None:
        text = str(exc) if isinstance(exc, AtpoError) or type(exc).__name__ == "ValueRefused" else of_error(exc)
        self.shows.failed(text, own_line(exc))


class Listener:
    """Puts itself between a task's conversations and the tokens, where it is a ``MessageTask``."""

    def __init__(self, task: Any) -> None:
        self.heard = Heard(None)
        if isinstance(task, MessageTask):
            self._begin = task.begin
            task.begin = self.begin  # type: ignore[method-assign]

    def begin(self, split: Split, index: int) -> Any:
        """As the task's own, not awaited where that is no coroutine, so that its error stays the same."""
        begun = self._begin(split, index)
        return self._wrapped(begun) if inspect.isawaitable(begun) else begun

    async def _wrapped(self, begun: Awaitable[Any]) -> Any:
        conversation = await begun
        if not (hasattr(conversation, "messages") and hasattr(conversation, "reply")):
            return conversation
        self.heard = Heard(conversation)
        return self.heard


class Heard:
    """A conversation that remembers its last action and reply; around None it hears nothing."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain
        self._action: Message | None = None
        self._answer: list[Message] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def opening(self) -> list[Message]:
        return [] if self._plain is None else [dict(message) for message in self._plain.messages]

    def reply(self, action: Any) -> Any:
        """As the conversation's own, not awaited where that is no coroutine, so that its error stays the same."""
        self._action, self._answer = action.message, None
        said = self._plain.reply(action)
        return self._recorded(said) if inspect.isawaitable(said) else said

    async def _recorded(self, said: Awaitable[Any]) -> Any:
        reply = await said
        messages = getattr(reply, "messages", ())
        if isinstance(messages, Sequence) and all(isinstance(message, dict) for message in messages):
            self._answer = [dict(message) for message in messages]
        return reply

    def action(self) -> Message | None:
        """The last action, parsed."""
        return self._action

    def answer(self) -> list[Message] | None:
        """The last reply's messages."""
        return self._answer
