"""What each message promises beyond its types: ranges, lengths, finiteness, and what must agree with what.

The rules go by the field's name and type, so that a new message has its checks without a line here; turns and
manifests promise more, and that is written out.  Numbers are held to what the program keeps them in: ids and counts
to int32, other numbers to float32.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from atpo_async.core.dtypes import FLOAT32, INT32, PRECISION_BYTES, UINT8
from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire import messages as m
from atpo_async.wire.records import TurnRecords

MAX_ID = 2**31 - 1
"""Of ids, versions, counts and token ids."""
MAX_SIZE = 2**63 - 1
"""Of byte counts, and of sums over a whole batch or run."""
MAX_NUMBER = float(np.finfo(np.float32).max)
MAX_SECONDS = 1e9
"""Some thirty years: more is no duration but a point in time, or noise."""
MAX_NAME_BYTES = 200
MAX_TEXT_BYTES = 1 << 16
LOGPROB_SLACK = 2.0**-10
"""Log-probs may exceed 0 by this much: a softmax in reduced precision can round a sure token's to just above 0."""

Check = Callable[[Any], None]

_TOKENS = frozenset({"observation", "action", "prompt", "probe_token_ids"})
_LOGPROBS = frozenset({"logprobs", "probe_logprobs"})
_BYTES = frozenset({"data"})
_NAMES = frozenset({"run", "actor", "tree_id", "tree_ids", "environment"})
_SIZES = frozenset(
    {"total_bytes", "chunk_bytes", "offset", "nbytes", "num_action_tokens", "num_turn_tokens", "progress"}
)
_LEAST_INT: dict[tuple[type, str], int] = {
    # An actor that has no weights yet reports version -1; a lease may ask for none.
    (m.LeaseRequest, "version"): -1,
    (m.ActorReport, "version"): -1,
    (m.Lease, "min_version"): -1,
    (m.VersionGone, "newest"): -1,
    # Of an evaluation that has no turn yet.
    (m.EvalResult, "version_min"): -1,
    (m.EvalResult, "version_max"): -1,
}
_UNBOUNDED = frozenset({"seed", "shape"})
_NOT_NEGATIVE = frozenset({"probability", "weight", "probe_tolerance", "priorities", "success"})
# One bad number in a report must not cost an actor its leases: the metrics file drops what is not finite.
_MAY_BE_NOT_FINITE = frozenset({"metrics"})


def check(message: msgspec.Struct) -> None:
    """Hold ``message`` against what its type promises, as a receiver does, every turn included.  Raises BadMessage."""
    checker(type(message))(message)
    for turn in _turns_within(message):
        # Records are decoded, and so checked, by being looked at.
        checker(Turn)(turn)


def _turns_within(message: Any) -> Iterable[Turn]:
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, TurnRecords):
            yield from value
        elif type(value) is tuple:
            for item in value:
                if type(item) is Turn:
                    yield item
                elif isinstance(item, msgspec.Struct):
                    yield from _turns_within(item)


def _identity(message: Any) -> str:
    names = ("run", "actor", "tree_id", "turn_id", "batch_id", "step", "version", "index", "name")
    known = ", ".join(f"{n} {getattr(message, n)!r:.60}" for n in names if hasattr(message, n))
    return f"{type(message).__name__} ({known})"


def _bad(message: Any, fact: str) -> BadMessage:
    return BadMessage(f"{_identity(message)}: {fact}")


def _check_tokens(message: Any, name: str, tokens: np.ndarray) -> None:
    if tokens.dtype != INT32:
        raise _bad(message, f"{name} is {tokens.dtype}; expected int32")
    if len(tokens) and tokens.min() < 0:
        raise _bad(message, f"{name} has the negative token id {tokens.min()}")


def _check_logprobs(message: Any, name: str, logprobs: np.ndarray) -> None:
    if logprobs.dtype != FLOAT32:
        raise _bad(message, f"{name} is {logprobs.dtype}; expected float32")
    good = np.isfinite(logprobs) & (logprobs <= LOGPROB_SLACK)
    if not good.all():
        at = int(np.flatnonzero(~good)[0])
        raise _bad(message, f"{name}[{at}] is {logprobs[at]}; expected finite and at most {LOGPROB_SLACK}")


def _check_bytes(message: Any, name: str, data: np.ndarray) -> None:
    if data.dtype != UINT8:
        raise _bad(message, f"{name} is {data.dtype}; expected uint8")


def _check_int(message: Any, name: str, value: int, least: int) -> None:
    most, said = (MAX_SIZE, "2**63 - 1") if name in _SIZES else (MAX_ID, "2**31 - 1")
    if not least <= value <= most:
        raise _bad(message, f"{name} is {value}; expected {least} to {said}")


def _check_float(message: Any, name: str, value: float | None) -> None:
    if value is None:
        return
    if not math.isfinite(value) or abs(value) > MAX_NUMBER:
        raise _bad(message, f"{name} is {value}; expected a finite number that fits float32")
    is_duration = name.endswith("_s")
    if value < 0 and (is_duration or name in _NOT_NEGATIVE):
        raise _bad(message, f"{name} is {value}; expected at least 0")
    if is_duration and value > MAX_SECONDS:
        raise _bad(message, f"{name} is {value}; expected at most {MAX_SECONDS:g}")


