"""Sends that are passed on: a server has taken them, and acknowledges them only once another one has."""

from __future__ import annotations

from collections.abc import Callable


class Parcel:
    """One send on its way to another server.  A handler that returns it lets the sends behind it be handled, and keeps
    the server from acknowledging it, or any after it, before it has arrived."""

    __slots__ = ("_on_arrival", "arrived", "refusal")

    def __init__(self) -> None:
        self.arrived = False
        self.refusal: str | None = None
        """Why the other server refused it; None where it took it."""
        self._on_arrival: Callable[[], None] | None = None

    def arrive(self, refusal: str | None = None) -> None:
        """The other server has acknowledged it, or refused it for good."""
        self.arrived = True
        self.refusal = self.refusal if refusal is None else refusal
        if self._on_arrival is not None:
            self._on_arrival()

    def then(self, call: Callable[[], None]) -> None:
        """Call this when it has arrived; at once if it has."""
        self._on_arrival = call
        if self.arrived:
            call()


class NoAnswer(Exception):
    """Raised by a handler of a request that cannot be answered now: no reply is sent, and a client that still waits
    asks again."""
