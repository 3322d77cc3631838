"""The front's links to its shards: what each has, as last heard, what is passed on to it, and what it is asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from atpo_async.config import LinksConfig
from atpo_async.core.errors import BadMessage, PeerLost
from atpo_async.core.naming.shards import role_of
from atpo_async.links.client import RoutedClient
from atpo_async.links.frames import encode_within, limits_of
from atpo_async.links.parcels import Parcel
from atpo_async.links.way import Way
from atpo_async.status import waits
from buffer.front import messages as f
from buffer.front.passing import Frames, Passed

log = logging.getLogger("atpo.buffer")

T = TypeVar("T")

LOOK_S = 0.5
"""How long a shard has no news before it says so."""
LOOK_PAUSE_S = 0.02
"""Between two looks: the changes of a busy shard come together."""
AHEAD = 2
"""Times ``links.window``: what one shard may have unacknowledged of all actors that send through the front."""


class ShardLink:
    """One shard.

    Args:
        index: the shard's.
        settings: of the run's links.
        locate: where it listens now; empty while that is not known.
    """

    def __init__(self, index: int, *, settings: LinksConfig, locate: Callable[[], str]) -> None:
        self.index = index
        self.name = role_of(index)
        self._settings = settings
        self.client = RoutedClient(
            Way(""), peer=self.name, identity="buffer", receives=f.ShardToFront, locate=locate,
            settings=settings.model_copy(update={"window": AHEAD * settings.window}),
        )  # fmt: skip
        self.state: f.ShardState | None = None
        """As last heard."""
        self.asking = 0
        """Training leases that it is being asked for."""
        self.granted = 0
        """Training leases that it granted after ``state``."""

    @property
    def alive(self) -> bool:
        """Whether it has answered of late."""
        return (
            self.state is not None and self.client.connected and self.client.silent_s < 3 * self._settings.heartbeat_s
        )

    async def ask(self, question: f.Question, kind: type[T], *, timeout_s: float) -> T:
        """The answer of a shard.

        Raises:
            PeerLost: none within ``timeout_s``.
            ShardAway: it cannot write, or answers something else.
            BadMessage: it refuses.
        """
        with waits.waiting("the buffer", f"an answer of {self.name}", on=self.name):
            answer = f.answer_in(await self.client.request(f.asked(question), timeout_s=timeout_s), kind)
        if isinstance(answer, f.Prepared):
            # At once, in the order in which the shard has sent its numbers: later ones have leases that these lack.
            self.heard(answer.state)
        return answer

    async def send(self, message: Any, parcel: Parcel) -> None:
        """Pass a message on; ``parcel`` arrives with it.  Waits for: space in the window."""
        await self.client.pass_on(parcel, encode_within(message, limits_of(self._settings)))

    async def follow(self, heard: Callable[[], Mapping[str, float]], changed: Callable[[], None]) -> None:
        """Keep ``state`` new.  Waits for: a change in the shard.  Unblocked by: its answer.

        Raises:
            PeerLost: it is away for longer than ``links.give_up_s``.
        """
        loop = asyncio.get_running_loop()
        last, told = loop.time(), 0.0
        while True:
            seen = -1 if self.state is None else self.state.changes
            # Of a thousand actors not with every look.
            due = loop.time() - told >= LOOK_S
            told = loop.time() if due else told
            look = f.Look(seen=seen, wait_s=LOOK_S, heard=dict(heard()) if due else {})
            try:
                answer = await self.client.request(f.asked(look), timeout_s=self._settings.deadline_s)
                state = f.answer_in(answer, f.ShardState)
            except (PeerLost, f.ShardAway, BadMessage) as exc:
                if loop.time() - last > self._settings.give_up_s:
                    raise
                log.warning("the buffer's front waits for %s: %s", self.name, exc)
                await asyncio.sleep(self._settings.heartbeat_s)
                continue
            last = loop.time()
            fresh = self.state is None or state.changes != self.state.changes
            self.heard(state)
            if fresh:
                changed()
            await asyncio.sleep(LOOK_PAUSE_S)

    def heard(self, state: f.ShardState) -> None:
        """The shard says what it has."""
        self.state, self.granted = state, 0


class Shards:
    """All shards of a run's buffer, by index.

    Args:
        count: how many.
        settings: of the run's links.
        locate: where a shard listens now, by its index.
    """

    def __init__(self, count: int, *, settings: LinksConfig, locate: Callable[[int], str]) -> None:
        self._limits = limits_of(settings)
        self.links = [
            ShardLink(index, settings=settings, locate=partial(locate, index)) for index in range(count)
        ]  # fmt: skip

    def __iter__(self) -> Iterator[ShardLink]:
        return iter(self.links)

    def __len__(self) -> int:
        return len(self.links)

    @property
    def states(self) -> list[f.ShardState]:
        """Of those that have answered."""
        return [link.state for link in self.links if link.state is not None]

    @property
    def missing(self) -> str:
        """The first shard that has not answered, or not of late; empty where all have."""
        return next((link.name for link in self.links if not link.alive), "")

    def total(self, name: str) -> int:
        """The sum of a number over the shards."""
        return sum(int(getattr(state, name)) for state in self.states)

    async def ask_all(self, questions: list[f.Question], kind: type[T], *, timeout_s: float) -> list[T]:
        """One question to each shard, at once.

        Raises:
            PeerLost, ShardAway, BadMessage: as ``ShardLink.ask``, of the first that failed.
        """
        asked = (link.ask(each, kind, timeout_s=timeout_s) for link, each in zip(self.links, questions, strict=True))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found: list[T] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            found.append(answer)
        return found

    async def send_all(self, message: Any) -> Parcel:
        """Pass a message on to every shard.  Waits for: space in the windows.  It has arrived once all have it."""
        frames = encode_within(message, self._limits)
        together = Parcels()
        for link in self.links:
            await link.client.pass_on(together.another(), frames)
        return together.whole()

    async def pass_on(self, index: int, message: Passed, frames: Frames) -> Parcel:
        """Pass a message of a tree on to its shard.

        Raises:
            BadMessage: there is no such shard.
        """
        if index >= len(self.links):
            raise BadMessage(f"{message.type} of tree {message.tree_id}: this buffer has {len(self.links)} shards")
        parcel = Parcel()
        await self.links[index].client.pass_on(parcel, frames)
        return parcel


class Parcels:
    """Several parcels that arrive as one: once the last has; refused with the first reason that there is."""

    def __init__(self) -> None:
        self._all = Parcel()
        self._left = 1

    def another(self) -> Parcel:
        """One of them."""
        parcel = Parcel()
        self._left += 1
        parcel.then(lambda: self._arrived(parcel.refusal))
        return parcel

    def whole(self) -> Parcel:
        """What stands for all of them; there are no more."""
        self._arrived(None)
        return self._all

    def _arrived(self, refusal: str | None) -> None:
        self._left -= 1
        self._all.refusal = self._all.refusal or refusal
        if not self._left:
            self._all.arrive()
