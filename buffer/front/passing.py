"""Reads as little of an actor's message as it takes to pass it on: whose tree it is of, and no turn.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from atpo_async.core.errors import BadMessage
from atpo_async.core.naming.shards import shard_of
from atpo_async.core.tree import Turn
from atpo_async.wire import codec
from atpo_async.wire import messages as m

Frames = Sequence[codec.Buffer]

_OF_TREES = frozenset(str(kind.__struct_config__.tag) for kind in (m.TreeOpened, Turn, m.TreeClosed))
ToFront = m.ActorHello | m.LeaseRequest | m.LeaseReturned | m.ActorReport | m.RelayHello
"""What the front reads itself."""
_MAX_SHOWN = 60


class Passed(msgspec.Struct, frozen=True):
    """A message of a tree that the shard ``shard_of(tree_id)`` will read and check."""

    type: str
    run: str = ""
    tree_id: str = ""


_HEAD = msgspec.msgpack.Decoder(Passed)


def reader(limits: codec.Limits) -> Callable[[Frames], Any]:
    """Reads the messages of actors: ``Passed`` for those of trees, the others in full.  Raises BadMessage."""

    def read(frames: Frames) -> Any:
        if len(frames) != codec.NUM_FRAMES:
            raise BadMessage(f"a message of {len(frames)} frames; expected {codec.NUM_FRAMES}")
        if sum(map(len, frames)) > limits.message_bytes or len(frames[0]) > limits.header_bytes:
            raise BadMessage(f"message of {sum(map(len, frames))} bytes exceeds {limits.message_bytes}")
        try:
            head = _HEAD.decode(frames[0])
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise BadMessage(f"header is no message: {exc!s:.200}") from None
        if head.type not in _OF_TREES:
            return codec.decode(frames, ToFront, limits=limits)
        if shard_of(head.tree_id) is None:
            raise BadMessage(f"{head.type} of tree {head.tree_id[:_MAX_SHOWN]!r}: its id names no shard of this buffer")
        return head

    return read
