"""A surrogate and a correction of a user's own train like built-in ones, and what is wrong with one is said by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atpo_async.config import Config, ObjectiveConfig, build
from atpo_async.config.doors import CORRECTION, SURROGATE
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.loss_traits import CorrectionTraits, SurrogateTraits, declared, declares
from atpo_async.ops.exits import EXIT_USER
from atpo_async.ops.role import exit_code
from learner.loss.correction import Tempering
from learner.loss.loading import CheckedSurrogate, correction_of, load_correction, load_surrogate
from learner.loss.protocols import SurrogateTerms, SurrogateTokens, UnitRatios, UnitWeights
from learner.loss.tokens import OffPolicyTokens
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.report import StepReport
from learner.training.trainer import Trainer
from tests.learner_support import in_double, make_batch, make_config, make_model

OWN: dict[str, dict[str, object]] = {
    "objective": {"surrogate": "tests.loss_examples:sapo", "surrogate_options": {"temperature": 2.0}},
    "correction": {"action": "tests.loss_examples:trimmed", "action_options": {"keep": 0.5}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def trained(folder: Path, **learner: object) -> tuple[StepReport, Tensor]:
    """Report of one float64 batch with both of one's own, and the weights after it."""
    config = make_config(folder, **OWN, learner={"max_grad_norm": 1e9, "lr": 1e-2, **learner})
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=in_double(load_policy(config)))
    report = trainer.train(make_batch(), version=3)
    return report, torch.cat([p.detach().reshape(-1) for p in trainer.policy.parameters()])


@pytest.mark.parametrize("steps", [{}, {"minibatches": 2}], ids=["one step", "two steps"])
def test_ones_own_loss_trains_alike_packed_or_flat_whole_or_in_micro_batches(
    folder: Path, steps: dict[str, object]
) -> None:
    whole, expected = trained(folder, packing="flat", **steps)
    ways: list[dict[str, object]] = [{"packing": "flat", "micro_batch_tokens": 64}, {"packing": "tree"}]
    for way in ways:
        report, weights = trained(folder, **way, **steps)
        torch.testing.assert_close(weights, expected, atol=1e-10, rtol=1e-9)
        for name in ("train/loss", "surrogate/gate", "is/edge", "is/truncated_share", "clip_share"):
            assert report.metrics[name] == pytest.approx(whole.metrics[name], abs=1e-12), name
    assert whole.metrics["train/updates"] == math.prod(int(str(n)) for n in steps.values())
    assert 0 < whole.metrics["surrogate/gate"] <= 1
    assert whole.metrics["is/edge"] > 0
    # Half of the batch's turns are nearer than the edge.
    assert whole.metrics["is/truncated_share"] == pytest.approx(0.5, abs=0.15)


def test_ones_own_surrogate_begins_as_the_plain_policy_gradient(folder: Path) -> None:
    own = make_config(folder, objective=OWN["objective"], learner={"packing": "flat"})
    clip = make_config(folder, learner={"packing": "flat"})
    reports = [
        Trainer(config, accelerator=make_accelerator(config), policy=in_double(load_policy(config))).train(
            make_batch(), version=3
        )
        for config in (own, clip)
    ]
    assert reports[0].metrics["grad_norm"] == pytest.approx(reports[1].metrics["grad_norm"], rel=1e-9)


# --- what is checked when it is loaded


def refused(**sections: dict[str, object]) -> Callable[[], object]:
    config = build(sections)
    return lambda: (load_surrogate(config.objective), load_correction(config))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"objective": {"surrogate": "tests.loss_examples:absent"}},
            "objective.surrogate = 'tests.loss_examples:absent': module 'tests.loss_examples' .* has no 'absent'",
        ),
        ({"objective": {"surrogate": "no_such_module:x"}}, "objective.surrogate = 'no_such_module:x': .* cannot be im"),
        (
            {"objective": {"surrogate": "tests.loss_examples:sapo", "surrogate_options": {"tau": 1.0}}},
            r"objective.surrogate = 'tests.loss_examples:sapo' .*'tau'; a surrogate is called as \(tokens, settings,",
        ),
        (
            {"correction": {"action": "tests.loss_examples:absent"}},
            "correction.action = 'tests.loss_examples:absent': .* has no 'absent'",
        ),
        (
            {
                "correction": {"action": "tests.loss_examples:trimmed", "numerator": "policy"},
                "objective": {"surrogate": "policy-gradient"},
            },
            "tests.loss_examples:trimmed is measured over the whole batch before its first step",
        ),
        (
            {"correction": {"action": "tests.loss_examples:trimmed", "prox": "interpolate"}},
            "correction.prox = 'interpolate' .* tests.loss_examples:trimmed needs them",
        ),
        (
            {"correction": {"action": "tests.loss_examples:trimmed", "exponent": "ess"}},
            "correction.action = 'tests.loss_examples:trimmed' bounds the batch by its own measure",
        ),
    ],
)
def test_what_cannot_be_loaded_ends_the_learner_as_something_that_the_user_mends(
    sections: dict[str, dict[str, object]], said: str
) -> None:
    with pytest.raises((ConfigError, SetupError), match=said) as caught:
        refused(**sections)()
    assert exit_code(caught.value) == EXIT_USER


