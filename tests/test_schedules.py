"""Coefficients that move with the learner's batches: their curves, how they are written, and what they do to a loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from atpo_async.config import Config, as_options, build, load, resolved, split_options, to_toml
from atpo_async.config.idle_settings import idle_settings
from atpo_async.config.resuming import describe_changes
from atpo_async.core.errors import ConfigError
from atpo_async.core.schedule import Schedule, coefficient
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.learner_support import in_double, make_batch, make_config, make_model

RISING = {"kind": "linear", "start": 0, "end": 0.4, "steps": 4}
STEPS = (0, 50, 100, 200, 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


# --- the curves


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Schedule(kind="cosine-up", start=0, end=1, steps=200), (0, 0.1464466, 0.5, 1, 1)),
        (Schedule(kind="cosine-down", start=0.4, end=0, steps=200), (0.4, 0.3414214, 0.2, 0, 0)),
        (Schedule(kind="linear", start=1, end=0, steps=200), (1, 0.75, 0.5, 0, 0)),
        (Schedule(kind="constant", start=0.3, end=0.3, steps=1), (0.3,) * 5),
        (0.3, (0.3,) * 5),
    ],
    ids=["SPEAR's imitation", "SPEAR's tool reward", "linear", "constant", "a number"],
)
def test_a_coefficient_is_a_function_of_the_step_alone(schedule: float | Schedule, values: tuple[float, ...]) -> None:
    assert [coefficient(schedule, step) for step in STEPS] == pytest.approx(values, abs=5e-8)


def test_a_schedule_ends_exactly_at_its_end() -> None:
    for kind, start, end in (("cosine-up", 0.1, 0.7), ("cosine-down", 0.7, 0.1), ("linear", 0.1, 0.7)):
        schedule = Schedule(kind=kind, start=start, end=end, steps=7)  # type: ignore[arg-type]
        assert (schedule.at(0), schedule.at(7), schedule.at(-1)) == (start, end, start)


# --- how it is written


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-0.1, "objective.kl_coef must be >= 0, got -0.1"),
        ("much", r"objective.kl_coef: must be a number, or a table \{ kind, start, end, steps \} .*, got 'much'"),
        (float("nan"), "objective.kl_coef: must be a number"),
        (True, "objective.kl_coef: takes no truth value"),
        ({"kind": "linear"}, "objective.kl_coef: a schedule lacks 'start': it is { kind, start, end, steps }"),
        ({**RISING, "begin": 1}, "objective.kl_coef: 'begin' is no part of a schedule; known: kind, start, end, steps"),
        ({**RISING, "kind": "cosine"}, "kind = 'cosine' is unknown; known: constant, linear, cosine-up, cosine-down"),
        (
            {**RISING, "kind": "cosine-down"},
            "kind = 'cosine-down' with start = 0.0 .* goes the other way: use cosine-u",
        ),
        ({**RISING, "kind": "constant"}, "kind = 'constant' stays at start = 0.0: leave end = 0.4 out, or linear"),
        ({**RISING, "steps": 0}, "steps = 0 must be 1 or more"),
        ({**RISING, "steps": 2.5}, "steps = 2.5 must be a whole number"),
        ({**RISING, "start": "0"}, "start = '0' must be a number"),
        ({**RISING, "end": float("inf")}, "start = 0.0 and end = inf must be finite"),
        ({**RISING, "end": -1}, "objective.kl_coef: a schedule from 0 to -1 must not fall below 0"),
    ],
)
def test_what_is_no_coefficient_is_refused_by_its_field(value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("{ ", r"\{ ").replace(" }", r" \}").replace("\\\\", "\\")):
        build({"objective": {"kl_coef": value}})


def test_a_schedule_survives_every_way_in_which_a_configuration_is_written(tmp_path: Path) -> None:
    config = build({"objective": {"kl_coef": RISING, "kl_estimator": "k2"}})
    toml, record = tmp_path / "resolved.toml", tmp_path / "config.json"
    toml.write_text(to_toml(config))
    record.write_text(config.model_dump_json())
    assert 'kl_coef = {kind = "linear", start = 0.0, end = 0.4, steps = 4}' in to_toml(config)
    assert load(toml) == load(record) == load([], as_options(toml)) == config
    assert resolved(Config(), {"objective": {"kl_coef": RISING, "kl_estimator": "k2"}}) == config
    assert json.loads(record.read_text())["objective"]["kl_coef"] == {**RISING, "start": 0.0}


def test_a_number_and_a_table_replace_one_another_in_layers(tmp_path: Path) -> None:
    number, table = tmp_path / "number.toml", tmp_path / "table.toml"
    number.write_text("[objective]\nkl_coef = 0.04\n")
    table.write_text('[objective]\nkl_coef = {kind = "linear", start = 0, end = 0.4, steps = 4}\n')
    rising = Schedule(kind="linear", start=0.0, end=0.4, steps=4)
    assert load([number, table]).objective.kl_coef == rising
    assert load([table, number]).objective.kl_coef == 0.04
    words = ["--objective.kl_coef.kind", "linear", "--objective.kl_coef.start=0"]
    words += ["--objective.kl_coef.end", "0.4", "--objective.kl_coef.steps", "4"]
    assert load(number, split_options(words)[1]).objective.kl_coef == rising
    whole = ["--objective.kl_coef", '{kind = "linear", start = 0, end = 0.4, steps = 4}']
    assert load(number, split_options(whole)[1]).objective.kl_coef == rising
    assert load(table, {"objective.kl_coef.end": "0.2"}).objective.kl_coef == Schedule(
        kind="linear", start=0.0, end=0.2, steps=4
    )


def test_a_setting_that_works_with_a_coefficient_works_with_one_that_is_zero_only_now() -> None:
    assert idle_settings(build({"objective": {"kl_estimator": "k2", "kl_coef": RISING}})) == []
    never = {**RISING, "end": 0}
    assert idle_settings(build({"objective": {"kl_estimator": "k2", "kl_coef": never}}))


def test_a_changed_schedule_is_told_when_a_run_goes_on() -> None:
    old, new = build({}), build({"objective": {"entropy_coef": RISING}})
    (line,) = describe_changes(old, new, updates=3, steps=3)
    assert line == 'objective.entropy_coef: 0 -> {kind = "linear", start = 0.0, end = 0.4, steps = 4}'


# --- what it does


def trained(folder: Path, name: str, coefficients: Sequence[object]) -> tuple[dict[str, float], torch.Tensor]:
    """Train two batches, steps 0 and 2 of a run, with a coefficient for each; the last metrics, and the weights."""
    sections: dict[str, dict[str, object]] = {"learner": {"max_grad_norm": 1e9, "lr": 1e-2}}
    config = make_config(folder, objective={name: RISING}, **sections)
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=in_double(load_policy(config)))
    for seed, step, value in zip((1, 0), (0, 2), coefficients, strict=True):
        trainer._loss.config = make_config(folder, objective={name: value}, **sections)
        report = trainer.train(make_batch(seed=seed, step=step), version=3)
    return report.metrics, torch.cat([p.detach().reshape(-1) for p in trainer.policy.parameters()])


@pytest.mark.parametrize("name", ["kl_coef", "entropy_coef"])
def test_a_batch_is_trained_with_the_coefficient_of_its_step(folder: Path, name: str) -> None:
    # It is 0 for the first batch; what the second needs is there all the same.
    metrics, weights = trained(folder, name, [RISING, RISING])
    assert metrics[f"objective/{name}"] == pytest.approx(0.2)
    tiny = 1e-300  # 0 itself would measure nothing
    _, by_hand = trained(folder, name, [tiny, 0.2])
    torch.testing.assert_close(weights, by_hand, atol=0, rtol=0)
    _, other = trained(folder, name, [tiny, 0.3])
    assert not torch.allclose(weights, other, atol=1e-9)
