"""Tracks which actors are alive, by their last message, and where.  Pure: the clock is passed in, monotonic seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

FORGOTTEN_S = 3600.0
"""An actor that holds nothing and was silent for so long is forgotten."""


RELAYED_PATIENCE = 3
"""Times longer may an actor be silent that comes through a relay: it may be on its way past one that died."""


class Host(NamedTuple):
    """The machine of an actor, as it says itself; empty where it does not."""

    name: str = ""
    """For people."""
    identity: str = ""
    """Of the machine and its boot."""


class ActorPresence:
    """Actors by name.

    Args:
        silent_s: an actor that is silent for longer has lost its leases.
    """

    def __init__(self, silent_s: float) -> None:
        self._silent_s = silent_s
        self.is_relayed: Callable[[str], bool] = lambda actor: False
        """Whether an actor comes through a relay."""
        self._heard: dict[str, float] = {}
        self._hosts: dict[str, Host] = {}
        self._left: set[str] = set()
        """Actors that have handed their leases back and are about to end; their links may live on for a moment."""

    def heard(self, actor: str, now: float) -> None:
        """``actor`` gave a sign of life at ``now``; an earlier one changes nothing."""
        self._heard[actor] = max(now, self._heard.get(actor, now))

    def lives_on(self, actor: str, host: Host) -> None:
        """``actor`` says where it runs; a message that does not say changes nothing."""
        if host.name or host.identity:
            self._hosts[actor] = host

    def host_of(self, actor: str) -> Host:
        """Where ``actor`` runs, as far as known."""
        return self._hosts.get(actor, Host())

    def asks(self, actor: str) -> None:
        """``actor`` asks to take part, or for leases."""
        self._left.discard(actor)

    def leaves(self, actor: str) -> None:
        """``actor`` has handed its leases back in good order and takes part no more."""
        if actor in self._heard:
            self._left.add(actor)

    def is_there(self, actor: str, now: float) -> bool:
        """Whether ``actor`` takes part: it was heard from lately, and has not left."""
        return actor not in self._left and actor in self._heard and not self.is_silent(actor, now)

    def present(self) -> Iterator[tuple[str, float]]:
        """Actors that have not left, silent ones too, each with when it was last heard from."""
        for actor, heard in self._heard.items():
            if actor not in self._left:
                yield actor, heard

    @property
    def num_there(self) -> int:
        """Actors that were ever heard from and have not left; silent ones count until they are forgotten."""
        return len(self._heard) - len(self._left)

    def excuse(self, now: float) -> None:
        """The buffer stood still until ``now``: no silence in that time counts."""
        for actor in self._heard:
            self._heard[actor] = now

    def goes_on(self, former: str, actor: str, now: float) -> None:
        """The process that was called ``former`` is called ``actor`` from now on."""
        self.heard(actor, now)
        self._heard.pop(former, None)
        self._left.discard(former)
        if (host := self._hosts.pop(former, None)) is not None:
            self.lives_on(actor, host)

    def _limit_s(self, actor: str) -> float:
        return self._silent_s * (RELAYED_PATIENCE if self.is_relayed(actor) else 1)

    def is_silent(self, actor: str, now: float) -> bool:
        return now - self._heard.get(actor, now) > self._limit_s(actor)

    def alive(self, now: float) -> list[str]:
        """Actors that were heard from lately and have not left."""
        return [
            actor
            for actor, heard in self._heard.items()
            if now - heard <= self._limit_s(actor) and actor not in self._left
        ]

    def num_alive(self, now: float) -> int:
        """Actors that were heard from lately and have not left."""
        return len(self.alive(now))

    def forget_long_gone(self, now: float, holders: Iterable[str]) -> set[str]:
        """Drop those that were silent for very long and hold nothing, and return them."""
        gone = {actor for actor, heard in self._heard.items() if now - heard > FORGOTTEN_S}
        gone -= set(holders) if gone else set()
        for actor in gone:
            del self._heard[actor]
            self._hosts.pop(actor, None)
            self._left.discard(actor)
        return gone

    def __len__(self) -> int:
        return len(self._heard)
