"""Messages <-> frames: a msgpack header and one frame with all arrays, raw.

Frame 0 is the message as a msgpack map; in it an array is a descriptor ``[dtype code, offset, length]``.  Frame 1
holds the arrays one after another, little-endian, each on an 8-byte boundary, nothing else; it is empty when there
are none.  All arrays of the vocabulary have one dimension.

What comes in is not trusted: sizes are checked before anything is parsed, the header is parsed under limits, then
held against the schema, descriptors against the payload, and contents against what the message promises.  Every
violation is a ``BadMessage`` that states the fact and whose message it was.  Decoded arrays are read-only views of
the payload frame; nothing is copied.
"""

from __future__ import annotations

import math
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgpack
import msgspec
import numpy as np

from atpo_async import messages as m
from atpo_async.errors import BadMessage
from atpo_async.tree import Turn, VersionSpan

Buffer = bytes | memoryview

NUM_FRAMES = 2
LOGPROB_SLACK = 2.0**-10
"""Log-probs may exceed 0 by this much: a softmax in reduced precision can round a sure token's to just above 0."""

_ALIGN = 8
_PADDING = tuple(bytes(n) for n in range(_ALIGN))
_DTYPES = (np.dtype("<i4"), np.dtype("<f4"), np.dtype("u1"))
_INT32, _FLOAT32, _UINT8 = _DTYPES
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_SHORT = 64
_LITTLE = sys.byteorder == "little"
_MAX_INT = 2**63 - 1
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a receiver takes.  ``message_bytes`` counts header and payload together."""

    message_bytes: int = 64 << 20
    items: int = 1 << 16
    """Of any one list or map in the header."""
    string_bytes: int = 1 << 16

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
        self.parts: list[bytes] = []
        self.size = 0

    def describe(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            code = _CODES.get(value.dtype)
            if code is None or value.ndim != 1:
                raise BadMessage(
                    f"an array of {value.dtype}{list(value.shape)} cannot be sent; "
                    "arrays have one dimension and are int32, float32 or uint8"
                )
            padding = -self.size % _ALIGN
            if padding:
                self.parts.append(_PADDING[padding])
            offset = self.size + padding
            data = value.tobytes() if _LITTLE else value.astype(_DTYPES[code]).tobytes()
            self.parts.append(data)
            self.size = offset + len(data)
            return code, offset, len(value)
        if isinstance(value, np.generic):
            return value.item()
        raise BadMessage(f"a {type(value).__name__} cannot be sent")


def encode(message: msgspec.Struct) -> list[Buffer]:
    """The two frames of ``message``.  Raises BadMessage for an array of another dtype or number of dimensions."""
    payload = _Payload()
    try:
        header = msgspec.msgpack.encode(message, enc_hook=payload.describe)
    except (TypeError, ValueError, OverflowError) as exc:
        raise BadMessage(f"{type(message).__name__} cannot be encoded: {exc}") from exc
    return [header, b"".join(payload.parts)]


# --- in --------------------------------------------------------------------------------------------------------


class _Arrays:
    """Turns descriptors into views of the payload and remembers which bytes they took."""

    __slots__ = ("payload", "size", "taken")

    def __init__(self, payload: Buffer) -> None:
        self.payload = payload
        self.size = len(payload)
        self.taken: list[tuple[int, int]] = []

    def view(self, kind: type, value: Any) -> Any:
        if kind is not np.ndarray:
            raise BadMessage(f"the wire knows no {kind.__name__}")
        code, offset, length = value if type(value) is list and len(value) == 3 else (None, None, None)
        if type(code) is not int or type(offset) is not int or type(length) is not int:
            raise BadMessage(f"{value!r:.80} is no array descriptor [dtype code, offset, length]")
        if not 0 <= code < len(_DTYPES):
            raise BadMessage(f"array dtype code {code} is unknown; codes are 0 to {len(_DTYPES) - 1}")
        dtype = _DTYPES[code]
        end = offset + length * dtype.itemsize
        if offset < 0 or length < 0 or offset % _ALIGN or end > self.size:
            raise BadMessage(
                f"array at offset {offset} with {length} {dtype} items is not in {self.size} payload bytes"
            )
        self.taken.append((offset, end))
        if not length:
            return _EMPTY[code]
        return np.frombuffer(self.payload, dtype, length, offset)

    def check_layout(self) -> None:
        """The arrays lie side by side from 0 to the end: none overlap, no byte is unaccounted for."""
        end = 0
        for start, stop in sorted(self.taken):
            if start != end + -end % _ALIGN:
                raise BadMessage(f"array at offset {start} overlaps another or leaves a gap after byte {end}")
            end = stop
        if end != self.size:
            raise BadMessage(f"arrays end at byte {end} of {self.size} payload bytes")


_EMPTY = tuple(np.frombuffer(bytes(dtype.itemsize), dtype)[:0] for dtype in _DTYPES)


def decode(frames: Sequence[Buffer], union_type: Any, *, limits: Limits = DEFAULT_LIMITS) -> Any:
    """The message in ``frames``, checked in full.

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
    tree = _parse(header, limits)
    members = _members(union_type)
    tag = tree.get("type")
    kind = members.get(tag) if isinstance(tag, str) else None
    if kind is None:
        raise BadMessage(f"message type {tag!r:.80} is unknown here; expected one of {', '.join(members)}")
    arrays = _Arrays(payload if isinstance(payload, bytes) else payload.toreadonly().cast("B"))
    try:
        message = msgspec.convert(tree, kind, dec_hook=arrays.view)
    except BadMessage as exc:
        raise BadMessage(f"{tag}: {exc}") from None
    except (msgspec.ValidationError, ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise BadMessage(f"{tag}: {exc}") from None
    arrays.check_layout()
    _checker(kind)(message)
    return message


def check(message: msgspec.Struct) -> None:
    """Hold ``message`` against what its type promises, as a receiver does.  Raises BadMessage."""
    _checker(type(message))(message)


def _parse(header: Buffer, limits: Limits) -> dict[str, Any]:
    # Nesting needs no limit of ours: the parser's stack is fixed, and the schema is finite.
    try:
        tree = msgpack.unpackb(
            header,
            raw=False,
            strict_map_key=True,
            ext_hook=_refuse_extension,
            max_str_len=limits.string_bytes,
            max_bin_len=0,
            max_array_len=limits.items,
            max_map_len=limits.items,
            max_ext_len=0,
        )
    except BadMessage:
        raise
    # msgpack raises its own exceptions, ValueError for limits and text, TypeError for keys.
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException) as exc:
        raise BadMessage(f"header is no msgpack within the limits: {type(exc).__name__} {exc!s:.200}") from None
    if type(tree) is not dict:
        raise BadMessage(f"header is a {type(tree).__name__}; expected a map")
    return tree


