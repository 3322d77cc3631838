"""A journal is damaged by what a read of it proves, not by its size; and no damage ends the process that looks."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pytest

from atpo_async.core.errors import SetupError
from atpo_async.wire.records import pack
from buffer.journal import check, pages
from buffer.journal.journal import Journal
from buffer.journal.pages import Value, walk
from buffer.trees.index import TurnEntry, places_of, rows_of

SIZES = (200, 3000, 5000, 40_000, 9000)


def opened(folder: Path) -> Journal:
    return Journal(folder, max_bytes=1 << 24, gather_s=0.0)


def keep(journal: Journal, number: int, nbytes: int) -> TurnEntry:
    place = journal.add(number.to_bytes(8, "little") * (nbytes // 8))
    entry = TurnEntry(1, number, 0, 1, 2, 3, 0.5, 0.25, 7, 8, *place)
    journal.note(entry)
    return entry


async def fill(folder: Path) -> None:
    """Every kind of page: leaves and branches of a table, long values in each, free pages and their list."""
    async with opened(folder) as journal:
        journal.recover()
        entries = [keep(journal, 9000 + i, 3000) for i in range(30)]
        await journal.settle()
        for number in range(1, 13):
            keep(journal, number, SIZES[number % len(SIZES)])
            await journal.settle()
        for number in range(20, 120):
            keep(journal, number, 64)
        for number in range(400):
            journal.put(b"tree/%04d" % number, b"v" * 60)
        journal.put(b"batch/1", b"b" * 20_000)
        await journal.settle()
        journal.release(rows_of(entries), gone=True)
        await journal.settle()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled") / "journal"
    asyncio.run(fill(folder))
    return folder


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "journal"))


def page_bytes(file: Path) -> int:
    with lmdb.open(str(file.parent), max_dbs=4, readonly=True, lock=False) as env:
        return int(env.stat()["psize"])


def missing_bytes(folder: Path) -> int:
    """By how much the file is shorter than LMDB's count of its pages."""
    with lmdb.open(str(folder), max_dbs=4, readonly=True, lock=False) as env:
        size: int = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    return size - (folder / "data.mdb").stat().st_size


def reached(file: Path) -> dict[int, int]:
    """Page -> its kind, of all that the trees reach; of long values all their pages."""
    found: dict[int, int] = {}

    class Watched(pages._Walker):
        def _page(self, number: int) -> bytes:
            page = super()._page(number)
            _, _, flags, _, _ = pages._HEAD.unpack_from(page)
            count = pages._LONG.unpack_from(page)[3] if flags & pages._OVERFLOW else 1
            found.update(dict.fromkeys(range(number, number + count), flags))
            return page

    descriptor = os.open(file, os.O_RDONLY)
    try:
        Watched(descriptor, lambda value: None).follow()
    finally:
        os.close(descriptor)
    return found


def refusal(folder: Path) -> str:
    """Why the journal is not opened, or not recovered from; empty where it is."""
    try:
        opened(folder).recover()
    except SetupError as exc:
        return str(exc)
    return ""


def whole_values(file: Path) -> dict[tuple[str, bytes], bytes]:
    found: dict[tuple[str, bytes], bytes] = {}

    def look(value: Value) -> None:
        found[value.table, value.key] = value.read()

    assert not walk(file, look).damage
    return found


# --- healthy -------------------------------------------------------------------------------------------------------


def test_what_is_read_without_a_map_is_what_lmdb_has(folder: Path) -> None:
    found = whole_values(folder / "data.mdb")
    there: dict[tuple[str, bytes], bytes] = {}
    with lmdb.open(str(folder), max_dbs=4, readonly=True, lock=False) as env:
        for table in (b"chunks", b"rows", b"state"):
            db = env.open_db(table, create=False)
            with env.begin(db=db) as txn:
                there |= {(table.decode(), bytes(key)): bytes(value) for key, value in txn.cursor()}
    assert found == there


