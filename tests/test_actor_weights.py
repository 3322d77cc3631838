from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from actors.engines.base import WeightsFile
from actors.weights import copies
from actors.weights.copies import NoSpace
from actors.weights.fetcher import WeightsFetcher
from actors.weights.refusals import Refusals
from atpo_async.config import WeightsConfig
from atpo_async.core.errors import PeerLost, ProbeMismatch, WeightsRejected
from atpo_async.run.host import host_id
from atpo_async.wire.digests import digest_of, root_of
from atpo_async.wire.messages import (
    AnnouncementRequest,
    Chunk,
    ChunkRequest,
    ManifestRequest,
    TensorSpec,
    VersionGone,
    WeightsAnnounced,
    WeightsManifest,
)

PAYLOAD = np.arange(10_000, dtype=np.uint8)
SETTINGS = WeightsConfig(chunk_bytes=4096, poll_s=0.01, fetch_timeout_s=5.0)


class FakeLearner:
    """Answers as the publisher does; ``spoil`` changes one chunk, ``gone_after`` forgets the version."""

    def __init__(self, version: int = 1) -> None:
        self.version = version
        self.payload = PAYLOAD
        self.spoil: int | None = None
        self.gone_after: int | None = None
        self.shm_path: str | None = None
        self.asked: list[object] = []
        self.silent = False

    @property
    def manifest(self) -> WeightsManifest:
        half = len(self.payload) // 2
        return WeightsManifest(
            run="r",
            version=self.version,
            total_bytes=len(self.payload),
            chunk_bytes=4096,
            tensors=(
                TensorSpec(
                    name="a",
                    dtype="float32",
                    shape=(half // 4,),
                    offset=0,
                    nbytes=half,
                    digest=digest_of(self.payload[:half].data),
                ),
                TensorSpec(
                    name="b",
                    dtype="float32",
                    shape=(half // 4,),
                    offset=half,
                    nbytes=half,
                    digest=digest_of(self.payload[half:].data),
                ),
            ),
            probe_token_ids=np.arange(4, dtype=np.int32),
            probe_logprobs=np.zeros(3, dtype=np.float32),
            probe_tolerance=1e-4,
        )

    @property
    def announcement(self) -> WeightsAnnounced:
        m = self.manifest
        return WeightsAnnounced(
            run="r", version=m.version, total_bytes=m.total_bytes, digest=root_of(m.tensors, m.total_bytes),
            host_id=host_id(),
            shm_path=self.shm_path,
        )  # fmt: skip

    async def request(self, message: object, *, timeout_s: float) -> object:
        self.asked.append(message)
        if self.silent:
            raise PeerLost("learner is silent")
        if isinstance(message, AnnouncementRequest):
            return self.announcement
        if isinstance(message, ManifestRequest):
            return self.manifest
        assert isinstance(message, ChunkRequest)
        if self.gone_after is not None and message.index >= self.gone_after:
            return VersionGone(version=message.version, newest=message.version + 2)
        data = self.payload[message.index * 4096 : (message.index + 1) * 4096].copy()
        if self.spoil == message.index:
            data[0] ^= 1
        return Chunk(version=message.version, index=message.index, data=data)


class FakeListener:
    def __init__(self, *heard: WeightsAnnounced) -> None:
        self.heard = list(heard)

    async def next(self, *, timeout_s: float) -> WeightsAnnounced | None:
        return self.heard.pop(0) if self.heard else None


@pytest.fixture
def learner() -> FakeLearner:
    return FakeLearner()


@pytest.fixture
def fetcher(learner: FakeLearner) -> Iterator[WeightsFetcher]:
    made = WeightsFetcher(run="r", client=learner, listener=FakeListener(), settings=SETTINGS)  # type: ignore[arg-type]
    yield made
    made.close()


async def taken(fetcher: WeightsFetcher, learner: FakeLearner) -> WeightsFile:
    """The announced version, whole."""
    weights = await fetcher.fetch(learner.announcement)
    assert weights is not None
    assert weights.path.read_bytes() == PAYLOAD.tobytes()
    return weights


async def test_chunks_make_the_payload_again(fetcher: WeightsFetcher, learner: FakeLearner) -> None:
    await taken(fetcher, learner)
    assert sum(isinstance(m, ChunkRequest) for m in learner.asked) == 3
    assert fetcher.version == 1


async def test_on_the_same_host_the_file_is_linked_and_no_chunk_is_pulled(
    fetcher: WeightsFetcher, learner: FakeLearner, tmp_path: Path
) -> None:
    shared = tmp_path / "weights" / "v1.bin"
    shared.parent.mkdir()
    shared.write_bytes(PAYLOAD.tobytes())
    learner.shm_path = str(shared)
    weights = await fetcher.fetch(learner.announcement)
    assert weights is not None
    shared.unlink()  # the learner drops the version while the engine reads
    assert weights.path.read_bytes() == PAYLOAD.tobytes()
    assert not any(isinstance(m, ChunkRequest) for m in learner.asked)


async def test_a_shared_file_that_is_gone_is_pulled_instead(
    fetcher: WeightsFetcher, learner: FakeLearner, tmp_path: Path
) -> None:
    learner.shm_path = str(tmp_path / "gone" / "v1.bin")
    await taken(fetcher, learner)


async def test_an_altered_chunk_is_rejected_by_name_and_leaves_nothing(
    fetcher: WeightsFetcher, learner: FakeLearner
) -> None:
    learner.spoil = 1
    with pytest.raises(
        WeightsRejected, match=r"version 1: tensor [ab] is not what .* \(1 of 2 tensors differ\); it was not applied"
    ):
        await fetcher.fetch(learner.announcement)
    assert fetcher.version == -1


async def test_a_short_shared_file_is_rejected(fetcher: WeightsFetcher, learner: FakeLearner, tmp_path: Path) -> None:
    shared = tmp_path / "weights" / "v1.bin"
    shared.parent.mkdir()
    shared.write_bytes(PAYLOAD.tobytes()[:-1])
    learner.shm_path = str(shared)
    with pytest.raises(WeightsRejected, match="9999 bytes"):
        await fetcher.fetch(learner.announcement)


async def test_a_shared_file_that_was_altered_is_rejected(
    fetcher: WeightsFetcher, learner: FakeLearner, tmp_path: Path
) -> None:
    shared = tmp_path / "weights" / "v1.bin"
    shared.parent.mkdir()
    altered = PAYLOAD.copy()
    altered[5000] ^= 1
    shared.write_bytes(altered.tobytes())
    learner.shm_path = str(shared)
    with pytest.raises(
        WeightsRejected, match=r"version 1: tensor [ab] is not what .* \(1 of 2 tensors differ\); it was not applied"
    ):
        await fetcher.fetch(learner.announcement)
    assert fetcher.version == -1


async def test_a_manifest_that_says_other_than_the_announcement_is_rejected(
    fetcher: WeightsFetcher, learner: FakeLearner
) -> None:
    announced = learner.announcement
    learner.payload = np.ones_like(PAYLOAD)
    with pytest.raises(WeightsRejected, match="version 1: manifest and announcement name different payloads"):
        await fetcher.fetch(announced)


async def test_a_version_replaced_meanwhile_is_no_error(fetcher: WeightsFetcher, learner: FakeLearner) -> None:
    learner.gone_after = 1
    assert await fetcher.fetch(learner.announcement) is None
    assert fetcher.version == -1


async def test_an_older_version_is_never_taken(fetcher: WeightsFetcher, learner: FakeLearner) -> None:
    learner.version = 5
    await fetcher.fetch(learner.announcement)
    learner.version = 4
    with pytest.raises(WeightsRejected, match="version 4 is not newer than 5"):
        await fetcher.fetch(learner.announcement)


async def test_only_the_last_of_several_announcements_counts(learner: FakeLearner) -> None:
    first, second = FakeLearner(3).announcement, FakeLearner(4).announcement
    fetcher = WeightsFetcher(
        run="r", client=learner, listener=FakeListener(first, second), settings=SETTINGS  # type: ignore[arg-type]
    )  # fmt: skip
    heard = await fetcher.next()
    assert heard is not None
    assert heard.version == 4


async def test_a_lost_announcement_is_made_up_for_by_the_poll(fetcher: WeightsFetcher, learner: FakeLearner) -> None:
    heard = await fetcher.next()
    assert heard is not None
    assert heard.version == 1


async def test_a_silent_learner_is_no_error(fetcher: WeightsFetcher, learner: FakeLearner) -> None:
    learner.silent = True
    assert await fetcher.next() is None


# --- folders that go, disks that are full


@pytest.mark.parametrize("shared", [False, True])
async def test_a_folder_that_is_removed_between_two_versions_is_made_anew(
    fetcher: WeightsFetcher, learner: FakeLearner, tmp_path: Path, shared: bool
) -> None:
    if shared:
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "v.bin").write_bytes(PAYLOAD.tobytes())
        learner.shm_path = str(tmp_path / "weights" / "v.bin")
    first = await fetcher.fetch(learner.announcement)
    assert first is not None
    shutil.rmtree(first.path.parent)
    fetcher.release(first)
    learner.version = 2
    await taken(fetcher, learner)


async def test_a_folder_that_is_removed_while_chunks_come_makes_the_actor_fetch_once_more(
    fetcher: WeightsFetcher, learner: FakeLearner
) -> None:
    plain = learner.request
    removed: list[Path] = []

    async def request(message: object, *, timeout_s: float) -> object:
        if isinstance(message, ChunkRequest) and message.index == 1 and not removed:
            assert fetcher._copies._scratch is not None
            removed.append(fetcher._copies._scratch.path)
            shutil.rmtree(fetcher._copies._scratch.path)
        return await plain(message, timeout_s=timeout_s)

    learner.request = request  # type: ignore[method-assign]
    weights = await fetcher.fetch(learner.announcement)
    assert weights is not None
    assert weights.path.parent != removed[0]
    assert weights.path.read_bytes() == PAYLOAD.tobytes()


def full(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """No byte more fits into ``folders``."""
    plain = os.pwrite

    def pwrite(file: int, data: Any, at: int) -> int:
        if any(Path(os.readlink(f"/proc/self/fd/{file}")).is_relative_to(folder) for folder in folders):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(file, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Shared memory and the folder for temporary files."""
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    monkeypatch.setattr(copies, "SHARED_MEMORY", memory)
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    return memory, disk


async def test_with_shared_memory_full_the_disk_takes_the_bytes_and_memory_is_tried_again(
    fetcher: WeightsFetcher, learner: FakeLearner, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, disk = places
    with monkeypatch.context() as patched:
        full(patched, memory)
        first = await fetcher.fetch(learner.announcement)
    assert first is not None
    assert first.path.is_relative_to(disk)
    assert first.path.read_bytes() == PAYLOAD.tobytes()
    assert list(memory.iterdir()) == []
    learner.version = 2
    second = await fetcher.fetch(learner.announcement)
    assert second is not None
    assert second.path.is_relative_to(memory)
    assert list(disk.iterdir()) == []


async def test_bytes_that_fit_nowhere_are_an_error_by_name_and_fit_later(
    fetcher: WeightsFetcher, learner: FakeLearner, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        full(patched, *places)
        for _ in range(5):
            with pytest.raises(NoSpace, match=r"version 1: its 10000 bytes cannot be written in .*No space left"):
                await fetcher.fetch(learner.announcement)
    assert [list(place.iterdir()) for place in places] == [[], []]
    assert await fetcher.fetch(learner.announcement) is not None


async def test_what_the_engine_has_not_taken_up_is_fetched_again(fetcher: WeightsFetcher, learner: FakeLearner) -> None:
    assert await fetcher.fetch(learner.announcement) is not None
    assert await fetcher.next() is None
    fetcher.forget(1)
    heard = await fetcher.next()
    assert heard is not None
    assert await fetcher.fetch(heard) is not None


def test_only_the_same_refusal_three_times_in_a_row_is_raised() -> None:
    refusals = Refusals()
    same = [WeightsRejected(f"weights version {n}: tensor a.1 is missing (1 of 7 are)") for n in (4, 4, 5)]
    other = WeightsRejected("weights version 4: tensor a.2 is missing (1 of 7 are)")
    for error in (same[0], same[1], other, same[0], same[1]):
        refusals.add(error)
    refusals.over()
    refusals.add(same[0])
    refusals.add(same[1])
    with pytest.raises(WeightsRejected, match=r"version 5: tensor a.1 is missing .* \(3 times in a row; is model.path"):
        refusals.add(same[2])


def test_what_is_off_by_other_nats_is_off_for_the_same_reason() -> None:
    refusals = Refusals()
    errors = [
        ProbeMismatch(f"weights version {n}: the engine is {error} nats off, tolerance {error}, {error} before: it")
        for n, error in ((3, "0.1"), (3, "1.2e-05"), (4, "nan"))
    ]
    refusals.add(errors[0])
    refusals.add(errors[1])
    with pytest.raises(ProbeMismatch, match="3 times in a row"):
        refusals.add(errors[2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chunk_bytes": 0}, "chunks of 0 bytes"),
        ({"total_bytes": 9_996}, "tensor b, float32 of shape .1250., cannot have 5000 bytes at 5000 of 9996"),
        ({"tensors": 3}, "tensor a, float32 of shape .1250., cannot have 4999 bytes at 0 of 10000"),
    ],
)
async def test_a_manifest_that_no_payload_can_be_like_is_rejected(
    fetcher: WeightsFetcher, learner: FakeLearner, monkeypatch: pytest.MonkeyPatch, change: dict[str, int], said: str
) -> None:
    first, second = learner.manifest.tensors
    changed: dict[str, Any] = dict(change)
    if "tensors" in change:
        changed["tensors"] = (msgspec.structs.replace(first, nbytes=4999), second)
    made = msgspec.structs.replace(learner.manifest, **changed)
    monkeypatch.setattr(FakeLearner, "manifest", property(lambda self: made))
    with pytest.raises(WeightsRejected, match=said):
        await fetcher.fetch(learner.announcement)
    assert not any(isinstance(each, ChunkRequest) for each in learner.asked)


async def test_chunks_of_one_byte_are_a_few_tasks_at_a_time(
    fetcher: WeightsFetcher, learner: FakeLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer says how many there are: that many tasks would fill the memory."""
    made = msgspec.structs.replace(learner.manifest, chunk_bytes=1)
    monkeypatch.setattr(FakeLearner, "manifest", property(lambda self: made))
    tasks, answer = [], learner.request

    async def counted(message: object, *, timeout_s: float) -> object:
        tasks.append(len(asyncio.all_tasks()))
        if isinstance(message, ChunkRequest):
            return Chunk(version=message.version, index=message.index, data=learner.payload[message.index :][:1])
        return await answer(message, timeout_s=timeout_s)

    monkeypatch.setattr(learner, "request", counted)
    await taken(fetcher, learner)
    assert max(tasks) < 20
