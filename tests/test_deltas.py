"""Versions as differences: the learner's real publisher at one end, an actor's real fetcher at the other."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from actors.weights import copies as actors_copies
from atpo_async.core.vocabulary import Precision
from atpo_async.transports.base import Payload
from atpo_async.transports.deltas.encoding import EncodingStopped, encode
from atpo_async.wire.digests import digest_of
from atpo_async.wire.messages import (
    ActorToLearner,
    Chunk,
    ChunkRequest,
    LearnerToActor,
    ManifestRequest,
    Refused,
    VersionGone,
    WeightsManifest,
)
from learner.weights import differences as made_by_learner
from learner.weights import files, store
from tests.deltas_support import Ends, connected, ends, settings_of, weights_of


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shared memory of this test alone."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(files, "SHARED_MEMORY", folder)
    monkeypatch.setattr(actors_copies, "SHARED_MEMORY", folder)
    return folder


def whole(both: Ends, version: int) -> bytes:
    """The learner's own file."""
    offered = both.publisher.store._versions[version]
    return offered.payload.read(0, offered.manifest.total_bytes).tobytes()


def asked_whole(both: Ends, version: int) -> int:
    """Chunks of the whole file that were asked for."""
    return sum(isinstance(m, ChunkRequest) and m.version == version and m.base < 0 for m in both.asking.asked)


def until_made(both: Ends) -> None:
    """Waits for: the differences that were begun.  Unblocked by: the learner's thread, which needs no event loop."""
    both.publisher.store._differences._thread.submit(lambda: None).result()


async def begun(both: Ends) -> None:
    """Versions 0 and 1 at the actor; the learner makes differences from now on."""
    for version in (0, 1):
        assert await both.pass_on(version) == whole(both, version)
    both.counts()


# --- as it should be


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("transport", ["auto", "chunks"])
async def test_from_the_second_version_on_an_actor_gets_differences_and_every_byte(
    tmp_path: Path, precision: Precision, transport: str
) -> None:
    async with ends(tmp_path, settings_of(transport), precision=precision) as both:
        assert await both.pass_on(0) == whole(both, 0)
        assert both.counts() == {"fallback/no_base": 1.0}
        for version in (1, 2, 3):
            assert await both.pass_on(version) == whole(both, version)
            assert asked_whole(both, version) == 0
            found = both.counts()
            assert (found["versions"], found["steps"]) == (1.0, 1.0)
            assert found["whole_bytes"] == len(whole(both, version))
            assert 0 < found["bytes"] / found["whole_bytes"] == found["ratio"] < 0.1
        counters = both.publisher.counters
        assert counters["differences/made"] == 3.0
        assert counters["differences/ratio"] < 0.1
        assert counters["differences/encode_s"] > 0


async def test_adapters_travel_as_differences_too(tmp_path: Path) -> None:
    tensors = {f"layer.lora_{part}.weight": torch.randn(64, 16) for part in "AB"}
    moved = {name: tensor + 1e-6 * (torch.rand(tensor.shape) < 0.1) for name, tensor in tensors.items()}
    async with ends(tmp_path) as both:
        await both.pass_on(0, tensors)
        assert await both.pass_on(1, moved) == whole(both, 1)
        assert both.counts()["versions"] == 1.0


async def test_a_learner_whose_actors_are_on_its_host_makes_no_difference(tmp_path: Path) -> None:
    async with ends(tmp_path, settings_of("auto", shared_memory=True)) as both:
        for version in range(4):
            assert await both.pass_on(version) == whole(both, version)
        assert both.counts() == {}
        assert not any(name.startswith("differences/") for name in both.publisher.counters)
        assert {m.base for m in both.asking.asked if isinstance(m, ManifestRequest)} == {-1}


