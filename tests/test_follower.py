"""A follower's copy is the journal of some commit, whatever happens to either side; it goes on from where it was."""

from __future__ import annotations

import asyncio
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from atpo_async.core.errors import BadMessage, SetupError
from atpo_async.run.rundir import FOLLOWING, PROMOTED
from atpo_async.wire.followers import messages as f
from atpo_async.wire.messages import PROTOCOL, Refused
from buffer.following import copying, sending
from buffer.following.copying import Has, ranges_of
from buffer.following.folder import FollowerFolder
from buffer.journal import commits
from buffer.journal.changes import CHUNKS, ROWS, STATE, Change, Decoder, cut, encode
from buffer.journal.commits import Commits
from buffer.journal.journal import Journal
from buffer.journal.marks import MARK, Mark, dump, read_mark
from buffer.trees.index import TurnEntry, rows_of
from tests.fault_support import Spawner
from tests.follower_support import RUN, Source, contents, follower, following_config, has_all, has_at_least, source
from tests.waiting_support import until, within


def record(number: int, nbytes: int) -> bytes:
    return number.to_bytes(8, "little") * (nbytes // 8)


def keep(journal: Journal, number: int, *, nbytes: int = 4096) -> TurnEntry:
    place = journal.add(record(number, nbytes))
    entry = TurnEntry(1, number, 0, 1, 2, 3, 0.5, 0.25, 7, 8, *place)
    journal.note(entry)
    return entry


async def work(source: Source, first: int, count: int, *, nbytes: int = 4096) -> list[TurnEntry]:
    """So many commits of a record and an entry each."""
    found = []
    for number in range(first, first + count):
        found.append(keep(source.journal, number, nbytes=nbytes))
        source.journal.put(b"last", str(number).encode())
        await within(source.journal.settle(at_once=True))
    return found


def noted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tables of the entries that copies send from now on."""
    sent: list[int] = []

    def note(change: Change) -> list[bytes]:
        sent.append(change.table)
        return encode(change)

    monkeypatch.setattr(copying, "encode", note)
    return sent


async def test_a_follower_gets_a_copy_and_then_every_commit(tmp_path: Path) -> None:
    async with source(tmp_path / "j") as s:
        entries = await work(s, 1, 20)
        async with follower(tmp_path / "copy", s.endpoint):
            await has_all(s)
            await work(s, 21, 20)
            # Freed and cut out as well as added.
            s.journal.release(rows_of(entries[:5]), gone=True)
            s.journal.release(rows_of(entries[7:8]))
            s.journal.put(b"last", None)
            await within(s.journal.settle())
            await has_all(s)
            assert s.socket.followers.copies == 1
    assert contents(tmp_path / "copy" / "journal") == contents(tmp_path / "j")


async def test_a_follower_that_was_away_goes_on_where_it_was_also_with_the_next_process_of_the_buffer(
    tmp_path: Path,
) -> None:
    async with source(tmp_path / "j") as s:
        await work(s, 1, 3)
        async with follower(tmp_path / "copy", s.endpoint):
            await has_all(s)
        await work(s, 4, 3)
        async with follower(tmp_path / "copy", s.endpoint):
            await has_all(s)
        assert s.socket.followers.copies == 1
    async with source(tmp_path / "j") as s:
        await work(s, 7, 3)
        async with follower(tmp_path / "copy", s.endpoint):
            await has_all(s)
        assert s.socket.followers.copies == 0
    assert contents(tmp_path / "copy" / "journal") == contents(tmp_path / "j")


async def test_a_follower_that_lacks_commits_that_are_kept_no_more_gets_only_the_chunks_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "KEEP_BYTES", 10_000)
    sent = noted(monkeypatch)
    async with source(tmp_path / "j") as s:
        entries = await work(s, 1, 10)
        async with follower(tmp_path / "copy", s.endpoint):
            await has_all(s)
        assert sent.count(CHUNKS) == 10
        sent.clear()
        await work(s, 11, 6)
        s.journal.release(rows_of(entries[:4]), gone=True)
        s.journal.put(b"last", b"none")
        await within(s.journal.settle())
        async with follower(tmp_path / "copy", s.endpoint):
            await has_all(s)
        assert (s.socket.followers.copies, sent.count(CHUNKS)) == (2, 6)
    assert contents(tmp_path / "copy" / "journal") == contents(tmp_path / "j")


async def test_chunks_of_a_copy_that_was_broken_off_are_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "PART_BYTES", 5000)
    async with source(tmp_path / "j") as s:
        await work(s, 1, 12)
        real, broken = FollowerFolder.take, asyncio.Event()
        loop = asyncio.get_running_loop()

        def stops(self: FollowerFolder, part: f.JournalPart) -> None:
            if part.part == 6:
                loop.call_soon_threadsafe(broken.set)
                raise OSError(28, "No space left on device")
            real(self, part)

        monkeypatch.setattr(FollowerFolder, "take", stops)
        async with follower(tmp_path / "copy", s.endpoint):
            await within(broken.wait())
        monkeypatch.setattr(FollowerFolder, "take", real)
        held = FollowerFolder(tmp_path / "copy", sync=False)
        hello = held.hello(PROTOCOL)
        held.close()
        assert not hello.complete
        assert 1 in Has(hello.chunks)
        sent = noted(monkeypatch)
        async with follower(tmp_path / "copy", s.endpoint):
            await has_all(s)
        assert 0 < sent.count(CHUNKS) < 12
    assert contents(tmp_path / "copy" / "journal") == contents(tmp_path / "j")


async def test_a_copy_that_takes_too_long_is_broken_off_and_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "COPY_S", -1.0)
    monkeypatch.setattr(sending, "PART_BYTES", 5000)
    async with source(tmp_path / "j") as s:
        await work(s, 1, 8)
        async with follower(tmp_path / "copy", s.endpoint):
            await until(lambda: s.socket.followers.copies >= 2)
            monkeypatch.setattr(sending, "COPY_S", 60.0)
            await has_all(s)
    assert contents(tmp_path / "copy" / "journal") == contents(tmp_path / "j")


async def test_a_copy_whose_follower_asks_for_nothing_more_is_let_go_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "COPY_S", 0.0)
    async with source(tmp_path / "j") as s:
        await work(s, 1, 8)
        nothing = np.zeros(0, np.uint8)
        followers = s.socket.followers
        hello = f.FollowHello(protocol=PROTOCOL, run="", stream="", position=0, complete=False, chunks=nothing)
        assert isinstance(await followers.handle("gone", hello), f.Following)
        (gone,) = followers.followers
        assert gone.copy is not None
        await until(lambda: gone.copy is None)
        assert followers.followers == ()
        request = f.FollowRequest(run=RUN, part=0, durable=0, wait_s=0.0)
        assert isinstance(await followers.handle("gone", request), Refused)


async def test_values_larger_than_a_message_travel(tmp_path: Path) -> None:
    config = following_config(links={"max_message_bytes": 1 << 16})
    async with source(tmp_path / "j", config) as s:
        await work(s, 1, 2, nbytes=400_000)
        async with follower(tmp_path / "copy", s.endpoint, config):
            await has_all(s)
            await work(s, 3, 2, nbytes=400_000)
            await has_all(s)
    assert contents(tmp_path / "copy" / "journal") == contents(tmp_path / "j")


async def test_nothing_settles_before_a_follower_has_it_where_the_buffer_waits_for_one(tmp_path: Path) -> None:
    config = following_config(buffer={"follower_wait": True})
    async with source(tmp_path / "j", config) as s:
        keep(s.journal, 1)
        settled = asyncio.create_task(s.journal.settle())
        await until(lambda: s.commits == 1 and s.journal.unmirrored_s > 0)
        assert not settled.done()
        assert s.journal.held_up == "no follower has its last commits (buffer.follower_wait)"
        more = [asyncio.create_task(s.journal.settle()) for _ in range(3)]
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await s.journal.settle(timeout_s=0.02, at_once=True)
        assert len(s.journal._unmirrored) == s.commits == 1
        async with follower(tmp_path / "copy", s.endpoint):
            await within(asyncio.gather(settled, *more))
            await work(s, 2, 5)
            # All of them are on the follower's disk before they settle.
            assert s.journal.mirrored == s.commits
        keep(s.journal, 9)
        with pytest.raises(TimeoutError):
            await s.journal.settle(timeout_s=0.05)


async def test_a_follower_that_is_behind_does_not_hold_the_journal_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FollowerFolder.take

    def refuses(self: FollowerFolder, part: f.JournalPart) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("buffer.following.client.WRITE_RETRY_S", 0.01)
    async with source(tmp_path / "j") as s:
        await work(s, 1, 1)
        monkeypatch.setattr(FollowerFolder, "take", refuses)
        async with follower(tmp_path / "copy", s.endpoint):
            await work(s, 2, 10)
            followers = s.socket.followers
            await until(lambda: any(each.trouble for each in followers.followers))
            gauges = followers.gauges()
            assert gauges["buffer/followers"] == 1.0
            assert gauges["buffer/follower_lag_commits"] == 11.0
            assert gauges["buffer/follower_lag_bytes"] > 10 * 4096
            assert "it cannot write" in followers.facts()["spare"]
            assert "No space left on device" in followers.facts()["spare"]
            monkeypatch.setattr(FollowerFolder, "take", real)
            await has_all(s)
            assert followers.gauges()["buffer/follower_lag_bytes"] == 0.0
    assert contents(tmp_path / "copy" / "journal") == contents(tmp_path / "j")


async def test_small_files_come_along_and_those_that_change_come_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"run_id": "run-1"}')
    (run / "version").write_text("3\n")
    (run / "endpoints.json").write_text('{"actors": "tcp://h:1"}')
    (run / "metrics.jsonl").write_text("{}\n")
    async with source(tmp_path / "j", files=run) as s:
        await work(s, 1, 1)
        async with follower(tmp_path / "copy", s.endpoint):
            await has_all(s)
            (run / "version").write_text("4\n")
            await work(s, 2, 1)
            await has_all(s)
            assert (tmp_path / "copy" / "version").read_text() == "4\n"
    copied = {path.name for path in (tmp_path / "copy").iterdir()}
    assert copied == {FOLLOWING, "journal", "run.json", "version", "endpoints.former.json"}
    assert (tmp_path / "copy" / "endpoints.former.json").read_text() == '{"actors": "tcp://h:1"}'


async def test_a_follower_learns_of_the_runs_end_with_everything_on_disk(tmp_path: Path) -> None:
    async with source(tmp_path / "j") as s:
        await work(s, 1, 2)
        async with follower(tmp_path / "copy", s.endpoint) as following:
            await has_all(s)
            keep(s.journal, 3)
            s.over = True
            await s.socket.__aexit__(None, None, None)
            assert await within(following)
    assert contents(tmp_path / "copy" / "journal") == contents(tmp_path / "j")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="its processes are forked and looked at in /proc")
async def test_a_follower_killed_at_any_moment_holds_the_journal_of_some_commit(
    tmp_path: Path, spawner: Spawner
) -> None:
    copy, log = tmp_path / "copy", tmp_path / "log"
    chance = random.Random(0)
    async with source(tmp_path / "j") as s:
        first = 1
        for _ in range(4):
            args = (str(copy), s.endpoint.removeprefix("tcp://"))
            process = spawner.start("follower", "tests.follower_support:run_follower", *args, log=log)
            goal = s.commits
            await work(s, first, 5)
            await has_at_least(s, goal)
            for number in range(first + 5, first + 5 + chance.randint(1, 30)):
                await work(s, number, 1)
            process.kill()
            first = s.commits + 1
            chunks, rows, state = contents(copy / "journal")
            mark = read_mark(state)
            assert mark is not None
            # One record and one value a commit: all of that commit, and nothing after it.
            assert int(state[b"last"]) == mark.number
            assert [struct.unpack(">Q", key)[0] for key in sorted(chunks)] == list(range(1, mark.number + 1))
            assert set(rows) == set(chunks)
        async with follower(copy, s.endpoint):
            await has_all(s)
        assert s.socket.followers.copies == 1
    assert contents(copy / "journal") == contents(tmp_path / "j")


# --- who may not follow -------------------------------------------------------------------------------------------


async def test_a_copy_of_another_run_or_another_journal_or_one_that_is_ahead_is_refused(tmp_path: Path) -> None:
    async with source(tmp_path / "j") as s:
        await work(s, 1, 3)
        async with follower(tmp_path / "copy", s.endpoint):
            await has_all(s)
    async with source(tmp_path / "other", run="run-2") as s:
        await work(s, 1, 1)
        async with follower(tmp_path / "copy", s.endpoint) as following:
            with pytest.raises(SetupError, match=r"holds the journal of run 'run-1', this buffer's is that of 'run-2'"):
                await within(following)
    async with source(tmp_path / "anew") as s:
        await work(s, 1, 1)
        async with follower(tmp_path / "copy", s.endpoint) as following:
            with pytest.raises(SetupError, match=r"this buffer's journal does not know.*Give the follower an empty"):
                await within(following)
        assert s.journal.committed is not None
        mark = Mark(stream=s.journal.committed.stream, number=99, last_chunk=9)
    made = FollowerFolder(tmp_path / "ahead", sync=False)
    with made._tables.env.begin(write=True) as txn:
        txn.put(MARK, dump(mark), db=made._tables.tables[STATE])
    made.close()
    async with source(tmp_path / "anew") as s:
        await work(s, 2, 1)
        async with follower(tmp_path / "ahead", s.endpoint) as following:
            with pytest.raises(SetupError, match=r"has commit 99 .*disk has lost commits.*Promote"):
                await within(following)


def test_a_folder_that_is_not_empty_and_no_followers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(SetupError, match=r"is not empty and no follower's: it has thesis.tex"):
        FollowerFolder(tmp_path / "full", sync=False)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / PROMOTED).write_text("{}")
    with pytest.raises(SetupError, match="has been promoted"):
        FollowerFolder(tmp_path / "done", sync=False)
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)
    FollowerFolder(tmp_path / "volume", sync=False).close()
    one = FollowerFolder(tmp_path / "volume", sync=False)
    with pytest.raises(SetupError, match="is in use by another"):
        FollowerFolder(tmp_path / "volume", sync=False)
    one.close()


async def test_more_followers_than_a_buffer_takes_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "MOST_FOLLOWERS", 1)
    async with source(tmp_path / "j") as s:
        await work(s, 1, 1)
        async with follower(tmp_path / "one", s.endpoint):
            await has_all(s)
            async with follower(tmp_path / "two", s.endpoint, name="two") as second:
                with pytest.raises(SetupError, match="1 followers are there"):
                    await within(second)


# --- bytes from strangers -------------------------------------------------------------------------------------------


def following(**fields: object) -> f.Following:
    base = {"run": RUN, "stream": "s", "position": 1, "copy": True, "max_bytes": 1, "value_bytes": 1000}
    return f.Following(**{**base, **fields})  # type: ignore[arg-type]


def part(
    kind: str, *sent: Change, ends: bool = False, position: int = 1, data: bytes | None = None, **more: object
) -> f.JournalPart:
    raw = b"".join(piece for change in sent for piece in encode(change)) if data is None else data
    fields = {"part": 0, "kind": kind, "data": np.frombuffer(raw, np.uint8), "ends": ends, "position": position}
    return f.JournalPart(**{**fields, "behind": 0, "files": (), **more})  # type: ignore[arg-type]


CHUNK = Change(CHUNKS, struct.pack(">Q", 1), b"")
MARKED = Change(STATE, MARK, dump(Mark(stream="s", number=1, last_chunk=1)))
HOSTILE = {
    "another table": (part("commits", data=b"\x07\x01\x00\x00\x00\x00\x00k"), "none of a journal's"),
    "a key too long": (part("commits", data=struct.pack("<BHI", 2, 512, 0)), "a key of 512 bytes"),
    "no key": (part("commits", data=struct.pack("<BHI", 2, 0, 0)), "a key of 0 bytes"),
    "a value too long": (part("commits", data=struct.pack("<BHI", 2, 1, 1001)), "a value of 1001"),
    "a deletion with a value": (part("commits", data=struct.pack("<BHI", 0x82, 1, 4)), "none of a journal's"),
    "an end amid a change": (part("commits", data=b"\x02\x01\x00", ends=True), "ends amid a change"),
    "a damaged chunk": (part("chunks", Change(CHUNKS, b"12345678", b"nonsense")), "is damaged"),
    "state among records": (part("chunks", MARKED), "records hold another change"),
    "records at a copy's end": (part("rest", CHUNK), "the end of a copy holds records"),
    "rows without their chunk": (
        part("rest", Change(ROWS, b"12345678", b""), MARKED, ends=True), "lacks 1 of its chunks"
    ),
    "no mark": (part("rest", ends=True), "its mark is None"),
    "another mark": (part("rest", MARKED, ends=True, position=2), "said to be commit 2"),
    "a damaged mark": (part("rest", Change(STATE, MARK, b"\xff"), ends=True), "is no Mark"),
    "a path": (part("nothing", files=(f.SmallFile(name="../evil", data=np.zeros(1, np.uint8)),)), "none of a run's"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_none_of_a_journal_is_refused_and_leaves_the_copy_as_it_was(tmp_path: Path, name: str) -> None:
    held = FollowerFolder(tmp_path / "copy", sync=False)
    held.begin(following(), "tcp://h:1")
    held.take(part("rest", Change(STATE, b"old", b"1"), MARKED, ends=True))
    before = held.mark
    sent, fact = HOSTILE[name]
    with pytest.raises(BadMessage, match=fact):
        held.take(sent)
    assert held.mark == before
    held.close()
    assert contents(tmp_path / "copy" / "journal")[STATE][b"old"] == b"1"
    assert not (tmp_path / "evil").exists()


def test_a_commit_that_did_not_end_is_not_there(tmp_path: Path) -> None:
    held = FollowerFolder(tmp_path / "copy", sync=False)
    held.begin(following(), "tcp://h:1")
    held.take(part("rest", MARKED, ends=True))
    held.take(part("commits", Change(STATE, b"half", b"1")))
    held.close()
    assert set(contents(tmp_path / "copy" / "journal")[STATE]) == {MARK}


def test_another_run_is_refused_by_the_follower_too(tmp_path: Path) -> None:
    held = FollowerFolder(tmp_path / "copy", sync=False)
    held.begin(following(), "tcp://h:1")
    with pytest.raises(SetupError, match="follows run 'run-1', the buffer at tcp://h:1 is of 'run-2'"):
        held.begin(following(run="run-2"), "tcp://h:1")
    held.close()


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 64, 10_000])
def test_changes_come_out_of_parts_of_any_size_as_they_went_in(size: int) -> None:
    sent = [
        Change(CHUNKS, b"k" * 8, bytes(range(256)) * 3), Change(STATE, b"x", None), Change(ROWS, b"r", b""),
        Change(STATE, b"name", b"value"),
    ]  # fmt: skip
    parts = list(cut((piece for change in sent for piece in encode(change)), size))
    assert [ends for _, ends in parts] == [False] * (len(parts) - 1) + [True]
    assert all(len(data) == size for data, ends in parts if not ends)
    decoder = Decoder(1000)
    assert [change for data, _ in parts for change in decoder.feed(data)] == sent
    assert decoder.pending_bytes == 0
    assert list(cut((), size)) == [(b"", True)]


def test_chunk_numbers_travel_as_ranges() -> None:
    numbers = np.array([1, 2, 3, 7, 9, 10], np.uint64)
    has = Has(ranges_of(numbers))
    assert [number for number in range(12) if number in has] == numbers.tolist()
    assert 5 not in Has(ranges_of(np.zeros(0, np.uint64)))
    with pytest.raises(BadMessage, match="no ranges"):
        Has(np.zeros(17, np.uint8))
    with pytest.raises(BadMessage, match="do not rise"):
        Has(np.concatenate([ranges_of(numbers), ranges_of(numbers)]))
    with pytest.raises(BadMessage, match="do not rise"):
        Has(np.zeros(16, np.uint8))


def test_how_far_behind_a_copy_is_in_commits_bytes_and_seconds() -> None:
    now = 0.0
    kept = Commits(None, (), clock=lambda: now, name="s")
    for number in range(5):
        now = float(number)
        kept.append([Change(STATE, b"k", bytes(100))])
    now = 10.0
    assert (kept.bytes_up_to(5) - kept.bytes_up_to(2), kept.since(2)) == (3 * 108, 2.0)
    assert (kept.bytes_up_to(5) - kept.bytes_up_to(5), kept.since(5)) == (0, None)
    assert kept.after(3) == ([piece for _ in range(2) for piece in encode(Change(STATE, b"k", bytes(100)))], 5)
    assert [kept.standing("s", number) for number in (0, 5, 6)] == ["here", "here", "ahead"]
    assert kept.standing("t", 0) == "unknown"


async def test_a_journal_that_nothing_follows_keeps_no_commit_in_memory(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", run=RUN, max_bytes=1 << 20, gather_s=0.0)
    journal.recover()
    commit, returned = journal.tables.commit, []
    journal.tables.commit = lambda group: returned.append(commit(group)) or []  # type: ignore[method-assign, func-returns-value]
    async with journal:
        keep(journal, 1)
        await within(journal.settle(at_once=True))
    assert returned
    assert not any(returned)
