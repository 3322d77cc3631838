"""Messages <-> frames: a msgpack header and one frame with all arrays, raw.

Frame 0 is the message as a msgpack map; in it an array is a descriptor ``[dtype code, offset, length]``, and turns
that are passed on as records (``atpo_async.wire.records``) are one array of bytes with their number, ``[dtype code,
offset, length, count]``.  Frame 1 holds the arrays one after another, little-endian, each on an 8-byte boundary,
nothing else; it is empty when there are none.  All arrays of the vocabulary have one dimension.

Incoming frames are not trusted.  Sizes are checked before anything is parsed.  The header is parsed straight into the
types of the message: what is of another type or out of its bounds, extension types included, ends the parse where it
stands, no memory is set aside for lengths that are only announced, nothing nests deeper than the vocabulary does, and
lists and maps are limited.  Then descriptors are checked against the payload, and contents against the rules of the
message (``wire.checks``).  Every violation is a ``BadMessage`` that states the fact and whose message it was.  Decoded
arrays are read-only views of the payload frame; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from atpo_async.core.bounds import LOGPROB_SLACK
from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import Turn
from atpo_async.wire import messages as m
from atpo_async.wire.arrays import Arrays, Buffer, Payload
from atpo_async.wire.checks import bad, check, rest_of
from atpo_async.wire.forms import MAX_ITEMS, Receiver, form_of, receiver_of
from atpo_async.wire.plain_turn import plain_turn
from atpo_async.wire.records import TurnRecords, codec

__all__ = [
    "DEFAULT_LIMITS",
    "LOGPROB_SLACK",
    "MAX_ITEMS",
    "NUM_FRAMES",
    "Buffer",
    "Limits",
    "check",
    "decode",
    "decode_turn",
    "encode",
]

NUM_FRAMES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a receiver takes.  ``message_bytes`` counts header and payload together."""

    message_bytes: int = 64 << 20

    @property
    def header_bytes(self) -> int:
        """An eighth of the message: parsed objects take many times the bytes they are parsed from."""
        return self.message_bytes // 8


DEFAULT_LIMITS = Limits()


# --- out -------------------------------------------------------------------------------------------------------


def encode(message: msgspec.Struct) -> list[Buffer]:
    """The two frames of ``message``.  Raises BadMessage for an array of another dtype or number of dimensions.

    Where the vocabulary has records of turns, any sequence of turns is taken.
    """
    payload = Payload()
    try:
        if type(message) in _RECORDS_WITHIN:
            message = _with_records(message)
        header = msgspec.msgpack.encode(message, enc_hook=payload.describe)
    except (TypeError, ValueError, OverflowError) as exc:
        raise BadMessage(f"{type(message).__name__} cannot be encoded: {exc}") from exc
    return [header, b"".join(payload.parts)]


_RECORDS_WITHIN: dict[type, tuple[tuple[str, str], ...]] = {
    m.Batch: (("trees", "turns"), ("rows", "turns")),
    m.Leases: (("leases", "committed"),),
}
"""Which field of the items of which field holds records of turns."""


def _with_records(message: Any) -> Any:
    replace = msgspec.structs.replace
    for outer, inner in _RECORDS_WITHIN[type(message)]:
        items = getattr(message, outer)
        if not all(type(getattr(item, inner)) is TurnRecords for item in items):
            packed = tuple(replace(item, **{inner: TurnRecords.of(getattr(item, inner))}) for item in items)
            message = replace(message, **{outer: packed})
    return message


# --- in --------------------------------------------------------------------------------------------------------


def decode(frames: Sequence[Buffer], union_type: Any, *, limits: Limits = DEFAULT_LIMITS) -> Any:
    """The message in ``frames``, checked in full; records of turns are checked when they are read.

    Args:
        frames: header and payload.
        union_type: the message types this receiver takes, for instance ``messages.ActorToBuffer``.
        limits: checked before anything is parsed.

    Raises:
        BadMessage: whatever is wrong with it.
    """
    if len(frames) != NUM_FRAMES:
        raise BadMessage(f"a message of {len(frames)} frames; expected {NUM_FRAMES}")
    header, payload = frames
    if len(header) > limits.header_bytes:
        raise BadMessage(f"header of {len(header)} bytes exceeds {limits.header_bytes}")
    if len(header) + len(payload) > limits.message_bytes:
        raise BadMessage(f"message of {len(header) + len(payload)} bytes exceeds {limits.message_bytes}")
    if type(payload) is not bytes:
        payload = memoryview(payload).toreadonly().cast("B")
    return _decode(header, payload, receiver_of(union_type))


def decode_turn(header: Buffer, payload: Buffer) -> Turn:
    """One turn, checked in full.  Raises BadMessage.

    The caller has checked the size of the frames; a payload that is no ``bytes`` is a read-only view of bytes.
    """
    turn: Turn = _decode(header, payload, _TURN_RECEIVER)
    return turn


def _decode(header: Buffer, payload: Buffer, receiver: Receiver) -> Any:
    try:
        value = receiver.parse(header)
    # Text that is no UTF-8 is a ValueError, nesting without end in a field to be skipped a RecursionError.
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise receiver.explain(header, payload, exc) from None
    if type(value) is _WireTurn:
        turn = plain_turn(value, payload)
        if turn is not None:
            return turn
    form = receiver.forms.get(type(value))
    if form is None:
        raise receiver.unknown("")
    arrays = Arrays(payload)
    try:
        message = form.message(value, arrays)
        arrays.check_layout()
    except BadMessage as exc:
        raise BadMessage(f"{form.kind.__struct_config__.tag}: {exc}") from None
    if (fact := rest_of(form.kind)(message)) is not None:
        raise bad(message, fact)
    return message


_WireTurn = form_of(Turn).wire
_TURN_RECEIVER = receiver_of(Turn)

codec.set(encode, decode_turn)
