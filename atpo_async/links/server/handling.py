"""The steps common to all messages of a server: decode the message, and run the handler on it."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from atpo_async.config import LinksConfig
from atpo_async.core.texts import of_error
from atpo_async.links.frames import MAX_REASON, limits_of
from atpo_async.links.parcels import Parcel
from atpo_async.wire import codec

log = logging.getLogger("atpo.links")

Frames = Sequence[codec.Buffer]
"""Of one message."""

Handler = Callable[..., Any]
"""``handler(peer, message)``, with ``with_frames`` ``handler(peer, message, frames)``; a coroutine function or not."""

Outcome = Parcel | str | None
"""Of a send that was handled: None where it is done, why it is refused, or what has still to arrive elsewhere."""

Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
"""Starts a task of the link, by its name."""

_QUEUED_MESSAGES = 4
"""Times ``max_message_bytes``: what may wait for the handler of one peer, of its sends and of its requests each."""


class BadMessages:
    """Counts invalid messages, and logs them: all of the first ones, then every hundredth.

    A broken peer must not fill the disk.
    """

    def __init__(self, title: str) -> None:
        self.count = 0
        self._title = title

    def note(self, peer: str, fact: object) -> None:
        self.count += 1
        if self.count <= 20 or self.count % 100 == 0:
            log.warning("%s: bad message %d, from %s: %s", self._title, self.count, peer, fact)


class Handling:
    """The types a server takes, and its handler.

    Args:
        title: the server's name, for logs and refusals.
        receives: the message types that it takes.
        handler: of messages.
        with_frames: whether the handler gets the frames too.
        settings: of the link.
        spawn: starts a task of the link.
        read: the message in two frames, where another than the codec reads it; raises BadMessage.
    """

    def __init__(
        self,
        title: str,
        *,
        receives: Any,
        handler: Handler,
        with_frames: bool,
        settings: LinksConfig,
        spawn: Spawn,
        read: Callable[[Frames], Any] | None = None,
    ) -> None:
        self.title = title
        self.settings = settings
        self.limits = limits_of(settings)
        self.max_queued_bytes = _QUEUED_MESSAGES * settings.max_message_bytes
        self.bad = BadMessages(title)
        self.spawn = spawn
        self.always_waits = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
            getattr(handler, "__call__", None)  # noqa: B004  (objects may be handlers; theirs is a method)
        )
        """What the handler returns has to be awaited, whatever the message."""
        self._receives = receives
        self._handler = handler
        self._with_frames = with_frames
        self._read = read

    def read(self, frames: Frames) -> Any:
        """The message in these frames.  Raises BadMessage."""
        if self._read is not None:
            return self._read(frames)
        return codec.decode(frames, self._receives, limits=self.limits)

    def run(self, peer: str, message: Any, frames: Frames) -> Any:
        """What the handler returns: a result, or an awaitable of one."""
        if self._with_frames:
            return self._handler(peer, message, frames)
        return self._handler(peer, message)

    def failure(self, what: str, exc: Exception) -> str:
        """Reason of a refusal, for the peer."""
        return f"{self.title} failed on {what}: {of_error(exc, MAX_REASON)}"
