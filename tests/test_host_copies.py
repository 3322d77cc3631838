"""One fetch a host: which of a host's actors fetches a version over the network, and when another one takes over."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.weights import copies
from actors.weights.fetcher import WeightsFetcher
from atpo_async.core.errors import PeerLost, WeightsRejected
from atpo_async.run import scratch
from atpo_async.transports import host_copies
from atpo_async.transports.host_copies import HostCopies, name_of
from atpo_async.wire.messages import ChunkRequest, WeightsManifest
from tests.test_actor_weights import PAYLOAD, SETTINGS, FakeLearner, FakeListener
from tests.waiting_support import until, within

STALL_S = 5.0


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared memory of a host of its own."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(copies, "SHARED_MEMORY", folder)
    monkeypatch.setattr(host_copies, "_LOOK_EVERY_S", (0.01,))
    return folder


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(folder.glob(pattern))


def write(path: Path, payload: bytes) -> None:
    path.write_bytes(payload)


@pytest.fixture
def learner() -> FakeLearner:
    return FakeLearner()


@pytest.fixture
def actors(learner: FakeLearner) -> Iterator[list[WeightsFetcher]]:
    made = [
        WeightsFetcher(run="r", client=learner, listener=FakeListener(), settings=SETTINGS)  # type: ignore[arg-type]
        for _ in range(3)
    ]
    yield made
    for each in made:
        each.close()


class Clock:
    """Seconds that pass only when told, and how often they were looked at."""

    def __init__(self) -> None:
        self.now, self.looks = 0.0, 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now

    async def looked_at_again(self) -> None:
        before = self.looks
        await until(lambda: self.looks > before + 2)


class Process:
    """One of a host's processes, whose fetches end when they are let go on."""

    def __init__(self, number: int, memory: Path, clock: Clock) -> None:
        self.folder = memory / f"own-{number}"
        self.folder.mkdir()
        self.target = self.folder / "v1.bin"
        self.copies = HostCopies("r", stall_s=STALL_S, clock=clock)
        self.began, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def bring(self, manifest: WeightsManifest) -> bool:
        return await self.copies.bring(manifest, self.target, self._fetch)

    async def _fetch(self, path: Path) -> None:
        self.began.set()
        write(path, PAYLOAD[:100].tobytes())
        await self.may_go_on.wait()
        write(path, PAYLOAD.tobytes())

    @property
    def has_it(self) -> bool:
        return self.target.exists() and self.target.read_bytes() == PAYLOAD.tobytes()


def chunks_asked(learner: FakeLearner) -> list[int]:
    return [request.index for request in learner.asked if isinstance(request, ChunkRequest)]


async def test_three_actors_of_a_host_ask_the_learner_for_every_chunk_once(
    actors: list[WeightsFetcher], learner: FakeLearner, memory: Path
) -> None:
    files = await asyncio.gather(*(actor.fetch(learner.announcement) for actor in actors))
    assert sorted(chunks_asked(learner)) == [0, 1, 2]
    assert {file.path.read_bytes() for file in files if file is not None} == {PAYLOAD.tobytes()}
    assert len({file.path.stat().st_ino for file in files if file is not None}) == 1
    counts = [actor.take_counts() for actor in actors]
    assert sorted(count.get("weights/fetched_for_host", 0) for count in counts) == [0, 0, 1]
    assert sorted(count.get("weights/shared_by_host", 0) for count in counts) == [0, 1, 1]
    assert sorted(actor.hashed for actor in actors) == [False, False, True]
    for actor in actors:
        actor.close()
    assert listed(memory) == []


async def test_a_later_version_takes_the_place_of_the_one_before(
    actors: list[WeightsFetcher], learner: FakeLearner, memory: Path
) -> None:
    for learner.version in (1, 2):
        for actor in actors:
            assert await actor.fetch(learner.announcement) is not None
    assert sorted(chunks_asked(learner)) == [0, 0, 1, 1, 2, 2]
    (common,) = listed(memory, "atpo-r.host-*")
    left = {path.name for path in listed(common) if not path.name.startswith(".")}
    whole = name_of(learner.manifest)
    assert left == {f"{whole}.bin", f"{whole}.verified", f"{whole}.lock0"}


async def test_other_weights_under_the_same_number_are_fetched_too(
    actors: list[WeightsFetcher], learner: FakeLearner
) -> None:
    await actors[0].fetch(learner.announcement)
    learner.payload = PAYLOAD[::-1].copy()
    found = await actors[1].fetch(learner.announcement)
    assert found is not None
    assert found.path.read_bytes() == PAYLOAD[::-1].tobytes()


async def test_when_the_fetch_of_one_fails_another_takes_over(
    actors: list[WeightsFetcher], learner: FakeLearner
) -> None:
    learner.spoil = 1
    with pytest.raises(WeightsRejected, match="tensor a"):
        await actors[0].fetch(learner.announcement)
    learner.spoil = None
    for actor in actors[1:]:
        assert await actor.fetch(learner.announcement) is not None
    assert sorted(chunks_asked(learner)) == [0, 0, 1, 1, 2, 2]


async def test_when_the_host_s_files_go_away_the_version_is_fetched_again(
    actors: list[WeightsFetcher], learner: FakeLearner, memory: Path
) -> None:
    await actors[0].fetch(learner.announcement)
    for folder in listed(memory):
        shutil.rmtree(folder)
    for actor in actors[1:]:
        assert await actor.fetch(learner.announcement) is not None
    assert sorted(chunks_asked(learner)) == [0, 0, 1, 1, 2, 2]