def is_name(text: str) -> bool:
    """Whether ``text`` may name a run, an actor, a tree: printable, at most ``MAX_NAME_BYTES`` bytes; may be empty."""
    return text.isprintable() and (
        len(text) <= MAX_NAME_BYTES if text.isascii() else len(text.encode()) <= MAX_NAME_BYTES
    )


def _check_text(message: Any, name: str, text: str | None) -> None:
    if text is None:
        return
    if name in _NAMES and not is_name(text):
        raise _bad(message, f"{name} {text!r:.60} is no name; expected {MAX_NAME_BYTES} printable bytes at most")
    # A character takes four bytes at most.
    if len(text) > MAX_TEXT_BYTES // 4 and len(text.encode()) > MAX_TEXT_BYTES:
        raise _bad(message, f"{name} has {len(text.encode())} bytes; expected at most {MAX_TEXT_BYTES}")


def _check_mapping(message: Any, name: str, values: dict[str, float]) -> None:
    for key, value in values.items():
        if not is_name(key):
            raise _bad(
                message, f"{name} has the key {key!r:.60}; expected at most {MAX_NAME_BYTES} bytes, all printable"
            )
        if name not in _MAY_BE_NOT_FINITE and not 0 <= value <= MAX_NUMBER:
            raise _bad(
                message, f"{name}[{key!r:.60}] is {value}; expected a finite number of at least 0 that fits float32"
            )


def _check_turn(turn: Turn) -> None:
    if not 1 <= turn.turn_id <= MAX_ID:
        raise _bad(turn, f"turn_id is {turn.turn_id}; turns are numbered from 1 to 2**31 - 1")
    if not 0 <= turn.parent_id < turn.turn_id:
        raise _bad(turn, f"parent_id is {turn.parent_id}; a parent's id is at least 0 and below its child's")
    if not 0 <= turn.lease_epoch <= MAX_ID or not 0 <= turn.expansion_round <= MAX_ID:
        raise _bad(turn, f"lease_epoch {turn.lease_epoch} or expansion_round {turn.expansion_round} is out of range")
    _check_text(turn, "run", turn.run)
    _check_text(turn, "tree_id", turn.tree_id)
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
        if span.start != end or not end < span.end <= length or not 0 <= span.version <= MAX_ID:
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
    tokens, sequences = len(manifest.probe_token_ids), manifest.probe_sequences
    if sequences == 0 or tokens % sequences:
        raise _bad(manifest, f"{tokens} probe_token_ids are no {sequences} sequences of one length")
    if len(manifest.probe_logprobs) != max(0, tokens - sequences):
        raise _bad(manifest, f"{len(manifest.probe_logprobs)} probe_logprobs; expected {max(0, tokens - sequences)}")
    end = 0
    for spec in sorted(manifest.tensors, key=lambda s: s.offset):
        # Without the bound on their number, the product of many large factors would take its time.
        if len(spec.shape) > 32 or any(not 0 <= n <= MAX_SIZE for n in spec.shape):
            raise _bad(manifest, f"tensor {spec.name!r:.80} has the shape {list(spec.shape)!r:.200}")
        if math.prod(spec.shape) * PRECISION_BYTES[spec.dtype] != spec.nbytes:
            raise _bad(manifest, f"tensor {spec.name!r:.80} of {spec.dtype}{list(spec.shape)} has {spec.nbytes} bytes")
        if spec.offset < end or spec.offset + spec.nbytes > manifest.total_bytes:
            raise _bad(manifest, f"tensor {spec.name!r:.80} overlaps another or ends past {manifest.total_bytes} bytes")
        end = spec.offset + spec.nbytes


_WRITTEN_OUT: dict[type, Check] = {Turn: _check_turn}
_BEYOND_FIELDS: dict[type, Check] = {m.WeightsManifest: _check_manifest}


@lru_cache(maxsize=64)
def checker(kind: type) -> Check:
    """All checks of a message type, from its fields' types and names.  Records are left as they are, unlooked at."""
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
    if hint is str or hint == (str | None):
        return lambda message: _check_text(message, name, getattr(message, name))
    if typing.get_origin(hint) is dict:
        return lambda message: _check_mapping(message, name, getattr(message, name))
    if typing.get_origin(hint) is not tuple:
        return None
    if args[0] is str:
        return lambda message: _check_texts(message, name, getattr(message, name))
    if isinstance(args[0], type) and issubclass(args[0], msgspec.Struct):
        if args[0] is VersionSpan:
            raise TypeError(f"{kind.__name__}.{name}: spans are checked with their turn")
        item = checker(args[0])

        def each(message: Any) -> None:
            for value in getattr(message, name):
                item(value)

        return each
    return None


def _check_texts(message: Any, name: str, texts: tuple[str, ...]) -> None:
    for text in texts:
        _check_text(message, name, text)


_ARRAY_CHECKS: tuple[tuple[frozenset[str], Callable[[Any, str, np.ndarray], None]], ...] = (
    (_TOKENS, _check_tokens),
    (_LOGPROBS, _check_logprobs),
    (_BYTES, _check_bytes),
)
