"""Messages <-> frames: a msgpack header and one frame with all arrays, raw.

Frame 0 is the message as a msgpack map; in it an array is a descriptor ``[dtype code, offset, length]``, and turns
that are passed on as records (``atpo_async.wire.records``) are one array of bytes with their number, ``[dtype code,
offset, length, count]``.  Frame 1 holds the arrays one after another, little-endian, each on an 8-byte boundary,
nothing else; it is empty when there are none.  All arrays of the vocabulary have one dimension.

What comes in is not trusted.  Sizes are checked before anything is parsed.  The header is parsed straight into the
types of the message: what is of another type, extension types included, ends the parse where it stands, no room is
made for lengths that are only announced, nothing nests deeper than the vocabulary does, and lists and maps are
limited.  Then descriptors are held against the payload, and contents against what the message promises
(``wire.checks``).  Every violation is a ``BadMessage`` that states the fact and whose message it was.  Decoded
arrays are read-only views of the payload frame; nothing is copied.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import msgspec
import numpy as np

from atpo_async.core.dtypes import FLOAT32, INT32, WIRE_DTYPES
from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire import messages as m
from atpo_async.wire.checks import (
    LOGPROB_SLACK,
    MAX_ID,
    MAX_NAME_BYTES,
    MAX_NUMBER,
    MAX_SECONDS,
    check,
    checker,
)
from atpo_async.wire.records import MIN_RECORD_BYTES, TurnRecords, codec

__all__ = [
    "DEFAULT_LIMITS",
    "LOGPROB_SLACK",
    "NUM_FRAMES",
    "Buffer",
    "Limits",
    "check",
    "decode",
    "decode_turn",
    "encode",
]

Buffer = bytes | memoryview

NUM_FRAMES = 2
MAX_ITEMS = 1 << 16
"""Of any one list or map in the header."""

_ALIGN = 8
_PADDING = tuple(bytes(n) for n in range(_ALIGN))
_CODES = {dtype: code for code, dtype in enumerate(WIRE_DTYPES)}
_INT32_CODE, _FLOAT32_CODE, _UINT8_CODE = range(len(WIRE_DTYPES))
_LITTLE = sys.byteorder == "little"


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


class _Payload:
    """Gathers the arrays of one message in the order in which the header names them."""

    __slots__ = ("parts", "size")

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.size = 0

    def describe(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            code = _CODES.get(value.dtype)
            if code is None or value.ndim != 1:
                raise BadMessage(
                    f"an array of {value.dtype}{list(value.shape)} cannot be sent; "
                    "arrays have one dimension and are int32, float32 or uint8"
                )
            data = value.tobytes() if _LITTLE else value.astype(WIRE_DTYPES[code]).tobytes()
            return code, self._add((data,), len(data)), len(value)
        if isinstance(value, TurnRecords):
            return _UINT8_CODE, self._add(value.parts, value.nbytes), value.nbytes, len(value)
        if isinstance(value, np.generic):
            return value.item()
        raise BadMessage(f"a {type(value).__name__} cannot be sent")

    def _add(self, parts: Sequence[Any], nbytes: int) -> int:
        offset = self.size
        padding = -offset % _ALIGN
        if padding:
            self.parts.append(_PADDING[padding])
            offset += padding
        self.parts += parts
        self.size = offset + nbytes
        return offset


def encode(message: msgspec.Struct) -> list[Buffer]:
    """The two frames of ``message``.  Raises BadMessage for an array of another dtype or number of dimensions.

    Where the vocabulary has records of turns, any sequence of turns is taken.
    """
    payload = _Payload()
    try:
        if type(message) in _RECORDS_WITHIN:
            message = _with_records(message)
        header = msgspec.msgpack.encode(message, enc_hook=payload.describe)
    except (TypeError, ValueError, OverflowError) as exc:
        raise BadMessage(f"{type(message).__name__} cannot be encoded: {exc}") from exc
    return [header, b"".join(payload.parts)]


_RECORDS_WITHIN: dict[type, tuple[str, str]] = {m.Batch: ("trees", "turns"), m.Leases: ("leases", "committed")}
"""Which field of the items of which field holds records of turns."""


def _with_records(message: Any) -> Any:
    outer, inner = _RECORDS_WITHIN[type(message)]
    items = getattr(message, outer)
    if all(type(getattr(item, inner)) is TurnRecords for item in items):
        return message
    replace = msgspec.structs.replace
    packed = tuple(replace(item, **{inner: TurnRecords.of(getattr(item, inner))}) for item in items)
    return replace(message, **{outer: packed})


# --- in --------------------------------------------------------------------------------------------------------


class _Arrays:
    """Turns descriptors into views of the payload and remembers which bytes they took."""

    __slots__ = ("payload", "size", "taken")

    def __init__(self, payload: Buffer) -> None:
        self.payload = payload
        self.size = len(payload)
        self.taken: list[tuple[int, int]] = []

    def view(self, descriptor: tuple[int, int, int]) -> np.ndarray:
        code, offset, length = descriptor
        self._take(code, offset, length)
        if not length:
            return _EMPTY[code]
        return np.frombuffer(self.payload, WIRE_DTYPES[code], length, offset)

    def records(self, descriptor: tuple[int, int, int, int]) -> TurnRecords:
        code, offset, length, count = descriptor
        self._take(code, offset, length)
        if code != _UINT8_CODE:
            raise BadMessage(f"records are {WIRE_DTYPES[code]}; expected uint8")
        if not 0 <= count <= length // MIN_RECORD_BYTES or (length and not count):
            raise BadMessage(f"{count} turns cannot be in {length} bytes of records")
        return TurnRecords.raw((memoryview(self.payload)[offset : offset + length],) if length else (), count)

    def _take(self, code: int, offset: int, length: int) -> None:
        if not 0 <= code < len(WIRE_DTYPES):
            raise BadMessage(f"array dtype code {code} is unknown; codes are 0 to {len(WIRE_DTYPES) - 1}")
        dtype = WIRE_DTYPES[code]
        end = offset + length * dtype.itemsize
        if offset < 0 or length < 0 or offset % _ALIGN or end > self.size:
            raise BadMessage(
                f"array at offset {offset} with {length} {dtype} items is not in {self.size} payload bytes"
            )
        self.taken.append((offset, end))

    def check_layout(self) -> None:
        """The arrays lie side by side from 0 to the end: none overlap, no byte is unaccounted for."""
        end = 0
        for start, stop in sorted(self.taken):
            if start != end + -end % _ALIGN:
                raise BadMessage(f"array at offset {start} overlaps another or leaves a gap after byte {end}")
            end = stop
        if end != self.size:
            raise BadMessage(f"arrays end at byte {end} of {self.size} payload bytes")


_EMPTY = tuple(np.frombuffer(bytes(dtype.itemsize), dtype)[:0] for dtype in WIRE_DTYPES)


def decode(frames: Sequence[Buffer], union_type: Any, *, limits: Limits = DEFAULT_LIMITS) -> Any:
    """The message in ``frames``, checked in full; records of turns are checked when they are looked at.

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
    known = _receivers.get(id(union_type))
    return _decode(header, payload, known[1] if known else _receiver(union_type))


