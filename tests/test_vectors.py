"""Every reference number of ALGORITHM, sections 2 to 4, through the functions that a run uses, in float64.

A test names the parts of the file that it answers for (``answers``); the last test walks the file and names what no
test answers for.  Numbers of the file have ten significant digits: ``same`` asks for all ten.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from atpo_async.config import CorrectionConfig, CreditConfig, ObjectiveConfig
from atpo_async.config.credit_rule import credit_rule
from atpo_async.config.doors import ADVANTAGE_MODE
from atpo_async.core.credit import (
    TreeArrays,
    branch_prob,
    has_signal,
    leaf_tokens,
    normalised_leaves,
    turn_weights,
)
from atpo_async.core.credit.value_modes import child_mean
from atpo_async.core.credit.value_modes.tree_trace import traced
from atpo_async.core.tree import Turn, TurnTree, VersionSpan
from atpo_async.core.vocabulary import Aggregation
from learner.loss import correction, objective, units
from learner.loss.correction import Tempering
from learner.loss.diagnostics import Weighed, summary, sums
from learner.loss.loading import load_surrogate
from learner.loss.tempering import effective_share
from learner.loss.tokens import ActionTokens, OffPolicyTokens
from learner.packing.credited import CreditedTree, Normaliser
from learner.packing.rows import leaf_rows
from tests.learner_support import correction_for

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "at2po_vectors.json").read_text())
SECTIONS = ("tree", "atpo_loss", "adjacent_turns", "decoupled", "weight_zoo", "ess_tempering", "tree_trace")

answered: set[str] = set()

INPUTS = {
    "tree/nodes", "tree/prompt_len", "tree/leaves",
    *(f"atpo_loss/{name}" for name in ("mask", "turn_id", "old_logp", "new_logp", "adv", "clip_low", "clip_high")),
    *(f"adjacent_turns/{name}" for name in ("mask", "old_logp", "new_logp", "adv", "clip_low", "clip_high")),
    "adjacent_turns/by_turn_id/turn_id", "adjacent_turns/by_mask_run_official/turn_id",
    *(f"decoupled/{name}" for name in ("mu_logp", "prox_logp", "new_logp", "adv", "mask", "turn_id")),
    *(f"decoupled/{name}" for name in ("token_version", "C", "clip_low", "clip_high")),
    "decoupled/prox_loglinear/v_theta", "decoupled/prox_loglinear/v_prox",
    *(f"weight_zoo/{name}" for name in ("log_ratio_pi_over_mu", "adv_sign", "mu_logp")),
    "tree_trace/rho_turn",
}  # fmt: skip
"""What the numbers were computed from, and facts of the case."""
ELSEWHERE = {
    # What the actors choose: tests/test_expansion.py.
    "tree/expansion",
    # How the published code spreads its own update over turns: a monitor of that code, which ours does not have.
    "atpo_loss/turn_entropy", "atpo_loss/official/metrics/actor/turn_kl_entropy",
    "atpo_loss/official/metrics/actor/single_turn_count",
}  # fmt: skip


def answers(*parts: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    answered.update(parts)
    return lambda test: test


def at(part: str) -> Any:
    found: Any = VECTORS
    for key in part.split("/"):
        found = found[key]
    return found


def leaves(node: Any, path: str) -> Iterator[str]:
    if not isinstance(node, dict):
        yield path
        return
    for key, item in node.items():
        yield from leaves(item, f"{path}/{key}")


def same(found: Any, expected: Any) -> None:
    """All ten digits; numbers that are 0 but for rounding are within it."""
    found = found.detach() if isinstance(found, torch.Tensor) else found
    np.testing.assert_allclose(np.asarray(found, dtype=np.float64), np.asarray(expected), rtol=6e-10, atol=1e-15)


def tensor(numbers: Any) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# --- tree, tree_trace -----------------------------------------------------------------------------------------------

NODES = VECTORS["tree"]["nodes"][1:]
ARRAYS = TreeArrays(
    # Node n of the file is at position n - 1.
    parent=np.array([n["parent"] - 1 for n in NODES]),
    is_leaf=np.array([n["reward"] is not None for n in NODES]),
    reward=np.array([n["reward"] or 0.0 for n in NODES], dtype=np.float64),
    entropy=np.array([n["H"] for n in NODES]),
    num_action_tokens=np.array([n["n_act"] for n in NODES]),
)


def by_turn(section: dict[str, Any]) -> np.ndarray:
    """By position; turns that the section does not name are 0, its root is left out."""
    return np.array([section.get(str(i), 0.0) for i in range(1, 10)], dtype=np.float64)


@answers(
    "tree/leaf_reward_normalised", "tree/leaf_mean", "tree/leaf_std_population",
    "tree/leaf_reward_normalised_branch_prob", "tree/branch_prob_q", "tree/T_leaf",
)  # fmt: skip
def test_leaf_rewards_weights_and_lengths() -> None:
    found = normalised_leaves(ARRAYS)
    same(found, by_turn(at("tree/leaf_reward_normalised")))
    # Two leaves tell what all were divided by, and what was taken from them.
    divisor = (ARRAYS.reward[8] - ARRAYS.reward[5]) / (found[8] - found[5])
    same(divisor - VECTORS["meta"]["eps_leaf_norm"], at("tree/leaf_std_population"))
    same(ARRAYS.reward[5] - found[5] * divisor, at("tree/leaf_mean"))
    q = branch_prob(ARRAYS)
    same(q, by_turn(at("tree/branch_prob_q")))
    same(normalised_leaves(ARRAYS, weights=q), by_turn(at("tree/leaf_reward_normalised_branch_prob")))
    same(leaf_tokens(ARRAYS), by_turn(at("tree/T_leaf")))


@answers(*(f"tree/{part}{suffix}" for part in "VA" for suffix in ("", "_unnormalised_rewards")))
@pytest.mark.parametrize("advantage_mode", list(VECTORS["tree"]["A"]["child_mean"]))
@pytest.mark.parametrize("value_mode", list(VECTORS["tree"]["V"]))
@pytest.mark.parametrize("suffix", ["", "_unnormalised_rewards"])
def test_values_and_advantages(suffix: str, value_mode: Any, advantage_mode: Any) -> None:
    assert set(at(f"tree/A{suffix}/{value_mode}")) <= set(ADVANTAGE_MODE.names())
    settings = CreditConfig(value_mode=value_mode, advantage_mode=advantage_mode, normalise_leaves=not suffix)
    found = credit_rule(settings).credit(ARRAYS)
    expected = at(f"tree/V{suffix}/{value_mode}")
    same(found.values, by_turn(expected))
    # The root of leaf_mean is 0 but for rounding.
    assert found.root_value == pytest.approx(expected["0"], rel=6e-10, abs=1e-15)
    advantages = at(f"tree/A{suffix}/{value_mode}/{advantage_mode}")
    same(found.advantages, by_turn(advantages))
    # The file gives the root an advantage over nothing; here it is no turn and has a value only.
    same(advantages["0"], expected["0"])


@answers("tree/V_child_mean_branch_prob_norm")
def test_values_of_rewards_that_were_normalised_under_the_branch_probabilities() -> None:
    found = credit_rule(CreditConfig(leaf_weights="branch-prob")).credit(ARRAYS)
    expected = at("tree/V_child_mean_branch_prob_norm")
    same(found.values, by_turn(expected))
    same(found.root_value, expected["0"])


@answers(*(f"tree/node_weight/{name}" for name in VECTORS["tree"]["node_weight"]))
@pytest.mark.parametrize("name", list(VECTORS["tree"]["node_weight"]))
def test_turn_weights_of_every_aggregation(name: str) -> None:
    aggregation: Any = name.replace("_", "-").replace("branch-prob-token-mean", "branch-prob")
    assert aggregation in get_args(Aggregation)
    same(turn_weights(ARRAYS, aggregation=aggregation), by_turn(at(f"tree/node_weight/{name}")))


def turn(node: dict[str, Any]) -> Turn:
    return Turn(
        run="r", tree_id="t", turn_id=node["id"], parent_id=node["parent"], lease_epoch=0, expansion_round=0,
        observation=np.zeros(node["n_obs"], dtype=np.int32), action=np.ones(node["n_act"], dtype=np.int32),
        logprobs=np.full(node["n_act"], -0.5, dtype=np.float32), spans=(VersionSpan(0, 0, node["n_act"]),),
        end="continue" if node["reward"] is None else "done", reward=node["reward"], success=None, generate_s=0.0,
        environment_s=0.0,
    )  # fmt: skip


@answers("tree/flattened_child_softmax_node_value")
def test_rows_of_a_tree_carry_the_advantage_of_each_turn_on_their_path() -> None:
    settings = CreditConfig(value_mode="child_softmax")
    prompt = np.zeros(VECTORS["tree"]["prompt_len"], dtype=np.int32)
    tree = CreditedTree(
        TurnTree("t", 0, prompt, tuple(turn(n) for n in NODES)), 1.0, credit_rule(settings).credit(ARRAYS).advantages,
        has_signal(ARRAYS),
    )  # fmt: skip
    rows = leaf_rows(
        [tree], version=0, max_lag=0, aggregation="seq-mean-token-mean", normaliser=Normaliser.of([tree])
    )  # fmt: skip
    expected = at("tree/flattened_child_softmax_node_value")
    assert [str(row.turn[-1] + 1) for row in rows] == list(expected)
    for row, case in zip(rows, expected.values(), strict=True):
        mask = np.array(case["loss_mask"], dtype=bool)
        assert (row.at - len(prompt)).tolist() == np.flatnonzero(mask).tolist()
        assert (row.parts[:, 0] + 1).tolist() == case["path"][1:]
        same(row.advantage, np.array(case["advantage"])[mask])


@answers("tree_trace/leaf_values", *(f"tree_trace/cbar{cap}_b0" for cap in ("1", "2", "_inf")))
@pytest.mark.parametrize(("name", "cap"), [("cbar1_b0", 1.0), ("cbar2_b0", 2.0), ("cbar_inf_b0", math.inf)])
def test_tree_traces(name: str, cap: float) -> None:
    expected, rho = at(f"tree_trace/{name}"), by_turn(at("tree_trace/rho_turn"))
    leaf_values = ARRAYS.with_reward(normalised_leaves(ARRAYS))
    same(leaf_values.reward, by_turn(at("tree_trace/leaf_values")))
    found, root = traced(leaf_values, np.minimum(rho, cap), 0.0)
    same(found, by_turn(expected))
    same(root, expected["0"])
    # V(n) - b does not depend on where the rewards' zero is, if b moves with it.
    moved, moved_root = traced(leaf_values.with_reward(leaf_values.reward + 3.0), np.minimum(rho, cap), 3.0)
    same(moved[~ARRAYS.is_leaf] - 3.0, found[~ARRAYS.is_leaf])
    same(moved_root - 3.0, root)
    # A run takes b from the root's child_mean, and rho with no ratio above 2.4 knows no difference past that cap.
    baseline = child_mean.values(leaf_values, None)[1]
    settings = CreditConfig(value_mode="tree_trace", trace_cap=min(cap, 2.4))
    same(credit_rule(settings).credit(ARRAYS, ratio=rho).values, traced(leaf_values, np.minimum(rho, cap), baseline)[0])


@answers("tree_trace/selfnorm_cbar2")
def test_self_normalised_tree_traces() -> None:
    settings = CreditConfig(value_mode="tree_trace_selfnorm", trace_cap=2.0)
    found = credit_rule(settings).credit(ARRAYS, ratio=by_turn(at("tree_trace/rho_turn")))
    expected = at("tree_trace/selfnorm_cbar2")
    same(found.values, by_turn(expected))
    same(found.root_value, expected["0"])


# --- atpo_loss, adjacent_turns, decoupled ---------------------------------------------------------------------------

PAPER = ObjectiveConfig(clip_low=3e-3, clip_high=4e-3, dual_clip=None)
FORMS = ("rows", "flat")
"""The same tokens as rows with masked places and gaps between turn numbers, and as the flat list that a run has."""


class Tokens:
    """A case of the file in one of the two forms."""

    def __init__(self, case: dict[str, Any], turn_id: list[list[int]], form: str) -> None:
        self._case, self._counts = case, torch.tensor(turn_id) >= 0
        self._flat = form == "flat"
        turn = torch.tensor(turn_id)
        row = torch.arange(turn.shape[0])[:, None].expand_as(turn)
        turn = torch.where(turn < 0, turn, turn + 100 * row)
        share = self._counts.double() / self._counts.sum(1, keepdim=True) / turn.shape[0]
        self.turn, self.row, self.weight = self.place(turn), self.place(row), self.place(share)
        if self._flat:
            self.turn = torch.unique(self.turn, return_inverse=True)[1]

    def place(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[self._counts] if self._flat else rows

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.place(tensor(self._case[name]))

    def back(self, found: torch.Tensor) -> torch.Tensor:
        """In the form of the file; places that do not count hold 0."""
        out = torch.zeros(self._counts.shape, dtype=found.dtype)
        out[self._counts] = found if self._flat else found[self._counts]
        return out

    def against_mu(self) -> OffPolicyTokens:
        return OffPolicyTokens(
            numerator=self["prox_logp"], mu=self["mu_logp"], advantage=self["adv"], turn=self.turn, row=self.row
        )

    def loss(
        self, settings: ObjectiveConfig, *, prox: str, mu: str, weights: torch.Tensor | None = None
    ) -> tuple[objective.Loss, torch.Tensor]:
        logp = self["new_logp"].requires_grad_()
        tokens = ActionTokens(
            logp=logp, prox=self[prox], mu=self[mu], advantage=self["adv"], turn=self.turn, row=self.row,
            weight=self.weight, correction=torch.ones_like(logp) if weights is None else weights,
        )  # fmt: skip
        result = objective.atpo_loss(tokens, settings, load_surrogate(settings))
        (gradient,) = torch.autograd.grad(result.loss, logp)
        if not self._flat:
            assert not gradient[~self._counts].any()
        return result, self.back(gradient)


@answers(
    *(f"atpo_loss/{name}" for name in ("loss", "grad_new_logp", "ratio", "clipfrac", "ppo_kl_k1", "agg")),
    "atpo_loss/adv_per_turn", "atpo_loss/official/loss",
    *(f"atpo_loss/official/metrics/actor/{name}" for name in ("pg_clipfrac", "ppo_kl", "pg_clipfrac_lower")),
)  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_the_paper(form: str) -> None:
    case = VECTORS["atpo_loss"]
    assert (PAPER.clip_low, PAPER.clip_high, PAPER.aggregation) == (case["clip_low"], case["clip_high"], case["agg"])
    tokens = Tokens(case, case["turn_id"], form)
    result, gradient = tokens.loss(PAPER, prox="old_logp", mu="old_logp")
    same(result.loss, case["loss"])
    same(gradient, case["grad_new_logp"])
    same(tokens.back(result.log_ratio.exp()), case["ratio"])
    clipped = tokens.back(result.clipped)[tokens._counts].double().mean()
    same(clipped, case["clipfrac"])
    by_token = objective.log_ratio(
        tokens["new_logp"], tokens["old_logp"], units.units("token", tokens.turn, tokens.row)
    )  # fmt: skip
    k1 = -by_token[tokens.turn >= 0].mean()
    same(k1, case["ppo_kl_k1"])
    count = units.num_units(tokens.turn)
    per_turn = units.unit_mean(tokens["adv"], tokens.turn, count)[torch.unique(tokens.turn[tokens.turn >= 0])]
    same(per_turn, np.ravel(case["adv_per_turn"]))
    # The authors' own function works in float32.
    official = case["official"]
    assert result.loss.item() == pytest.approx(official["loss"], abs=1e-9)
    assert float(clipped) == pytest.approx(official["metrics"]["actor/pg_clipfrac"], abs=1e-9)
    assert float(k1) == pytest.approx(official["metrics"]["actor/ppo_kl"], abs=1e-9)
    with_dual_clip, _ = tokens.loss(PAPER.model_copy(update={"dual_clip": 3.0}), prox="old_logp", mu="old_logp")
    assert float((with_dual_clip.clipped ^ result.clipped).sum()) == official["metrics"]["actor/pg_clipfrac_lower"]


@answers(
    *(f"adjacent_turns/{name}/{key}" for name in ("by_turn_id", "by_mask_run_official") for key in ("loss", "grad")),
    "adjacent_turns/by_turn_id/ratio", "adjacent_turns/by_mask_run_official/ratio",
)  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["by_turn_id", "by_mask_run_official"])
def test_turns_without_an_observation_between_them_are_as_many_as_their_ids(name: str, form: str) -> None:
    case, expected = VECTORS["adjacent_turns"], VECTORS["adjacent_turns"][name]
    tokens = Tokens(case, expected["turn_id"], form)
    result, gradient = tokens.loss(PAPER, prox="old_logp", mu="old_logp")
    same(result.loss, expected["loss"])
    same(gradient, expected["grad"])
    same(tokens.back(result.log_ratio.exp()), expected["ratio"])


DECOUPLED = VECTORS["decoupled"]
CASES: dict[str, tuple[CorrectionConfig, float | None]] = {
    "none": (CorrectionConfig(action="none", accept_bias=True), None),
    "turn_sum_truncate": (CorrectionConfig(level="turn", cap=2.0), None),
    "turn_mean_truncate": (CorrectionConfig(level="turn", cap=2.0, exponent="geometric"), None),
    "turn_sum_truncate_twosided_0.5_2": (CorrectionConfig(level="turn", cap=2.0, floor=0.5), None),
    "turn_sum_mask_0.5_2": (CorrectionConfig(action="mask", level="turn", cap=2.0, floor=0.5), None),
    "token_truncate": (CorrectionConfig(level="token", cap=2.0), None),
    "turn_geo_gate_0.05_x_token_truncate": (CorrectionConfig(level="token", cap=2.0, gate=0.05), None),
    "turn_prefix_product_truncate": (CorrectionConfig(level="prefix", cap=2.0), None),
    "turn_sum_truncate_dualclip_3": (CorrectionConfig(level="turn", cap=2.0), 3.0),
}
"""Name in the file -> the correction, the dual clip."""


@answers(*(f"decoupled/cases/{name}" for name in CASES))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", list(CASES))
def test_decoupled_weights_loss_gradient_and_ess(name: str, form: str) -> None:
    assert (PAPER.clip_low, PAPER.clip_high) == (DECOUPLED["clip_low"], DECOUPLED["clip_high"])
    (settings, dual_clip), expected = CASES[name], DECOUPLED["cases"][name]
    assert settings.cap == DECOUPLED["C"]
    tokens = Tokens(DECOUPLED, DECOUPLED["turn_id"], form)
    weights = correction_for(settings).weights(tokens.against_mu())
    result, gradient = tokens.loss(
        PAPER.model_copy(update={"dual_clip": dual_clip}), prox="prox_logp", mu="mu_logp", weights=weights.per_token
    )
    same(result.loss, expected["loss"])
    same(gradient, expected["grad_new_logp"])
    if "weight_per_token" in expected:
        same(tokens.back(weights.per_token), expected["weight_per_token"])
        found = summary(diagnostics(tokens, settings, weights), corrects=settings.action != "none")["is/ess_frac"]
        same(found, expected["ess_frac"])
        unit = units.units(settings.level, tokens.turn, tokens.row)
        same(found * len(torch.unique(unit[unit >= 0])), expected["ess"])


def diagnostics(tokens: Tokens, settings: CorrectionConfig, weights: correction.Weights) -> list[float]:
    token_version = tokens.place(torch.tensor(DECOUPLED["token_version"]))
    weighed = Weighed(
        tokens=tokens.against_mu(), counted=torch.ones_like(tokens.turn, dtype=torch.bool), lag=5 - token_version,
        clipped=torch.zeros_like(tokens.turn, dtype=torch.bool), weights=weights, level=settings.level,
    )  # fmt: skip
    found: list[float] = sums(weighed).tolist()
    return found


@answers("decoupled/diagnostics_token", "decoupled/diagnostics_turn_sum")
@pytest.mark.parametrize("form", FORMS)
def test_diagnostics(form: str) -> None:
    settings = CorrectionConfig(level="token", cap=1e9)
    tokens = Tokens(DECOUPLED, DECOUPLED["turn_id"], form)
    weights = correction_for(settings).weights(tokens.against_mu())
    found = summary(diagnostics(tokens, settings, weights), corrects=settings.action != "none")
    names = {
        "kl_mu_prox_k1": "kl/mu_prox_k1", "kl_k2": "kl/mu_prox_k2", "kl_k3": "kl/mu_prox_k3",
        "kl_prox_mu_is": "kl/prox_mu_is", "chi2": "is/chi2_token", "mean_ratio": "is/mean_ratio_token",
        "ess_frac": "is/ess_frac_token",
    }  # fmt: skip
    expected = dict(DECOUPLED["diagnostics_token"])
    for theirs, ours in names.items():
        same(found[ours], expected.pop(theirs))
    same(2 * found["kl/mu_prox_k2"], expected.pop("m2"))
    ratios = weights.per_token[tokens.turn >= 0]
    same(ratios.max(), expected.pop("max_ratio"))
    same(ratios.min(), expected.pop("min_ratio"))
    assert not expected
    expected = dict(DECOUPLED["diagnostics_turn_sum"])
    same(found["is/chi2_turn"], expected.pop("chi2"))
    same(found["is/ess_frac_turn"], expected.pop("ess_frac"))
    same(found["is/ess_frac_turn_lognormal"], expected.pop("ess_frac_lognormal_pred"))
    assert not expected


@answers("decoupled/turn_sum_logratio", "decoupled/turn_mean_logratio", "decoupled/turn_ntok")
@pytest.mark.parametrize("form", FORMS)
def test_log_ratios_of_turns(form: str) -> None:
    tokens = Tokens(DECOUPLED, DECOUPLED["turn_id"], form)
    total, length = correction.unit_log_ratio(tokens.against_mu(), "turn")
    present = length > 0
    same(total[present], DECOUPLED["turn_sum_logratio"])
    same(length[present], DECOUPLED["turn_ntok"])
    same((total / length)[present], DECOUPLED["turn_mean_logratio"])


@answers("decoupled/prox_loglinear/alpha", "decoupled/prox_loglinear/prox_logp")
@pytest.mark.parametrize("form", FORMS)
def test_the_interpolated_proximal_policy(form: str) -> None:
    case = DECOUPLED["prox_loglinear"]
    assert case["v_theta"] == case["v_prox"] + 1
    tokens = Tokens(DECOUPLED, DECOUPLED["turn_id"], form)
    lag = case["v_prox"] - tokens.place(torch.tensor(DECOUPLED["token_version"]))
    found = correction.interpolated_prox(tokens["new_logp"], tokens["mu_logp"], lag)
    same(tokens.back(found), case["prox_logp"])
    # Between 0 and 1 the interpolation is the share itself.
    share = correction.interpolated_prox(torch.ones_like(found), torch.zeros_like(found), lag)
    same(tokens.back(share), case["alpha"])


# --- ess_tempering, weight_zoo --------------------------------------------------------------------------------------


@answers(*(f"ess_tempering/{target}" for target in VECTORS["ess_tempering"]))
@pytest.mark.parametrize("target", list(VECTORS["ess_tempering"]))
def test_the_exponent_that_keeps_an_effective_sample_size(target: str) -> None:
    expected = VECTORS["ess_tempering"][target]
    settings = CorrectionConfig(exponent="ess", ess_target=float(target), cap=1e9)
    tokens = Tokens(DECOUPLED, DECOUPLED["turn_id"], "flat")
    given, tempered = tokens.against_mu(), correction_for(settings)
    found = tempered.temper(tempered.log_weights(given, torch.ones_like(tokens.turn, dtype=torch.bool)))
    same(found.scale, expected["lambda"])
    weights = tempered.weights(given, found)
    same(weights.per_unit, expected["w"])


ZOO = VECTORS["weight_zoo"]
MU, ADVANTAGE = tensor(ZOO["mu_logp"]), tensor(ZOO["adv_sign"])
PI = MU + tensor(ZOO["log_ratio_pi_over_mu"])
EACH, ONE_ROW = torch.arange(10), torch.zeros(10, dtype=torch.long)


SAMPLED = OffPolicyTokens(numerator=PI, mu=MU, advantage=ADVANTAGE, turn=EACH, row=ONE_ROW)


def zoo_weights(settings: CorrectionConfig, tempering: Tempering | None = None) -> torch.Tensor:
    return correction_for(settings).weights(SAMPLED, tempering or Tempering()).per_token


def zoo_gradient(settings: ObjectiveConfig, advantage: torch.Tensor) -> torch.Tensor:
    """Of the loss of single tokens whose proximal policy is mu."""
    logp, ones = PI.clone().requires_grad_(), torch.ones_like(PI)
    tokens = ActionTokens(
        logp=logp, prox=MU, mu=MU, advantage=advantage, turn=EACH, row=ONE_ROW, weight=ones, correction=ones
    )
    result = objective.atpo_loss(tokens, settings, load_surrogate(settings))
    (gradient,) = torch.autograd.grad(result.loss, logp)
    assert torch.equal(result.clipped, gradient == 0)
    return gradient


@answers(*(f"weight_zoo/{name}" for name in ("tis_C2", "vtrace_rho_bar1", "mis_0.5_2", "icepop_0.5_5", "topr")))
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tis_C2", CorrectionConfig(level="token", cap=2.0)),
        ("vtrace_rho_bar1", CorrectionConfig(level="token", cap=1.0)),
        ("mis_0.5_2", CorrectionConfig(action="mask", level="token", cap=2.0, floor=0.5)),
        ("icepop_0.5_5", CorrectionConfig(action="icepop", level="token", cap=5.0, floor=0.5)),
        ("topr", CorrectionConfig(action="topr", level="token", cap=1.0)),
    ],
)
def test_published_weights_of_single_tokens(name: str, settings: CorrectionConfig) -> None:
    same(zoo_weights(settings), ZOO[name])


@answers("weight_zoo/cispo_0_to_6")
def test_cispo_weighs_the_plain_gradient_with_the_clipped_ratio() -> None:
    settings = ObjectiveConfig(surrogate="cispo", ratio_level="token", clip_low=1.0, clip_high=5.0)
    for advantage in (torch.ones_like(PI), ADVANTAGE):
        same(-zoo_gradient(settings, advantage) / advantage, ZOO["cispo_0_to_6"])


@answers("weight_zoo/m2po_keep_tau0.04", "weight_zoo/m2po_keep_tau0.25")
@pytest.mark.parametrize("limit", [0.04, 0.25])
def test_m2po_keeps_the_tokens_within_its_second_moment(limit: float) -> None:
    settings = CorrectionConfig(action="m2po", level="token", m2_limit=limit)
    counted = torch.ones_like(EACH, dtype=torch.bool)
    masked = correction_for(settings)
    tempering = masked.temper(masked.log_weights(SAMPLED, counted))
    found = zoo_weights(settings, tempering)
    keep = torch.tensor(ZOO[f"m2po_keep_tau{limit}"])
    assert torch.equal(found != 0, keep)
    same(found[keep], tensor(ZOO["tis_C2"])[keep])


@answers("weight_zoo/dppo_tv_keep_0.2")
def test_dppo_masks_tokens_that_move_further_away() -> None:
    settings = ObjectiveConfig(surrogate="tv", ratio_level="token", tv_limit=0.2)
    gradient = zoo_gradient(settings, ADVANTAGE)
    keep = torch.tensor(ZOO["dppo_tv_keep_0.2"])
    assert torch.equal(gradient != 0, keep)
    same(gradient[keep], (-(PI - MU).exp() * ADVANTAGE)[keep])


@answers(*(f"weight_zoo/kl/{name}" for name in ("k1", "k2", "k3")), "weight_zoo/ess", "weight_zoo/ess_frac")
def test_divergences_and_ess_of_single_tokens() -> None:
    settings = CorrectionConfig(level="token", cap=1e9)
    weights = correction_for(settings).weights(SAMPLED)
    everywhere = torch.ones_like(EACH, dtype=torch.bool)
    weighed = Weighed(
        tokens=SAMPLED, counted=everywhere, lag=EACH, clipped=everywhere, weights=weights, level=settings.level
    )
    found = summary(sums(weighed).tolist(), corrects=True)
    for name in ("k1", "k2", "k3"):
        same(found[f"kl/mu_prox_{name}"], ZOO["kl"][name])
    same(found["is/ess_frac"], ZOO["ess_frac"])
    same(found["is/ess_frac_token"], ZOO["ess_frac"])
    same(10 * effective_share(weights.per_token), ZOO["ess"])


def test_the_objectives_divergences_are_those_of_the_reference_too() -> None:
    # Of samples of mu: KL(mu || pi), so mu stands where the policy being trained does.
    for name in ("k2", "k3"):
        same(objective.kl_to_reference(MU, PI, name).mean(), ZOO["kl"][name])


# --- the file as a whole --------------------------------------------------------------------------------------------


def test_every_number_of_these_sections_is_answered_for() -> None:
    present = [path for section in SECTIONS for path in leaves(VECTORS[section], section)]
    known = answered | INPUTS | ELSEWHERE
    within = {path: {part for part in known if path == part or path.startswith(f"{part}/")} for path in present}
    assert [path for path, parts in within.items() if not parts] == []
    assert known - set().union(*within.values()) == set(), "no such part in the file"
