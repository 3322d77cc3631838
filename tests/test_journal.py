"""What the journal said it has is there, whatever happens to the process or the disk."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from atpo_async.core.errors import SetupError
from buffer.journal import check, tables
from buffer.journal import chunks as chunks_module
from buffer.journal import journal as journals
from buffer.journal.journal import Journal
from buffer.journal.tables import JournalBroken, Tables
from buffer.trees.index import ROW, Place, TurnEntry, pack_entry, places_of, rows_of

SOON_S = 20.0


def record(number: int, nbytes: int = 256) -> bytes:
    return number.to_bytes(8, "little") * (nbytes // 8)


def keep(journal: Journal, number: int, *, tree: int = 1, nbytes: int = 256) -> TurnEntry:
    place = journal.add(record(number, nbytes))
    entry = TurnEntry(tree, number, 0, 1, 2, 3, 0.5, 0.25, 7, 8, *place)
    journal.note(entry)
    return entry


def opened(folder: Path, **options: Any) -> Journal:
    return Journal(folder, **({"max_bytes": 1 << 24, "gather_s": 0.0} | options))


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with opened(tmp_path / "j") as made:
        made.recover()
        yield made


async def held_in(folder: Path) -> tuple[list[int], dict[bytes, bytes], list[bytes]]:
    """Turn ids, state and records of a journal that nobody has open."""
    async with opened(folder) as made:
        found = made.recover()
        records = await made.load(places_of(found.rows))
        return found.rows["turn_id"].tolist(), dict(found.state), records


async def test_what_is_settled_is_there_for_the_next_process(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        journal.recover()
        for number in range(1, 6):
            keep(journal, number)
        journal.put(b"name", b"value")
        await journal.settle()
    ids, state, records = await held_in(tmp_path)
    assert ids == [1, 2, 3, 4, 5]
    assert state == {b"name": b"value"}
    assert records == [record(number) for number in ids]


async def test_a_record_can_be_read_before_during_and_after_its_commit(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = keep(journal, 1)
    assert journal.read(first.place) == record(1)
    holding, commit = asyncio.Event(), Tables.commit
    loop = asyncio.get_running_loop()

    def held(self: Tables, group: Any) -> None:
        asyncio.run_coroutine_threadsafe(holding.wait(), loop).result(SOON_S)
        commit(self, group)

    monkeypatch.setattr(Tables, "commit", held)
    settling = asyncio.create_task(journal.settle())
    await asyncio.sleep(0)
    second = keep(journal, 2)
    assert [journal.read(e.place) for e in (first, second)] == [record(1), record(2)]
    assert await journal.load([second.place, first.place]) == [record(2), record(1)]
    holding.set()
    await settling
    assert [journal.read(e.place) for e in (first, second)] == [record(1), record(2)]


async def test_a_load_under_way_sees_what_a_commit_takes_away(journal: Journal) -> None:
    entries = [keep(journal, number) for number in range(1, 4)]
    await journal.settle()
    loading = asyncio.create_task(journal.load([entry.place for entry in entries]))
    await asyncio.sleep(0)
    journal.release(rows_of(entries))
    await journal.settle()
    assert await loading == [record(1), record(2), record(3)]


async def test_as_many_may_load_at_once_as_there_are_peers(journal: Journal) -> None:
    entry = keep(journal, 1)
    await journal.settle()
    found = await asyncio.gather(*(journal.load([entry.place]) for _ in range(5000)))
    assert all(each == [record(1)] for each in found)


async def test_the_last_record_of_a_chunk_frees_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        journal.recover()
        first = [keep(journal, number) for number in range(1, 4)]
        await journal.settle()
        second = keep(journal, 4)
        await journal.settle()
        journal.release(rows_of(first[:2]))
        await journal.settle()
        assert journal.status()["chunks"] == 2
        journal.release(rows_of(first[2:]))
        await journal.settle()
        assert journal.status()["chunks"] == 1
        assert journal.nbytes == journal.status()["chunk_bytes"] == second.nbytes
    ids, _, _ = await held_in(tmp_path)
    assert ids == [4]


async def test_what_is_let_go_before_it_was_ever_committed_leaves_nothing_and_is_never_written(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        journal.recover()
        journal.put(b"k", b"v")
        await journal.settle()
        before = journal._tables._env.info()["last_pgno"]
        journal.release(rows_of([keep(journal, number, nbytes=1 << 16) for number in range(1, 9)]))
        await journal.settle()
        assert (journal.nbytes, journal.status()["chunk_bytes"]) == (0, 0)
        assert journal._tables._env.info()["last_pgno"] <= before + 4
    assert (await held_in(tmp_path))[0] == []


async def test_pages_of_what_was_freed_are_used_again(journal: Journal) -> None:
    sizes = []
    for generation in range(40):
        entries = [keep(journal, 1 + generation, nbytes=4096) for _ in range(100)]
        await journal.settle()
        journal.release(rows_of(entries))
        await journal.settle()
        sizes.append((journal.folder / "data.mdb").stat().st_size)
    assert sizes[-1] <= sizes[9]


async def test_large_groups_are_cut_into_chunks(journal: Journal) -> None:
    entries = [keep(journal, number, nbytes=64 << 10) for number in range(1, 13)]
    await journal.settle()
    assert journal.status()["chunks"] == 3
    assert await journal.load([e.place for e in entries]) == [record(e.turn_id, 64 << 10) for e in entries]


async def test_one_settling_serves_all_that_was_handed_over_before_it(journal: Journal) -> None:
    before = journal.commits
    for number in range(1, 101):
        keep(journal, number)
    await asyncio.gather(*(journal.settle() for _ in range(100)))
    assert journal.commits - before <= 2


async def test_what_changes_is_collected_right_before_the_commit(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        journal.recover()
        journal.collect = lambda: journal.put(b"k", b"collected")
        await journal.settle()
        journal.collect = lambda: journal.put(b"k", None)
        await journal.settle()
        journal.collect = lambda: None
    assert b"k" not in (await held_in(tmp_path))[1]


# --- the disk refuses ----------------------------------------------------------------------------------------------


class Disk:
    """Lets a journal's commits fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = None
        self.tried = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        commit = Tables.commit

        def guarded(journal: Tables, group: Any) -> None:
            self._loop.call_soon_threadsafe(self.tried.set)
            if self.error is not None:
                raise self.error
            commit(journal, group)

        monkeypatch.setattr(Tables, "commit", guarded)
        monkeypatch.setattr(journals, "RETRY_S", 0.01)

    async def fail(self, journal: Journal, error: Exception) -> asyncio.Task[None]:
        """Returns somebody who waits for a commit that does not come."""
        self.error = error
        self.tried.clear()
        waiting = asyncio.create_task(journal.settle())
        await asyncio.wait_for(self.tried.wait(), SOON_S)
        self.tried.clear()
        await asyncio.wait_for(self.tried.wait(), SOON_S)  # … and was tried again
        return waiting