def _refuse_extension(code: int, data: bytes) -> Any:
    raise BadMessage(f"header holds msgpack extension type {code}; none is taken")


@lru_cache(maxsize=64)
def _members(union_type: Any) -> dict[str, Any]:
    return {t.__struct_config__.tag: t for t in typing.get_args(union_type) or (union_type,)}


# --- what each message promises --------------------------------------------------------------------------------

Check = Callable[[Any], None]

_TOKENS = frozenset({"observation", "action", "prompt", "probe_token_ids"})
_LOGPROBS = frozenset({"logprobs", "probe_logprobs"})
_BYTES = frozenset({"data"})

_LEAST_INT: dict[tuple[type, str], int] = {
    # An actor that has no weights yet reports version -1; a lease may ask for none.
    (m.LeaseRequest, "version"): -1,
    (m.ActorReport, "version"): -1,
    (m.Lease, "min_version"): -1,
    (m.VersionGone, "newest"): -1,
}
_UNBOUNDED = frozenset({"seed", "shape"})
_NOT_NEGATIVE = frozenset({"probability", "weight", "probe_tolerance", "priorities", "success"})
# One bad number in a report must not cost an actor its leases: the metrics file drops what is not finite.
_MAY_BE_NOT_FINITE = frozenset({"metrics"})


