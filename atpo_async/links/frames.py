"""Link frames: the kinds that the two ends of a link exchange, their layout, and the size that a message may have.

Nothing here knows ZeroMQ.
"""

from __future__ import annotations

import struct
from typing import Any

from atpo_async.config import LinksConfig
from atpo_async.core.errors import BadMessage
from atpo_async.wire import codec

LINK = struct.Struct("<2sBQQQ")
"""A link frame: magic, kind, the client's session, two numbers whose meaning depends on the kind."""
MAGIC = b"a1"
SEND, REQUEST, PING, ACK, REFUSE, REPLY, PONG, REPLACED, DENIED, SENDS, FULL = range(1, 12)
"""SENDS is several in a row in one frame, as records (``wire.records``): most of what a small message costs on
its way is what each frame costs at both ends, whatever is in it.  FULL is the answer of a server that can take no
further client; the reason is in its second frame."""
MAX_SENDS = 64
SENDS_BYTES = 1 << 16
"""Most bytes that a client puts into one SENDS; a larger message goes alone, and without a copy."""

ID_SEPARATOR = b"\0"
"""In a routing id, between the client's name and bytes that cannot be guessed."""
MAX_NAME_BYTES = 200

MAX_REASON = 2000
"""Characters of a refusal's reason."""


def limits_of(settings: LinksConfig) -> codec.Limits:
    """The limits of a message on a link with these settings."""
    return codec.Limits(message_bytes=settings.max_message_bytes)


def encode_within(message: Any, limits: codec.Limits) -> list[codec.Buffer]:
    """Frames of a message that a receiver with the same limits takes.  Raises BadMessage if there are none."""
    frames = codec.encode(message)
    size = len(frames[0]) + len(frames[1])
    if size > limits.message_bytes or len(frames[0]) > limits.header_bytes:
        raise BadMessage(
            f"{type(message).__name__} of {size} bytes ({len(frames[0])} of header) exceeds links.max_message_bytes = "
            f"{limits.message_bytes} (an eighth of it for the header); raise it for every role"
        )
    return frames


def worth_a_line(count: int) -> bool:
    """Whether the ``count``-th of many alike is logged: the 1st, 2nd, 3rd, 10th, 100th, 1,000th, … is."""
    return count <= 3 or count == 10 ** (len(str(count)) - 1)
