"""Loss terms and token weights on tokens by hand: the numbers of their publications' formulas."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atpo_async.config import build
from atpo_async.config.doors import TERM, TOKEN_WEIGHT
from atpo_async.config.loss_rules import united
from atpo_async.core.doors import Door
from atpo_async.core.errors import ConfigError
from atpo_async.core.loss_traits import Needs, TermTraits, TokenWeightTraits, declared
from learner.loss.parts.covariance import covariance, means
from learner.loss.protocols import MinP, Now, TermTokens
from learner.loss.terms.epo import beta
from tests.objective_support import loss_of, measured, parts_of, start_tokens, statistics, tensor

ROOT = Path(__file__).resolve().parent.parent
FREE = {"ratio_level": "token", "clip_low": 1.0, "clip_high": 9.0, "dual_clip": None}


# --- Lp-Reg

FOURTH = [0.60, 0.30, 0.07, 0.02, 0.01]
NOISE = [0.90, 0.05, 0.03, 0.015, 0.005]


def numbers_of(chances: list[float], sampled: int, noise: float = 0.02) -> tuple[float, float, float]:
    """log-prob of the sampled token, log of the kept mass, largest log-prob."""
    kept = [p for p in chances if p >= noise * max(chances)]
    return math.log(chances[sampled]), math.log(sum(kept)), math.log(max(chances))


@pytest.mark.parametrize(
    ("chances", "now", "loss", "gradient", "gap", "k3"),
    [
        (FOURTH, 0.02, 1.0000507, 0.9898990, 0.0100503, 5.06742e-5),
        (FOURTH, 0.005, 1.8940593, -2.7904040, 1.3963447, 1.6440593),
        (NOISE, 0.015, 1.0, 1.0, None, None),
    ],
    ids=["on-policy", "pushed down", "noise"],
)
@pytest.mark.parametrize("replace", [False, True])
def test_an_improbable_token_of_a_bad_turn_is_held_near_the_denoised_policy(
    chances: list[float], now: float, loss: float, gradient: float, gap: float | None, k3: float | None, replace: bool
) -> None:
    logp, log_mass, top = numbers_of(chances, 3)
    if gap is not None:
        assert logp - log_mass == pytest.approx(-3.9019727, abs=5e-8)
    config, parts = parts_of({**FREE, "terms": ["lp-reg"], "term_options": {"lp-reg": {"replace": replace}}})
    start = start_tokens([logp], [-1.0], min_p=([log_mass], [top]))
    known = Now(step=0, num_steps=100, measured=measured(parts, start).values)
    found, of_logp, _ = loss_of(config, parts, start, [math.log(now)], known)
    assert found.loss.item() == pytest.approx(loss, abs=5e-8)
    assert of_logp.item() == pytest.approx(gradient, abs=5e-8)
    assert found.term_metrics["lp-reg/selected_share"].item() == 1.0
    assert found.term_metrics["lp-reg/noise_share"].item() == (gap is None)
    for name, value in (("gap", gap), ("k3", k3)):
        assert found.term_metrics[f"lp-reg/{name}"].item() == pytest.approx(
            math.nan if value is None else value, abs=5e-8, nan_ok=True
        )


def test_where_the_surrogate_is_clipped_the_regulariser_acts_alone_or_takes_its_place() -> None:
    logp, log_mass, top = numbers_of(FOURTH, 3)
    start = start_tokens([logp], [-1.0], min_p=([log_mass], [top]))
    known = Now(step=0, num_steps=100, measured={"threshold": 0.0})
    narrow = {**FREE, "clip_low": 0.2, "terms": ["lp-reg"]}
    added, of_added, _ = loss_of(*parts_of(narrow), start, [math.log(0.005)], known)
    assert (added.loss.item(), of_added.item()) == pytest.approx((0.8 + 1.6440593, -3.0404040), abs=5e-8)
    assert added.clipped.item()
    replacing = {**narrow, "term_options": {"lp-reg": {"replace": True}}}
    replaced, of_replaced, _ = loss_of(*parts_of(replacing), start, [math.log(0.005)], known)
    assert (replaced.loss.item(), of_replaced.item()) == pytest.approx((1.8940593, -2.7904040), abs=5e-8)
    assert not replaced.clipped.item()


def test_the_least_probable_tokens_of_bad_turns_are_selected_and_no_others() -> None:
    _, parts = parts_of({"terms": ["lp-reg"], "term_options": {"lp-reg": {"share": 0.5}}})
    logs = np.log([0.02, 0.4, 0.015, 0.7, 0.001])
    start = start_tokens(logs, [-1, -1, -1, -1, 1], min_p=([0.0] * 5, [0.0] * 5))
    threshold = measured(parts, start).values["threshold"]
    assert threshold == pytest.approx(math.log(0.02))
    assert [i for i in range(4) if logs[i] <= threshold] == [0, 2]
    none_bad = start_tokens(logs, [1, 1, 1, 0, 1], min_p=([0.0] * 5, [0.0] * 5))
    assert measured(parts, none_bad).values["threshold"] == -math.inf


def test_a_proxy_of_the_policy_itself_pulls_by_the_noises_mass_alone() -> None:
    _, parts = parts_of({**FREE, "terms": ["lp-reg"], "term_options": {"lp-reg": {"proxy": "policy"}}})
    assert (parts.needs.min_p, parts.needs.own_min_p) == (None, 0.02)
    start = start_tokens([-1.0], [-1.0])
    logp = tensor([-4.0]).requires_grad_()
    tokens = TermTokens(
        logp=logp, log_ratio=logp - start.logp, prox=start.logp, mu=start.mu, advantage=start.advantage,
        turn=start.turn, row=start.row, start=start, now=Now(step=0, num_steps=9, measured={"threshold": 0.0}),
        min_p=MinP(log_mass=tensor([math.log(0.99)]), top_logp=tensor([-0.5])),
    )  # fmt: skip
    (term,) = parts.terms
    assert term(tokens).metrics["gap"].item() == pytest.approx(0.0100503, abs=5e-8)


# --- EPO


def test_the_corridor_is_a_hinge_on_both_sides_of_the_mean_entropy() -> None:
    options = {"low": 0.8, "high": 1.2, "alpha": 0.1, "decay": 1.0, "steps": 40}
    config, parts = parts_of({"terms": ["epo"], "term_options": {"epo": options}, "entropy_coef": 0.001})
    assert beta(10, 40, 1.0) == pytest.approx(1.6065307, abs=5e-8)
    entropy = [0.3, 0.5, 0.8]
    start = start_tokens([-1.0] * 3, [0.0] * 3, entropy=entropy)
    now = Now(step=10, num_steps=999, measured={"anchor": 0.5})
    found, _, of_entropy = loss_of(config, parts, start, [-1.0] * 3, now, weight=[1 / 3] * 3, entropy=entropy)
    assert found.entropy.item() == pytest.approx(0.5333333, abs=5e-8)
    assert found.terms["epo"].item() == pytest.approx(0.001 * 1.6065307 * 0.01, abs=5e-13)
    assert found.loss.item() == pytest.approx(-5.172680e-4, abs=5e-11)
    assert of_entropy is not None
    assert of_entropy.tolist() == pytest.approx([-3.868844e-4, -3.333333e-4, -2.797823e-4], abs=5e-11)
    assert found.term_metrics["epo/band_low_share"].tolist() == [1, 0, 0]
    assert found.term_metrics["epo/band_high_share"].tolist() == [0, 0, 1]


def test_the_corridors_middle_is_the_plain_mean_of_the_batches_before() -> None:
    config, parts = parts_of({"terms": ["epo"], "entropy_coef": 0.001})
    state: dict[str, float] = {}
    anchors = []
    for step, entropy in enumerate(([0.2, 0.4], [0.6, 0.6], [0.1, 0.3])):
        start = start_tokens([-1.0] * 2, [0.0] * 2, entropy=entropy)
        now = Now(step=step, num_steps=100, state=state)
        found = measured(parts, start, now)
        anchors.append(found.values.get("anchor"))
        assert found.state is not None
        state = dict(found.state)
    assert anchors[0] is None
    assert anchors[1:] == pytest.approx([0.3, 0.45])
    first, _, of_entropy = loss_of(config, parts, start, [-1.0] * 2, Now(step=0, num_steps=100), entropy=[0.1, 0.3])
    assert first.terms["epo"].item() == 0.0
    assert of_entropy is not None
    assert of_entropy.tolist() == pytest.approx([-0.001, -0.001])


# --- AEPO's advantage, 80/20


@pytest.mark.parametrize(
    ("sample", "factors"),
    [
        (True, [0.7676210, 0.9225403, 1.0774597, 1.2323790]),
        (False, [0.7316718, 0.9105573, 1.0894427, 1.2683282]),
    ],
)
def test_an_advantage_grows_with_the_tokens_entropy(sample: bool, factors: list[float]) -> None:
    options = {"entropy-advantage": {"sample": sample}}
    config, parts = parts_of(
        {"token_weights": ["entropy-advantage"], "token_weight_options": options, "ratio_level": "token"}
    )
    start = start_tokens([-1.0] * 4, [2.0, -1.0, 1.0, 1.0], entropy=[0.1, 0.5, 0.9, 1.3])
    now = Now(step=0, num_steps=100, measured=measured(parts, start).values)
    (part,) = parts.weights
    assert part(start, now).tolist() == pytest.approx(factors, abs=5e-8)
    _, of_logp, _ = loss_of(config, parts, start, [-1.0] * 4, now)
    assert of_logp.tolist() == pytest.approx([-2 * factors[0], factors[1], -factors[2], -factors[3]], abs=2e-7)


def test_a_factor_of_an_advantage_never_turns_its_sign_and_equal_entropies_change_nothing() -> None:
    options = {"entropy-advantage": {"scale": 1.0}}
    _, parts = parts_of({"token_weights": ["entropy-advantage"], "token_weight_options": options})
    start = start_tokens([-1.0] * 5, [1.0] * 5, entropy=[0.0, 1.0, 1.0, 1.0, 1.0])
    (part,) = parts.weights
    factors = part(start, Now(step=0, num_steps=1, measured=measured(parts, start).values))
    assert factors[0].item() == 0.0
    equal = start_tokens([-1.0] * 2, [1.0] * 2, entropy=[0.4, 0.4])
    assert part(equal, Now(step=0, num_steps=1, measured=measured(parts, equal).values)).tolist() == [1.0, 1.0]


def test_only_the_tokens_of_highest_entropy_are_learned_from() -> None:
    config, parts = parts_of({"token_weights": ["top-entropy"], "ratio_level": "token"})
    entropy = [0.1 * i for i in range(11)]
    start = start_tokens([-1.0] * 11, [1.0] * 11, entropy=entropy)
    now = Now(step=0, num_steps=100, measured=measured(parts, start).values)
    assert now.measured["threshold"] == pytest.approx(0.8)
    _, of_logp, _ = loss_of(config, parts, start, [-1.0] * 11, now)
    assert of_logp.tolist() == [0.0] * 8 + [-1.0] * 3


# --- Clip-Cov, KL-Cov

ADVANTAGE, CHANCES = [1.0, 1.0, -1.0, -1.0], [0.9, 0.1, 0.5, 0.05]
COVARIANCES = [1.4188458, -0.7783788, -0.8310591, 1.4715260]


def test_the_covariance_is_over_the_whole_batch() -> None:
    start = start_tokens(np.log(CHANCES), ADVANTAGE)
    assert covariance(start, means(start, statistics())).tolist() == pytest.approx(COVARIANCES, abs=5e-8)


@pytest.mark.parametrize(
    ("options", "draws", "weights"),
    [
        ({}, [0.9, 0.1, 0.1, 0.5], [1, 1, 1, 0]),  # floor(2e-4 * 4) is none: one all the same
        ({"share": 0.5}, [0.9, 0.1, 0.1, 0.5], [0, 1, 1, 0]),
        ({"share": 1.0, "high": 1.45}, [0.9, 0.1, 0.1, 0.5], [0, 1, 1, 1]),
        ({"share": 1.0, "low": 2.0}, [0.9, 0.1, 0.1, 0.5], [1, 1, 1, 1]),
    ],
)
def test_clip_cov_takes_a_few_of_the_covarying_tokens_out(
    options: dict[str, Any], draws: list[float], weights: list[int]
) -> None:
    config, parts = parts_of(
        {"token_weights": ["clip-cov"], "token_weight_options": {"clip-cov": options}, "ratio_level": "token"}
    )
    start = start_tokens(np.log(CHANCES), ADVANTAGE, random=draws)
    now = Now(step=0, num_steps=100, measured=measured(parts, start).values)
    (part,) = parts.weights
    assert part(start, now).tolist() == weights
    _, of_logp, _ = loss_of(config, parts, start, np.log(CHANCES), now)
    assert of_logp.tolist() == pytest.approx([-a * w for a, w in zip(ADVANTAGE, weights, strict=True)])


def test_kl_cov_holds_the_most_covarying_token_and_only_once_it_has_moved() -> None:
    config, parts = parts_of({**FREE, "terms": ["kl-cov"], "term_options": {"kl-cov": {"coef": 3.0}}})
    start = start_tokens(np.log(CHANCES), ADVANTAGE)
    now = Now(step=0, num_steps=100, measured=measured(parts, start).values)
    assert now.measured["threshold"] == pytest.approx(1.4715260, abs=5e-8)
    still, of_logp, _ = loss_of(config, parts, start, np.log(CHANCES), now)
    assert of_logp.tolist() == pytest.approx([-1, -1, 1, 1])
    moved = [*np.log(CHANCES[:3]), math.log(0.04)]
    found, of_logp, _ = loss_of(config, parts, start, moved, now)
    assert found.terms["kl-cov"].item() == pytest.approx(3 * math.log(0.05 / 0.04))
    assert of_logp.tolist() == pytest.approx([-1, -1, 1, 0.8 - 3])
    assert found.term_metrics["kl-cov/selected_share"].tolist() == [0, 0, 0, 1]
    assert still.terms["kl-cov"].item() == 0.0


# --- what is refused


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"terms": ["lp-rig"]}, "objective.terms = 'lp-rig' is unknown; did you mean lp-reg"),
        ({"token_weights": ["top-entropi"]}, "objective.token_weights = 'top-entropi' is unknown; did you mean top-e"),
        ({"terms": ["lp-reg", "lp-reg"]}, "objective.terms: 'lp-reg' and 'lp-reg' would both be 'lp-reg' in metrics"),
        (
            {"terms": ["a:epo"], "token_weights": ["b:epo"]},
            "objective.token_weights: 'b:epo' and 'a:epo' would both be",
        ),
        (
            {"terms": ["lp-reg"], "term_options": {"lp-reg": {"noise": 0.0}}},
            "objective.term_options.lp-reg: noise = 0.0 ",
        ),
        ({"terms": ["lp-reg"], "term_options": {"lp-reg": {"share": 1.5}}}, "lp-reg: share = 1.5 must be above 0"),
        ({"terms": ["lp-reg"], "term_options": {"lp-reg": {"coef": -1.0}}}, "lp-reg: coef = -1.0 must be >= 0"),
        ({"terms": ["lp-reg"], "term_options": {"lp-reg": {"proxy": "mu"}}}, "proxy = 'mu' is unknown; known: prox, p"),
        (
            {
                "terms": ["lp-reg"],
                "term_options": {"lp-reg": {"replace": True}},
                "token_weights": ["top-entropy"],
            },
            "replace = true with objective.token_weights = ['top-entropy']: what stands in the surrogate's place would",
        ),
        ({"terms": ["lp-reg"], "term_options": {"lp-reg": {"kappa": 0.1}}}, "unexpected keyword argument 'kappa'"),
        (
            {"terms": ["lp-reg"], "term_options": {"lp-reg": {"coeff": 0.1}}},
            "argument 'coeff' (did you mean 'coef'?); a",
        ),
        (
            {"terms": ["lp-reg"], "term_options": {"lp-reg": {"coef": "big"}}},
            "its option 'coef' is float, not str 'big'",
        ),
        (
            {"terms": ["lp-reg"], "term_options": {"lp-reg": {"coef": [1]}}},
            "must be a number, text, true or false, or a",
        ),
        (
            {
                "terms": ["lp-reg"],
                "term_options": {"lp-reg": {"noise": {"kind": "linear", "start": 0.1, "end": 0.2, "steps": 3}}},
            },
            "an option that decides what is measured of each token cannot be a schedule",
        ),
        (
            {
                "terms": ["lp-reg"],
                "term_options": {"lp-reg": {"coef": {"kind": "linear", "start": 1, "end": -1, "steps": 3}}},
            },
            "lp-reg: coef = -1.0 must be >= 0",
        ),
        ({"terms": ["epo"]}, "objective.term_options.epo: objective.entropy_coef = 0.0 is its lambda"),
        (
            {"terms": ["epo"], "entropy_coef": 0.1, "term_options": {"epo": {"alpha": 0.5}}},
            "alpha = 0.5 must be above 0",
        ),
        (
            {"terms": ["epo"], "entropy_coef": 0.1, "term_options": {"epo": {"low": 2.0}}},
            "low = 2.0 and high = 1.5 must",
        ),
        (
            {"terms": ["epo"], "entropy_coef": 0.1, "term_options": {"epo": {"decay": -1.0}}},
            "decay = -1.0 must be >= 0",
        ),
        (
            {"terms": ["epo"], "entropy_coef": 0.1, "term_options": {"epo": {"steps": -1}}},
            "steps = -1 must be 1 or more",
        ),
        ({"terms": ["kl-cov"], "term_options": {"kl-cov": {"share": 0.0}}}, "kl-cov: share = 0.0 must be above 0"),
        ({"terms": ["kl-cov"], "term_options": {"kl-cov": {"coef": -0.5}}}, "kl-cov: coef = -0.5 must be >= 0"),
        (
            {"token_weights": ["clip-cov"], "token_weight_options": {"clip-cov": {"low": 5.0}}},
            "objective.token_weight_options.clip-cov: low = 5.0 must be below high = 5.0",
        ),
        (
            {"token_weights": ["top-entropy"], "token_weight_options": {"top-entropy": {"share": 1.0}}},
            "top-entropy: share = 1.0 must be between 0 and 1",
        ),
        (
            {"token_weights": ["entropy-advantage"], "token_weight_options": {"entropy-advantage": {"scale": 2.0}}},
            "entropy-advantage: scale = 2.0 must be between 0 and 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_field(objective: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build({"objective": objective})
    assert said in str(refused.value)


@pytest.mark.parametrize("name", [{"terms": ["lp-reg"]}, {"token_weights": ["top-entropy"]}], ids=["term", "weight"])
def test_what_is_measured_first_needs_log_probs_before_the_first_step(name: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"correction.prox = 'interpolate' has no log-probs before the first step"):
        build({"objective": name, "correction": {"prox": "interpolate"}})


def test_the_policys_noise_floor_is_measured_for_one_share() -> None:
    one = {"a": Needs(min_p=0.02, entropy=True), "b": Needs(min_p=0.02, random=True), "c": Needs(own_min_p=0.1)}
    assert united(one) == Needs(min_p=0.02, own_min_p=0.1, entropy=True, random=True)
    with pytest.raises(ValueError, match=r"for one share of the largest probability, not for 0.02 \(a\) and 0.1 \(b\)"):
        united({"a": Needs(min_p=0.02), "b": Needs(min_p=0.1)})


@pytest.mark.parametrize("door", [TERM, TOKEN_WEIGHT], ids=lambda door: door.field)
def test_every_built_in_one_declares_what_it_measures_and_is_described(door: Door[Any]) -> None:
    algorithm, methods = ((ROOT / "docs" / name).read_text() for name in ("ALGORITHM.md", "methods.md"))
    for name in door.names():
        function = door.load(name)
        traits = declared(function, TermTraits() if door is TERM else TokenWeightTraits())
        assert traits.check is not None, name
        assert f"`{name}`" in algorithm, name
        assert f'"{name}"' in methods, name
        taken = set(inspect.signature(function).parameters) - {"tokens", "now", "settings"}
        assert taken == set(inspect.signature(traits.check).parameters) - {"settings"}, name


# --- statistics


def test_statistics_are_exact_and_leave_out_what_is_not_counted() -> None:
    found = statistics()
    values = tensor([3.0, 1.0, math.nan, 2.0, 100.0])
    where = torch.tensor([True, True, True, True, False])
    assert found.count(where) == 4
    assert (found.sum(values, where), found.mean(values, where)) == (6.0, 2.0)
    assert found.std(values, where) == pytest.approx(math.sqrt(2 / 3))
    assert found.std(values, where, sample=True) == pytest.approx(1.0)
    assert [found.quantile(values, q, where) for q in (0, 0.25, 0.5, 1)] == [1.0, 1.5, 2.0, 3.0]
    assert [found.smallest(values, k, where) for k in (0, 1, 2, 9)] == [-math.inf, 1.0, 2.0, 3.0]
    assert [found.largest(values, k, where) for k in (0, 1, 2, 9)] == [math.inf, 3.0, 2.0, 1.0]
    none = torch.zeros(5, dtype=torch.bool)
    assert found.sum(values, none) == 0.0
    for number in (found.mean(values, none), found.std(values, none), found.quantile(values, 0.5, none)):
        assert math.isnan(number)
    assert (found.smallest(values, 1, none), found.largest(values, 1, none)) == (-math.inf, math.inf)


def test_a_sum_does_not_depend_on_the_order_in_which_a_batch_is_cut() -> None:
    values = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e8
    found = statistics()
    for order in (torch.arange(1000), torch.randperm(1000, generator=torch.Generator().manual_seed(1))):
        assert found.sum(values[order]) == found.sum(values)
        assert found.std(values[order]) == found.std(values)
