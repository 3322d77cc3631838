"""Whole runs in processes, as a user starts them: to the end, interrupted, and with a role killed in mid-run."""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atpo_async.run.metrics import read_metrics
from tests.e2e_support import STEPS, Job, job, running

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc"),
    pytest.mark.timeout(400),
]

PROMISED = {
    "eval/success",
    "train/reward",
    "train/loss",
    "lag/mean",
    "lag/p95",
    "lag/max",
    "turns/multi_version_share",
    "tokens/generated_per_s",
    "tokens/trained_per_s",
    "time/learner_wait_s",
    "time/actor_wait_s",
    "is/ess_frac",
    "is/truncated_share",
    "clip_share",
    "buffer/trees",
    "engine/probe_error",
    "weights/publish_s",
    "weights/swap_s",
    "engine/prefix_hit_share",
}
OF_ACTORS = {
    "tokens/generated_per_s",
    "time/actor_wait_s",
    "engine/probe_error",
    "weights/swap_s",
    "engine/prefix_hit_share",
}
ACTORS = ("actor-0", "actor-1")
REBUILT = "weights/differences/versions"
COPY = "copy-of-metrics.jsonl"
ALL_STEPS = list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def policy(hopqa_policy: Path) -> Path:
    return hopqa_policy


def ended_well(run: Job, code: int) -> None:
    """What holds at the end of every run, whatever happened on the way."""
    assert code == 0, run.story()
    assert run.living() == []
    assert run.left_in_shared_memory() == []
    assert sorted({record.step for record in run.steps()}) == ALL_STEPS
    versions = [record.version for record in run.steps()]
    assert all(before < after for before, after in itertools.pairwise(versions)), versions
    assert (run.path / "report.html").is_file()
    assert (run.path / "model" / "config.json").is_file()


# --- one run to its end, looked at from all sides ---------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """A run with the transformers engine and two actors that take the weights as differences, in chunks; held at the
    gate until they have reported everything once."""
    folder = tmp_path_factory.mktemp("finished")
    options: dict[str, Any] = {
        "metrics.options.jsonl.path": str(folder / COPY), "actor.count": 2, "weights.shared_memory": False,
    }  # fmt: skip
    with job(folder, policy, **options) as run:
        train = run.train()
        run.until(
            lambda: run.steps() and all(names(run, actor) >= OF_ACTORS | {REBUILT} for actor in ACTORS),
            "a report of each actor with all names",
            of=train,
        )
        run.open_gate()
        code = run.exit_code(train)
        ended_well(run, code)
        assert "report.html" in train.said()
        yield run


def names(run: Job, source: str | None = None) -> set[str]:
    return {name for record in run.records() if source in (None, record.source) for name in record.metrics}


def test_a_run_takes_every_step_once_and_leaves_no_process_and_no_shared_memory(finished: Job) -> None:
    assert [record.step for record in finished.steps()] == ALL_STEPS


def test_metrics_hold_every_promised_name(finished: Job) -> None:
    assert PROMISED - names(finished) == set()


def test_every_record_reached_the_metrics_sink_once_and_in_order(finished: Job) -> None:
    copied = [(record.time, record.source, record.step) for record in read_metrics(finished.folder / COPY)]
    assert copied == [(record.time, record.source, record.step) for record in finished.records()]


def test_the_first_evaluation_comes_before_any_update(finished: Job) -> None:
    records = finished.records()
    first_eval = next(i for i, record in enumerate(records) if "eval/success" in record.metrics)
    first_update = next(i for i, record in enumerate(records) if "train/loss" in record.metrics)
    assert first_eval < first_update
    assert records[first_eval].step == 0
    assert [record.step for record in finished.with_metric("eval/success")] == [0, STEPS]


def test_no_turn_trained_on_is_older_than_the_configuration_allows(finished: Job) -> None:
    assert max(record.metrics["lag/max"] for record in finished.steps() if "lag/max" in record.metrics) <= 2


def test_next_to_no_turn_came_too_late(finished: Job) -> None:
    steps = [record.metrics for record in finished.steps() if "turns/count" in record.metrics]
    stale = sum(metrics["turns/stale"] for metrics in steps)
    assert stale <= 0.1 * (stale + sum(metrics["turns/count"] for metrics in steps))


def test_every_swap_reproduced_the_learners_log_probs(finished: Job) -> None:
    errors = [record.metrics["engine/probe_error"] for record in finished.with_metric("engine/probe_error")]
    assert max(errors) < 1e-4


def test_versions_reached_both_actors_as_differences_and_were_what_was_learned(finished: Job) -> None:
    """Each engine compares every tensor with the file, bit for bit, and the file has the learner's digests."""
    for actor in ACTORS:
        reports = [record.metrics for record in finished.records() if record.source == actor]
        fallbacks = {name for metrics in reports for name in metrics if "differences/fallback" in name}
        # The first one, and those of which the learner no longer had the base when it was first asked.
        assert fallbacks <= {f"weights/differences/fallback/{reason}" for reason in ("no_base", "not_offered")}
        assert sum(metrics.get(REBUILT, 0.0) for metrics in reports) >= 1
        assert not any("weights/rejected" in metrics for metrics in reports)


