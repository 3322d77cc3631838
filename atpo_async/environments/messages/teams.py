"""Tasks in messages as teams solve them: what members are shown, and what of a proposer's chain is a note."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from atpo_async.core.vocabulary import Split
from atpo_async.environments.base import Episode
from atpo_async.environments.messages.chat_format import ChatFormat
from atpo_async.environments.messages.types import Action, Message, MessageEpisode
from atpo_async.environments.values import ValueRefused, refuse


class TeamTasks:
    """Mixin of ``MessageTask``: its tasks can be solved by teams (``[team]``) where it has ``begin_synthesis``.

    Further methods that a task may have::

        async def begin_synthesis(self, split, index, notes):   # a text by seat, "" where a proposer gave none
            return Game(...)                                    # a conversation, as begin() makes one
        async def begin_proposal(self, split, index, seat):     # in place of begin(), where seats differ
            return Game(...)
        def note(self, action):                                 # None for no note; by default what is said without
            return action.content                               # thinking and tool calls, of the chain's last action
    """

    begin_synthesis: Callable[[Split, int, tuple[str, ...]], Awaitable[MessageEpisode]] | None = None
    begin_proposal: Callable[[Split, int, int], Awaitable[MessageEpisode]] | None = None
    format: ChatFormat

    @abstractmethod
    async def start(self, split: Split, task_index: int) -> Episode:
        raise NotImplementedError

    @abstractmethod
    async def _begun(self, begin: str, split: Split, task_index: int, *more: Any) -> Episode:
        """The episode of what the method of that name, which begins conversations, returns."""
        raise NotImplementedError

    def note(self, action: Action) -> str | None:
        """What the synthesizer is shown of a proposer's last action; None for nothing."""
        return action.content or None

    @property
    def cue(self) -> Callable[[Split, int, tuple[np.ndarray, ...]], Awaitable[np.ndarray | None]] | None:
        return None if self.begin_synthesis is None else self._cue

    @property
    def start_synthesizer(self) -> Callable[[Split, int, tuple[np.ndarray, ...]], Awaitable[Episode]] | None:
        return None if self.begin_synthesis is None else self._start_synthesizer

    @property
    def start_proposer(self) -> Callable[[Split, int, int], Awaitable[Episode]] | None:
        return None if self.begin_proposal is None else self._start_proposer

    async def _cue(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> np.ndarray | None:
        # A renderer looks at how the answer was opened, which every prompt of this task does alike.
        opened = await self.start(split, task_index)
        await opened.close()
        where = f"{type(self).__name__}, task {task_index} ({split})"
        said: Any = self.note(self.format.parse(opened.prompt, actions[-1]))
        if inspect.isawaitable(said):
            if inspect.iscoroutine(said):
                said.close()
            raise ValueRefused("note", f"{where}: note() is a coroutine: write def note(self, action)")
        if said is not None and not isinstance(said, str):
            raise refuse(where, "what note() returned", said, "a text, or None for no note")
        return self.format.encode(said) if said else None

    async def _start_synthesizer(self, split: Split, task_index: int, cues: tuple[np.ndarray, ...]) -> Episode:
        notes = tuple(self.format.decode(cue) if len(cue) else "" for cue in cues)
        return await self._begun("begin_synthesis", split, task_index, notes)

    async def _start_proposer(self, split: Split, task_index: int, seat: int) -> Episode:
        return await self._begun("begin_proposal", split, task_index, seat)


def with_notes(messages: Sequence[Message], notes: str) -> list[Message]:
    """The messages without those of the system, and ``notes`` after the last one's text."""
    shown = [message for message in messages if message["role"] not in ("system", "developer")]
    last: Message = shown[-1] if shown else {"role": "user", "content": ""}
    content = last.get("content") or ""
    more: Any = f"{content}{notes}" if isinstance(content, str) else [*content, {"type": "text", "text": notes}]
    return [*shown[:-1], {**last, "content": more}]