async def test_a_file_that_is_short_by_commits_alone_is_a_whole_journal(folder: Path) -> None:
    """Pages that are taken and given back in one commit are counted, and never written at the end of the file."""
    async with opened(folder) as journal:
        before = journal.recover()
        records = await journal.load(places_of(before.rows))
    with lmdb.open(str(folder), max_dbs=4, map_size=1 << 30) as env, env.begin(write=True) as txn:
        state = env.open_db(b"state", txn=txn, create=False)
        for number in range(400):
            txn.put(b"z%05d" % number, b"v" * 1000, db=state)
        for number in reversed(range(400)):
            txn.delete(b"z%05d" % number, db=state)
    assert missing_bytes(folder) > 0
    async with opened(folder) as journal:
        after = journal.recover()
        assert (dict(after.state), after.rows.tolist()) == (dict(before.state), before.rows.tolist())
        assert await journal.load(places_of(after.rows)) == records
        # And it goes on: pages that were never written are used like others.
        for number in range(500, 520):
            keep(journal, number, 40_000)
        await journal.settle()
    assert refusal(folder) == ""


def test_what_was_read_is_in_the_log_with_counts_and_seconds(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert refusal(folder) == ""
    (line,) = [line for line in caplog.messages if "entries read" in line]
    num_chunks = sum(table == "chunks" for table, _ in whole_values(folder / "data.mdb"))
    assert f"{num_chunks} of {num_chunks} chunks of records" in line


def test_damage_on_pages_that_nothing_reaches_is_none(folder: Path) -> None:
    file = folder / "data.mdb"
    psize, there = page_bytes(file), reached(folder / "data.mdb")
    unreached = [n for n in range(2, file.stat().st_size // psize) if n not in there]
    assert unreached
    with open(file, "r+b") as out:
        for number in unreached:
            out.seek(number * psize)
            out.write(bytes(psize))
    assert refusal(folder) == ""


def test_what_another_table_holds_is_not_judged(folder: Path) -> None:
    with lmdb.open(str(folder), max_dbs=4, map_size=1 << 30) as env, env.begin(write=True) as txn:
        other = env.open_db(b"somebody else's", txn=txn)
        for number in range(300):
            txn.put(b"%d" % number, bytes(9000), db=other)
    assert refusal(folder) == ""


def test_records_are_read_for_so_long_and_no_longer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(check, "RECORDS_S", -1.0)
    assert refusal(folder) == ""
    assert any("entries read, 0 of " in line for line in caplog.messages)


def test_chunks_of_earlier_programs_have_no_checksum_and_are_held_to_their_records() -> None:
    chunk = pack((b"head", b"payload " * 100)) + pack((b"head", b"other"))
    assert check.fault_of(chunk) is None
    assert check.fault_of(check.with_sum([chunk])) is None
    assert "in it" not in str(check.fault_of(chunk[:-8]))
    assert check.fault_of(chunk[:-8]) is not None
    assert check.fault_of(chunk[:8] + bytes(len(chunk) - 8)) is not None


# --- damaged -------------------------------------------------------------------------------------------------------


def kinds(file: Path) -> dict[str, list[int]]:
    there = reached(file)
    first = {n for n in there if n - 1 not in there or not there[n] & pages._OVERFLOW}
    return {
        "leaf": [n for n, flags in there.items() if flags & pages._LEAF],
        "branch": [n for n, flags in there.items() if flags & pages._BRANCH],
        "long": [n for n, flags in there.items() if flags & pages._OVERFLOW and n in first],
        "rest": [n for n, flags in there.items() if flags & pages._OVERFLOW and n not in first],
    }


def test_the_journal_of_these_tests_has_every_kind_of_page(filled: Path) -> None:
    assert all(kinds(filled / "data.mdb").values())


def cut(file: Path, number: int, psize: int) -> None:
    os.truncate(file, number * psize)


def cut_within(file: Path, number: int, psize: int) -> None:
    os.truncate(file, number * psize + 100)


def zeros(file: Path, number: int, psize: int) -> None:
    with open(file, "r+b") as out:
        out.seek(number * psize)
        out.write(bytes(psize))


def cut_and_padded(file: Path, number: int, psize: int) -> None:
    size = file.stat().st_size
    cut(file, number, psize)
    os.truncate(file, size)


@pytest.mark.parametrize("damage", [cut, cut_within, zeros, cut_and_padded])
@pytest.mark.parametrize("kind", ["leaf", "branch", "long", "rest"])
def test_every_page_that_the_tables_reach_is_missed_by_name(
    folder: Path, filled: Path, kind: str, damage: Callable[[Path, int, int], None]
) -> None:
    file = folder / "data.mdb"
    psize = page_bytes(file)
    for number in kinds(file)[kind]:
        shutil.copyfile(filled / "data.mdb", file)
        damage(file, number, psize)
        said = refusal(folder)
        assert said.startswith(f"the journal in {folder} is damaged: "), f"{kind} page {number}: {said}"
        assert "keep the folder, turns that were acknowledged are in it" in said
        assert "move" not in said


def swapped(file: Path, number: int, psize: int) -> None:
    data = bytearray(file.read_bytes())
    data[number * psize : (number + 1) * psize] = data[(number - 1) * psize : number * psize]
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["leaf", "branch", "long"])
def test_a_page_with_another_ones_content_is_damage(folder: Path, filled: Path, kind: str) -> None:
    file = folder / "data.mdb"
    for number in kinds(file)[kind]:
        shutil.copyfile(filled / "data.mdb", file)
        swapped(file, number, page_bytes(file))
        assert f"page {number} holds something else" in refusal(folder)


def start_of_value(file: Path, part: bytes) -> int:
    """Where in the file the long value that holds ``part`` has it."""

    class Watched(pages._Walker):
        def _read(self, start: int, size: int) -> bytes:
            data = super()._read(start, size)
            found.extend(start + at.start() for at in re.finditer(re.escape(part), data))
            return data

    def look(value: Value) -> None:
        value.read()

    found: list[int] = []
    descriptor = os.open(file, os.O_RDONLY)
    try:
        Watched(descriptor, look).follow()
    finally:
        os.close(descriptor)
    return found[0]


def test_one_flipped_bit_of_a_record_is_damage_and_its_chunk_is_named(folder: Path) -> None:
    file = folder / "data.mdb"
    data = bytearray(file.read_bytes())
    # What the writer had in its memory fills the ends of pages: that may be the record too, and nothing reads it.
    data[start_of_value(file, (3).to_bytes(8, "little") * 100) + 400] ^= 1
    file.write_bytes(data)
    said = refusal(folder)
    assert "is damaged: chunks: the value under" in said
    assert "it is not what was written, by its checksum (whole: rows, state)" in said


def test_a_page_that_leads_back_to_its_root_ends_the_search(folder: Path) -> None:
    file = folder / "data.mdb"
    psize, branch = page_bytes(file), kinds(file)["branch"][0]
    data = bytearray(file.read_bytes())
    head = branch * psize
    (node,) = struct.unpack_from("=H", data, head + pages._HEAD.size)
    struct.pack_into("=HHH", data, head + node, branch & 0xFFFF, branch >> 16, 0)
    file.write_bytes(data)
    assert f"page {branch} is reached twice" in refusal(folder)


def noise(seed: int, size: int) -> Iterator[int]:
    value = seed
    for _ in range(size):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF
        yield value >> 16 & 0xFF


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_page_holds_the_search_ends_with_a_line(folder: Path, seed: int) -> None:
    """Bytes of a reached page are noise, its number and kind left as they were."""
    file = folder / "data.mdb"
    psize, there = page_bytes(file), kinds(file)
    pool = there["leaf"] + there["branch"]
    number = pool[seed % len(pool)]
    data = bytearray(file.read_bytes())
    data[number * psize + 12 : (number + 1) * psize] = bytes(noise(seed, psize - 12))
    file.write_bytes(data)
    assert walk(file).damage


def test_an_unreadable_disk_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, size: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    assert refusal(folder).startswith(f"the journal in {folder} cannot be read: Input/output error; keep the folder")