def decode_turn(header: Buffer, payload: Buffer) -> Turn:
    """One turn, checked in full.  Raises BadMessage.

    The frames are of a size that somebody has looked at; a payload that is no ``bytes`` is a read-only view of bytes.
    """
    turn: Turn = _decode(header, payload, _TURN_RECEIVER)
    return turn


def _decode(header: Buffer, payload: Buffer, receiver: _Receiver) -> Any:
    try:
        value = receiver.parse(header)
    # Text that is no UTF-8 is a ValueError, nesting without end in a field to be skipped a RecursionError.
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise receiver.explain(header, exc) from None
    if type(value) is _WireTurn:
        turn = _plain_turn(value, payload)
        if turn is not None:
            return turn
    form = receiver.forms.get(type(value))
    if form is None:
        raise receiver.unknown("")
    arrays = _Arrays(payload)
    try:
        message = form.message(value, arrays)
        arrays.check_layout()
    except BadMessage as exc:
        raise BadMessage(f"{form.kind.__struct_config__.tag}: {exc}") from None
    checker(form.kind)(message)
    return message


# --- the types that the header is parsed into ------------------------------------------------------------------


class _Nothing(msgspec.Struct, tag="", frozen=True):
    """A type alone is parsed without its tag, too; with a second one the tag must be there."""


