"""What a run that goes on may have otherwise, what is said of it, and which curves jump."""

from __future__ import annotations

from typing import Any

import pytest

from atpo_async.config import Config, build
from atpo_async.config.resuming import MUST_STAY, WITH_EXACT_LAG, describe_changes, rate_of, refused

LINEAR = {"lr": 6e-4, "schedule": "linear", "warmup_steps": 2}


def changed(path: str, value: Any) -> dict[str, dict[str, Any]]:
    section, field = path.split(".")
    return {section: {field: value}}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("learner.lr", 3e-5),
        ("learner.schedule", "cosine"),
        ("learner.schedule_steps", 7),
        ("learner.weight_decay", 0.1),
        ("learner.betas", (0.8, 0.9)),
        ("learner.num_processes", 2),
        ("learner.tensorboard", True),
        ("learner.minibatches", 2),
        ("learner.max_grad_norm", 0.5),
        ("objective.clip_high", 0.3),
        ("correction.cap", 5.0),
        ("credit.value_mode", "leaf_mean"),
        ("search.step_timeout_s", 5.0),
        ("search.max_action_tokens", 32),
        ("staleness.max_lag", 4),
        ("staleness.trees_per_batch", 8),
        ("buffer.max_reissues", 9),
        ("buffer.priority_exponent", 0.2),
        ("model.dtype", "bfloat16"),
        ("model.max_context_tokens", 1024),
        ("weights.poll_s", 9.0),
        ("actor.count", 3),
        ("run.steps", 200),
    ],
)
def test_what_cannot_break_exactness_may_change_and_is_reported_with_both_values(path: str, value: Any) -> None:
    new = build(changed(path, value))
    assert refused(Config(), new) == []
    (line, *_) = describe_changes(Config(), new, updates=0, steps=0)
    assert line.startswith(f"{path}: ")
    assert " -> " in line


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run.seed", 1),
        ("run.max_tasks", 4),
        ("model.path", "other"),
        ("model.max_context_tokens", 128),
        ("environment.name", "my.env:make"),
        ("environment.options", {"hops": 2}),
        ("search.temperature", 0.7),
        ("search.initial_rollouts", 4),
        ("staleness.max_uses", 2),
        ("buffer.ready", "partial"),
    ],
)
def test_what_the_journal_was_made_with_stays(path: str, value: Any) -> None:
    assert [change[0] for change in refused(Config(), build(changed(path, value)))] == [path]


def test_what_the_weights_are_made_of_stays_and_how_they_travel_may_change() -> None:
    old = build({"learner": {"lora": {"rank": 8}}})
    new = build({"learner": {"lora": {"rank": 4, "alpha": 8.0, "targets": "q_proj", "publish": "adapter"}}})
    assert [change[0] for change in refused(old, new)] == [
        f"learner.lora.{name}" for name in ("rank", "alpha", "targets")
    ]
    assert "learner.lora.publish: merged -> adapter" in describe_changes(old, new, updates=0, steps=0)


def test_a_number_of_tasks_may_be_raised_and_never_lowered() -> None:
    few, many = build(changed("run.max_tasks", 16)), build(changed("run.max_tasks", 32))
    assert refused(few, many) == refused(few, Config()) == []
    assert [change[0] for change in refused(many, few)] == ["run.max_tasks"]


def test_with_an_exact_lag_whole_batches_lie_in_the_journal() -> None:
    exact = {"exact_lag": 2, "max_lag": 4}
    old, new = build({"staleness": exact}), build({"staleness": {**exact, "trees_per_batch": 8}})
    assert [change[0] for change in refused(old, new)] == ["staleness.trees_per_batch"]
    assert "staleness.trees_per_batch" in WITH_EXACT_LAG


def test_fields_that_must_stay_exist() -> None:
    from atpo_async import config

    known = config.fields()
    for name in (*MUST_STAY, *WITH_EXACT_LAG):
        assert name in known or (name.endswith("*") and any(path.startswith(name[:-1]) for path in known)), name


def test_a_change_reads_as_it_is_written() -> None:
    old, new = build({"learner": {"lr": 1e-4}}), build({"learner": {"lr": 3e-5, "lineage": True}})
    assert describe_changes(old, new, updates=0, steps=0) == [
        "learner.lr: 0.0001 -> 3e-05",
        "learner.lineage: false -> true",
    ]


def test_a_schedule_that_jumps_over_new_steps_is_reported_with_both_rates_and_the_way_to_keep_the_old_curve() -> None:
    old = build({"run": {"steps": 60}, "learner": LINEAR, "buffer": {"weight_exponent_steps": 60}})
    new = build({"run": {"steps": 120}, "learner": LINEAR, "buffer": {"weight_exponent_steps": 60}})
    steps, jump = describe_changes(old, new, updates=31, steps=31)
    assert steps == "run.steps: 60 -> 120"
    assert jump == (
        "the learning rate of step 32 is 0.000453, with the settings before it would be 0.0003 (learner.schedule = "
        "'linear' ended at step 60 and ends at step 120 now); --learner.schedule_steps 60 keeps the old curve"
    )
    kept = build({"run": {"steps": 120}, "learner": {**LINEAR, "schedule_steps": 60}})
    assert rate_of(kept, 31) == rate_of(old, 31)
    assert not any("learning rate" in line for line in describe_changes(old, kept, updates=31, steps=31))


def test_an_old_curve_that_is_at_its_end_is_reported_as_ended() -> None:
    old, new = build({"run": {"steps": 6}, "learner": LINEAR}), build({"run": {"steps": 12}, "learner": LINEAR})
    (jump,) = [line for line in describe_changes(old, new, updates=6, steps=6) if "learning rate" in line]
    assert "is 0.00036, with the settings before it would be 0 " in jump
    assert jump.endswith("--learner.schedule_steps 6 keeps the old curve, whose learning rate is 0 from here on")


def test_a_new_rate_is_reported_as_what_it_is_from_the_next_step_on() -> None:
    old, new = build({"learner": {"lr": 1e-4}}), build({"learner": {"lr": 3e-5}})
    assert describe_changes(old, new, updates=5, steps=5) == [
        "learner.lr: 0.0001 -> 3e-05",
        "the learning rate of step 6 is 3e-05, with the settings before it would be 0.0001",
    ]


def test_the_priority_weights_exponent_jumps_with_the_steps_as_well_and_is_reported() -> None:
    old, new = build({"run": {"steps": 10}}), build({"run": {"steps": 20}})
    (jump,) = [line for line in describe_changes(old, new, updates=5, steps=5) if "exponent" in line]
    assert "is 0.55 now, before it was 0.7; --buffer.weight_exponent_steps 10 keeps the old curve" in jump


def test_a_run_without_a_step_has_no_curve_that_could_jump() -> None:
    old, new = build({"run": {"steps": 60}, "learner": LINEAR}), build({"run": {"steps": 120}, "learner": LINEAR})
    assert describe_changes(old, new, updates=0, steps=0) == ["run.steps: 60 -> 120"]