def test_the_learner_loads_both_before_its_first_batch(folder: Path) -> None:
    absent: list[tuple[str, dict[str, object]]] = [
        ("objective", {"surrogate": "tests.loss_examples:absent"}),
        ("correction", {"action": "tests.loss_examples:absent"}),
    ]
    for section, fields in absent:
        config = make_config(folder, **{section: fields})
        with pytest.raises(ConfigError, match="has no 'absent'"):
            Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))


def test_one_that_corrects_nothing_is_held_to_accept_bias_when_it_declares_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @declares(CorrectionTraits(corrects=False))
    def nothing(ratios: UnitRatios, settings: object) -> UnitWeights:
        return UnitWeights(weight=torch.ones_like(ratios.log_weight), changed=ratios.log_weight > math.inf)

    monkeypatch.setattr("tests.loss_examples.nothing", nothing, raising=False)
    sections: dict[str, Any] = {"correction": {"action": "tests.loss_examples:nothing"}, "staleness": {"max_lag": 4}}
    with pytest.raises(
        ConfigError, match=r"correction.action = 'tests.loss_examples:nothing' .* off-policy uncorrected"
    ):
        load_correction(build(sections))
    sections["correction"]["accept_bias"] = True
    assert not load_correction(build(sections)).corrects


# --- what is checked of what it returns

TOKENS = SurrogateTokens(
    logp=torch.tensor([-1.0, -2.0, -0.5], requires_grad=True),
    log_ratio=torch.tensor([0.0, 0.1, -0.1], requires_grad=True),
    prox=torch.tensor([-1.0, -2.1, -0.4]),
    mu=torch.tensor([-1.1, -2.0, -0.5]),
    advantage=torch.tensor([1.0, -1.0, 1.0]),
    turn=torch.tensor([0, 0, 1]),
    row=torch.tensor([0, 0, 0]),
)
FINE = -TOKENS.log_ratio


def fails(tokens: SurrogateTokens) -> SurrogateTerms:
    raise IndexError("no such turn")


@pytest.mark.parametrize(
    ("surrogate", "said"),
    [
        (lambda t: FINE, "returned Tensor: it must return SurrogateTerms"),
        (lambda t: SurrogateTerms(loss=FINE.sum()), r"returned for loss float32\[\]: it must be float\[3\]"),
        (lambda t: SurrogateTerms(loss=FINE[:2]), r"returned for loss float32\[2\]: it must be float\[3\]"),
        (lambda t: SurrogateTerms(loss=t.turn), r"returned for loss int64\[3\]: it must be float\[3\]"),
        (lambda t: SurrogateTerms(loss=0.5), "returned for loss float: it must be"),  # type: ignore[arg-type]
        (
            lambda t: SurrogateTerms(loss=FINE, clipped=t.advantage),
            r"returned for clipped float32\[3\]: it must be bool\[3\]",
        ),
        (
            lambda t: SurrogateTerms(loss=FINE / t.log_ratio.detach()),
            r"returned for loss nan at place 0 of 3 \(logp -1, log_ratio 0, mu -1.1, advantage 1\): it must be finite",
        ),
        (lambda t: SurrogateTerms(loss=t.advantage), "returned a loss without a gradient"),
        (
            lambda t: SurrogateTerms(loss=FINE, metrics={"far": t.mu}),
            r"returned the metrics \['far'\] and declares \[\] \(SurrogateTraits.metrics\)",
        ),
        (fails, r"failed: IndexError: no such turn \(.*test_loss_doors.py:\d+\)"),
    ],
)
def test_a_surrogates_first_batch_says_what_is_wrong_with_its_terms(
    surrogate: Callable[[SurrogateTokens], Any], said: str
) -> None:
    checked = CheckedSurrogate("mine:loss", lambda tokens, settings: surrogate(tokens))
    with pytest.raises(ConfigError, match=rf"^objective.surrogate = 'mine:loss' {said}.*; see docs/extending.md"):
        checked(TOKENS, ObjectiveConfig())