class _Tag(msgspec.Struct, frozen=True):
    """What a header that could not be parsed says it is."""

    type: str = ""


class _Form:
    """A struct as the header has it: arrays are descriptors, lists and maps have an end."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self._raised: list[tuple[str, Callable[[Any, _Arrays], Any]]] = []
        hints, fields = typing.get_type_hints(kind), []
        for field in msgspec.structs.fields(kind):
            hint, raised = _lowered(hints[field.name])
            if raised is not None:
                self._raised.append((field.name, raised))
            fields.append((field.name, hint) if field.required else (field.name, hint, field.default))
        config = kind.__struct_config__
        self.wire = msgspec.defstruct(
            kind.__name__, fields, tag=config.tag, kw_only=True, frozen=True, forbid_unknown_fields=True, eq=False
        )

    def message(self, value: Any, arrays: _Arrays) -> Any:
        fields = msgspec.structs.asdict(value)
        for name, raised in self._raised:
            fields[name] = raised(fields[name], arrays)
        return self.kind(**fields)


def _lowered(hint: Any) -> tuple[Any, Callable[[Any, _Arrays], Any] | None]:
    """The type that stands for ``hint`` in the header, and how to get from its value to the one of ``hint``."""
    if hint is np.ndarray:
        return tuple[int, int, int], lambda value, arrays: arrays.view(value)
    if hint is TurnRecords:
        return tuple[int, int, int, int], lambda value, arrays: arrays.records(value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return Annotated[hint, msgspec.Meta(max_length=MAX_ITEMS)], None
    if origin is not tuple:
        return hint, None
    if not isinstance(args[0], type) or not issubclass(args[0], msgspec.Struct) or args[0] is VersionSpan:
        return Annotated[hint, msgspec.Meta(max_length=MAX_ITEMS)], None
    item = _Form(args[0])
    of_items = tuple[item.wire, ...]  # type: ignore[name-defined]
    return (
        Annotated[of_items, msgspec.Meta(max_length=MAX_ITEMS)],
        lambda value, arrays: tuple([item.message(v, arrays) for v in value]),
    )


@lru_cache(maxsize=64)
def _form(kind: Any) -> _Form:
    return _Form(kind)


class _Receiver:
    """The parser for one union of message types."""

    def __init__(self, union_type: Any) -> None:
        kinds = typing.get_args(union_type) or (union_type,)
        forms = [_form(kind) for kind in kinds]
        self.forms = {form.wire: form for form in forms}
        self.tags = tuple(str(kind.__struct_config__.tag) for kind in kinds)
        self.parse = msgspec.msgpack.Decoder(typing.Union[(_Nothing, *self.forms)]).decode

    def explain(self, header: Buffer, exc: Exception) -> BadMessage:
        if not isinstance(exc, msgspec.ValidationError):
            return BadMessage(f"header is no msgpack within the limits: {type(exc).__name__} {exc!s:.200}")
        try:
            tag = _PARSE_TAG(header).type
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return BadMessage(f"header is no message: {exc!s:.200}")
        if tag in self.tags:
            return BadMessage(f"{tag}: {exc!s:.200}")
        return self.unknown(tag)

    def unknown(self, tag: str) -> BadMessage:
        return BadMessage(f"message type {tag!r:.80} is unknown here; expected one of {', '.join(self.tags)}")


_PARSE_TAG = msgspec.msgpack.Decoder(_Tag).decode

_receivers: dict[int, tuple[Any, _Receiver]] = {}
"""By the union's id: its hash takes longer than all of the parse.  The union is kept, so that the id stays its own."""


