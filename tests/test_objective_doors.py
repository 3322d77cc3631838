"""Loss terms and token weights through the real trainer: the same however the batch is cut, kept over a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atpo_async.config import Config
from atpo_async.core.errors import ConfigError
from learner.checkpoints.checkpoint import Progress, load, save
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.report import StepReport
from learner.training.trainer import Trainer
from tests.learner_support import in_double, make_batch, make_config, make_model

Sections = dict[str, dict[str, Any]]
SCHEDULED = {"kind": "linear", "start": 2.0, "end": 4.0, "steps": 10}

METHODS: dict[str, dict[str, Any]] = {
    "Lp-Reg": {"terms": ["lp-reg"], "term_options": {"lp-reg": {"noise": 0.01, "share": 0.8, "coef": SCHEDULED}}},
    "Lp-Reg of the policy, replacing": {
        "terms": ["lp-reg"],
        "term_options": {"lp-reg": {"noise": 0.1, "share": 0.4, "proxy": "policy", "replace": True}},
    },
    "EPO": {"terms": ["epo"], "term_options": {"epo": {"low": 0.99, "high": 1.01}}, "entropy_coef": 0.1},
    "KL-Cov": {"terms": ["kl-cov"], "term_options": {"kl-cov": {"share": 0.2}}},
    "Clip-Cov": {
        "token_weights": ["clip-cov"],
        "token_weight_options": {"clip-cov": {"share": 0.1, "low": 0.1}},
        "clip_high": 0.5,
    },
    "80/20": {"token_weights": ["top-entropy"]},
    "AEPO": {"token_weights": ["entropy-advantage"], "surrogate": "clip-keep"},
    "one's own": {
        "terms": ["tests.loss_examples:near"],
        "token_weights": ["tests.loss_examples:early"],
        "token_weight_options": {"tests.loss_examples:early": {"share": 0.7}},
    },
    "several": {
        "terms": ["lp-reg", "epo"],
        "token_weights": ["top-entropy", "entropy-advantage"],
        "term_options": {"lp-reg": {"noise": 0.01, "share": 0.8}, "epo": {"low": 0.99, "high": 1.01}},
        "entropy_coef": 0.1,
        "kl_coef": 0.1,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def configured(folder: Path, objective: dict[str, Any], **learner: object) -> Config:
    return make_config(folder, objective=objective, learner={"max_grad_norm": 1e9, "lr": 1e-2, **learner})


def trainer_of(config: Config) -> Trainer:
    return Trainer(config, accelerator=make_accelerator(config), policy=in_double(load_policy(config)))


def weights_of(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.policy.parameters()])


def trained(config: Config) -> tuple[StepReport, torch.Tensor]:
    """Report of the second of two float64 batches, and the weights after it."""
    trainer = trainer_of(config)
    trainer.train(make_batch(seed=1, num_trees=2), version=3)
    report = trainer.train(make_batch(step=1), version=3)
    return report, weights_of(trainer)


@pytest.fixture(scope="module")
def plain(folder: Path) -> torch.Tensor:
    return trained(configured(folder, {}, packing="flat", minibatches=2, epochs=2))[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_the_same_from_trees_rows_and_micro_batches_over_several_steps(
    folder: Path, plain: torch.Tensor, name: str
) -> None:
    steps: dict[str, object] = {"minibatches": 2, "epochs": 2}
    flat, expected = trained(configured(folder, METHODS[name], packing="flat", **steps))
    assert flat.fault is None
    assert not torch.allclose(expected, plain, atol=1e-7), "it does nothing"
    ways: list[dict[str, object]] = [
        {"packing": "tree", "pack_tokens": 64, "micro_batch_tokens": 128},
        {"packing": "flat", "micro_batch_tokens": 64},
    ]
    for way in ways:
        other, weights = trained(configured(folder, METHODS[name], **way, **steps))
        torch.testing.assert_close(weights, expected, atol=1e-10, rtol=1e-9)
        for metric, value in flat.metrics.items():
            if metric not in ("tokens/forward", "pack/token_ratio", "pack/micro_batch_tokens"):
                assert other.metrics[metric] == pytest.approx(value, rel=1e-9, abs=1e-9), metric


@pytest.mark.parametrize("lora", [{}, {"lora": {"rank": 2}}], ids=["all weights", "adapters"])
def test_a_method_is_the_same_in_half_of_the_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, object]
) -> None:
    """Memory runs out in the second of two steps: its passes keep what was measured before the first."""
    config = configured(folder, METHODS["several"], minibatches=2, packing="flat", **lora)
    expected = trainer_of(config)
    report = expected.train(make_batch(), version=3)
    trainer = trainer_of(config)
    calls: list[None] = []
    original = trainer.steps.attempt

    def attempt(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return original(*args)

    monkeypatch.setattr(trainer.steps, "attempt", attempt)
    found = trainer.train(make_batch(), version=3)
    assert len(calls) == 3
    assert found.metrics["pack/micro_batch_tokens"] < report.metrics["pack/micro_batch_tokens"]
    torch.testing.assert_close(weights_of(trainer), weights_of(expected), atol=1e-10, rtol=1e-9)


def test_a_method_runs_with_adapters_and_in_half_precision(folder: Path) -> None:
    for learner in ({"lora": {"rank": 2}}, {"mixed_precision": "bf16"}):
        config = configured(folder, METHODS["several"], minibatches=2, **learner)
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # which holds a process to one precision
        trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
        report = trainer.train(make_batch(), version=3)
        AcceleratorState._reset_state()
        assert report.fault is None
        assert {"loss/lp-reg", "loss/epo", "lp-reg/threshold", "top-entropy/zero_share"} <= report.metrics.keys()


def test_what_a_method_measures_and_does_is_logged(folder: Path) -> None:
    report, _ = trained(configured(folder, METHODS["several"], minibatches=2))
    metrics = report.metrics
    assert metrics["top-entropy/zero_share"] == pytest.approx(0.8, abs=0.02)
    assert metrics["top-entropy/mean"] == pytest.approx(1 - metrics["top-entropy/zero_share"])
    assert metrics["entropy-advantage/mean"] == pytest.approx(1.0)
    assert 0 < metrics["lp-reg/selected_share"] < 0.8
    assert metrics["lp-reg/threshold"] < 0
    assert metrics["epo/anchor"] != metrics["epo/entropy"]
    assert 0 < metrics["epo/band_low_share"] < 1
    assert all(math.isfinite(metrics[f"loss/{name}"]) for name in ("lp-reg", "epo", "entropy", "kl_reference"))


def test_a_run_without_them_is_what_it_was(folder: Path) -> None:
    report, _ = trained(configured(folder, {}))
    assert not [name for name in report.metrics if name.partition("/")[0] in ("lp-reg", "epo", "top-entropy")]
    trainer = trainer_of(configured(folder, {}))
    assert (trainer._measures_first, trainer.planner.keep_idle, trainer.planner.draws) == (False, False, False)
    assert trainer.objective_state == {}


def test_turns_without_an_advantage_count_in_statistics(folder: Path) -> None:
    trainer = trainer_of(configured(folder, METHODS["80/20"]))
    assert trainer.planner.keep_idle


def test_draws_are_of_the_token_and_differ_from_step_to_step(folder: Path) -> None:
    weights = METHODS["Clip-Cov"]
    first, again, later = (trainer_of(configured(folder, weights)) for _ in range(3))
    reports = [t.train(make_batch(step=s), version=3) for t, s in ((first, 0), (again, 0), (later, 1))]
    below = [report.metrics["clip-cov/drawn_below"] for report in reports]
    assert below[0] == below[1] != below[2]
    assert reports[0].metrics["clip-cov/zero_share"] > 0


# --- the state


def test_running_numbers_outlive_a_checkpoint_and_older_ones_begin_anew(folder: Path, tmp_path: Path) -> None:
    config = configured(folder, METHODS["EPO"])
    whole = trainer_of(config)
    for step in range(2):
        whole.train(make_batch(seed=step, step=step), version=3)
    path = save(tmp_path, whole, Progress(step=2, version=2), keep=2)
    expected = whole.train(make_batch(seed=2, step=2), version=3)
    resumed = trainer_of(config)
    load(path, resumed)
    assert resumed.objective_state["epo"]["count"] == 2
    found = resumed.train(make_batch(seed=2, step=2), version=3)
    assert found.metrics["epo/anchor"] == expected.metrics["epo/anchor"]
    state = json.loads((path / "state.json").read_text())
    del state["objective"]
    (path / "state.json").write_text(json.dumps(state))
    load(path, resumed)
    assert resumed.objective_state == {}
    assert "epo/anchor" not in resumed.train(make_batch(seed=2, step=2), version=3).metrics


def test_a_batch_that_was_refused_leaves_no_number_that_is_none(folder: Path) -> None:
    trainer = trainer_of(configured(folder, METHODS["EPO"]))
    trainer.train(make_batch(), version=3)
    before = dict(trainer.objective_state)
    with torch.no_grad():
        next(trainer.policy.parameters()).fill_(math.nan)
    report = trainer.train(make_batch(step=1), version=3)
    assert report.fault is not None
    assert trainer.objective_state == before


# --- what a user's own returns


def fails(*_: Any, **__: Any) -> Any:
    raise IndexError("no such token")


@pytest.mark.parametrize(
    ("door", "own", "said"),
    [
        ("terms", lambda t, s: t.logp, "returned Tensor: it must return TermLoss"),
        (
            "terms",
            lambda t, s: example("TermLoss", loss=t.logp.sum()),
            r"returned for loss float64\[\]: it must be float",
        ),
        ("terms", lambda t, s: example("TermLoss", loss=t.mu), "returned a loss without a gradient"),
        (
            "terms",
            lambda t, s: example("TermLoss", loss=t.logp / 0.0),
            r"returned for loss .* at place 0 of \d+ \(logp -",
        ),
        ("terms", lambda t, s: example("TermLoss", loss=t.logp, replaces=t.mu), "returned for replaces float64"),
        (
            "terms",
            lambda t, s: example("TermLoss", loss=t.logp, metrics={"x": t.mu}),
            r"returned the metrics \['x'\] and declares \[\] \(TermTraits.metrics\)",
        ),
        ("terms", fails, r"failed: IndexError: no such token \(.*test_objective_doors.py:\d+\)"),
        ("token_weights", lambda t, n, s: t.logp, "returned a weight of -"),
        ("token_weights", lambda t, n, s: 1.0, "returned float: it must return Tensor"),
        ("token_weights", lambda t, n, s: t.turn, r"returned for its weight int64\[\d+\]: it must be float"),
        (
            "token_weights",
            lambda t, n, s: (t.logp * 0).requires_grad_(),
            "returned weights with a gradient: detach them",
        ),
    ],
)
def test_a_first_batch_says_what_is_wrong_with_what_ones_own_returns(
    folder: Path, monkeypatch: pytest.MonkeyPatch, door: str, own: Callable[..., Any], said: str
) -> None:
    monkeypatch.setattr("tests.loss_examples.mine", own, raising=False)
    trainer = trainer_of(configured(folder, {door: ["tests.loss_examples:mine"]}))
    with pytest.raises(ConfigError, match=rf"^objective.{door} = 'tests.loss_examples:mine' {said}.*; see docs/extend"):
        trainer.train(make_batch(), version=3)


def example(name: str, **fields: Any) -> Any:
    from learner.loss import protocols

    return getattr(protocols, name)(**fields)


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (lambda t, b, n, s: 1.0, "returned float: it must return Measured"),
        (
            lambda t, b, n, s: example("Measured", values={"x": "1"}),
            r"returned for values\['x'\] str: it must be a number",
        ),
        (
            lambda t, b, n, s: example("Measured", state={"x": True}),
            r"returned for state\['x'\] bool: it must be a numb",
        ),
    ],
)
def test_a_measure_that_is_no_number_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, measure: Callable[..., Any], said: str
) -> None:
    from atpo_async.core.loss_traits import TermTraits, declares

    own = declares(TermTraits(measure=measure))(lambda t, s: example("TermLoss", loss=t.logp * 0))
    monkeypatch.setattr("tests.loss_examples.mine", own, raising=False)
    trainer = trainer_of(configured(folder, {"terms": ["tests.loss_examples:mine"]}))
    with pytest.raises(ConfigError, match=f"{said}.*; see docs/extending"):
        trainer.train(make_batch(), version=3)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (
            {"terms": ["tests.loss_examples:absent"]},
            "objective.terms = 'tests.loss_examples:absent': .* has no 'absent'",
        ),
        (
            {"token_weights": ["no_such_module:x"]},
            "objective.token_weights = 'no_such_module:x': .* cannot be imported",
        ),
        (
            {"terms": ["tests.loss_examples:near"], "term_options": {"tests.loss_examples:near": {"rate": 1.0}}},
            r"objective.terms = 'tests.loss_examples:near' .*'rate'; a loss term is called as \(tokens, settings,",
        ),
        (
            {"terms": ["tests.loss_examples:near"], "term_options": {"tests.loss_examples:near": {"coef": -1.0}}},
            "objective.term_options.tests.loss_examples:near: coef = -1.0 must be >= 0",
        ),
    ],
)
def test_what_cannot_be_loaded_is_named_before_the_first_batch(
    folder: Path, objective: dict[str, Any], said: str
) -> None:
    from atpo_async.core.errors import AtpoError

    config = configured(folder, objective)
    with pytest.raises(AtpoError, match=said):
        Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))


def test_the_example_terms_are_those_of_the_page() -> None:
    from tests import loss_examples

    page = (Path(__file__).resolve().parent.parent / "docs" / "extending.md").read_text()
    for name in ("near", "early"):
        assert f"def {name}(" in page
        assert callable(getattr(loss_examples, name))