async def test_without_a_chain_versions_come_whole_and_nothing_is_kept(tmp_path: Path) -> None:
    async with ends(tmp_path, settings_of(), settings_of(max_chain=0)) as both:
        for version in range(3):
            assert await both.pass_on(version) == whole(both, version)
        assert both.counts() == {}
        assert both.fetcher._receiver.base == -1
    async with ends(tmp_path, settings_of(max_chain=0), settings_of()) as both:
        for version in range(3):
            assert await both.pass_on(version) == whole(both, version)
        assert both.counts() == {"fallback/no_base": 1.0, "fallback/not_offered": 2.0}
        assert not any(name.startswith("differences/") for name in both.publisher.counters)


async def test_an_actor_that_was_busy_takes_the_steps_that_it_missed(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await begun(both)
        for version in (2, 3, 4):
            announced = both.publish(version)
            await both.made(version, version - 1)
        assert await both.take(announced) == whole(both, 4)
        assert both.counts()["steps"] == 3.0
        assert asked_whole(both, 4) == 0


async def test_an_actor_whose_first_version_takes_long_gets_it_and_then_what_it_missed(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        first, versions = both.publish(0), iter((1, 2, 3))
        expected = whole(both, 0)

        def alter(request: ActorToLearner, answer: LearnerToActor) -> LearnerToActor:
            """While the first version is on its way, three more come."""
            if isinstance(request, ChunkRequest) and (version := next(versions, None)) is not None:
                both.publish(version)
                until_made(both)
            return answer

        both.asking.alter = alter
        assert await both.take(first) == expected
        both.counts()
        assert await both.take(both.publisher.store.announcement(3)) == whole(both, 3)
        assert both.counts()["steps"] == 3.0


async def test_a_version_that_is_no_longer_fetched_goes_and_one_such_is_kept_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ends(tmp_path) as both:

        def ask(version: int) -> LearnerToActor:
            return both.publisher.store.answer(ChunkRequest(run="run", version=version, index=0))

        now = 100.0
        monkeypatch.setattr(both.publisher.store, "_clock", lambda: now)
        for version in (0, 1):
            both.publish(version)
            assert isinstance(ask(version), Chunk)
        both.publish(2)
        assert both.publisher.store._versions.keys() == {0, 1, 2}
        both.publish(3)
        assert both.publisher.store._versions.keys() == {0, 2, 3}
        now += store.FETCHED_WITHIN_S
        both.publish(4)
        assert both.publisher.store._versions.keys() == {3, 4}
        assert isinstance(ask(0), VersionGone)


async def test_a_version_that_is_fetched_makes_space_for_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else that one lies on the disk, where no actor of the learner's host can link it."""
    async with ends(tmp_path) as both:
        for version in (0, 1, 2):
            both.publish(version)
            both.publisher.store.answer(ChunkRequest(run="run", version=0, index=0))
        path = both.publisher.store._versions[0].path
        free = both.publisher.store._versions[0].manifest.total_bytes
        monkeypatch.setattr(store, "free_beside", lambda path: free)
        both.publish(3)
        assert both.publisher.store._versions.keys() == {0, 2, 3}
        monkeypatch.setattr(store, "free_beside", lambda path: free - 1)
        both.publish(4)
        assert both.publisher.store._versions.keys() == {3, 4}
        assert not path.exists()
        assert isinstance(both.publisher.store.answer(ChunkRequest(run="run", version=0, index=1)), VersionGone)


async def test_a_chain_is_no_longer_than_either_end_allows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def far(learners: int, actors: int) -> dict[str, float]:
        async with ends(tmp_path, settings_of(max_chain=learners), settings_of(max_chain=actors)) as both:
            await begun(both)
            for version in (2, 3, 4):
                announced = both.publish(version)
                await both.made(version, version - 1)
            assert await both.take(announced) == whole(both, 4)
            return both.counts()

    assert await far(2, 8) == {"fallback/not_offered": 1.0}
    assert await far(8, 2) == {"fallback/too_long": 1.0}
    assert "version 4 is 3 differences from 1, over weights.max_chain" in caplog.text
    assert (await far(3, 3))["steps"] == 3.0


async def test_two_actors_take_the_same_differences(tmp_path: Path) -> None:
    async with ends(tmp_path) as both, connected(both.publisher, settings_of(), "another") as (another, _):
        for version in range(3):
            announced = both.publish(version)
            payloads = await asyncio.gather(both.take(announced), both.take(announced, another))
            assert list(payloads) == [whole(both, version)] * 2
        assert both.publisher.counters["differences/made"] == 2.0
        assert another.take_counts()["weights/differences/versions"] == 2.0


async def test_the_differences_kept_are_smaller_than_a_version_together(tmp_path: Path) -> None:
    """Half of a version changes each time: of such differences only one is kept."""
    tensors = {"a": torch.randn(8192)}
    async with ends(tmp_path) as both:
        for version in range(4):
            announced = both.publish(version, tensors)
            if version < 2:
                await both.take(announced)
            await both.made(version, version - 1)
            half = torch.rand(8192) < 0.6
            tensors = {"a": torch.where(half, torch.randn(8192), tensors["a"])}
        assert both.publisher.counters["differences/made"] == 3.0
        assert both.publisher.counters["differences/kept_bytes"] < 4 * 8192
        both.counts()
        assert await both.take(announced) == whole(both, 3)
        assert both.counts() == {"fallback/not_offered": 1.0}


# --- whatever goes wrong costs a version the difference and nothing else


def on_manifest(**changes: Any) -> Any:
    """Alters the differences that a manifest names."""

    def alter(request: ActorToLearner, answer: LearnerToActor) -> LearnerToActor:
        if not isinstance(answer, WeightsManifest):
            return answer
        named = tuple(msgspec.structs.replace(each, **changes) for each in answer.differences)
        return msgspec.structs.replace(answer, differences=named)

    return alter


def on_chunk(change: Any) -> Any:
    """Alters the chunks of differences."""

    def alter(request: ActorToLearner, answer: LearnerToActor) -> LearnerToActor:
        return change(answer) if isinstance(answer, Chunk) and answer.base >= 0 else answer

    return alter


def spoiled(chunk: Chunk) -> Chunk:
    data = chunk.data.copy()
    data[len(data) // 2] ^= 1
    return msgspec.structs.replace(chunk, data=data)


FAULTS = {
    "the base is another": (on_manifest(base_digest="00" * 32), "wrong_base"),
    "the base is not the actor's": (on_manifest(base=0), "not_offered"),
    "a codec of later versions": (on_manifest(codec="brotli-7"), "unknown_codec"),
    "larger than the version": (on_manifest(nbytes=1 << 40), "too_large"),
    "of another digest": (on_manifest(digest="00" * 16), "damaged"),
    "a bit was lost": (on_chunk(spoiled), "damaged"),
    "a chunk is short": (on_chunk(lambda c: msgspec.structs.replace(c, data=c.data[:-1])), "withdrawn"),
    "it is no longer kept": (on_chunk(lambda c: Refused(reason="no longer kept")), "withdrawn"),
    "it leads to an older version": (on_manifest(version=1, base=1), "not_offered"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_of_a_difference_costs_that_one_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    alter, reason = FAULTS[fault]
    async with ends(tmp_path) as both:
        await begun(both)
        both.asking.alter = alter
        assert await both.pass_on(2) == whole(both, 2)
        assert both.counts() == {f"fallback/{reason}": 1.0}
        assert asked_whole(both, 2) > 0
        assert any("version 2 comes whole, not as differences" in r.getMessage() for r in caplog.records)
        both.asking.alter = lambda request, answer: answer
        assert await both.pass_on(3) == whole(both, 3)
        assert both.counts()["versions"] == 1.0


async def test_what_is_rebuilt_and_is_not_what_was_published_is_fetched_whole_at_once(tmp_path: Path) -> None:
    """A difference that is whole and well-formed and leads elsewhere: only the version's own digests show it."""
    async with ends(tmp_path) as both, ends(tmp_path / "other") as other:
        await begun(both)
        await begun(other)
        announced = both.publish(2)
        other.publish(2, weights_of(5))
        await both.made(2, 1)
        await other.made(2, 1)
        theirs = other.publisher.store.answer(ManifestRequest(run="run", version=2, base=1))
        assert isinstance(theirs, WeightsManifest)
        differences = theirs.differences

        def alter(request: ActorToLearner, answer: LearnerToActor) -> LearnerToActor:
            if isinstance(request, ChunkRequest) and request.base >= 0:
                return other.publisher.store.answer(request)
            if isinstance(answer, WeightsManifest):
                return msgspec.structs.replace(answer, differences=differences)
            return answer

        both.asking.alter = alter
        assert await both.take(announced) == whole(both, 2)
        assert both.counts()["fallback/refused"] == 1.0


async def test_a_base_that_went_bad_in_memory_is_found_and_replaced(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        assert await both.pass_on(0) == whole(both, 0)
        weights = await both.fetcher.fetch(both.publish(1))
        assert weights is not None
        data = weights.path.read_bytes()
        weights.path.chmod(0o600)
        weights.path.write_bytes(data[:40] + bytes([data[40] ^ 4]) + data[41:])
        both.fetcher.release(weights)
        both.counts()
        assert await both.pass_on(2) == whole(both, 2)
        assert both.counts()["fallback/refused"] == 1.0
        assert await both.pass_on(3) == whole(both, 3)
        assert both.counts()["versions"] == 1.0


async def test_weights_that_the_engine_refused_come_whole_when_they_are_fetched_again(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await begun(both)
        announced = both.publish(2)
        assert await both.take(announced) == whole(both, 2)
        both.counts()
        both.fetcher.forget(2)
        assert await both.take(announced) == whole(both, 2)
        assert both.counts() == {"fallback/same_version": 1.0}
        assert asked_whole(both, 2) > 0


async def test_a_version_that_is_withdrawn_while_its_difference_is_fetched_is_left_for_the_next(tmp_path: Path) -> None:
    """It is not fetched whole, and so not kept."""
    async with ends(tmp_path, settings_of(max_chain=1)) as both:
        await begun(both)
        announced = both.publish(2)
        await both.made(2, 1)

        def alter(request: ActorToLearner, answer: LearnerToActor) -> LearnerToActor:
            if isinstance(answer, WeightsManifest) and answer.version == 2:
                for version in (3, 4):
                    both.publish(version)
                    until_made(both)
            return answer

        both.asking.alter = alter
        assert await both.take(announced) is None
        assert both.counts() == {"fallback/withdrawn": 1.0}
        newest = await both.fetcher.newest(timeout_s=5)
        assert newest is not None
        assert await both.take(newest) == whole(both, 4)


async def test_a_learner_that_starts_anew_sends_whole_versions_first(tmp_path: Path) -> None:
    async with ends(tmp_path) as before:
        await begun(before)
        async with ends(tmp_path / "again") as after:
            # The actor finds the new learner, which knows nothing of the base.
            before.asking._client = after.asking._client
            assert await before.take(after.publish(5)) == whole(after, 5)
            assert before.counts() == {"fallback/not_offered": 1.0}
            assert await before.take(after.publish(6)) == whole(after, 6)
            assert before.counts()["versions"] == 1.0


# --- the learner


async def test_a_version_is_announced_and_served_whole_while_its_difference_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    made = encode

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert released.wait(60)
        return made(*args, **kwargs)

    async with ends(tmp_path) as both, connected(both.publisher, settings_of(max_chain=0), "whole") as (other, _):
        await begun(both)
        monkeypatch.setattr(made_by_learner, "encode", slow)
        announced = both.publish(2)
        waiting = asyncio.create_task(both.take(announced))
        assert await both.take(announced, other) == whole(both, 2)
        # Training goes on, too: the next version is written and announced.
        assert await both.take(both.publish(3), other) == whole(both, 3)
        assert not waiting.done()
        released.set()
        assert await waiting == whole(both, 2)
        assert both.counts()["versions"] == 1.0


@pytest.mark.parametrize(("wait_s", "limit_s"), [(0.01, 120.0), (60.0, 4.0)])
async def test_an_actor_asks_again_while_the_learner_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released: threading.Event, wait_s: float, limit_s: float
) -> None:
    """Its request is held for less than its time limit, whatever that is."""
    made = encode

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert released.wait(60)
        return made(*args, **kwargs)

    async with ends(tmp_path, settings_of(fetch_timeout_s=limit_s)) as both:
        await begun(both)
        monkeypatch.setattr(made_by_learner, "encode", slow)
        monkeypatch.setattr(made_by_learner, "WAIT_S", wait_s)

        def alter(request: ActorToLearner, answer: LearnerToActor) -> LearnerToActor:
            if isinstance(answer, WeightsManifest) and answer.differences_pending:
                released.set()
            return answer

        both.asking.alter = alter
        assert await both.pass_on(2) == whole(both, 2)
        assert both.counts()["versions"] == 1.0
        asked = [m for m in both.asking.asked if isinstance(m, ManifestRequest) and m.version == 2]
        assert len(asked) >= 2


async def test_versions_that_come_faster_than_differences_are_made_share_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    made = encode

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert released.wait(60)
        return made(*args, **kwargs)

    async with ends(tmp_path) as both:
        await begun(both)
        monkeypatch.setattr(made_by_learner, "encode", slow)
        for version in (2, 3, 4, 5):
            announced = both.publish(version)
        taking = asyncio.create_task(both.take(announced))
        released.set()
        assert await taking == whole(both, 5)
        assert both.counts()["steps"] == 2.0  # 1 to 2, and from there to 5
        assert both.publisher.counters["differences/skipped"] == 2.0


@pytest.mark.parametrize("fault", ["the disk", "too large"])
async def test_a_difference_that_cannot_be_made_costs_actors_the_whole_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        if fault == "the disk":
            raise OSError(28, "No space left on device")
        raise EncodingStopped("it is larger than the version")

    async with ends(tmp_path) as both:
        await begun(both)
        with monkeypatch.context() as patch:
            patch.setattr(made_by_learner, "encode", fails)
            assert await both.pass_on(2) == whole(both, 2)
        assert both.counts() == {"fallback/not_offered": 1.0}
        name = {"the disk": "failed", "too large": "too_large"}[fault]
        assert both.publisher.counters[f"differences/not_made/{name}"] == 1.0
        assert await both.pass_on(3) == whole(both, 3)
        assert both.counts()["versions"] == 1.0


async def test_versions_with_other_tensors_start_a_new_chain(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await begun(both)
        assert await both.pass_on(2, weights_of(2, size=30_000)) == whole(both, 2)
        assert both.counts() == {"fallback/not_offered": 1.0}
        assert await both.pass_on(3, weights_of(3, size=30_000)) == whole(both, 3)
        assert both.counts()["versions"] == 1.0


async def test_once_no_actor_asks_any_longer_no_differences_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made_by_learner, "QUIET_VERSIONS", 2)
    async with ends(tmp_path) as both:
        await begun(both)
        for version in range(2, 8):
            announced = both.publish(version)
            until_made(both)
        # To 1, which was fetched, and to the two after it.
        assert both.publisher.counters["differences/made"] == 3.0
        assert await both.take(announced) == whole(both, 7)
        assert both.counts() == {"fallback/not_offered": 1.0}
        # It has asked: from the next version on it gets differences again.
        assert await both.pass_on(8) == whole(both, 8)
        assert both.counts()["versions"] == 1.0


# --- files, memory, and peers without differences


async def test_nothing_is_left_in_shared_memory_but_what_the_run_had_before(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "FETCHED_WITHIN_S", 0.0)

    def files_there() -> set[str]:
        return {path.name for path in memory.rglob("*") if path.is_file() and not path.name.startswith(".")}

    async with ends(tmp_path) as both:
        for version in range(4):
            assert await both.pass_on(version) == whole(both, version)
        assert files_there() == {"v2.bin", "v3.bin"}
    assert not files_there()


async def test_a_folder_that_is_removed_costs_nothing(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await begun(both)
        announced = both.publish(2)
        folder = both.fetcher._copies._scratch
        assert folder is not None
        folder.remove()
        assert await both.take(announced) == whole(both, 2)
        assert both.counts()["versions"] == 1.0


def test_peers_without_the_fields_of_differences_are_understood() -> None:
    plain = WeightsManifest(
        run="r", version=1, total_bytes=0, chunk_bytes=4096, tensors=(),
        probe_token_ids=np.zeros(1, np.int32), probe_logprobs=np.zeros(0, np.float32),
    )  # fmt: skip
    assert (plain.differences, plain.differences_pending) == ((), False)
    for kind, fields in (
        (ManifestRequest, {"type": "manifest_request", "run": "r", "version": 1}),
        (ChunkRequest, {"type": "chunk_request", "run": "r", "version": 1, "index": 0}),
    ):
        assert getattr(msgspec.convert(fields, kind), "base") == -1  # noqa: B009


async def test_an_actor_that_takes_no_differences_is_named_none(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await begun(both)
        plain = both.publisher.store.answer(ManifestRequest(run="run", version=1))
        assert isinstance(plain, WeightsManifest)
        assert plain.differences == ()
        named = both.publisher.store.answer(ManifestRequest(run="run", version=1, base=0))
        assert isinstance(named, WeightsManifest)
        assert [(each.base, each.version) for each in named.differences] == [(0, 1)]
        answer = both.publisher.store.answer(ChunkRequest(run="run", version=1, base=0, index=0))
        assert isinstance(answer, Chunk)
        assert digest_of(answer.data.data) == named.differences[0].digest
        for request, said in (
            (ChunkRequest(run="run", version=1, base=0, index=9), "chunk 9 is none of it"),
            (ChunkRequest(run="run", version=7, base=0, index=0), "no difference from version 0 to 7"),
        ):
            refused = both.publisher.store.answer(request)
            assert isinstance(refused, Refused)
            assert said in refused.reason


# --- actors that share a host's copies


async def test_of_actors_that_share_a_host_one_fetches_the_difference_and_any_can_go_on(tmp_path: Path) -> None:
    sharing = settings_of("auto", shared_memory=True)
    async with ends(tmp_path, settings_of(), sharing) as both, connected(both.publisher, sharing, "second") as (two, _):
        for version in (0, 1):
            announced = both.publish(version)
            payloads = await asyncio.gather(both.take(announced), both.take(announced, two))
            assert list(payloads) == [whole(both, version)] * 2
        found = [fetcher.take_counts() for fetcher in (both.fetcher, two)]
        assert sum(counts.get("weights/differences/versions", 0.0) for counts in found) == 1.0
        # Whichever fetched so far: the other has what it needs to go on alone.
        for version, fetcher in ((2, two), (3, both.fetcher)):
            assert await both.take(both.publish(version), fetcher) == whole(both, version)
            assert fetcher.take_counts()["weights/differences/versions"] == 1.0
            other = both.fetcher if fetcher is two else two
            assert await both.take(both.publisher.store.announcement(version), other) == whole(both, version)
            assert "weights/differences/versions" not in other.take_counts()


async def test_what_is_rebuilt_wrong_for_a_host_is_fetched_whole_for_all(tmp_path: Path) -> None:
    sharing = settings_of("auto", shared_memory=True)
    async with ends(tmp_path, settings_of(), sharing) as both:
        await begun(both)
        base = both.fetcher._receiver._receivers["chunks"]._rebuilding  # type: ignore[attr-defined]
        path = tmp_path / "spoiled"
        path.write_bytes(bytes(len(whole(both, 1))))
        base._base = base._base._replace(payload=Payload(path))
        assert await both.pass_on(2) == whole(both, 2)
        assert both.counts()["fallback/refused"] == 1.0