def _receiver(union_type: Any) -> _Receiver:
    receiver = _receiver_of(union_type)
    # Unions that are made anew for every call must not pile up.
    if len(_receivers) < 64:
        _receivers[id(union_type)] = (union_type, receiver)
    return receiver


@lru_cache(maxsize=64)
def _receiver_of(union_type: Any) -> _Receiver:
    return _Receiver(union_type)


# --- turns, which are nearly all there is ----------------------------------------------------------------------

_WireTurn = _form(Turn).wire
_TURN_RECEIVER = _receiver(Turn)

# The first byte of a float32, the sign and seven bits of the exponent.  With these it is negative and finite, or from
# 0 to under half of the slack; 0xff may be infinite, 0x3a above the slack: those are looked at more closely.
_PLAIN_LOGPROB = bytes([*range(0x3A), *range(0x80, 0xFF)])
assert LOGPROB_SLACK == 2.0**-10


def _plain_turn(value: Any, payload: Buffer) -> Turn | None:
    """The turn, if it is one that needs no closer look: laid out as ``encode`` does it, and plainly within all bounds.

    None does not mean that it is bad.  This is what runs for every turn of a run, so it is written for speed: arrays
    are held against their bounds by their highest bytes alone.
    """
    observation_code, observation_at, observation_len = value.observation
    action_code, action_at, length = value.action
    logprobs_code, logprobs_at, logprobs_len = value.logprobs
    action_end = action_at + 4 * length
    logprobs_end = logprobs_at + 4 * length
    if not (
        observation_code == action_code == _INT32_CODE
        and logprobs_code == _FLOAT32_CODE
        and observation_at == 0
        and 0 <= observation_len <= MAX_ID
        and 0 < length == logprobs_len <= MAX_ID
        and action_at == (4 * observation_len + 7) & -8
        and logprobs_at == (action_end + 7) & -8
        and logprobs_end == len(payload)
    ):
        return None
    turn_id, end, reward = value.turn_id, value.end, value.reward
    run, tree_id = value.run, value.tree_id
    if not (
        0 <= value.parent_id < turn_id <= MAX_ID
        and 0 <= value.lease_epoch <= MAX_ID
        and 0 <= value.expansion_round <= MAX_ID
        and 0.0 <= value.generate_s <= MAX_SECONDS
        and 0.0 <= value.environment_s <= MAX_SECONDS
        and len(run) <= MAX_NAME_BYTES >= len(tree_id)
        and run.isascii()
        and tree_id.isascii()
        and run.isprintable()
        and tree_id.isprintable()
    ):
        return None
    if end == "continue":
        if reward is not None or value.success is not None:
            return None
    elif reward is None or not -MAX_NUMBER <= reward <= MAX_NUMBER:
        return None
    covered = 0
    for span in value.spans:
        if span.start != covered or not covered < span.end <= length or not 0 <= span.version <= MAX_ID:
            return None
        covered = span.end
    if covered != length:
        return None
    raw = payload if type(payload) is bytes else bytes(payload)
    # The sign of every token id at once; the zeros between the two arrays do not matter.
    if not raw[3:action_end:4].isascii() or raw[logprobs_at + 3 :: 4].translate(None, _PLAIN_LOGPROB):
        return None
    return Turn(
        run=run,
        tree_id=tree_id,
        turn_id=turn_id,
        parent_id=value.parent_id,
        lease_epoch=value.lease_epoch,
        expansion_round=value.expansion_round,
        observation=np.frombuffer(payload, INT32, observation_len) if observation_len else _EMPTY[_INT32_CODE],
        action=np.frombuffer(payload, INT32, length, action_at),
        logprobs=np.frombuffer(payload, FLOAT32, length, logprobs_at),
        spans=value.spans,
        end=end,
        reward=reward,
        success=value.success,
        generate_s=value.generate_s,
        environment_s=value.environment_s,
    )


codec.set(encode, decode_turn)