def test_the_report_opens_without_a_network(finished: Job) -> None:
    text = (finished.path / "report.html").read_text()
    assert "<svg" in text
    fetched = r"""(?:src|href|srcset|poster|data)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?(?:https?:)?//|@import"""
    assert re.findall(fetched, text) == []


def test_the_trained_policy_is_an_ordinary_model_folder(finished: Job, policy: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    after = AutoModelForCausalLM.from_pretrained(finished.path / "model").state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    tokenizer = AutoTokenizer.from_pretrained(finished.path / "model")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(policy).get_vocab()


# --- things that happen in mid-run ------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_where_it_stood(policy: Path, tmp_path: Path) -> None:
    # No checkpoint is due before the end: what there is was saved because of the stop.
    options: dict[str, Any] = {"learner.checkpoint_every": 100}
    with job(tmp_path, policy, **options) as run:
        train = run.train()
        run.until(run.steps, "a first step", of=train)
        train.interrupt()
        assert run.exit_code(train) == 130, run.story()
        assert run.living() == []
        assert run.left_in_shared_memory() == []
        assert "The run goes on with:" in train.said()
        done = [record.step for record in run.steps()]
        assert 0 < len(done) < STEPS
        assert f"Saved: step {done[-1]} of {STEPS}." in train.said()

        run.open_gate()
        again = run.start("train", run.config, "--learner.lr", "2e-4")
        ended_well(run, run.exit_code(again))
        assert "note: learner.lr: 0.0004 -> 0.0002" in again.said()
        assert f"trees in {STEPS} of {STEPS} steps" in again.said()
        # Nothing is done twice: what was trained before the stop was saved before the end.
        assert [record.step for record in run.steps()] == ALL_STEPS
        assert [record.step for record in run.steps()][: len(done)] == done
        assert [record.step for record in run.with_metric("eval/success")] == [0, STEPS]
        published = [r.version for r in run.with_metric("weights/publish_s")]
        assert len(set(published)) == len(published), "a version number was used twice"


@pytest.mark.slow
def test_a_killed_learner_resumes_and_a_killed_buffer_begins_anew(policy: Path, tmp_path: Path) -> None:
    with job(tmp_path, policy) as run:
        train = run.train()
        run.until(lambda: list((run.path / "checkpoints").glob("step-*")), "a checkpoint", of=train)
        os.kill(run.pid("learner"), signal.SIGKILL)

        def published_anew() -> bool:
            # Every batch publishes too; without one there is only what a learner publishes at its start.
            return sum("train/loss" not in r.metrics for r in run.with_metric("weights/publish_s")) == 2

        run.until(published_anew, "the learner's return", of=train)
        assert "resumed from" in run.rundir.log_path("learner", 1).read_text()
        os.kill(run.pid("buffer"), signal.SIGKILL)
        run.until(lambda: run.rundir.log_path("buffer", 1).is_file(), "the buffer's return", of=train)
        run.open_gate()
        ended_well(run, run.exit_code(train))
        assert [record.step for record in run.with_metric("eval/success")] == [0, STEPS]
        said = train.said()
        assert "learner ended: killed by SIGKILL; starting it again" in said
        assert "buffer ended: killed by SIGKILL; starting it again" in said


@pytest.mark.slow
def test_without_lag_an_actor_killed_that_joined_by_hand_is_replaced_by_another(policy: Path, tmp_path: Path) -> None:
    """Without lag a batch's trees are all that is under way: the run can go on only if what the killed actor held is
    given to the other."""
    options: dict[str, Any] = {"actor.count": 0, "staleness.max_lag": 0}
    with job(tmp_path, policy, **options) as run:
        train = run.train()
        run.until(lambda: (run.path / "endpoints.json").is_file(), "the endpoints", of=train)
        address = run.rundir.read_endpoints().actors.removeprefix("tcp://")

        first = run.start("actor", run.config, "--join", address, "--name", "first")

        def holds_trees() -> bool:
            reports = [r for r in run.records() if r.source == "first"]
            return bool(run.steps() and reports and reports[-1].metrics["actor/trees_in_flight"] > 0)

        run.until(holds_trees, "trees held back in the first actor", of=first)
        os.kill(first.popen.pid, signal.SIGKILL)
        first.popen.wait()
        assert first.living() == []

        run.open_gate()
        second = run.start("actor", run.config, "--join", address, "--name", "second")
        code = run.exit_code(train)
        assert run.exit_code(second) == 0, run.story()
        ended_well(run, code)
        assert [record.step for record in run.steps()] == ALL_STEPS
        # Not lag/max, which masking keeps within max_lag.
        lags = [record.metrics["lag/served_max"] for record in run.steps() if "lag/served_max" in record.metrics]
        assert lags
        assert set(lags) == {0}
        assert sum(record.metrics["turns/stale"] for record in run.steps() if "turns/stale" in record.metrics) == 0


@pytest.mark.slow
@pytest.mark.vllm
def test_with_vllm_a_killed_actor_takes_its_engine_along_and_the_run_finishes(policy: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    options: dict[str, Any] = {"actor.engine": "vllm"}
    with job(tmp_path, policy, **options) as run:
        train = run.train()
        run.until(
            lambda: run.steps() and names(run, "actor-0") >= OF_ACTORS, "a report of the actor with all names", of=train
        )
        family = run.family("actor-0")
        assert len(family) > 1, "vLLM was expected to run in processes of its own"
        os.kill(run.pid("actor-0"), signal.SIGKILL)
        run.until(lambda: run.rundir.log_path("actor-0", 1).is_file(), "the actor's return", of=train)
        assert running(family) == set(), "processes of the killed actor's engine are left"

        def reports() -> int:
            return sum(record.source == "actor-0" for record in run.records())

        before = reports()
        run.until(lambda: reports() > before, "a report of the second attempt", of=train)
        family = run.family("actor-0", attempt=1)
        assert len(family) > 1
        run.open_gate()
        ended_well(run, run.exit_code(train))
        assert running(family) == set(), "processes of the second engine are left"
        assert [record.step for record in run.steps()] == ALL_STEPS
        assert PROMISED - names(run) == set()
        records = run.records()
        first_eval = next(i for i, record in enumerate(records) if "eval/success" in record.metrics)
        assert first_eval < next(i for i, record in enumerate(records) if "train/loss" in record.metrics)
        assert max(r.metrics["lag/max"] for r in run.steps() if "lag/max" in r.metrics) <= 2
        assert max(r.metrics["engine/probe_error"] for r in run.with_metric("engine/probe_error")) < 1e-4
        swaps = sum(r.metrics["weights/swaps"] for r in run.with_metric("weights/swaps"))
        assert swaps >= 2, "the first weights, and some that were learned"
