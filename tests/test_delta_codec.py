"""Differences between two payloads: exact for every bit pattern, small where little has changed, and safe to read."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.core.dtypes import PRECISION_BYTES
from atpo_async.core.vocabulary import Precision
from atpo_async.transports.base import Payload
from atpo_async.transports.deltas import blocks, codec, decoding
from atpo_async.transports.deltas.blocks import blocks_of, same_layout
from atpo_async.transports.deltas.codec import HEADER, BadDifference, BlockDecoder, BlockEncoder, Kind, head_of
from atpo_async.transports.deltas.decoding import RebuildingStopped, rebuild
from atpo_async.transports.deltas.encoding import EncodingStopped, encode
from atpo_async.wire.messages import TensorSpec

WIDTHS = (2, 4)


def put_on(base: np.ndarray, record: bytes, width: int) -> np.ndarray:
    """The block that a record makes of the base's."""
    block = base.copy()
    BlockDecoder().decode(head_of(record[: HEADER.size], len(block)), memoryview(record)[HEADER.size :], block, width)
    return block


def kind_of(record: bytes) -> Kind:
    return Kind(record[0])


def random_bytes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def changed_in(base: np.ndarray, width: int, share: float, by: int = 3) -> np.ndarray:
    """``base`` with a share of its elements a few units higher or lower."""
    source = np.random.default_rng(1)
    new = base.copy().view(f"<u{width}")
    at = source.random(len(new)) < share
    new[at] += source.integers(1, by + 1, at.sum()).astype(new.dtype)
    return new.view(np.uint8)


# --- one block


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("share", "by", "kind"),
    [
        (0.0, 1, Kind.SAME),
        (0.0005, 1, Kind.GAPS),
        (0.05, 3, Kind.GAPS),
        (0.4, 3, Kind.MASK),
        (1.0, 200, Kind.STEPS),
    ],
)
def test_each_share_of_changed_elements_has_its_form_and_comes_back(
    width: int, share: float, by: int, kind: Kind
) -> None:
    base = random_bytes(1 << 18)
    new = changed_in(base, width, share, by)
    record = BlockEncoder().encode(base, new, width)
    assert kind_of(record) is kind
    assert np.array_equal(put_on(base, record, width), new)
    assert len(record) < 0.6 * len(new)


@pytest.mark.parametrize("width", WIDTHS)
def test_flipped_bits_go_as_their_xor(width: int) -> None:
    base = random_bytes(1 << 16)
    new = base ^ 0x55
    record = BlockEncoder().encode(base, new, width)
    assert kind_of(record) is Kind.XOR
    assert np.array_equal(put_on(base, record, width), new)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("compressible", "kind"), [(True, Kind.WHOLE), (False, Kind.RAW)])
def test_a_block_unlike_its_base_goes_as_it_is(width: int, compressible: bool, kind: Kind) -> None:
    base = random_bytes(1 << 16)
    new = np.full(1 << 16, 7, np.uint8) if compressible else random_bytes(1 << 16, seed=5)
    record = BlockEncoder().encode(base, new, width)
    assert kind_of(record) is kind
    assert len(record) <= len(new) + HEADER.size
    assert np.array_equal(put_on(base, record, width), new)


def test_nan_payloads_and_the_sign_of_zero_are_kept() -> None:
    odd = np.array([0x0000, 0x8000, 0x7F80, 0xFF80, 0x7F81, 0x7FC1, 0xFFFF, 0x0001], np.uint16)
    base, new = (np.array(pair, np.uint16) for pair in zip(*itertools.product(odd, odd), strict=True))
    record = BlockEncoder().encode(base.view(np.uint8), new.view(np.uint8), 2)
    assert np.array_equal(put_on(base.view(np.uint8), record, 2), new.view(np.uint8))
    pairs = [(struct.pack("<f", a), struct.pack("<f", b)) for a, b in [(0.0, -0.0), (-0.0, 0.0), (np.nan, 1.0)]]
    for old, now in pairs:
        one, two = (np.frombuffer(data, np.uint8) for data in (old, now))
        assert np.array_equal(put_on(one, BlockEncoder().encode(one, two, 4), 4), two)


@settings(max_examples=150)
@given(data=st.data(), width=st.sampled_from(WIDTHS), count=st.integers(1, 300))
def test_any_two_blocks_lead_from_one_to_the_other(data: st.DataObject, width: int, count: int) -> None:
    base = np.frombuffer(data.draw(st.binary(min_size=count * width, max_size=count * width)), np.uint8)
    new = base.copy()
    for at, bits in data.draw(st.lists(st.tuples(st.integers(0, len(base) - 1), st.integers(1, 255)), max_size=40)):
        new[at] ^= bits
    record = BlockEncoder().encode(base, new, width)
    assert np.array_equal(put_on(base, record, width), new)
    assert len(record) <= len(new) + HEADER.size


