"""A learner joins by address: what it is told, which one is refused, how what it writes gets to the run's folder."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from atpo_async.config import Config, build
from atpo_async.core.errors import PeerLost, RunMismatch, SetupError
from atpo_async.ops.joined import asking
from atpo_async.ops.joined.joining import Joined, join
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.metrics import MetricsWriter, read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.wire.messages import Checkpointed
from buffer.service import BufferService
from tests.buffer_peers_support import LOOPBACK
from tests.waiting_support import LIMIT_S, until

BEAT_S = 0.1


def configured(folder: Path, **sections: dict[str, Any]) -> Config:
    """Of a run in ``folder``."""
    links = {"heartbeat_s": BEAT_S, "give_up_s": LIMIT_S, **sections.pop("links", {})}
    return build({"run": {"name": "r", "dir": str(folder)}, "links": links, **sections})


@contextlib.asynccontextmanager
async def buffer_of(run: RunDir, endpoints: Endpoints = LOOPBACK) -> AsyncIterator[BufferService]:
    service = BufferService(
        run.config, run=run.run_id, endpoints=endpoints, rundir=run, stopping=asyncio.Event()
    )  # fmt: skip
    async with service:
        serving = asyncio.create_task(service.serve(), name="buffer under test")
        yield service
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


@contextlib.asynccontextmanager
async def joined(service: BufferService, config: Config, folder: Path, *, rank: int = 0) -> AsyncIterator[Joined]:
    """A rank's place in the run, left in good order."""
    found = await asyncio.to_thread(
        join, config, endpoint=service.learner.endpoint, rank=rank, parent=folder
    )  # fmt: skip
    try:
        yield found
    finally:
        await asyncio.to_thread(found.close)


def cut(found: Joined) -> None:
    """As a kill does: nothing further is passed on, and the lock is free."""
    found.uplink._call(found.uplink._end())
    found.uplink._loop.call_soon_threadsafe(found.uplink._loop.stop)
    found.uplink._thread.join()
    found.replica.close()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(configured(tmp_path / "runs"))


async def test_what_a_learner_writes_in_its_replica_is_in_the_runs_folder_too(run: RunDir, tmp_path: Path) -> None:
    async with buffer_of(run) as service, joined(service, run.config, tmp_path / "far") as found:
        own = found.rundir
        assert own.run_id == run.run_id
        assert own.path == tmp_path / "far" / run.run_id / "rank-0"
        with MetricsWriter(own.metrics_path, source="learner") as metrics:
            metrics.write(step=1, version=1, metrics={"train/loss": 0.5})
        own.lineage_path.write_text('{"step":0,"rank":0}\n')
        own.trees_path.write_text('{"tree_id":"t"}\n{"tree_id":"half')
        (own.path / "skipped").mkdir()
        (own.path / "skipped" / "step-000001-rank-0.batch").write_bytes(b"batch")
        (own.path / "model").mkdir()
        (own.path / "model" / "config.json").write_text("{}")
        await asyncio.to_thread(own.pass_on)
        assert [record.metrics for record in read_metrics(run.metrics_path)] == [{"train/loss": 0.5}]
        assert run.lineage_path.read_text() == '{"step":0,"rank":0}\n'
        assert run.trees_path.read_text() == '{"tree_id":"t"}\n', "no line before its end"
        assert (run.path / "skipped" / "step-000001-rank-0.batch").read_bytes() == b"batch"
        assert (run.path / "model" / "config.json").read_text() == "{}"
        (own.path / "status").mkdir()
        (own.path / "status" / "learner.json").write_text("{}")
    assert (run.path / "status" / "learner.json").read_text() == "{}", "the last status follows at the end"


async def test_numbers_of_versions_are_counted_in_the_runs_folder(run: RunDir, tmp_path: Path) -> None:
    assert run.next_version() == 0
    async with buffer_of(run) as service:
        async with joined(service, run.config, tmp_path / "far") as found:
            assert await asyncio.to_thread(found.rundir.next_version) == 1
            assert await asyncio.to_thread(found.rundir.next_version) == 2
            assert await asyncio.to_thread(found.rundir.skip_versions, 7) == 5
        shutil.rmtree(tmp_path / "far")
        async with joined(service, run.config, tmp_path / "far") as found:
            assert await asyncio.to_thread(found.rundir.next_version) == 8
    assert run.next_version() == 9