@pytest.mark.parametrize(
    "error", [lmdb.DiskError("No space left on device"), OSError(5, "Input/output error"), lmdb.MapFullError("full")]
)
async def test_while_the_disk_refuses_nothing_settles_and_it_goes_on_when_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    async with opened(tmp_path) as journal:
        journal.recover()
        disk = Disk(monkeypatch)
        first = keep(journal, 1)
        waiting = await disk.fail(journal, error)
        assert not waiting.done()
        assert journal.failing == str(error)
        assert "nothing is acknowledged until it can" in caplog.text
        second = keep(journal, 2)
        assert await journal.load([first.place, second.place]) == [record(1), record(2)]
        disk.error = None
        await asyncio.wait_for(waiting, SOON_S)
        assert journal.failing is None
        assert "is written again" in caplog.text
        await journal.settle()
    assert (await held_in(tmp_path))[0] == [1, 2]


async def test_a_journal_that_takes_nothing_more_tells_its_owner(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    disk.error = lmdb.PanicError("mdb_txn_commit")
    keep(journal, 1)
    waiting = asyncio.create_task(journal.settle())
    assert journal.broken is not None
    with pytest.raises(JournalBroken, match="can take nothing more"):
        await asyncio.wait_for(journal.broken, SOON_S)
    assert not waiting.done()
    waiting.cancel()
    monkeypatch.undo()


async def test_a_fault_of_ours_while_collecting_ends_in_the_open(journal: Journal) -> None:
    def faulty() -> None:
        raise KeyError("tree")

    journal.collect = faulty
    waiting = asyncio.create_task(journal.settle())
    assert journal.broken is not None
    with pytest.raises(JournalBroken, match="failed: KeyError: 'tree'"):
        await asyncio.wait_for(journal.broken, SOON_S)
    waiting.cancel()


async def test_settling_gives_up_after_the_time_it_was_given(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    waiting = await disk.fail(journal, lmdb.DiskError("No space left on device")) if keep(journal, 1) else None
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await journal.settle(timeout_s=0.01)
    # For hours, perhaps: who has given up is not remembered.
    assert len(journal._settling) == 1
    disk.error = None
    assert waiting is not None
    await asyncio.wait_for(waiting, SOON_S)
    assert not journal._settling


async def test_a_commit_gathers_from_the_first_thing_on_that_it_will_hold(tmp_path: Path) -> None:
    hour_s = 3600.0
    async with Journal(tmp_path / "journal", max_bytes=1 << 24, gather_s=hour_s) as journal:
        journal.recover()
        keep(journal, 1)
        # As if it had come that long ago, while the commit before was written.
        journal._first_at -= hour_s
        await asyncio.wait_for(journal.settle(), SOON_S)
        keep(journal, 2)
        gathering = asyncio.create_task(journal.settle())
        for _ in range(20):
            await asyncio.sleep(0)
        assert (journal.commits, gathering.done()) == (1, False)
        await asyncio.wait_for(journal.settle(at_once=True), SOON_S)
        await asyncio.wait_for(gathering, SOON_S)
        assert journal.commits == 2


# --- killed --------------------------------------------------------------------------------------------------------

WRITER = textwrap.dedent("""
    import asyncio, sys
    from pathlib import Path
    from buffer.trees.index import TurnEntry
    from buffer.journal.journal import Journal

    async def main():
        async with Journal(Path(sys.argv[1]), max_bytes=1 << 24, gather_s=0.0) as journal:
            journal.recover()
            number = 0
            while True:
                for _ in range(50):
                    number += 1
                    place = journal.add(number.to_bytes(8, "little") * 512)
                    journal.note(TurnEntry(1, number, 0, 1, 2, 3, 0.5, 0.25, 7, 8, *place))
                    journal.put(b"last", str(number).encode())
                await journal.settle()
                print(number, flush=True)

    asyncio.run(main())
""")


def begin_writing(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )


@pytest.mark.parametrize("groups", [1, 7, 30])
async def test_a_process_killed_in_mid_commit_leaves_whole_groups_and_all_that_it_acknowledged(
    tmp_path: Path, groups: int
) -> None:
    writer = begin_writing(tmp_path)
    try:
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(groups)]
        writer.send_signal(signal.SIGKILL)
        told += [int(line) for line in writer.stdout]
    finally:
        writer.kill()
        writer.wait()
    ids, state, records = await held_in(tmp_path)
    assert len(ids) >= told[-1]
    assert len(ids) % 50 == 0
    assert ids == list(range(1, len(ids) + 1))
    assert state[b"last"] == str(len(ids)).encode()
    assert records == [record(number, 4096) for number in ids]


# --- what is found --------------------------------------------------------------------------------------------------


async def test_a_journal_in_use_is_refused(journal: Journal) -> None:
    with pytest.raises(SetupError, match=rf"in use by another buffer \(process {os.getpid()}\); stop that one first"):
        opened(journal.folder)


async def test_a_journal_that_was_never_entered_does_not_keep_its_folder(tmp_path: Path) -> None:
    forgotten = opened(tmp_path)
    del forgotten
    gc.collect()
    closed = opened(tmp_path)
    await closed.close()
    await closed.close()
    async with opened(tmp_path) as journal:
        journal.recover()


def test_a_journal_that_could_not_be_opened_does_not_keep_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(check, "create", lambda folder: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            opened(tmp_path)
    opened(tmp_path)


async def test_a_journal_of_another_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        journal.recover()
        journal.put(tables._META, b"999")
        await journal.settle()
    async with opened(tmp_path) as journal:
        said = f"has format 999, this program reads {tables.FORMAT}: finish the run with the program"
        with pytest.raises(SetupError, match=said):
            journal.recover()


async def test_another_runs_journal_is_refused_with_both_named(tmp_path: Path) -> None:
    async with opened(tmp_path, run="one") as journal:
        journal.recover()
        await journal.settle()
    async with opened(tmp_path, run="other") as journal:
        with pytest.raises(SetupError, match="belongs to run 'one', this is run 'other'"):
            journal.recover()
    async with opened(tmp_path, run="one") as journal:
        assert journal.recover().state == {}


def test_a_full_disk_is_named_before_anything_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LEAST_FREE_BYTES", 1 << 60)
    with pytest.raises(SetupError, match=r"bytes left, the journal needs .*set buffer\.journal_dir to another disk"):
        opened(tmp_path)


async def test_a_journal_that_is_there_is_opened_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its buffer died while the disk was full: the next one waits for room as that one did."""
    async with Journal(tmp_path, max_bytes=1 << 24) as journal:
        journal.recover()
        keep(journal, 1)
        await journal.settle()
    monkeypatch.setattr(tables, "LEAST_FREE_BYTES", 1 << 60)
    async with Journal(tmp_path, max_bytes=1 << 24) as journal:
        assert len(journal.recover().rows) == 1


def test_an_emptied_file_is_not_taken_for_a_new_journal(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").touch()
    with pytest.raises(
        SetupError, match=r"is damaged: data\.mdb is empty, and leases were given before; keep the fold"
    ):
        opened(tmp_path)


async def test_an_empty_file_of_a_run_that_gave_no_lease_is_made_anew(tmp_path: Path) -> None:
    """A buffer was killed between the file's creation and its first bytes."""
    (tmp_path / "data.mdb").touch()
    async with opened(tmp_path, leased=lambda: False) as journal:
        assert len(journal.recover().rows) == 0


def test_a_buffer_killed_while_it_makes_its_journal_leaves_none_or_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed_first(path: str, **options: Any) -> Any:
        (Path(path) / "data.mdb").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(lmdb, "open", killed_first)
        patched.setattr(check, "_remove", lambda aside: None)  # nobody cleans up behind a kill
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path)
    assert not (tmp_path / "data.mdb").exists()
    opened(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data.mdb", "lock.mdb", "owner"]


def test_a_file_made_on_a_full_disk_is_removed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_room(path: str, **options: Any) -> Any:
        (Path(path) / "data.mdb").touch()
        raise lmdb.DiskError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(lmdb, "open", without_room)
        with pytest.raises(SetupError, match="cannot be opened: No space left"):
            opened(tmp_path)
    opened(tmp_path)


def test_a_folder_that_cannot_be_is_named_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"file/j cannot be used: .*set buffer\.journal_dir"):
        opened(tmp_path / "file" / "j")


def test_a_file_that_is_no_journal_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(os.urandom(64 << 10))
    with pytest.raises(SetupError, match=r"data\.mdb is no journal, page 0 is .*; keep the folder"):
        opened(tmp_path)


async def test_a_chunk_that_is_missing_is_named(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        journal.recover()
        entry = keep(journal, 1)
        await journal.settle()
        with journal._tables._env.begin(write=True) as txn:
            txn.delete(tables._U64.pack(entry.chunk), db=journal._tables._chunks)
    async with opened(tmp_path) as journal:
        with pytest.raises(SetupError, match=f"chunk {entry.chunk} is missing"):
            journal.recover()


# --- moving what is left --------------------------------------------------------------------------------------------


async def test_chunks_of_which_little_is_needed_are_named_and_can_be_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks_module, "SPARE_BYTES", 1000)
    async with opened(tmp_path) as journal:
        journal.recover()
        chunks: list[Sequence[TurnEntry]] = []
        for group in range(4):
            chunks.append([keep(journal, 10 * group + i) for i in range(1, 9)])
            await journal.settle()
        assert journal.sparse_chunks(9) == []
        for entries in chunks:
            journal.release(rows_of(entries[1:]))
        assert journal.sparse_chunks(2) == [chunks[0][0].chunk, chunks[1][0].chunk]
        rows = await journal.rows_in([chunks[0][0].chunk])
        assert rows["turn_id"].tolist() == list(range(1, 9))
        (moved,) = await journal.load([chunks[0][0].place])
        place = journal.add(moved)
        journal.note(chunks[0][0]._replace(chunk=place.chunk, offset=place.offset))
        journal.release(rows_of(chunks[0][:1]))
        await journal.settle()
    ids, _, records = await held_in(tmp_path)
    # The rows of what else was in the chunks that are left are there until these go; their owner lets them go again.
    assert ids.count(1) == 1
    assert records[ids.index(1)] == record(1)


def test_a_place_is_three_numbers() -> None:
    assert Place(1, 2, 3) == (1, 2, 3)
    assert np.dtype(ROW).itemsize == len(pack_entry(TurnEntry(1, 2, 0, 0, 0, 0, 0.0, 0.0, 0, 0, 1, 0, 8)))


@pytest.mark.parametrize(("gone", "left"), [(False, [2, 3]), (True, [1, 2, 3])])
async def test_rows_are_cut_out_of_a_chunk_that_others_keep_unless_their_tree_is_gone(
    tmp_path: Path, gone: bool, left: list[int]
) -> None:
    async with opened(tmp_path) as journal:
        journal.recover()
        entries = [keep(journal, number) for number in (1, 2, 3)]
        await journal.settle()
        journal.release(rows_of(entries[:1]), gone=gone)
        await journal.settle()
        assert journal.nbytes == entries[1].nbytes + entries[2].nbytes
    assert (await held_in(tmp_path))[0] == left
