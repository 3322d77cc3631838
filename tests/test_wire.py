"""Messages to frames and back: every type, arrays, records of turns, and the short way for turns."""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from atpo_async.wire.checks import bounds_of, rest_of
from atpo_async.wire.records import TurnRecords
from tests.wire_support import EVERYTHING, KINDS, batch_of, contents, frames_of, of_kind, turn, turns

# --- round trip ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_every_message_comes_back_as_it_was(kind: Any) -> None:
    @settings(max_examples=25)
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


# --- records ----------------------------------------------------------------------------------------------------


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


def test_plain_turns_are_sent_as_records() -> None:
    turns = (turn(turn_id=1, parent_id=0), turn(turn_id=2))
    assert codec.encode(batch_of(turns)) == codec.encode(batch_of(TurnRecords.of(turns)))


# --- the short way for turns -----------------------------------------------------------------------------------


@settings(max_examples=300)
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
