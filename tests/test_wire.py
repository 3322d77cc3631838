"""Messages to frames and back; and nothing but BadMessage for whatever else arrives."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import struct
import tracemalloc
import typing
from collections.abc import Sequence
from typing import Any, Literal

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.core.bounds import MAX_NUMBER
from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from atpo_async.wire.checks import bounds_of, rest_of
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

COUNTS = st.integers(0, 2**31 - 1)
TEXT = st.text(max_size=12).filter(str.isprintable)
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
        end=draw(st.sampled_from(["done", "turn_limit", "length_limit"])) if leaf else "continue",
        reward=draw(FINITE) if leaf else None,
        success=draw(st.none() | st.booleans()) if leaf else None,
        generate_s=draw(SECONDS),
        environment_s=draw(SECONDS),
    )


@st.composite
def manifests(draw: st.DrawFn) -> m.WeightsManifest:
    probe = draw(int32s(1, 70))
    tensors, offset = [], 0
    for name in draw(st.lists(TEXT, max_size=4)):
        dtype: Any = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
        shape = tuple(draw(st.lists(st.integers(0, 50), max_size=3)))
        nbytes = math.prod(shape) * (4 if dtype == "float32" else 2)
        tensors.append(m.TensorSpec(name=name, dtype=dtype, shape=shape, offset=offset, nbytes=nbytes))
        offset += nbytes + -nbytes % 64
    return m.WeightsManifest(
        run=draw(TEXT),
        version=draw(COUNTS),
        total_bytes=offset,
        chunk_bytes=draw(COUNTS),
        sha256=draw(TEXT),
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
        return st.binary(max_size=300).map(lambda b: np.frombuffer(b, np.uint8)) if name == "data" else int32s()
    if hint is TurnRecords:
        several = st.lists(turns(), max_size=3)
        return several.map(TurnRecords.of) | several.map(tuple)
    if hint is int:
        return COUNTS
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


# --- round trip ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_every_message_comes_back_as_it_was(kind: Any) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(of_kind(kind))
    def round_trip(message: Any) -> None:
        frames = codec.encode(message)
        assert contents(codec.decode(frames, EVERYTHING)) == contents(message)

    round_trip()


def test_decoded_arrays_are_read_only_views_of_the_payload_on_8_byte_boundaries() -> None:
    frames = codec.encode(turn())
    payload = bytearray(frames[1])
    decoded = codec.decode([frames[0], memoryview(payload)], m.ActorToBuffer)
    for array in (decoded.observation, decoded.action, decoded.logprobs):
        assert not array.flags.writeable
        assert array.ctypes.data % 8 == 0
    payload[0:4] = struct.pack("<i", 77)
    assert decoded.observation[0] == 77


def test_arrays_are_little_endian_in_one_frame_in_the_order_of_the_fields() -> None:
    header, payload = codec.encode(turn())
    assert len(payload) == 8 + 16 + 12
    assert payload[:8] == struct.pack("<2i", 4, 5)
    assert payload[8:20] == struct.pack("<3i", 1, 2, 3)
    assert payload[24:] == struct.pack("<3f", -0.5, 0.0, -2.0)
    assert msgpack.unpackb(header)["logprobs"] == [1, 24, 3]


def test_strided_arrays_and_numpy_scalars_are_sent_by_value() -> None:
    message = turn(action=np.arange(6, dtype=np.int32)[::2], reward=np.float64(0.5), turn_id=np.int64(3))
    decoded = codec.decode(codec.encode(message), m.ActorToBuffer)
    assert (decoded.action.tolist(), decoded.reward, decoded.turn_id) == ([0, 2, 4], 0.5, 3)


@pytest.mark.parametrize("array", [np.zeros(2, np.int64), np.zeros(2, np.float64), np.zeros((2, 2), np.int32)])
def test_an_array_the_wire_does_not_carry_is_refused_at_the_sender(array: np.ndarray) -> None:
    with pytest.raises(BadMessage, match="cannot be sent"):
        codec.encode(turn(observation=array))


def test_every_message_type_has_its_checks() -> None:
    for kind in KINDS:
        bounds_of(kind)
        rest_of(kind)


# --- hostile input ---------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None, derandomize=True)
@given(ANY_MESSAGE, st.data())
def test_mutated_bytes_give_a_valid_message_or_bad_message(message: Any, data: st.DataObject) -> None:
    frames = [bytearray(f) for f in codec.encode(message)]
    for _ in range(data.draw(st.integers(1, 3))):
        frame = data.draw(st.sampled_from(frames))
        at = data.draw(st.integers(0, len(frame)))
        how = data.draw(st.sampled_from(["flip", "cut", "insert", "delete"]))
        if how == "cut":
            del frame[at:]
        elif how == "insert":
            frame[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif how == "delete":
            del frame[at : at + data.draw(st.integers(1, 9))]
        elif at < len(frame):
            frame[at] ^= data.draw(st.integers(1, 255))
    decode_or_refuse([bytes(f) for f in frames])


ANY_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from([kind.__struct_config__.tag for kind in KINDS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(ANY_MESSAGE, ANY_VALUE, st.data())
def test_a_foreign_value_anywhere_in_the_header_gives_a_valid_message_or_bad_message(
    message: Any, value: Any, data: st.DataObject
) -> None:
    header, payload = codec.encode(message)
    tree = msgpack.unpackb(header)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(tree)
    node, key = data.draw(st.sampled_from(places))
    node[key] = value
    decode_or_refuse(frames_of(tree, bytes(payload)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.binary(max_size=40), max_size=4))
def test_garbage_is_a_bad_message(frames: list[bytes]) -> None:
    decode_or_refuse(frames)


@pytest.mark.parametrize("num_frames", [0, 1, 3])
def test_another_number_of_frames_is_refused(num_frames: int) -> None:
    with pytest.raises(BadMessage, match=f"{num_frames} frames; expected 2"):
        codec.decode((codec.encode(turn()) * 2)[:num_frames], m.ActorToBuffer)


def test_oversize_is_refused_before_anything_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("parsed")

    monkeypatch.setattr(codec, "_decode", never)
    limits = codec.Limits(message_bytes=800)
    with pytest.raises(BadMessage, match="header of 101 bytes exceeds 100"):
        codec.decode([bytes(101), b""], m.ActorToBuffer, limits=limits)
    with pytest.raises(BadMessage, match="message of 801 bytes exceeds 800"):
        codec.decode([bytes(1), bytes(800)], m.ActorToBuffer, limits=limits)


def test_extension_types_are_refused() -> None:
    for data in (b"", b"x" * 4):
        with pytest.raises(BadMessage):
            codec.decode(frames_of({"type": "run_finished", "run": msgpack.ExtType(4, data)}), m.LearnerToBuffer)
    with pytest.raises(BadMessage):
        codec.decode(frames_of({"type": "run_finished", "run": msgpack.Timestamp(1, 2)}), m.LearnerToBuffer)


def test_nesting_without_end_is_refused() -> None:
    for depth in (500, 5000, 1_000_000):
        with pytest.raises(BadMessage):
            codec.decode([b"\x81\xa4type" + b"\x91" * depth + b"\x00", b""], m.ActorToBuffer)


LONG = b"\xff\xff\xff\xff"
DEEP = b"\x91" * 1_000_000 + b"\x00"
HUGE_LENGTHS = {
    "list": b"\xdd" + LONG,
    "list of a few": b"\xdd" + LONG + bytes(1000),
    "map": b"\xdf" + LONG,
    "string": b"\xdb" + LONG,
    "bytes": b"\xc6" + LONG,
    "extension": b"\xc9" + LONG + b"\x05",
    "nested lists": DEEP,
    "nested maps": b"\x81\xa1x" * 1_000_000 + b"\x00",
}
HEADS = {
    "the type": b"\x81\xa4type",
    "a field before the type": b"\x82\xa1x",
    "a list of strings": b"\x82\xa4type\xaflease_returned\xa8tree_ids",
    "a map": b"\x82\xa4type\xa7trained\xaapriorities",
    "a string": b"\x82\xa4type\xacrun_finished\xa3run",
    "a number": b"\x82\xa4type\xa7trained\xa8batch_id",
    "a list of structs": b"\x82\xa4type\xa5batch\xa5trees",
    "a descriptor": b"\x82\xa4type\xa4turn\xa6action",
    "spans": b"\x82\xa4type\xa4turn\xa5spans",
    "an unknown field": b"\x82\xa4type\xa4turn\xa1x",
    "a key": b"\x82\xa4type\xa4turn",
    "nothing": b"",
}


@pytest.mark.parametrize("length", HUGE_LENGTHS)
@pytest.mark.parametrize("head", HEADS)
def test_what_announces_more_than_it_brings_is_refused_without_room_made_for_it(head: str, length: str) -> None:
    frames = [HEADS[head] + HUGE_LENGTHS[length], b""]
    tracemalloc.start()
    try:
        with pytest.raises(BadMessage):
            codec.decode(frames, EVERYTHING)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Nothing near what is announced, 4 GB and more.  The parser's way into a million lists ends early too.
    assert peak_bytes < 1_000_000


def test_lists_and_maps_over_the_limit_are_refused_before_their_items_are_read() -> None:
    too_many = codec.MAX_ITEMS + 1
    for tree in (
        {"type": "lease_returned", "run": "r", "actor": "a", "tree_ids": ["t"] * too_many},
        {
            "type": "trained",
            "run": "r",
            "batch_id": 1,
            "version": 1,
            "priorities": {f"{i}": 1.0 for i in range(too_many)},
        },
        {**msgpack.unpackb(codec.encode(turn())[0]), "spans": [[0, 0, 3]] * too_many},
    ):
        with pytest.raises(BadMessage, match=f"of length <= {codec.MAX_ITEMS}"):
            codec.decode(frames_of(tree), EVERYTHING)


def test_a_message_must_say_what_it_is() -> None:
    for tag, said in (("", "message type '' is unknown"), (7, "no message"), (None, "no message")):
        for union in (m.ActorToBuffer, m.ManifestRequest):
            with pytest.raises(BadMessage, match=said):
                codec.decode(frames_of({"type": tag, "run": "r", "version": 1}), union)
    with pytest.raises(BadMessage, match="message type '' is unknown"):
        codec.decode(frames_of({"run": "r", "version": 1}), m.ManifestRequest)


def test_a_type_of_another_receiver_is_refused_with_those_that_are_taken() -> None:
    with pytest.raises(BadMessage, match=r"'run_finished' is unknown here; expected one of actor_hello"):
        codec.decode(codec.encode(m.RunFinished(run="r")), m.ActorToBuffer)


def test_unknown_and_missing_fields_are_refused() -> None:
    with pytest.raises(BadMessage, match="unknown field `more`"):
        codec.decode(frames_of({"type": "run_finished", "run": "r", "more": 1}), m.LearnerToBuffer)
    with pytest.raises(BadMessage, match="missing required field `run`"):
        codec.decode(frames_of({"type": "run_finished"}), m.LearnerToBuffer)


@pytest.mark.parametrize(
    ("descriptor", "size"),
    [
        ([2, 0, 9], 8),
        ([2, 8, 1], 8),
        ([2, -8, 8], 8),
        ([2, 0, -1], 8),
        ([2, 4, 4], 8),
        ([3, 0, 8], 8),
        ([-1, 0, 8], 8),
        ([2, 0, 2**62], 8),
        ([2, 0, 4], 8),
        ([2, 8, 8], 16),
        ([2, 0], 8),
        ([2, 0, 8, 1], 8),
        ([2, 0, 8.0], 8),
        ([True, 0, 8], 8),
        ("array", 8),
    ],
)
def test_a_descriptor_that_does_not_fit_the_payload_is_refused(descriptor: Any, size: int) -> None:
    tree = {"type": "chunk", "version": 0, "index": 0, "data": descriptor}
    with pytest.raises(BadMessage):
        codec.decode(frames_of(tree, bytes(size)), m.LearnerToActor)


def test_arrays_that_overlap_are_refused() -> None:
    header, payload = codec.encode(turn())
    tree = msgpack.unpackb(header)
    tree["action"][1] = 0
    with pytest.raises(BadMessage, match="overlaps"):
        codec.decode(frames_of(tree, bytes(payload)), m.ActorToBuffer)


def test_an_array_of_another_dtype_than_its_field_is_refused() -> None:
    for field, array, expected in (
        ("observation", np.zeros(2, np.float32), "int32"),
        ("action", np.zeros(3, np.float32), "int32"),
        ("logprobs", np.zeros(3, np.int32), "float32"),
    ):
        with pytest.raises(BadMessage, match=f"{field} is .* expected {expected}"):
            codec.decode(codec.encode(turn(**{field: array})), m.ActorToBuffer)
    chunk = m.Chunk(version=0, index=0, data=np.zeros(2, np.int32))
    with pytest.raises(BadMessage, match="expected uint8"):
        codec.decode(codec.encode(chunk), m.LearnerToActor)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"turn_id": 0, "parent_id": 0}, "turn_id is 0, expected 1 to"),
        ({"parent_id": 3}, "below its child's"),
        ({"parent_id": -1}, "parent_id is -1, expected 0 to"),
        ({"turn_id": 2**31}, "turn_id is 2147483648, expected 1 to"),
        ({"lease_epoch": -1}, "lease_epoch is -1, expected 0 to"),
        ({"expansion_round": 2**31}, "expansion_round is 2147483648, expected 0 to"),
        ({"run": "r\x07"}, "is no name"),
        ({"action": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32), "spans": ()}, "action is empty"),
        ({"action": np.array([1, -1, 2], np.int32)}, "negative token id -1"),
        ({"observation": np.full(100, -5, np.int32)}, "negative token id -5"),
        ({"logprobs": np.zeros(2, np.float32)}, "2 logprobs for 3 action tokens"),
        ({"logprobs": np.array([0, np.nan, 0], np.float32)}, r"logprobs\[1\] is nan"),
        ({"logprobs": np.array([0, 0, -np.inf], np.float32)}, r"logprobs\[2\] is -inf"),
        ({"logprobs": np.array([0.5, 0, 0], np.float32)}, r"logprobs\[0\] is 0.5"),
        ({"spans": ()}, "spans cover 0 of 3"),
        ({"spans": (VersionSpan(0, 0, 2),)}, "spans cover 2 of 3"),
        ({"spans": (VersionSpan(0, 0, 4),)}, "does not follow"),
        ({"spans": (VersionSpan(0, 0, 1), VersionSpan(0, 2, 3))}, "does not follow"),
        ({"spans": (VersionSpan(0, 0, 2), VersionSpan(0, 1, 3))}, "does not follow"),
        ({"spans": (VersionSpan(0, 0, 0), VersionSpan(0, 0, 3))}, "does not follow"),
        ({"spans": (VersionSpan(-1, 0, 3),)}, r"spans\[0\]: version is -1, expected 0 to"),
        ({"reward": None}, "reward"),
        ({"end": "continue", "success": None}, "reward"),
        ({"end": "continue", "reward": None}, "success"),
        ({"reward": math.nan}, "reward is nan"),
        ({"generate_s": -1.0}, "generate_s is -1.0"),
        ({"environment_s": math.inf}, "environment_s is inf"),
        ({"environment_s": 2e9}, "environment_s is 2000000000.0"),
        ({"reward": -1e39}, "fits float32"),
        ({"spans": (VersionSpan(2**31, 0, 3),)}, r"spans\[0\]: version is 2147483648"),
    ],
)
def test_a_turn_that_breaks_its_promises_is_refused_by_name(changes: dict[str, Any], fact: str) -> None:
    with pytest.raises(BadMessage, match=fact) as caught:
        codec.decode(codec.encode(turn(**changes)), m.ActorToBuffer)
    assert "tree_id 't7'" in str(caught.value)


def test_a_log_prob_rounded_to_just_above_zero_is_taken() -> None:
    for size in (3, 500):
        values = np.full(size, codec.LOGPROB_SLACK, np.float32)
        fine = turn(action=np.ones(size, np.int32), logprobs=values, spans=(VersionSpan(0, 0, size),))
        assert codec.decode(codec.encode(fine), m.ActorToBuffer).logprobs.tolist() == values.tolist()


def test_long_log_probs_are_held_to_the_same_rule_as_short_ones() -> None:
    for bad in (math.nan, math.inf, -math.inf, 0.01):
        values = np.full(500, -1.0, np.float32)
        values[321] = bad
        long = turn(action=np.ones(500, np.int32), logprobs=values, spans=(VersionSpan(0, 0, 500),))
        with pytest.raises(BadMessage, match=r"logprobs\[321\]"):
            codec.decode(codec.encode(long), m.ActorToBuffer)


def test_a_turn_inside_another_message_is_held_to_the_same_promises_when_it_is_looked_at() -> None:
    lease = m.Lease(
        tree_id="t",
        task_index=0,
        kind="train",
        epoch=0,
        lifetime_s=1,
        min_version=0,
        seed=1,
        committed=TurnRecords.of([turn(), turn(reward=None)]),
    )
    leases = m.Leases(leases=(lease,), closed_because=None, retry_after_s=0, finished=False)
    decoded = codec.decode(codec.encode(leases), m.BufferToActor)
    committed = decoded.leases[0].committed
    assert contents(committed[0]) == contents(turn())
    for look in (lambda: committed[1], lambda: list(committed), lambda: codec.check(decoded)):
        with pytest.raises(BadMessage, match="reward is None"):
            look()


def test_records_travel_as_they_are() -> None:
    records = TurnRecords.of([turn(turn_id=i, parent_id=i - 1) for i in (1, 2, 3)])
    batch = batch_of(records)
    header, payload = codec.encode(batch)
    assert b"".join(records.parts) in payload
    assert msgpack.unpackb(header)["trees"][0]["turns"] == [2, 16, records.nbytes, 3]
    received = codec.decode([header, payload], m.BufferToLearner).trees[0].turns
    assert [bytes(part) for part in received.parts] == [b"".join(records.parts)]
    # And on, by whoever received them.
    assert codec.encode(batch_of(received)) == [header, payload]


def test_arrays_of_records_are_views_of_the_payload_on_8_byte_boundaries() -> None:
    _, payload = frames = codec.encode(batch_of((turn(), turn(turn_id=4))))
    for one in codec.decode(frames, m.BufferToLearner).trees[0].turns:
        for array in (one.observation, one.action, one.logprobs):
            assert np.shares_memory(array, np.frombuffer(payload, np.uint8))
            assert not array.flags.writeable
            assert array.ctypes.data % 8 == 0


def testplain_turns_are_sent_as_records() -> None:
    turns = (turn(turn_id=1, parent_id=0), turn(turn_id=2))
    assert codec.encode(batch_of(turns)) == codec.encode(batch_of(TurnRecords.of(turns)))


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda d: [d[0], d[1], d[2], -1], "-1 turns cannot be in"),
        (lambda d: [d[0], d[1], d[2], 2**40], "turns cannot be in"),
        (lambda d: [d[0], d[1], d[2], 0], "0 turns cannot be in"),
        (lambda d: [0, d[1], d[2] // 4, d[3]], "records are int32"),
        (lambda d: [d[0], d[1], d[2] * 2, d[3]], "is not in"),
        (lambda d: d[:3], "length 4"),
    ],
)
def test_a_descriptor_of_records_that_cannot_be_is_refused(change: Any, fact: str) -> None:
    header, payload = codec.encode(batch_of((turn(), turn())))
    tree = msgpack.unpackb(header)
    tree["trees"][0]["turns"] = change(tree["trees"][0]["turns"])
    with pytest.raises(BadMessage, match=fact):
        codec.decode(frames_of(tree, bytes(payload)), m.BufferToLearner)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_turns_than_announced_is_refused_when_they_are_looked_at(count: int) -> None:
    header, payload = codec.encode(batch_of((turn(), turn())))
    tree = msgpack.unpackb(header)
    tree["trees"][0]["turns"][3] = count
    turns = codec.decode(frames_of(tree, bytes(payload)), m.BufferToLearner).trees[0].turns
    with pytest.raises(BadMessage, match=r"3 turns were announced|the last of 1 records"):
        turns[0]


# --- the short way for turns -----------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(turns(), st.data())
def test_the_short_way_for_turns_takes_nothing_that_the_long_one_refuses_and_gives_the_same(
    message: Turn, data: st.DataObject
) -> None:
    header, payload = (bytes(f) for f in codec.encode(message))
    if data.draw(st.booleans()):
        name, value = data.draw(st.sampled_from(sorted(UNUSUAL.items())))
        tree = msgpack.unpackb(header)
        tree[name] = data.draw(st.sampled_from(value))
        header = msgpack.packb(tree)
    for _ in range(data.draw(st.integers(0, 3)) if payload else 0):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload = payload[:at] + bytes([data.draw(st.integers(0, 255))]) + payload[at + 1 :]
    assert both_ways([header, payload]) in ("same", "refused")


UNUSUAL: dict[str, list[Any]] = {
    "run": ["x" * 200, "x" * 201, "é", "é" * 101, "\n", ""],
    "turn_id": [0, 1, 2**31 - 1, 2**31, 2**63, -1],
    "parent_id": [0, -1, 2**31],
    "lease_epoch": [-1, 2**31 - 1, 2**31],
    "expansion_round": [-1, 2**31],
    "reward": [None, math.nan, math.inf, 1e39, -3e38, 0],
    "success": [None, True],
    "end": ["continue", "done"],
    "generate_s": [-0.0, -1, 1e9, 1e10, math.nan, math.inf],
    "environment_s": [math.nan],
    "spans": [[], [[0, 0, 2**31]], [[0, 0, 1]], [[2**31, 0, 1]], [[0, 1, 2]]],
}


def both_ways(frames: Sequence[bytes | memoryview]) -> str:
    long: Any = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "plain_turn", lambda value, payload: None)
        with contextlib.suppress(BadMessage):
            long = codec.decode(frames, m.ActorToBuffer)
    try:
        short = codec.decode(frames, m.ActorToBuffer)
    except BadMessage:
        assert long is None
        return "refused"
    assert long is not None
    np.testing.assert_array_equal(short.action, long.action)
    return "same" if contents(short) == contents(long) else "different"


def test_every_float_that_may_be_a_log_prob_and_no_other_is_taken_either_way() -> None:
    edges = [0x00000000, 0x00000001, 0x39FFFFFF, 0x3A000000, 0x3A7FFFFF, 0x3A800000, 0x3A800001, 0x3F800000]
    edges += [0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFEFFFFFF, 0xFF000000]
    edges += [0xFF7FFFFF, 0xFF800000, 0xFF800001, 0xFFC00000, 0xFFFFFFFF]
    for bits in edges + [high << 24 | low for high in range(256) for low in (0, 0x7FFFFF, 0x800000, 0xFFFFFF)]:
        value = np.array([bits], np.uint32).view(np.float32)
        one = turn(action=np.ones(1, np.int32), logprobs=value, spans=(VersionSpan(0, 0, 1),))
        fits = bool(np.isfinite(value[0]) and value[0] <= codec.LOGPROB_SLACK)
        assert both_ways(codec.encode(one)) == ("same" if fits else "refused"), hex(bits)


def test_arrays_in_another_order_are_taken_the_long_way() -> None:
    header, payload = codec.encode(turn())
    tree = msgpack.unpackb(header)
    tree["action"], tree["observation"] = [0, 0, 3], [0, 16, 2]
    moved = bytes(payload[8:24]) + bytes(payload[:8]) + bytes(payload[24:])
    assert contents(codec.decode(frames_of(tree, moved), m.ActorToBuffer)) == contents(turn())


# --- ranges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "fact"),
    [
        (m.LeaseRequest(run="r", actor="a", count=2**31, version=0), "count is 2147483648"),
        (m.LeaseRequest(run="r", actor="a", count=1, version=2**31), "version is 2147483648"),
        (m.LeaseRequest(run="r", actor="a", count=1, version=-2), "version is -2"),
        (m.LeaseRequest(run="r\n", actor="a", count=1, version=1), r"run 'r\\n' is no name"),
        (m.LeaseRequest(run="r", actor="a" * 201, count=1, version=1), "actor 'aaa.* is no name"),
        (m.LeaseReturned(run="r", actor="a", tree_ids=("t", "\0")), r"tree_ids\[\d\] .* is no name"),
        (m.LeaseReturned(run="r", actor="a", tree_ids=("é" * 101,)), r"tree_ids\[\d\] .* is no name"),
        (m.ActorReport(run="r", actor="a", version=1, tree_ids=(), metrics={"\x1b[2J": 1.0}), "printable"),
        (m.Trained(run="r", batch_id=1, version=1, priorities={"t": math.inf}), "is inf"),
        (m.Trained(run="r", batch_id=1, version=1, priorities={"t": -1.0}), "is -1.0"),
        (m.Trained(run="r", batch_id=1, version=1, priorities={"t": 1e39}), "fits float32"),
        (m.Trained(run="r", batch_id=-1, version=1, priorities={}), "batch_id is -1"),
        (m.VersionPublished(run="r", version=1, weights_endpoint="x" * 65537, announce_endpoint=""), "65537 bytes"),
        (m.VersionPublished(run="r", version=1, weights_endpoint="é" * 32769, announce_endpoint=""), "65538 bytes"),
        (m.EvalQuery(run="r", step=1, wait_s=1e10), "at most 1e"),
        (m.EvalQuery(run="r", step=1, wait_s=math.nan), "finite"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(message: Any, fact: str) -> None:
    with pytest.raises(BadMessage, match=fact):
        codec.decode(codec.encode(message), EVERYTHING)


def test_counts_are_not_negative_and_floats_are_finite() -> None:
    with pytest.raises(BadMessage, match="count is -1"):
        codec.decode(codec.encode(m.LeaseRequest(run="r", actor="a", count=-1, version=0)), m.ActorToBuffer)
    trained = m.Trained(run="r", batch_id=1, version=2, priorities={"t": math.nan})
    with pytest.raises(BadMessage, match=r"priorities\['t'\] is nan"):
        codec.decode(codec.encode(trained), m.LearnerToBuffer)


def test_one_metric_that_is_not_finite_does_not_cost_an_actor_its_report() -> None:
    report = m.ActorReport(run="r", actor="a", version=-1, tree_ids=(), metrics={"x": math.nan})
    assert math.isnan(codec.decode(codec.encode(report), m.ActorToBuffer).metrics["x"])


def test_a_manifest_whose_tensors_do_not_fit_is_refused() -> None:
    def manifest(*specs: m.TensorSpec, num_logprobs: int = 1) -> m.WeightsManifest:
        return m.WeightsManifest(
            run="r",
            version=1,
            total_bytes=128,
            chunk_bytes=64,
            sha256="",
            tensors=specs,
            probe_token_ids=np.array([1, 2], np.int32),
            probe_logprobs=np.zeros(num_logprobs, np.float32),
            probe_tolerance=1e-5,
        )

    def spec(shape: tuple[int, ...], offset: int, nbytes: int) -> m.TensorSpec:
        return m.TensorSpec(name="w", dtype="float32", shape=shape, offset=offset, nbytes=nbytes)

    fits = manifest(spec((4, 4), 64, 64), spec((4,), 0, 16))
    assert codec.decode(codec.encode(fits), m.LearnerToActor).tensors == fits.tensors
    for bad in (
        manifest(spec((4,), 0, 15)),
        manifest(spec((4,), 120, 16)),
        manifest(spec((4,), -16, 16)),
        manifest(spec((16,), 0, 64), spec((16,), 60, 64)),
        manifest(spec((-4, -1), 0, 16)),
        manifest(spec((2**62,) * 33 + (0,), 0, 0)),
        manifest(num_logprobs=2),
        msgspec.structs.replace(fits, probe_sequences=0),
        msgspec.structs.replace(fits, probe_sequences=2),
        msgspec.structs.replace(fits, probe_sequences=3, probe_logprobs=np.zeros(0, np.float32)),
        msgspec.structs.replace(fits, probe_tolerance=-1.0),
    ):
        with pytest.raises(BadMessage):
            codec.decode(codec.encode(bad), m.LearnerToActor)
