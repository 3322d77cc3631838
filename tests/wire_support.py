"""Messages of every type for hypothesis, and frames made by hand."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import typing
from typing import Any, Literal

import msgpack
import msgspec
import numpy as np
from hypothesis import strategies as st

from atpo_async.core.bounds import MAX_NUMBER
from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from atpo_async.wire.records import TurnRecords

UNIONS = (
    m.ActorToBuffer,
    m.BufferToActor,
    m.LearnerToBuffer,
    m.BufferToLearner,
    m.ActorToLearner,
    m.LearnerToActor,
)
KINDS = tuple(dict.fromkeys(kind for union in UNIONS for kind in typing.get_args(union)))
EVERYTHING = functools.reduce(operator.or_, KINDS)

BYTES = {"data", "settings", "facts", "evaluations"}
"""Fields of messages that hold bytes."""
COUNTS = st.integers(0, 2**31 - 1)
# What ``str.isprintable`` takes: drawn so, as most texts would be filtered out.
TEXT = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), max_size=12)
FINITE = st.floats(-MAX_NUMBER, MAX_NUMBER)
SECONDS = st.floats(0, 1e9)


def int32s(min_size: int = 0, max_size: int = 100) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.integers(0, 2**31 - 1), min_size=min_size, max_size=max_size).map(
        lambda v: np.array(v, dtype=np.int32)
    )


def logprobs(size: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.floats(-(2.0**100), 0.0, width=32), min_size=size, max_size=size).map(
        lambda v: np.array(v, dtype=np.float32)
    )


@st.composite
def turns(draw: st.DrawFn) -> Turn:
    action = draw(int32s(1, 90))
    cuts = sorted(draw(st.sets(st.integers(1, len(action)), max_size=4)) | {len(action)})
    spans = [VersionSpan(draw(COUNTS), start, end) for start, end in zip([0, *cuts[:-1]], cuts, strict=True)]
    turn_id = draw(st.integers(1, 2**31 - 1))
    leaf = draw(st.booleans())
    return Turn(
        run=draw(TEXT),
        tree_id=draw(TEXT),
        turn_id=turn_id,
        parent_id=draw(st.integers(0, turn_id - 1)),
        lease_epoch=draw(COUNTS),
        expansion_round=draw(COUNTS),
        observation=draw(int32s()),
        action=action,
        logprobs=draw(logprobs(len(action))),
        spans=tuple(spans),
        end=draw(st.sampled_from(["done", "turn_limit", "length_limit"] if leaf else ["continue", "pruned"])),
        reward=draw(FINITE) if leaf else None,
        success=draw(st.none() | st.booleans()) if leaf else None,
        generate_s=draw(SECONDS),
        environment_s=draw(SECONDS),
        turn_reward=draw(st.just(0.0) | FINITE),
        rewards=draw(st.dictionaries(TEXT.filter(bool), FINITE, max_size=3)) if leaf else {},
        fingerprint=tuple(draw(st.lists(st.integers(0, 2**63 - 1), max_size=3))),
        state_value=draw(st.none() | FINITE),
    )


@st.composite
def manifests(draw: st.DrawFn) -> m.WeightsManifest:
    probe = draw(int32s(1, 70))
    tensors, offset = [], 0
    for name in draw(st.lists(TEXT, max_size=4)):
        dtype: Any = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
        shape = tuple(draw(st.lists(st.integers(0, 50), max_size=3)))
        nbytes = math.prod(shape) * (4 if dtype == "float32" else 2)
        tensors.append(
            m.TensorSpec(name=name, dtype=dtype, shape=shape, offset=offset, nbytes=nbytes, digest=draw(TEXT))
        )
        offset += nbytes + -nbytes % 64
    return m.WeightsManifest(
        run=draw(TEXT),
        version=draw(COUNTS),
        total_bytes=offset,
        chunk_bytes=draw(COUNTS),
        tensors=tuple(tensors),
        probe_token_ids=probe,
        probe_logprobs=draw(logprobs(len(probe) - 1)),
        probe_tolerance=draw(st.none() | FINITE.map(abs)),
    )


def of_type(hint: Any, name: str) -> st.SearchStrategy[Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Turn:
        return turns()
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return of_kind(hint)
    if hint is np.ndarray:
        return st.binary(max_size=300).map(lambda b: np.frombuffer(b, np.uint8)) if name in BYTES else int32s()
    if hint is TurnRecords:
        several = st.lists(turns(), max_size=3)
        return several.map(TurnRecords.of) | several.map(tuple)
    if hint is int:
        return st.integers(1, 2**31 - 1) if name == "turn_id" else COUNTS
    if hint is float:
        return SECONDS if name.endswith("_s") else FINITE.map(abs)
    if hint is str:
        return TEXT
    if hint is bool:
        return st.booleans()
    if hint is type(None):
        return st.none()
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        return st.lists(of_type(args[0], name), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXT, of_type(args[1], name), max_size=3)
    return st.one_of([of_type(a, name) for a in args])


def of_kind(kind: Any) -> st.SearchStrategy[Any]:
    if kind is Turn:
        return turns()
    if kind is m.WeightsManifest:
        return manifests()
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{name: of_type(hints[name], name) for name in kind.__struct_fields__})


ANY_MESSAGE = st.sampled_from(KINDS).flatmap(of_kind)


def contents(value: Any) -> Any:
    """Something that compares by value."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.tolist())
    if isinstance(value, msgspec.Struct):
        return (type(value), [contents(getattr(value, f)) for f in value.__struct_fields__])
    if isinstance(value, tuple | TurnRecords):
        return [contents(v) for v in value]
    return value


def turn(**changes: Any) -> Turn:
    fields: dict[str, Any] = {
        "run": "r",
        "tree_id": "t7",
        "turn_id": 3,
        "parent_id": 1,
        "lease_epoch": 0,
        "expansion_round": 0,
        "observation": np.array([4, 5], np.int32),
        "action": np.array([1, 2, 3], np.int32),
        "logprobs": np.array([-0.5, 0.0, -2.0], np.float32),
        "spans": (VersionSpan(0, 0, 2), VersionSpan(1, 2, 3)),
        "end": "done",
        "reward": 1.0,
        "success": True,
        "generate_s": 0.1,
        "environment_s": 0.0,
    }
    return Turn(**(fields | changes))


def frames_of(tree: Any, payload: bytes = b"") -> list[bytes]:
    return [msgpack.packb(tree), payload]


def decode_or_refuse(frames: list[bytes]) -> None:
    """Whatever comes in, it is a message that keeps all its promises, or a BadMessage, and nothing else."""
    try:
        message = codec.decode(frames, EVERYTHING)
    except BadMessage:
        return
    # Records of turns are checked when they are looked at; everything else has been.
    with contextlib.suppress(BadMessage):
        for _ in _records_of(message):
            pass
        codec.check(message)
    codec.encode(message)


def _records_of(message: Any) -> Any:
    for item in getattr(message, "trees", ()) or getattr(message, "leases", ()):
        yield from getattr(item, "turns", ()) or getattr(item, "committed", ())


def batch_of(turns: Any) -> m.Batch:
    tree = m.BatchTree(
        tree_id="t",
        task_index=0,
        prompt=np.array([1, 2, 3], np.int32),
        turns=turns,
        failed_branches=0,
        probability=0.5,
        weight=1.0,
        uses=1,
    )
    return m.Batch(
        batch_id=1,
        step=1,
        num_trees=1,
        num_leaves=1,
        num_action_tokens=3,
        num_turn_tokens=3,
        trees=(tree,),
        metrics={},
    )
