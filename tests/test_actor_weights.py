from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engine_common import check_weights
from actors.weights import WeightsFetcher
from atpo_async.config import WeightsConfig
from atpo_async.errors import PeerLost, WeightsRejected
from atpo_async.messages import (
    AnnouncementRequest,
    Chunk,
    ChunkRequest,
    ManifestRequest,
    TensorSpec,
    VersionGone,
    WeightsAnnounced,
    WeightsManifest,
)
from atpo_async.rundir import host_id

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
            sha256=hashlib.sha256(self.payload.data).hexdigest(),
            tensors=(
                TensorSpec(name="a", dtype="float32", shape=(half // 4,), offset=0, nbytes=half),
                TensorSpec(name="b", dtype="float32", shape=(half // 4,), offset=half, nbytes=half),
            ),
            probe_token_ids=np.arange(4, dtype=np.int32),
            probe_logprobs=np.zeros(3, dtype=np.float32),
            probe_tolerance=1e-4,
        )

    @property
    def announcement(self) -> WeightsAnnounced:
        m = self.manifest
        return WeightsAnnounced(
            run="r", version=m.version, total_bytes=m.total_bytes, sha256=m.sha256, host_id=host_id(),
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


async def test_chunks_make_the_payload_again(fetcher: WeightsFetcher, learner: FakeLearner) -> None:
    weights = await fetcher.fetch(learner.announcement)
    assert weights is not None
    assert weights.path.read_bytes() == PAYLOAD.tobytes()
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
    weights = await fetcher.fetch(learner.announcement)
    assert weights is not None
    assert weights.path.read_bytes() == PAYLOAD.tobytes()


async def test_an_altered_chunk_is_rejected_by_name_and_leaves_nothing(
    fetcher: WeightsFetcher, learner: FakeLearner
) -> None:
    learner.spoil = 1
    with pytest.raises(WeightsRejected, match=r"version 1: payload is .* it was not applied"):
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
    with pytest.raises(WeightsRejected, match=r"version 1: payload is .* it was not applied"):
        await fetcher.fetch(learner.announcement)
    assert fetcher.version == -1


async def test_the_payload_is_hashed_once(
    fetcher: WeightsFetcher, learner: FakeLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    plain = hashlib.file_digest

    def counted(*args: Any) -> Any:
        hashed.append(args)
        return plain(*args)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    weights = await fetcher.fetch(learner.announcement)
    assert weights is not None
    shapes = {spec.name: tuple(spec.shape) for spec in weights.manifest.tensors}
    check_weights(weights, shapes, current=0)
    assert len(hashed) == 1


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
