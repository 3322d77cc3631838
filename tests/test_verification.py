"""One verification a host: who hashes a version, and when another actor's note of it counts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from actors.engines.common.checks import check_weights
from actors.weights.fetcher import WeightsFetcher
from atpo_async.core.errors import WeightsRejected
from atpo_async.transports import verification
from atpo_async.wire.digests import file_digests
from tests.test_actor_weights import PAYLOAD, SETTINGS, FakeLearner, FakeListener, taken


@pytest.fixture
def learner() -> FakeLearner:
    return FakeLearner()


@pytest.fixture
def fetcher(learner: FakeLearner) -> Iterator[WeightsFetcher]:
    made = another(learner)
    yield made
    made.close()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every place that was hashed."""
    found = list[int]()

    def counted(file: int, places: list[tuple[int, int]]) -> list[str]:
        found.extend(length for _, length in places)
        return file_digests(file, places)

    monkeypatch.setattr(verification, "file_digests", counted)
    return found


@pytest.fixture
def shared(learner: FakeLearner, tmp_path: Path) -> Path:
    """The learner's own file."""
    path = tmp_path / "weights" / "v1.bin"
    path.parent.mkdir(mode=0o700)
    path.write_bytes(PAYLOAD.tobytes())
    learner.shm_path = str(path)
    return path


def another(learner: FakeLearner) -> WeightsFetcher:
    return WeightsFetcher(run="r", client=learner, listener=FakeListener(), settings=SETTINGS)  # type: ignore[arg-type]


async def test_the_payload_is_hashed_once(fetcher: WeightsFetcher, learner: FakeLearner, hashed: list[int]) -> None:
    weights = await taken(fetcher, learner)
    shapes = {spec.name: tuple(spec.shape) for spec in weights.manifest.tensors}
    check_weights(weights, shapes, current=0)
    assert hashed == [5000, 5000]


async def test_three_actors_of_a_host_hash_a_version_once(
    fetcher: WeightsFetcher, learner: FakeLearner, shared: Path, hashed: list[int]
) -> None:
    fetchers = [fetcher, another(learner), another(learner)]
    await asyncio.gather(*(taken(each, learner) for each in fetchers))
    assert hashed == [5000, 5000]
    assert sum(each.hashed for each in fetchers) == 1
    for each in fetchers[1:]:
        each.close()


def alter(learner: FakeLearner, shared: Path, what: str) -> None:
    spoilt = PAYLOAD.copy()
    spoilt[7] ^= 1
    match what:
        case "rewritten":
            shared.write_bytes(spoilt.tobytes())
            os.utime(shared, ns=(1, 1))  # whatever the clock says
        case "another file":
            shared.rename(shared.with_name("kept"))  # its inode is not used again
            shared.write_bytes(spoilt.tobytes())
        case "another version":
            learner.payload = spoilt
        case "not private":
            shared.parent.chmod(0o777)
        case "no note":
            shared.with_suffix(verification.NOTE).write_bytes(b"{")
        case "no name":
            learner.shm_path = str(shared.with_name("elsewhere"))
        case "flipped":  # in memory: nothing about the file tells
            before = shared.stat()
            shared.write_bytes(spoilt.tobytes())
            os.utime(shared, ns=(before.st_atime_ns, before.st_mtime_ns))
        case _:
            raise AssertionError(what)


@pytest.mark.parametrize("what", ["rewritten", "another file", "another version", "not private", "no note", "no name"])
async def test_a_note_counts_only_for_the_file_and_the_version_that_it_is_of(
    fetcher: WeightsFetcher, learner: FakeLearner, shared: Path, hashed: list[int], what: str
) -> None:
    await taken(fetcher, learner)
    hashed.clear()
    alter(learner, shared, what)
    second = another(learner)
    if what in ("not private", "no note", "no name"):
        await taken(second, learner)
    else:
        with pytest.raises(WeightsRejected, match=r"version 1: tensor a is not what"):
            await second.fetch(learner.announcement)
    assert hashed == [5000, 5000]
    second.close()


async def test_a_version_that_the_engine_refused_is_hashed_whatever_was_noted(
    fetcher: WeightsFetcher, learner: FakeLearner, shared: Path, hashed: list[int]
) -> None:
    await taken(fetcher, learner)
    alter(learner, shared, "flipped")
    fetcher.forget(1)
    with pytest.raises(WeightsRejected, match="version 1: tensor a is not what"):
        await fetcher.fetch(learner.announcement)
    assert hashed == [5000] * 4


async def test_a_lock_that_is_never_given_back_costs_a_hash_and_not_the_version(
    fetcher: WeightsFetcher, learner: FakeLearner, shared: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "LOCK_S", 0.0)
    with FileLock(shared.with_suffix(verification.LOCK)):
        await taken(fetcher, learner)
    assert hashed == [5000, 5000]
