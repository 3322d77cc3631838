"""Handles what actors send straight to a shard: the messages of its trees, and a greeting."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import Turn
from atpo_async.wire import messages as m
from buffer.handlers.actors import ActorHandler
from buffer.trees.assembly import Frames


class TurnsHandler:
    """Takes the messages of trees.

    Args:
        actors: of the shard.
        name: of the shard, for refusals.
    """

    def __init__(self, actors: ActorHandler, *, name: str) -> None:
        self._actors = actors
        self._name = name

    def handle(self, peer: str, message: Any, frames: Frames) -> Awaitable[m.Message] | None:
        """One message of an actor.

        Raises:
            BadMessage: the message is refused.
        """
        if isinstance(message, Turn | m.TreeOpened | m.TreeClosed):
            return self._actors.handle(peer, message, frames)
        if isinstance(message, m.ActorHello):
            return self._welcome(peer, message)
        raise BadMessage(
            f"{self._name} takes the messages of its trees alone: {type(message).__name__} goes to the buffer"
        )

    async def _welcome(self, peer: str, hello: m.ActorHello) -> m.Message:
        # Its leases stay its own: the front has admitted this process, and this only finds out who is here.
        return self._actors.admitted(peer, hello) or m.Welcome(run=hello.run, weights_endpoint="", announce_endpoint="")