def _identity(message: Any) -> str:
    names = ("run", "actor", "tree_id", "turn_id", "batch_id", "step", "version", "index", "name")
    known = ", ".join(f"{n} {getattr(message, n)!r:.60}" for n in names if hasattr(message, n))
    return f"{type(message).__name__} ({known})"


def _bad(message: Any, fact: str) -> BadMessage:
    return BadMessage(f"{_identity(message)}: {fact}")


def _check_tokens(message: Any, name: str, tokens: np.ndarray) -> None:
    if tokens.dtype != _INT32:
        raise _bad(message, f"{name} is {tokens.dtype}; expected int32")
    # Most arrays are short, and for those Python's own min is several times faster than numpy's.
    if len(tokens) and (min(tokens.tolist()) if len(tokens) <= _SHORT else tokens.min()) < 0:
        raise _bad(message, f"{name} has the negative token id {tokens.min()}")


def _check_logprobs(message: Any, name: str, logprobs: np.ndarray) -> None:
    if logprobs.dtype != _FLOAT32:
        raise _bad(message, f"{name} is {logprobs.dtype}; expected float32")
    if not len(logprobs):
        return
    if len(logprobs) <= _SHORT:
        # In double precision no sum of floats overflows, so it is finite exactly if each of them is.
        values = logprobs.tolist()
        good = math.isfinite(sum(values)) and max(values) <= LOGPROB_SLACK
    else:
        good = bool(np.isfinite(logprobs).all() and logprobs.max() <= LOGPROB_SLACK)
    if not good:
        at = int(np.flatnonzero(~(np.isfinite(logprobs) & (logprobs <= LOGPROB_SLACK)))[0])
        raise _bad(message, f"{name}[{at}] is {logprobs[at]}; expected finite and at most {LOGPROB_SLACK}")


def _check_bytes(message: Any, name: str, data: np.ndarray) -> None:
    if data.dtype != _UINT8:
        raise _bad(message, f"{name} is {data.dtype}; expected uint8")


def _check_int(message: Any, name: str, value: int, least: int) -> None:
    if not least <= value <= _MAX_INT:
        raise _bad(message, f"{name} is {value}; expected {least} to 2**63 - 1")


def _check_float(message: Any, name: str, value: float | None) -> None:
    if value is None:
        return
    if not math.isfinite(value):
        raise _bad(message, f"{name} is {value}; expected a finite number")
    if value < 0 and (name.endswith("_s") or name in _NOT_NEGATIVE):
        raise _bad(message, f"{name} is {value}; expected at least 0")


def _check_turn(turn: Turn) -> None:
    # Written out and not composed as the others are: this runs for every turn of a run.
    if not 1 <= turn.turn_id <= _MAX_INT:
        raise _bad(turn, f"turn_id is {turn.turn_id}; turns are numbered from 1")
    if not 0 <= turn.parent_id < turn.turn_id:
        raise _bad(turn, f"parent_id is {turn.parent_id}; a parent's id is at least 0 and below its child's")
    if not 0 <= turn.lease_epoch <= _MAX_INT or not 0 <= turn.expansion_round <= _MAX_INT:
        raise _bad(turn, f"lease_epoch {turn.lease_epoch} or expansion_round {turn.expansion_round} is out of range")
    length = len(turn.action)
    if not length:
        raise _bad(turn, "action is empty; expected at least one token")
    _check_tokens(turn, "observation", turn.observation)
    _check_tokens(turn, "action", turn.action)
    if len(turn.logprobs) != length:
        raise _bad(turn, f"{len(turn.logprobs)} logprobs for {length} action tokens")
    _check_logprobs(turn, "logprobs", turn.logprobs)
    end = 0
    for span in turn.spans:
        if span.start != end or not end < span.end <= length or not 0 <= span.version <= _MAX_INT:
            raise _bad(
                turn, f"span (version {span.version}, {span.start}:{span.end}) does not follow {end} of {length} tokens"
            )
        end = span.end
    if end != length:
        raise _bad(turn, f"spans cover {end} of {length} action tokens")
    if (turn.reward is None) is turn.is_leaf:
        raise _bad(turn, f"reward is {turn.reward} with end {turn.end!r}; a reward is set on leaves and only there")
    if turn.success is not None and not turn.is_leaf:
        raise _bad(turn, "success is set on a turn that is no leaf")
    _check_float(turn, "reward", turn.reward)
    _check_float(turn, "generate_s", turn.generate_s)
    _check_float(turn, "environment_s", turn.environment_s)


