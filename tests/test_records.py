"""Records of turns: what is packed comes back, what is not looked at is not decoded, what is no record is refused."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire import codec
from atpo_async.wire.messages import RunFinished
from atpo_async.wire.plain_turn import plain_turn
from atpo_async.wire.records import MIN_RECORD_BYTES, Buffer, TurnRecords, frames_in, pack, unpack


def turn(turn_id: int, *, tokens: int = 3, **changes: Any) -> Turn:
    fields: dict[str, Any] = {
        "run": "r",
        "tree_id": "t",
        "turn_id": turn_id,
        "parent_id": turn_id - 1,
        "lease_epoch": 0,
        "expansion_round": 0,
        "observation": np.arange(turn_id % 4, dtype=np.int32),
        "action": np.full(tokens, turn_id, np.int32),
        "logprobs": np.full(tokens, -0.5, np.float32),
        "spans": (VersionSpan(0, 0, tokens),),
        "end": "continue",
        "reward": None,
        "success": None,
        "generate_s": 0.0,
        "environment_s": 0.0,
    }
    return Turn(**{**fields, **changes})


@settings(max_examples=100)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.binary(max_size=40)), min_size=1, max_size=5))
def test_frames_come_back_from_their_records(messages: list[tuple[bytes, bytes]]) -> None:
    records = [pack(frames) for frames in messages]
    for frames, record in zip(messages, records, strict=True):
        assert len(record) % 8 == 0
        assert tuple(map(bytes, unpack(record))) == frames
        assert all(view.readonly for view in unpack(bytearray(record)))
    assert pack(*messages) == b"".join(records)
    assert [tuple(map(bytes, frames)) for frames in frames_in(pack(*messages), len(messages))] == messages
    with pytest.raises(BadMessage):
        frames_in(pack(*messages), len(messages) - 1)


def test_a_record_is_two_sizes_and_two_padded_frames() -> None:
    assert pack([b"header", b"x"]) == struct.pack("<II", 6, 1) + b"header\0\0" + b"x\0\0\0\0\0\0\0"
    assert pack([b"12345678", b""]) == struct.pack("<II", 8, 0) + b"12345678"


@pytest.mark.parametrize("frames", [[], [b"h"], [b"h", b"p", b"x"], [b"", b"p"]])
def test_what_is_not_one_message_is_not_packed(frames: list[bytes]) -> None:
    with pytest.raises(BadMessage):
        pack(frames)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        bytes(8),
        bytes(16),
        pack([b"h", b"p"])[:-8],
        pack([b"h", b"p"]) + bytes(8),
        pack([b"h", b"p"]) * 2,
        struct.pack("<II", 2**32 - 1, 2**32 - 1) + bytes(64),
        struct.pack("<II", 8, 2**32 - 1) + bytes(64),
        struct.pack("<II", 8, 57) + bytes(64),
    ],
)
def test_what_is_no_record_is_refused(record: bytes) -> None:
    with pytest.raises(BadMessage):
        unpack(record)


def test_one_record_cut_off_among_several_is_told_and_none_is_taken() -> None:
    records = pack([b"one", b"1"], [b"two", b"2"])
    assert frames_in(b"", 9) == []
    with pytest.raises(BadMessage, match="record at byte 24 is cut off: 8 bytes are left"):
        frames_in(records[:32], 9)


def test_turns_come_back_by_index_slice_and_iteration() -> None:
    records = TurnRecords.of(turn(i) for i in range(1, 8))
    assert len(records) == 7
    assert [t.turn_id for t in records] == [1, 2, 3, 4, 5, 6, 7]
    assert (records[0].turn_id, records[6].turn_id, records[-1].turn_id, records[-7].turn_id) == (1, 7, 7, 1)
    assert [t.turn_id for t in records[::-2]] == [7, 5, 3, 1]
    assert [t.turn_id for t in (*records, turn(8))][-2:] == [7, 8]
    np.testing.assert_array_equal(records[2].observation, [0, 1, 2])
    for beyond in (7, -8):
        with pytest.raises(IndexError):
            records[beyond]


def test_no_turns_are_no_bytes() -> None:
    for none in (TurnRecords.of(()), TurnRecords.raw((), 0)):
        assert (len(none), none.nbytes, list(none), none[:]) == (0, 0, [], ())


def test_where_one_part_ends_and_the_next_begins_means_nothing() -> None:
    one, two, three = (pack(codec.encode(turn(i))) for i in (1, 2, 3))
    whole = len(one) + len(two) + len(three)
    ways: list[list[Buffer]] = [
        [one, two, three],
        [one + two + three],
        [one + two, three],
        [memoryview(one), b"", bytearray(two + three)],
    ]
    for parts in ways:
        records = TurnRecords.raw(parts, 3)
        assert records.nbytes == whole
        assert [t.turn_id for t in records] == [1, 2, 3]


def test_a_turn_is_decoded_once_and_only_when_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    records = TurnRecords.of([turn(1), turn(2), turn(3)])
    decoded: list[int] = []
    plain = plain_turn

    def counted(value: Any, payload: Any) -> Any:
        decoded.append(value.turn_id)
        return plain(value, payload)

    monkeypatch.setattr(codec, "plain_turn", counted)
    assert (len(records), records.nbytes > 0, decoded) == (3, True, [])
    assert records[1] is records[1]
    assert decoded == [2]
    assert list(records) == list(records)
    assert sorted(decoded) == [1, 2, 3]


def test_records_of_records_are_the_same() -> None:
    records = TurnRecords.of([turn(1)])
    assert TurnRecords.of(records) is records


def test_raw_records_are_neither_copied_nor_looked_at() -> None:
    bad = bytes(24)
    records = TurnRecords.raw([bad], 5)
    assert records.parts[0] is bad
    with pytest.raises(BadMessage):
        records[0]


def test_a_bad_turn_among_good_ones_is_refused_and_the_others_are_not() -> None:
    records = TurnRecords.of([turn(1), turn(2, logprobs=np.full(3, np.nan, np.float32)), turn(3)])
    assert (records[0].turn_id, records[2].turn_id) == (1, 3)
    for _ in range(2):
        with pytest.raises(BadMessage, match=r"turn_id 2.*logprobs\[0\] is nan"):
            records[1]


def test_another_message_among_turns_is_refused() -> None:
    records = TurnRecords.raw([pack(codec.encode(RunFinished(run="r")))], 1)
    with pytest.raises(BadMessage, match="'run_finished' is unknown here; expected one of turn"):
        records[0]


@pytest.mark.parametrize("count", [0, 1, 3, 2**31 - 1])
def test_another_number_of_records_than_announced_is_refused(count: int) -> None:
    records = TurnRecords.raw([pack(codec.encode(turn(i))) for i in (1, 2)], count)
    if not count:
        # Nothing to look at: whoever made it has to know that bytes without turns are none.
        assert list(records) == []
        return
    with pytest.raises(BadMessage, match=r"announced|bytes follow the last of"):
        records[0]


@settings(max_examples=300)
@given(st.integers(1, 3), st.data())
def test_damaged_records_give_turns_or_bad_message(count: int, data: st.DataObject) -> None:
    raw = bytearray(b"".join(pack(codec.encode(turn(i))) for i in range(1, count + 1)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[at] ^= data.draw(st.integers(1, 255))
        else:
            del raw[at : at + data.draw(st.integers(1, 2 * MIN_RECORD_BYTES))]
        if not raw:
            break
    records = TurnRecords.raw([bytes(raw)], count)
    for i in range(count):
        try:
            assert isinstance(records[i], Turn)
        except BadMessage:
            continue
