"""An actor's numbers get into the run's file under its own name, and only such as actors have."""

from __future__ import annotations

from pathlib import Path

import pytest

from atpo_async.links.client import Client
from atpo_async.run.metrics import MetricsWriter, read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.wire.messages import ActorReport, Refused
from buffer import metrics_file
from buffer.metrics_file import MAX_NAMES, MetricsFile, may_be_called
from tests.buffer_peers_support import SOON_S, configured, hello, running

ACTORS_OWN = {
    "actor/turns": 3.0,
    "actor/failed/timeout": 1.0,
    "actions/cut_share": 0.5,
    "engine/probe_error": 1e-6,
    "weights/swap_s": 0.1,
    "tokens/generated_per_s": 100.0,
    "time/actor_wait_s": 0.5,
}
OTHERS = ("train/success", "eval/success", "buffer/trees", "tokens/trained", "time/step_s", "weights/publish_s", "x")


def sources(path: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for record in read_metrics(path):
        found.setdefault(record.source, {}).update(record.metrics)
    return found


def test_numbers_that_are_not_an_actors_to_say_are_refused_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.report("gpu-7/actor-0", 4, 5, {**ACTORS_OWN, **dict.fromkeys(OTHERS, 1.0)})
    file.write(4, 5, {"train/success": 0.25})
    file.close()
    assert sources(tmp_path / "metrics.jsonl") == {"gpu-7/actor-0": ACTORS_OWN, "buffer": {"train/success": 0.25}}
    assert file.num_refused == len(OTHERS)
    assert "7 numbers reported by gpu-7/actor-0 are not taken (7 by now), as 'train/success'" in caplog.text


@pytest.mark.parametrize("name", ["buffer", "learner", "learner-1", "supervisor"])
def test_a_peer_with_another_roles_name_reports_nothing(tmp_path: Path, name: str) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.report(name, 0, 0, {"actor/turns": 1.0})
    file.close()
    assert (sources(tmp_path / "metrics.jsonl"), file.num_refused) == ({}, 1)
    assert not may_be_called(name)
    assert may_be_called(f"gpu-7/{name}")
    assert may_be_called(f"{name}-of-gpu-7")


def test_a_report_of_very_many_or_very_long_names_is_cut(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.report("a", 0, 0, {f"actor/{i}": 1.0 for i in range(MAX_NAMES + 10)})
    file.report("b", 0, 0, {"actor/" + "x" * 1000: 1.0, "actor/\n": 1.0})
    file.close()
    assert {source: len(found) for source, found in sources(tmp_path / "metrics.jsonl").items()} == {"a": MAX_NAMES}
    assert file.num_refused == 12


def test_many_names_of_peers_share_one_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = MetricsWriter

    def counted(path: Path, *, source: str) -> MetricsWriter:
        opened.append(source)
        return real(path, source=source)

    monkeypatch.setattr(metrics_file, "MetricsWriter", counted)
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for number in range(20):
        file.report(f"actor-{number % 10}", 0, 0, {"actor/turns": float(number)})
    file.write(3, 1, {"buffer/trees": 2.0})
    file.close()
    assert len(opened) == 1
    assert len(sources(tmp_path / "metrics.jsonl")) == 11


def test_numbers_that_are_none_are_counted_for_the_peer_that_reports_them(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.report("a", 0, 0, {"actor/turns": 1.0, "actor/trees": float("nan")})
    file.report("b", 0, 0, {"actor/turns": 1.0})
    file.close()
    found = [(record.source, record.metrics) for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert found == [("a", {"actor/turns": 1.0, "metrics/dropped": 1.0}), ("b", {"actor/turns": 1.0})]


async def test_over_the_socket_a_peer_reports_under_the_name_of_its_link_alone(tmp_path: Path) -> None:
    rundir = RunDir.create(configured(run={"dir": tmp_path, "name": "r"}))
    async with running(rundir=rundir) as peers:
        metrics = {"train/success": 1.0, "actor/turns": 2.0}
        await peers.send(ActorReport(run="r", actor="buffer", version=0, tree_ids=(), metrics=metrics))
        assert peers.service._gauges()["buffer/refused_metrics"] == 1
        settings = peers.config.links
        impostor = Client(
            peers.service.actors.endpoint, peer="buffer", identity="learner", receives=Refused, settings=settings
        )
        async with impostor:
            answer = await impostor.request(hello(peers.config, actor="learner"), timeout_s=SOON_S)
            assert isinstance(answer, Refused)
            assert answer.reason == "'learner' is another role's name; give this actor one of its own (--name)"
    assert sources(rundir.metrics_path) == {"a": {"actor/turns": 2.0}}