def _check_manifest(manifest: m.WeightsManifest) -> None:
    expected = max(0, len(manifest.probe_token_ids) - 1)
    if len(manifest.probe_logprobs) != expected:
        raise _bad(manifest, f"{len(manifest.probe_logprobs)} probe_logprobs; expected {expected}")
    end = 0
    for spec in sorted(manifest.tensors, key=lambda s: s.offset):
        if any(n < 0 for n in spec.shape) or math.prod(spec.shape) * _ITEM_BYTES[spec.dtype] != spec.nbytes:
            raise _bad(manifest, f"tensor {spec.name!r:.80} of {spec.dtype}{list(spec.shape)} has {spec.nbytes} bytes")
        if spec.offset < end or spec.offset + spec.nbytes > manifest.total_bytes:
            raise _bad(manifest, f"tensor {spec.name!r:.80} overlaps another or ends past {manifest.total_bytes} bytes")
        end = spec.offset + spec.nbytes


_WRITTEN_OUT: dict[type, Check] = {Turn: _check_turn}
_BEYOND_FIELDS: dict[type, Check] = {m.WeightsManifest: _check_manifest}


@lru_cache(maxsize=64)
def _checker(kind: type) -> Check:
    """All checks of a message type, from its fields' types and names."""
    if kind in _WRITTEN_OUT:
        return _WRITTEN_OUT[kind]
    hints = typing.get_type_hints(kind)
    checks = [c for name in kind.__struct_fields__ if (c := _field_check(kind, name, hints[name]))]  # type: ignore[attr-defined]
    if kind in _BEYOND_FIELDS:
        checks.append(_BEYOND_FIELDS[kind])

    def run(message: Any) -> None:
        for one in checks:
            one(message)

    return run


def _field_check(kind: type, name: str, hint: Any) -> Check | None:
    args = typing.get_args(hint)
    if hint is np.ndarray:
        array_check = next((c for names, c in _ARRAY_CHECKS if name in names), None)
        if array_check is None:
            raise TypeError(f"the wire has no dtype for {kind.__name__}.{name}")
        return lambda message: array_check(message, name, getattr(message, name))
    if hint is int and name not in _UNBOUNDED:
        least = _LEAST_INT.get((kind, name), 0)
        return lambda message: _check_int(message, name, getattr(message, name), least)
    if hint is float or hint == (float | None):
        return lambda message: _check_float(message, name, getattr(message, name))
    if typing.get_origin(hint) is dict and name not in _MAY_BE_NOT_FINITE:
        return lambda message: _check_mapping(message, name, getattr(message, name))
    if typing.get_origin(hint) is tuple and isinstance(args[0], type) and issubclass(args[0], msgspec.Struct):
        if args[0] is VersionSpan:
            raise TypeError(f"{kind.__name__}.{name}: spans are checked with their turn")
        item = _checker(args[0])

        def each(message: Any) -> None:
            for value in getattr(message, name):
                item(value)

        return each
    return None


def _check_mapping(message: Any, name: str, values: dict[str, float]) -> None:
    for key, value in values.items():
        if not math.isfinite(value) or value < 0:
            raise _bad(message, f"{name}[{key!r:.60}] is {value}; expected a finite number of at least 0")


_ARRAY_CHECKS: tuple[tuple[frozenset[str], Callable[[Any, str, np.ndarray], None]], ...] = (
    (_TOKENS, _check_tokens),
    (_LOGPROBS, _check_logprobs),
    (_BYTES, _check_bytes),
)
