"""The actor's benchmarks run whole on a small load: many episodes at once, overhead, and the message layer."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atpo_async.config import Config, build, load
from atpo_async.run.metrics import MetricsWriter
from benchmarks import concurrent_episodes, message_task, slow_disk, waits
from benchmarks.actor_overhead import in_flight_settings, measure, measure_messages
from benchmarks.actor_overhead import main as overhead_main
from buffer.journal.tables import Tables
from tests.e2e_support import WORLD
from tests.learner_support import small_policy


@pytest.fixture
def interpreter_as_it_was() -> Iterator[None]:
    """An actor sets these for its whole process."""
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)
    gc.unfreeze()


@pytest.mark.usefixtures("interpreter_as_it_was")
@pytest.mark.parametrize(
    ("tools", "together"), [("awaited", False), ("to_thread", True), ("async-tool", False), ("plain-tool", True)]
)
async def test_episodes_at_once_take_every_step_and_both_loops_tick_meanwhile(tools: str, together: bool) -> None:
    args = argparse.Namespace(
        episodes=4, steps=2, latency=0.03, action=0.01, observation=5, together=together, idle=0.05, tick=1.0
    )
    found = await concurrent_episodes.measure(tools, args)
    assert (found["tools"], found["steps"]) == (tools, 8)
    assert 1 <= found["tools_at_once"] <= 4
    assert found["calls_per_s"] > 0
    assert len(concurrent_episodes.rows([found])) == 6  # idle and loaded, of three loops
    assert all(ticks["ticks"] > 0 for load in ("idle", "loaded") for ticks in found[load].values())


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_policy(tmp_path_factory.mktemp("policy") / "plain", steps=0)


def config() -> Config:
    return build(
        {
            "actor": {"engine": "transformers"},
            "environment": {"name": "hopqa", "options": WORLD},
            "model": {"max_context_tokens": 64, "dtype": "float32"},
            "search": {"initial_rollouts": 2, "rounds": 0, "max_action_tokens": 4},
        }
    )


async def test_the_overhead_is_measured_against_the_same_requests(policy: Path) -> None:
    found = await measure(config(), policy, num_trees=2, rounds=1)
    assert (found["engine"], found["trees"], found["rounds"]) == ("transformers", 2, 1)
    assert len(found["ratios"]) == 1  # type: ignore[arg-type]
    assert set(found["front_end_cpu_us_per_turn"]) == {"actor", "straight"}  # type: ignore[call-overload]


def test_a_size_is_made_here_and_the_made_up_task_fills_the_places_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, object] = {}

    async def measured(config: Config, model: Path, trees: int, rounds: int, *, limit_s: float) -> dict[str, object]:
        weights = (model / "model.safetensors").stat().st_size
        asked.update(config=config, weights=weights, trees=trees, rounds=rounds, limit_s=limit_s)
        return {"ratio_median": 0.97}

    monkeypatch.setattr("benchmarks.actor_overhead.measure", measured)
    words = ["--model", "demo", "--in-flight", "24", "--device", "cpu", "--limit-s", "9", "--json", str(tmp_path / "j")]
    monkeypatch.setattr("sys.argv", ["actor_overhead.py", *words])
    overhead_main()
    made = asked["config"]
    assert isinstance(made, Config)
    assert (made.actor.trees_in_flight, made.actor.max_num_seqs, made.search.max_leaves) == (2, 24, 12)
    assert (made.actor.device, asked["trees"], asked["limit_s"]) == ("cpu", 8, 9.0)
    assert int(str(asked["weights"])) > 100_000
    assert json.loads(capsys.readouterr().out)["ratio_median"] == 0.97
    assert json.loads((tmp_path / "j").read_text())["model"] == "demo"


def test_settings_of_a_qwen3_size_hold_its_turns_and_as_many_requests_as_asked_for() -> None:
    made = load([], in_flight_settings(256, size="0.6b"))
    assert made.actor.trees_in_flight * made.search.max_leaves == pytest.approx(256, abs=6)
    assert made.environment.options == {"turns": 4, "prompt": 512, "observation": 200}
    assert made.model.max_context_tokens >= 512 + 3 * 200 + 4 * 128


async def test_the_message_layer_is_measured_on_the_same_task_in_messages(policy: Path, tmp_path: Path) -> None:
    model = message_task.with_template(policy, tmp_path / "policy")
    found = await measure_messages(config(), model, num_trees=2, rounds=1)
    assert set(found["tokens_per_s"]) == {"tokens", "messages"}  # type: ignore[call-overload]
    assert set(found["layer_us"]) == {"render", "parse", "extend"}  # type: ignore[call-overload]


def test_the_shares_of_waiting_are_those_of_the_steps_after_the_first(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl", source="learner") as learner:
        for step in range(waits.SKIPPED_STEPS + 2):
            late = step >= waits.SKIPPED_STEPS
            learner.write(
                step=step, version=step,
                metrics={"time/between_steps_s": 2.0, "time/learner_wait_s": 1.0 if late else 2.0, "time/step_s": 0.5},
            )  # fmt: skip
            learner.write(
                step=step, version=step,
                metrics={"time/actor_interval_s": 2.0, "time/actor_wait_s": 0.2 if late else 2.0, "actor/trees": 8},
            )  # fmt: skip
    found = waits.shares(tmp_path)
    expected = {"learner_waits": 0.5, "learner_steps": 0.25, "actor_waits": 0.1, "steps_per_s": 0.5, "trees_per_s": 4.0}
    assert {name: pytest.approx(value) for name, value in expected.items()} == {n: found[n] for n in expected}
    assert waits.summary({"a": [found, found]})["a"]["learner_waits"] == 0.5


def test_on_a_slow_disk_a_commit_takes_longer_and_writes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    slept: list[float] = []
    monkeypatch.setattr(Tables, "commit", Tables.commit)  # put back at the end
    monkeypatch.setattr("benchmarks.slow_disk._commit", lambda self, group: done.append(group))
    monkeypatch.setattr("benchmarks.slow_disk.time.sleep", slept.append)
    for _ in range(2):  # it is tried before the run
        slow_disk.make(0.6, commit_ms=40.0)
    Tables.commit(None, "group")  # type: ignore[arg-type]
    assert (done, slept) == (["group"], [0.04])


async def test_the_made_up_engine_and_its_task_serve_an_actor(tmp_path: Path) -> None:
    made = build(
        {
            "actor": {
                "engine": "benchmarks.fast_engine:FastEngine", "device": "cpu", "max_num_seqs": 3,
                "engine_options": {"step_ms": 0.1, "seat_us": 0.0},
            },
            "environment": {"name": "benchmarks.fast_engine:Chains", "options": {"turns": 2, "latency_s": 0.001}},
            "model": {"max_context_tokens": 64},
            "search": {"initial_rollouts": 3, "rounds": 1, "branches": 2, "max_action_tokens": 4},
        }
    )  # fmt: skip
    model = waits.make_policy(tmp_path / "policy")
    found = await measure(made, model, num_trees=3, rounds=1)
    assert 1 <= int(str(found["in_flight_mean"])) <= 3