# --- records of a peer


def packed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


def record_of(kind: int, changed: int, places: bytes = b"", values: bytes = b"") -> bytes:
    return HEADER.pack(kind, changed, len(places), len(values)) + places + values


BOMB = packed(bytes(1 << 24))
SIX = packed(bytes(6))
UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(6))

HOSTILE = {
    "a kind that there is not": (record_of(9, 1, b"", SIX), "of kind 9"),
    "nothing, with a body": (record_of(Kind.SAME, 0, b"", SIX), "has|is SAME"),
    "a change of nothing": (record_of(Kind.GAPS, 0, packed(b"\0"), packed(b"\0\0")), "is GAPS with 0 changed"),
    "a mask where there is none": (record_of(Kind.XOR, 3, b"x", SIX), "is XOR with 3 changed elements in 1"),
    "raw bytes of another number": (record_of(Kind.RAW, 3, b"", b"12345"), "is RAW"),
    "more changes than elements": (record_of(Kind.GAPS, 70_000, packed(bytes(70_000)), SIX), "70000 elements of 8"),
    "a bomb of values": (record_of(Kind.XOR, 8, b"", BOMB), "unpacks into 16777216 bytes, expected 16"),
    "a bomb of places": (record_of(Kind.GAPS, 3, BOMB, SIX), "16777216 bytes are no gaps between 3"),
    "a bomb of a mask": (record_of(Kind.MASK, 3, BOMB, SIX), "unpacks into 16777216 bytes, expected 1"),
    "a frame that hides its size": (record_of(Kind.GAPS, 3, packed(bytes(3)), UNSIZED), "unpacks into"),
    "no frame": (record_of(Kind.XOR, 3, b"", b"no frame at all"), "cannot be unpacked"),
    "half a frame": (record_of(Kind.XOR, 8, b"", packed(random_bytes(16).tobytes())[:-4]), "cannot be unpacked"),
    "two frames": (record_of(Kind.GAPS, 3, packed(bytes(3)), SIX + SIX), "cannot be unpacked"),
    "places past the end": (record_of(Kind.GAPS, 3, packed(b"\6\0\1"), SIX), "number 9 of 8"),
    "places that wrap around": (
        record_of(Kind.GAPS, 3, packed(b"\xff" * 12), SIX),
        r"number 12884901887 of 8",
    ),
    "a mask of fewer": (record_of(Kind.MASK, 3, packed(b"\x80"), SIX), "does not mark 3"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_record_that_no_encoder_made_is_refused_before_it_is_unpacked(what: str) -> None:
    record, said = HOSTILE[what]
    with pytest.raises(BadDifference, match=said):
        put_on(np.zeros(16, np.uint8), record, 2)


def test_a_mask_that_marks_what_lies_past_the_last_element_is_refused() -> None:
    record = record_of(Kind.MASK, 3, packed(b"\xc0\x01"), SIX)
    with pytest.raises(BadDifference, match="the mask of 9 elements does not mark 3"):
        put_on(np.zeros(18, np.uint8), record, 2)


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_record_is_refused_or_makes_other_bytes_but_never_fails_otherwise(data: st.DataObject) -> None:
    base = random_bytes(512)
    record = bytearray(
        BlockEncoder().encode(base, changed_in(base, 2, data.draw(st.sampled_from([0.05, 0.5, 1.0]))), 2)
    )
    for at, bits in data.draw(st.lists(st.tuples(st.integers(0, len(record) - 1), st.integers(1, 255)), min_size=1)):
        record[at] ^= bits
    try:
        found = put_on(base, bytes(record[: data.draw(st.integers(HEADER.size, len(record)))]), 2)
    except BadDifference:
        return
    assert len(found) == len(base)


# --- whole payloads


def layout_of(*tensors: tuple[str, Precision, tuple[int, ...]]) -> tuple[tuple[TensorSpec, ...], int]:
    """Aligned as the learner does; a name that ends in ``=`` is tied to the tensor before."""
    specs: list[TensorSpec] = []
    end = offset = 0
    for name, dtype, shape in tensors:
        nbytes = int(np.prod(shape, dtype=int)) * PRECISION_BYTES[dtype]
        if not name.endswith("="):
            offset = -(-end // 64) * 64
            end = offset + nbytes
        specs.append(TensorSpec(name=name, dtype=dtype, shape=shape, offset=offset, nbytes=nbytes, digest=""))
    return tuple(specs), end


def payload_of(folder: Path, name: str, data: np.ndarray) -> Payload:
    (folder / name).write_bytes(data.tobytes())
    return Payload(folder / name)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors of a test have several of them."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)


SPECS, TOTAL = layout_of(
    ("a", "bfloat16", (40, 5)),
    ("empty", "float32", (0, 3)),
    ("one", "float32", ()),
    ("head", "float32", (33,)),
    ("tied=", "float32", (33,)),
    ("half", "float16", (1,)),
    ("none", "bfloat16", (0,)),
)


def random_payload(seed: int) -> np.ndarray:
    data = np.zeros(TOTAL, np.uint8)
    for block in blocks_of(SPECS):
        data[block.offset : block.offset + block.nbytes] = random_bytes(block.nbytes, seed)
    return data


def difference(folder: Path, base: Payload, new: Payload, name: str = "d") -> Payload:
    with (folder / name).open("w+b") as file:
        made = encode(base, new, SPECS, file, max_bytes=1 << 20)
    payload = Payload(folder / name)
    assert (payload.size, payload.digest) == (made.nbytes, made.digest)
    return payload


def test_differences_in_a_row_rebuild_every_byte_of_the_last_version(tmp_path: Path, small_blocks: None) -> None:
    versions = [random_payload(0)]
    for seed in range(1, 4):
        newer = versions[-1].copy()
        newer[seed * 64 : seed * 64 + 12] ^= 255
        versions.append(newer)
    versions.append(random_payload(9))
    payloads = [payload_of(tmp_path, f"v{number}", data) for number, data in enumerate(versions)]
    steps = [
        difference(tmp_path, older, newer, f"d{number}")
        for number, (older, newer) in enumerate(itertools.pairwise(payloads))
    ]
    for first in range(len(versions)):
        rebuild(payloads[first], steps[first:], SPECS, TOTAL, tmp_path / "r")
        assert (tmp_path / "r").read_bytes() == versions[-1].tobytes()


def test_blocks_cover_every_tensor_once_and_tied_ones_at_one_place(small_blocks: None) -> None:
    found = list(blocks_of(SPECS))
    assert sum(block.nbytes for block in found) == 400 + 4 + 132 + 2
    assert {block.width for block in found} == {2, 4}
    assert all(block.nbytes % block.width == 0 for block in found)
    assert same_layout(SPECS, SPECS)
    assert not same_layout(SPECS, SPECS[:-1])
    assert not same_layout(SPECS, layout_of(("a", "bfloat16", (5, 40)))[0])


@pytest.mark.parametrize("what", ["cut short", "longer", "of another layout", "on a shorter base", "empty"])
def test_a_difference_that_does_not_fit_is_refused(tmp_path: Path, small_blocks: None, what: str) -> None:
    base, new = payload_of(tmp_path, "b", random_payload(0)), payload_of(tmp_path, "n", random_payload(1))
    made = difference(tmp_path, base, new)
    data, specs = (tmp_path / "d").read_bytes(), SPECS
    if what == "of another layout":
        specs = SPECS[1:]
    elif what == "on a shorter base":
        base = payload_of(tmp_path, "short", random_payload(0)[:-1])
    else:
        data = {"cut short": data[:-1], "longer": data + b"x", "empty": b""}[what]
        made = payload_of(tmp_path, "damaged", np.frombuffer(data, np.uint8))
    with pytest.raises(BadDifference):
        rebuild(base, [made], specs, TOTAL, tmp_path / "r")


def test_a_difference_that_grows_past_its_bound_or_has_to_stop_is_given_up(tmp_path: Path, small_blocks: None) -> None:
    base, new = payload_of(tmp_path, "b", random_payload(0)), payload_of(tmp_path, "n", random_payload(1))
    with (tmp_path / "d").open("w+b") as file:
        with pytest.raises(EncodingStopped, match="larger than 100 bytes"):
            encode(base, new, SPECS, file, max_bytes=100)
        with pytest.raises(EncodingStopped, match="had to stop"):
            encode(base, new, SPECS, file, max_bytes=1 << 20, should_stop=lambda: True)
    made = difference(tmp_path, base, new)
    with pytest.raises(RebuildingStopped, match=f"0 of {len(list(blocks_of(SPECS)))} blocks"):
        rebuild(base, [made], SPECS, TOTAL, tmp_path / "r", should_stop=lambda: True)


def test_a_base_that_can_no_longer_be_read_costs_the_difference_only(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, new = payload_of(tmp_path, "b", random_payload(0)), payload_of(tmp_path, "n", random_payload(1))
    made = difference(tmp_path, base, new)
    # Its file is cut short after the sizes were compared.
    records_of = decoding.records_of

    def cut_short(*args: Any) -> Any:
        (tmp_path / "b").write_bytes(b"x")
        return records_of(*args)

    monkeypatch.setattr(decoding, "records_of", cut_short)
    with pytest.raises(BadDifference, match="its base cannot be read"):
        rebuild(base, [made], SPECS, TOTAL, tmp_path / "r")


def test_the_bound_of_a_window_is_above_a_block() -> None:
    assert codec.WIDEST_WINDOW >= 2 * blocks.BLOCK_BYTES
