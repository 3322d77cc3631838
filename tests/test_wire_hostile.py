"""Nothing but BadMessage for whatever else than a message arrives, before memory or time is spent on it."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.core.errors import BadMessage
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from tests.wire_support import ANY_MESSAGE, EVERYTHING, KINDS, batch_of, decode_or_refuse, frames_of, turn


@settings(max_examples=400)
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


@settings(max_examples=400)
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


@settings(max_examples=200)
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