async def test_a_replica_goes_on_where_it_was_and_a_lost_one_begins_with_the_evaluations(
    run: RunDir, tmp_path: Path
) -> None:
    far = tmp_path / "far"
    with MetricsWriter(run.metrics_path, source="buffer") as metrics:
        metrics.write(step=0, version=0, metrics={"buffer/ready": 1})
    async with buffer_of(run) as service:
        async with joined(service, run.config, far) as found:
            with MetricsWriter(found.rundir.metrics_path, source="learner") as metrics:
                metrics.write(step=2, version=2, metrics={"eval/success": 0.25})
            await asyncio.to_thread(found.rundir.pass_on)
            cut(found)
            with MetricsWriter(found.rundir.metrics_path, source="learner") as metrics:
                metrics.write(step=3, version=3, metrics={"train/loss": 1.0})
        async with joined(service, run.config, far) as found:
            await asyncio.to_thread(found.rundir.pass_on)
            assert [record.step for record in read_metrics(run.metrics_path)] == [0, 2, 3]
        (far / run.run_id / "rank-0" / "lineage.jsonl").write_text('{"step":9,"rank":0}\n')
        shutil.move(far, tmp_path / "left behind")
        async with joined(service, run.config, far) as found:
            assert [record.step for record in read_metrics(found.rundir.metrics_path)] == [2]
            await asyncio.to_thread(found.rundir.pass_on)
        async with joined(service, run.config, tmp_path / "left behind") as found:
            await asyncio.to_thread(found.rundir.pass_on)
            assert not found.rundir.lineage_path.exists(), "what an earlier replica had not passed on is out of date"
    assert [record.step for record in read_metrics(run.metrics_path)] == [0, 2, 3]
    assert not run.lineage_path.exists()


async def test_nothing_is_lost_or_doubled_over_a_restart_of_the_buffer(run: RunDir, tmp_path: Path) -> None:
    async with buffer_of(run) as service:
        place = Endpoints(actors=service.actors.endpoint, learner=service.learner.endpoint)
        found = await asyncio.to_thread(
            join, run.config, endpoint=place.learner, rank=0, parent=tmp_path / "far"
        )  # fmt: skip
        assert await asyncio.to_thread(found.rundir.next_version) == 0
        with MetricsWriter(found.rundir.metrics_path, source="learner") as metrics:
            metrics.write(step=1, version=1, metrics={"train/loss": 1.0})
        await asyncio.to_thread(found.rundir.pass_on)
    with MetricsWriter(found.rundir.metrics_path, source="learner") as metrics:
        metrics.write(step=2, version=2, metrics={"train/loss": 1.0})
    passing = asyncio.create_task(asyncio.to_thread(found.rundir.pass_on))
    async with buffer_of(run, place):
        await passing
        assert [record.step for record in read_metrics(run.metrics_path)] == [1, 2]
        assert await asyncio.to_thread(found.rundir.next_version) == 1
        await asyncio.to_thread(found.close)


async def test_a_second_learner_is_refused_while_one_is_alive_and_let_in_once_it_is_dead(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "TAKEN_OVER_BEATS", 3)
    async with buffer_of(run) as service, joined(service, run.config, tmp_path / "a") as first:
        with pytest.raises(SetupError, match=r"learner on .* is at work in this run; end that one first"):
            await asyncio.to_thread(
                join, run.config, endpoint=service.learner.endpoint, rank=0, parent=tmp_path / "b"
            )  # fmt: skip
        with pytest.raises(SetupError, match="is in use by process"):
            await asyncio.to_thread(
                join, run.config, endpoint=service.learner.endpoint, rank=0, parent=tmp_path / "a"
            )  # fmt: skip
        monkeypatch.setattr(asking, "TAKEN_OVER_BEATS", 1000)
        cut(first)
        async with joined(service, run.config, tmp_path / "b") as second:
            assert await asyncio.to_thread(second.rundir.next_version) == 0


async def test_a_learner_whose_place_was_taken_gets_no_further_version(run: RunDir, tmp_path: Path) -> None:
    async with buffer_of(run) as service, joined(service, run.config, tmp_path / "a") as first:
        first.replica.close()  # as if its machine had stood still, and another had its disk
        async with joined(service, run.config, tmp_path / "a") as second:
            assert await asyncio.to_thread(second.rundir.next_version) == 0
            with pytest.raises(PeerLost, match=r"another learner, on .*, has taken this one's place"):
                await asyncio.to_thread(first.rundir.next_version)


async def test_ranks_have_replicas_of_their_own_and_write_what_is_theirs(run: RunDir, tmp_path: Path) -> None:
    async with (
        buffer_of(run) as service,
        joined(service, run.config, tmp_path / "a") as first,
        joined(service, run.config, tmp_path / "b", rank=1) as second,
    ):
        for rank, each in enumerate((first, second)):
            each.rundir.lineage_path.write_text(f'{{"step":0,"rank":{rank}}}\n')
            each.rundir.metrics_path.write_text(
                f'{{"time":1,"source":"learner","step":1,"version":1,"metrics":{{"x":{rank}}}}}\n'
            )
            await asyncio.to_thread(each.rundir.pass_on)
    assert run.lineage_path.read_text() == '{"step":0,"rank":0}\n{"step":0,"rank":1}\n'
    assert [record.metrics["x"] for record in read_metrics(run.metrics_path)] == [0]