async def test_a_copy_that_was_altered_is_found_out_and_fetched_again(
    actors: list[WeightsFetcher], learner: FakeLearner, memory: Path
) -> None:
    await actors[0].fetch(learner.announcement)
    (whole,) = listed(memory, "atpo-r.host-*/*.bin")
    whole.write_bytes(bytes(len(PAYLOAD)))
    found = await actors[1].fetch(learner.announcement)
    assert found is not None
    assert found.path.read_bytes() == PAYLOAD.tobytes()


async def test_a_process_that_stands_still_is_passed_over_and_may_end_later(
    memory: Path, learner: FakeLearner, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    still, second, third = (Process(number, memory, clock) for number in range(3))
    first = asyncio.create_task(still.bring(learner.manifest))
    await within(still.began.wait())
    others = [asyncio.create_task(each.bring(learner.manifest)) for each in (second, third)]
    await clock.looked_at_again()
    assert not second.began.is_set()
    assert not third.began.is_set()
    clock.now += STALL_S + 1
    await until(lambda: second.began.is_set() or third.began.is_set())
    assert "has fetched v1-" in caplog.text
    assert "without progress for 5 s" in caplog.text
    for each in (second, third):
        each.may_go_on.set()
    await within(asyncio.gather(*others))
    assert second.copies.fetched + third.copies.fetched == 1
    still.may_go_on.set()
    await within(first)
    assert all(each.has_it for each in (still, second, third))


async def test_a_slow_fetch_that_makes_progress_is_waited_for(memory: Path, learner: FakeLearner) -> None:
    clock = Clock()
    slow, other = (Process(number, memory, clock) for number in range(2))
    first = asyncio.create_task(slow.bring(learner.manifest))
    await within(slow.began.wait())
    waits = asyncio.create_task(other.bring(learner.manifest))
    await clock.looked_at_again()
    for _ in range(4):
        clock.now += STALL_S - 1
        slow.copies.progress()
        await clock.looked_at_again()
    assert not other.began.is_set()
    slow.may_go_on.set()
    await within(asyncio.gather(first, waits))
    assert (other.copies.fetched, other.copies.shared, other.has_it) == (0, 1, True)


DIES = """
import os, sys, time
from pathlib import Path
from atpo_async.run import locks
lock = locks.take(Path(sys.argv[1]), str(os.getpid()))
assert lock is not None
print("locked", flush=True)
time.sleep(600)
"""


async def test_a_process_that_is_killed_while_it_fetches_is_succeeded(memory: Path, learner: FakeLearner) -> None:
    other = Process(0, memory, Clock())
    common = memory / f"atpo-r.host-{os.getuid()}"
    common.mkdir(mode=0o700)
    whole = common / f"{name_of(learner.manifest)}.bin"
    whole.with_suffix(".part0").write_bytes(b"half")
    killed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DIES, str(whole.with_suffix(".lock0")), stdout=asyncio.subprocess.PIPE
    )
    assert killed.stdout is not None
    try:
        assert await killed.stdout.readline() == b"locked\n"
        other.may_go_on.set()
        waits = asyncio.create_task(other.bring(learner.manifest))
        await until(lambda: other.copies._folder is not None)
        assert not other.began.is_set()
    finally:
        killed.kill()
        await killed.wait()
    await within(waits)
    assert other.has_it
    assert not whole.with_suffix(".part0").exists()


async def test_a_cancelled_fetch_leaves_the_turn_to_another(memory: Path, learner: FakeLearner) -> None:
    first, second = (Process(number, memory, Clock()) for number in range(2))
    fetching = asyncio.create_task(first.bring(learner.manifest))
    await within(first.began.wait())
    waits = asyncio.create_task(second.bring(learner.manifest))
    fetching.cancel()
    second.may_go_on.set()
    assert await within(waits)
    assert second.has_it


async def test_in_a_folder_of_another_user_each_actor_fetches_for_itself(
    actors: list[WeightsFetcher],
    learner: FakeLearner,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(scratch, "is_private", lambda folder: False)
    for actor in actors[:2]:
        assert await actor.fetch(learner.announcement) is not None
    assert sorted(chunks_asked(learner)) == [0, 0, 1, 1, 2, 2]
    assert "weights are not shared with other actors of this host" in caplog.text


async def test_a_link_in_place_of_the_common_folder_is_not_followed(
    actors: list[WeightsFetcher], learner: FakeLearner, memory: Path, tmp_path: Path
) -> None:
    """Another user may have laid it there, to have files of this one removed."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    (private / "thesis.bin").write_text("years of work")
    (memory / f"{scratch.weights_folder('r').name}.host-{os.getuid()}").symlink_to(private)
    for actor in actors[:2]:
        assert await actor.fetch(learner.announcement) is not None
    assert [path.name for path in private.iterdir()] == ["thesis.bin"]


async def test_a_learner_that_falls_silent_is_an_error_for_the_one_that_asks_it(
    actors: list[WeightsFetcher], learner: FakeLearner
) -> None:
    announced = learner.announcement
    learner.silent = True
    with pytest.raises(PeerLost):
        await actors[0].fetch(announced)