def test_a_model_that_has_diverged_is_not_the_surrogates_fault() -> None:
    checked = load_surrogate(ObjectiveConfig(surrogate="tests.loss_examples:sapo"))
    broken = torch.tensor([math.nan, -2.0, -0.5], requires_grad=True)
    tokens = SurrogateTokens(
        logp=broken, log_ratio=broken - TOKENS.prox, prox=TOKENS.prox, mu=TOKENS.mu, advantage=TOKENS.advantage,
        turn=TOKENS.turn, row=TOKENS.row,
    )  # fmt: skip
    assert checked(tokens, ObjectiveConfig()).loss.isnan().tolist() == [True, False, False]


SAMPLED = OffPolicyTokens(
    numerator=TOKENS.prox, mu=TOKENS.mu, advantage=TOKENS.advantage, turn=TOKENS.turn, row=TOKENS.row
)
UNCHANGED = torch.zeros(2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("correction", "said"),
    [
        (lambda r: r.weight(), "returned Tensor: it must return UnitWeights"),
        (
            lambda r: UnitWeights(weight=r.advantage, changed=UNCHANGED),
            r"returned for weight float32\[3\]: it must be float\[2\]",
        ),
        (
            lambda r: UnitWeights(weight=r.weight(), changed=r.weight()),
            r"returned for changed float32\[2\]: it must be bool\[2\]",
        ),
        (
            lambda r: UnitWeights(weight=r.weight(), changed=UNCHANGED, exempt=UNCHANGED),
            r"returned for exempt bool\[2\]: it must be bool\[3\]",
        ),
        (
            lambda r: UnitWeights(weight=r.weight() / 0, changed=UNCHANGED),
            r"returned for weight inf at place 0 of 2 \(log_weight ",
        ),
        (lambda r: UnitWeights(weight=-r.weight(), changed=UNCHANGED), "returned a weight of -1"),
        (
            lambda r: UnitWeights(weight=r.weight().requires_grad_(), changed=UNCHANGED),
            "returned weights with a gradient",
        ),
    ],
)
def test_a_corrections_first_batch_says_what_is_wrong_with_its_weights(
    correction: Callable[[UnitRatios], Any], said: str
) -> None:
    settings = build({"correction": {"action": "mine:weights"}}).correction
    checked = correction_of(settings, lambda ratios, settings: correction(ratios))
    with pytest.raises(ConfigError, match=rf"^correction.action = 'mine:weights' {said}.*; see docs/extending.md"):
        checked.weights(SAMPLED)


def test_a_measure_that_is_no_number_is_named() -> None:
    traits = CorrectionTraits(measure=lambda logs, settings: math.nan)
    exact = declares(traits)(lambda ratios, settings: UnitWeights(weight=ratios.weight(), changed=UNCHANGED))
    checked = correction_of(build({"correction": {"action": "mine:weights"}}).correction, exact)
    with pytest.raises(ConfigError, match=r"correction.action = 'mine:weights' its measure returned float nan"):
        checked.temper(torch.tensor([0.5, 1.0]))
    assert checked.temper(torch.tensor([math.nan])) == Tempering()


# --- what the built-in ones declare


def test_every_built_in_one_reads_fields_that_there_are() -> None:
    config = Config()
    for name in SURROGATE.names():
        traits = declared(SURROGATE.load(name), SurrogateTraits(metrics=("declares nothing",)))
        assert not traits.metrics, name
        assert all(hasattr(config.objective, field) for field in traits.reads), name
    for name in CORRECTION.names():
        own = declared(CORRECTION.load(name), CorrectionTraits(levels=("declares nothing",)))
        assert set(own.levels) <= {"token", "turn", "prefix", "sequence"}, name
        assert all(hasattr(config.correction, field) for field in own.reads), name


def test_traits_are_read_through_bound_options() -> None:
    bound = SURROGATE.load("tests.loss_examples:sapo", {"temperature": 2.0})
    assert declared(bound, SurrogateTraits()).metrics == ("gate",)
    assert declared(bound, CorrectionTraits()) == CorrectionTraits()