# --- which learner is refused --------------------------------------------------------------------------------------


async def test_another_configuration_is_refused_with_each_field_and_what_may_differ_is_not(
    run: RunDir, tmp_path: Path
) -> None:
    other = configured(tmp_path, search={"rounds": 1, "temperature": 0.5}, learner={"lr": 3e-4})
    fits = configured(tmp_path, learner={"lr": 3e-4})
    async with buffer_of(run) as service:
        with pytest.raises(RunMismatch) as caught:
            await asyncio.to_thread(join, other, endpoint=service.learner.endpoint, rank=0, parent=tmp_path / "a")
        for field in ("search.rounds is 2 there and 1 here", "search.temperature is 1.0 there and 0.5 here"):
            assert field in str(caught.value)
        assert "learner.lr" not in str(caught.value)
        assert not (tmp_path / "a").exists()
        async with joined(service, fits, tmp_path / "a") as found:
            assert found.rundir.config.learner.lr == 3e-4


async def test_other_weights_than_the_runs_are_refused_whatever_their_folder_is_called(tmp_path: Path) -> None:
    for name, weights in (("m", b"one"), ("same", b"one"), ("other", b"two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    run = RunDir.create(configured(tmp_path / "runs", model={"path": str(tmp_path / "m")}))
    async with buffer_of(run) as service:
        same = configured(tmp_path, model={"path": str(tmp_path / "same")})
        async with joined(service, same, tmp_path / "a"):
            pass
        other = configured(tmp_path, model={"path": str(tmp_path / "other")})
        with pytest.raises(RunMismatch, match=r"began with other weights than model\.path = .*other"):
            await asyncio.to_thread(join, other, endpoint=service.learner.endpoint, rank=0, parent=tmp_path / "a")


async def test_the_socket_of_actors_is_no_place_for_a_learner(run: RunDir, tmp_path: Path) -> None:
    async with buffer_of(run) as service:
        with pytest.raises(SetupError, match="this is no socket for learners: --join takes the address"):
            await asyncio.to_thread(
                join, run.config, endpoint=service.actors.endpoint, rank=0, parent=tmp_path / "a"
            )  # fmt: skip


async def test_a_buffer_without_a_run_folder_lets_no_learner_in(run: RunDir, tmp_path: Path) -> None:
    service = BufferService(
        run.config, run=run.run_id, endpoints=LOOPBACK, rundir=None, stopping=asyncio.Event()
    )  # fmt: skip
    async with service:
        with pytest.raises(SetupError, match="this buffer has no run folder"):
            await asyncio.to_thread(
                join, run.config, endpoint=service.learner.endpoint, rank=0, parent=tmp_path / "a"
            )  # fmt: skip


async def test_a_learner_without_the_checkpoint_that_the_run_counts_on_is_refused(run: RunDir, tmp_path: Path) -> None:
    async with buffer_of(run) as service:
        service.state.checkpointed(Checkpointed(run=run.run_id, step=6, version=6))
        checkpoints = tmp_path / "a" / run.run_id / "checkpoints"
        (checkpoints / "step-000004-v000004").mkdir(parents=True)
        with pytest.raises(SetupError, match=r"counts on a checkpoint of step 6 .* none newer than step 4 in"):
            await asyncio.to_thread(
                join, run.config, endpoint=service.learner.endpoint, rank=0, parent=tmp_path / "a"
            )  # fmt: skip
        (checkpoints / "step-000006-v000006").mkdir()
        async with joined(service, run.config, tmp_path / "a"):
            pass


# --- a disk that refuses -------------------------------------------------------------------------------------------


async def test_a_full_disk_of_the_run_is_waited_for(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from buffer.uplink import lines

    full, append = threading.Event(), lines._append
    full.set()

    def refuses(path: Path, data: bytes) -> None:
        if full.is_set():
            raise OSError(28, "No space left on device")
        append(path, data)

    monkeypatch.setattr(lines, "_append", refuses)
    async with buffer_of(run) as service, joined(service, run.config, tmp_path / "far") as found:
        found.rundir.lineage_path.write_text('{"step":0,"rank":0}\n')
        passing = asyncio.create_task(asyncio.to_thread(found.rundir.pass_on))
        await until(lambda: "cannot be written: No space left on device" in found.uplink.asker.trouble)
        assert not passing.done()
        full.clear()
        await passing
    assert run.lineage_path.read_text() == '{"step":0,"rank":0}\n'
