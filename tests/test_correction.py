"""What the weights, the tempering and the diagnostics promise; their reference numbers: test_vectors.py."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atpo_async.config import CorrectionConfig, doors
from learner.loss import correction, diagnostics
from learner.loss.correction import Tempering
from learner.loss.diagnostics import Weighed
from learner.loss.tempering import effective_share
from learner.loss.tokens import OffPolicyTokens
from tests.learner_support import correction_for

ACTIONS = doors.CORRECTION.choices()
LEVELS = get_args(CorrectionConfig.model_fields["level"].annotation)


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Two rows: turns of 3, 2 and 4 tokens, then of 2, 3 and 1.
TURN = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4, 5])
ROW = torch.tensor([0] * 9 + [1] * 6)
MU = torch.linspace(-2.0, -0.1, 15, dtype=torch.float64)
DIFFERENCE = tensor([0.1, -0.3, 0.2, 0.8, 0.7, -0.5, -0.6, -0.4, -0.3, 0.0, 0.1, 2.0, -1.0, 1.0, -0.02])
ADVANTAGE = tensor([1.0] * 3 + [-1.0] * 2 + [1.0] * 4 + [-0.5] * 2 + [2.0] * 3 + [0.0])
S = tensor([0.0, 1.5, -1.8, 0.1, 2.0, -0.02])
"""Of each turn."""
ALL = torch.ones(15, dtype=torch.bool)


def weights(
    config: CorrectionConfig, tempering: Tempering | None = None, **changes: torch.Tensor
) -> correction.Weights:
    return correction_for(config).weights(tokens(**changes), tempering or Tempering())


def tokens(**changes: torch.Tensor) -> OffPolicyTokens:
    given = {"numerator": MU + DIFFERENCE, "mu": MU, "advantage": ADVANTAGE, "turn": TURN, "row": ROW} | changes
    return OffPolicyTokens(**given)


def temper(logs: torch.Tensor, config: CorrectionConfig) -> Tempering:
    return correction_for(config).temper(logs)


def log_weights(config: CorrectionConfig, counted: torch.Tensor, **changes: torch.Tensor) -> torch.Tensor:
    return correction_for(config).log_weights(tokens(**changes), counted)


def summary(config: CorrectionConfig, **changes: Any) -> dict[str, float]:
    return diagnostics.summary(measured(config, **changes).tolist(), corrects=config.action != "none")


def config_of(action: Any, level: Any, **others: Any) -> CorrectionConfig:
    return CorrectionConfig(action=action, level=level, **others)


log_ratios = st.lists(st.floats(-40, 40), min_size=15, max_size=15)


@given(log_ratios, st.sampled_from(ACTIONS), st.sampled_from(LEVELS), st.floats(0.1, 1))
def test_a_weight_is_within_its_bounds_or_nothing(values: list[float], action: Any, level: Any, scale: float) -> None:
    config = config_of(action, level, cap=3.0, floor=0.25, gate=0.7 if action != "none" else None)
    found = weights(config, Tempering(scale=scale, measured=9.0), numerator=MU + tensor(values))
    for weight in (found.per_token, found.per_unit):
        assert (((weight >= 0.25) & (weight <= 3.0)) | (weight == 0) | (weight == 1)).all()
    present = found.per_unit[:6] if level in ("turn", "prefix") else found.per_unit
    assert 0 <= effective_share(present) <= 1 + 1e-12


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_decides_what_a_weight_is_the_product_of(level: Any) -> None:
    found = weights(config_of("truncate", level, cap=1e9)).per_token
    prefix = torch.cat([S[:3].cumsum(0), S[3:].cumsum(0)])
    expected = {
        "token": DIFFERENCE, "turn": S[TURN], "prefix": prefix[TURN],
        "sequence": torch.stack([S[:3].sum(), S[3:].sum()])[ROW],
    }  # fmt: skip
    torch.testing.assert_close(found, expected[level].exp())


@pytest.mark.parametrize("level", LEVELS)
def test_the_geometric_exponent_is_a_mean_over_the_tokens_of_the_unit(level: Any) -> None:
    found = weights(config_of("truncate", level, cap=1e9, exponent="geometric")).per_token
    lengths = tensor([3, 2, 4, 2, 3, 1])
    prefix = torch.cat([S[:3].cumsum(0) / lengths[:3].cumsum(0), S[3:].cumsum(0) / lengths[3:].cumsum(0)])
    expected = {
        "token": DIFFERENCE, "turn": (S / lengths)[TURN], "prefix": prefix[TURN],
        "sequence": torch.stack([S[:3].sum() / 9, S[3:].sum() / 6])[ROW],
    }  # fmt: skip
    torch.testing.assert_close(found, expected[level].exp())


def test_a_fixed_exponent_and_the_batchs_tempering_multiply() -> None:
    found = weights(CorrectionConfig(cap=1e9, exponent_value=0.5), Tempering(scale=0.4)).per_unit
    torch.testing.assert_close(found, (0.2 * S).exp())


def test_topr_weighs_bad_actions_only() -> None:
    found = weights(CorrectionConfig(action="topr", cap=1.0))
    good = ADVANTAGE >= 0
    torch.testing.assert_close(found.per_token[good], torch.ones(11, dtype=torch.float64))
    torch.testing.assert_close(found.per_token[~good], S[TURN].clamp(max=0).exp()[~good])
    assert found.changed.tolist() == [False, True, False, True, False, False]


def test_topr_by_sequence_goes_by_the_sign_of_each_turn() -> None:
    found = weights(CorrectionConfig(action="topr", level="sequence", cap=1.0)).per_token
    low = math.exp(-0.3)
    assert found.tolist() == pytest.approx([1.0] * 3 + [low] * 2 + [1.0] * 4 + [1.0] * 6)


@pytest.mark.parametrize("level", LEVELS)
def test_a_gate_masks_turns_that_drifted_far_by_their_mean_whatever_the_level(level: Any) -> None:
    far = tensor([0.0, 0.75, -0.45, 0.05, 2 / 3, -0.02]).abs() > 0.5
    open_, gated = (weights(config_of("truncate", level, gate=gate)) for gate in (None, 0.5))
    torch.testing.assert_close(gated.per_token, torch.where(far[TURN], 0.0, open_.per_token))
    if level in ("turn", "prefix"):
        assert (gated.per_unit == 0).tolist() == far.tolist()
        assert gated.changed[far].all()
    if level == "sequence":
        # Some of its turns still count.
        torch.testing.assert_close(gated.per_unit, open_.per_unit)


def test_a_gate_looks_at_the_untempered_difference() -> None:
    found = weights(CorrectionConfig(gate=0.5, exponent_value=0.01), Tempering(scale=0.1))
    assert (found.per_unit == 0).tolist() == [False, True, False, False, True, False]
    assert found.changed.tolist() == [False, True, False, False, True, False]


def test_places_that_do_not_count_weigh_nothing_and_add_nothing() -> None:
    for level in LEVELS:
        config = config_of("truncate", level, cap=1e9)
        turn = torch.where(TURN == 1, -1, TURN)
        noisy = torch.where(TURN == 1, math.nan, MU + DIFFERENCE)
        found = weights(config, numerator=noisy, turn=turn).per_token
        clean = weights(config, numerator=torch.where(TURN == 1, MU, MU + DIFFERENCE)).per_token
        assert not found[TURN == 1].any()
        torch.testing.assert_close(found[TURN != 1], clean[TURN != 1])


@pytest.mark.parametrize("action", [a for a in ACTIONS if a != "none"])
def test_an_infinite_log_ratio_weighs_as_a_huge_one_and_nan_stays_visible(action: Any) -> None:
    for level in LEVELS:
        config = config_of(action, level, cap=2.0)
        noisy = MU + DIFFERENCE
        noisy[0], noisy[9] = math.inf, -math.inf
        found = weights(config, numerator=noisy, advantage=-ADVANTAGE.abs() - 1)
        assert torch.isfinite(found.per_token).all()
        assert found.per_token[0] == (0.0 if correction_for(config).traits.masks_outside else 2.0)
        assert found.per_token[9] == 0
        noisy[3] = math.nan
        assert torch.isnan(weights(config, numerator=noisy, advantage=-ADVANTAGE.abs() - 1).per_token[3])


def test_a_forward_pass_without_tokens_has_no_weights() -> None:
    none, index = tensor([]), torch.zeros(0, dtype=torch.long)
    nowhere = torch.zeros(0, dtype=torch.bool)
    for action in ACTIONS:
        for level in LEVELS:
            config = config_of(action, level, gate=None if action == "none" else 1.0)
            found = weights(config, numerator=none, mu=none, advantage=none, turn=index, row=index)
            assert found.per_token.shape == (0,)
            empty = {"numerator": none, "mu": none, "advantage": none, "turn": index, "row": index}
            ratios = log_weights(config, nowhere, **empty)
            assert ratios.shape == (0,)
            assert temper(ratios, config) == Tempering()
            assert summary(config, **empty, counted=nowhere, lag=index, clipped=nowhere) == {}


def test_every_module_of_the_package_is_a_correction_that_can_be_loaded_and_is_described() -> None:
    algorithm = (Path(__file__).resolve().parent.parent / "docs" / "ALGORITHM.md").read_text()
    for action in ACTIONS:
        assert correction_for(config_of(action, "token")).settings.action == action
        assert re.search(rf"[`\"]{action}[`\"]", algorithm), f"docs/ALGORITHM.md, section 4, says nothing of {action}"


# --- the whole batch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_batchs_log_ratios_hold_each_unit_once_however_it_is_cut(level: Any) -> None:
    config = config_of("truncate", level, exponent_value=0.5)
    whole = log_weights(config, ALL)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(whole, torch.unique(whole)[torch.argsort(torch.argsort(whole))])
    top, bottom = ROW == 0, ROW == 1
    halves = [
        log_weights(
            config, ALL[part], numerator=(MU + DIFFERENCE)[part], mu=MU[part], advantage=ADVANTAGE[part],
            turn=TURN[part] - TURN[part][0], row=ROW[part] * 0,
        )
        for part in (top, bottom)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(halves), whole)
    # A row whose first turn another row has counted already: its sequence is its own.
    counted = TURN != 3
    again = log_weights(config, counted)
    again = again[~again.isnan()]
    assert len(whole) - len(again) == {"token": 2, "turn": 1, "prefix": 1, "sequence": 0}[level]


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=40), st.floats(0.05, 1), st.floats(0.05, 1))
def test_tempering_is_as_mild_as_the_target_allows(logs: list[float], target: float, other: float) -> None:
    def scale(tau: float) -> float:
        return temper(tensor(logs), CorrectionConfig(exponent="ess", ess_target=tau)).scale

    def share(by: float) -> float:
        scaled = tensor(logs) * by
        return effective_share((scaled - scaled.max()).exp())

    found = scale(target)
    assert 0 <= found <= 1
    assert share(found) >= target - 1e-9
    assert found == 1 or share(found + 1e-3) < target + 1e-9
    assert (scale(max(target, other)) <= scale(min(target, other))) or math.isclose(target, other)


def test_one_unit_or_equal_units_need_no_tempering() -> None:
    for logs in ([7.0], [-3.0, -3.0, -3.0]):
        assert temper(tensor(logs), CorrectionConfig(exponent="ess", ess_target=1.0)).scale == 1.0


def test_the_guard_lowers_the_exponent_of_a_batch_whose_weights_as_applied_are_few() -> None:
    config = CorrectionConfig(cap=2.0, ess_floor=0.5)
    fine = tensor([0.1, -0.2, 0.3, 0.0])
    assert temper(fine, config).scale == 1.0
    # The bound alone keeps these: one huge ratio among many is no reason to correct less.
    assert temper(tensor([9.0, *[0.0] * 9]), config).scale == 1.0
    few = tensor([3.0, *[-4.0] * 9])
    found = temper(few, config).scale
    applied = (few * found).exp().clamp(max=2.0)
    assert 0 < found < 1
    assert effective_share(applied) == pytest.approx(0.5, abs=1e-6)
    assert temper(few, config.model_copy(update={"ess_floor": 0.0})).scale == 1.0
    assert temper(few, config.model_copy(update={"action": "none"})) == Tempering()


def test_the_guard_brings_masked_weights_back_and_leaves_alone_what_no_exponent_can_help() -> None:
    logs = tensor([3.0, -4.0, 5.0, -6.0])
    mask = CorrectionConfig(action="mask", cap=2.0, floor=0.5, ess_floor=0.5)
    scale = temper(logs, mask).scale
    assert effective_share(weights_of(logs * scale, mask)) >= 0.5
    never = mask.model_copy(update={"cap": 0.9})  # Even a ratio of 1 is masked.
    assert temper(logs, never).scale == 1.0


def weights_of(log_weights: torch.Tensor, config: CorrectionConfig) -> torch.Tensor:
    each, zero = torch.arange(len(log_weights)), torch.zeros_like(log_weights)
    return weights(config, numerator=log_weights, mu=zero, advantage=zero, turn=each, row=each * 0).per_unit


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30), st.floats(0.01, 2))
def test_m2po_drops_the_fewest_of_the_largest_that_bring_the_second_moment_down(
    logs: list[float], limit: float
) -> None:
    config = config_of("m2po", "token", m2_limit=limit)
    tempering = temper(tensor(logs), config)
    keep = weights_of_token(tensor(logs), config, tempering) != 0
    kept, dropped = tensor(logs)[keep].abs(), tensor(logs)[~keep].abs()
    assert tempering.scale == 1.0
    if len(kept):
        assert kept.square().mean() <= limit + 1e-12
    if len(dropped):
        assert not len(kept) or kept.max() < dropped.min()
        back = torch.cat([kept, dropped[dropped == dropped.min()]])
        assert back.square().mean() > limit - 1e-12


def weights_of_token(logs: torch.Tensor, config: CorrectionConfig, tempering: Tempering) -> torch.Tensor:
    each, zero = torch.arange(len(logs)), torch.zeros_like(logs)
    return weights(config, tempering, numerator=logs, mu=zero, advantage=zero, turn=each, row=each * 0).per_token


def test_m2po_drops_tokens_that_tie_at_the_border_together() -> None:
    config = config_of("m2po", "token", m2_limit=0.04)
    assert temper(tensor([0.1, 0.1, 0.3, -0.3, 0.3]), config).measured == 0.1
    everything = temper(tensor([1.0, -1.0, 1.0]), config)
    assert not weights_of_token(tensor([1.0, -1.0, 1.0]), config, everything).any()


def test_numbers_that_are_not_finite_do_not_temper_the_others() -> None:
    logs = [0.5, -1.0, 2.0, 0.1]
    for config in (CorrectionConfig(exponent="ess", ess_target=0.9), config_of("m2po", "token"), CorrectionConfig()):
        noisy = tensor([math.nan, *logs, math.inf, -math.inf])
        assert temper(noisy, config) == temper(tensor(logs), config)
        assert temper(tensor([math.nan]), config) == Tempering()


def test_only_some_corrections_need_the_whole_batch_first() -> None:
    assert correction_for(CorrectionConfig(exponent="ess")).needs_batch
    assert correction_for(config_of("m2po", "token")).needs_batch
    assert not correction_for(CorrectionConfig()).needs_batch
    assert not correction_for(CorrectionConfig(exponent="geometric")).needs_batch


def test_the_interpolated_proximal_policy_has_no_gradient_and_is_mu_at_lag_0() -> None:
    theta = (MU + DIFFERENCE).requires_grad_()
    lag = torch.arange(15) - 1
    found = correction.interpolated_prox(theta, MU, lag)
    assert not found.requires_grad
    torch.testing.assert_close(found[:2], MU[:2])
    torch.testing.assert_close(found[2:], (MU + lag / (lag + 1).double() * DIFFERENCE)[2:])


# --- diagnostics -----------------------------------------------------------------------------------------------------


def measured(config: CorrectionConfig, **changes: Any) -> torch.Tensor:
    beside: dict[str, Any] = {"counted": ALL, "lag": torch.tensor([0] * 3 + [1] * 6 + [4] * 6), "clipped": TURN == 3}
    beside |= {name: changes.pop(name) for name in list(changes) if name in beside}
    given = tokens(**changes)
    found = correction_for(config).weights(given)
    return diagnostics.sums(Weighed(tokens=given, weights=found, level=config.level, **beside))


def test_engine_mismatch_and_staleness_are_told_apart_by_the_tokens_age() -> None:
    found = summary(CorrectionConfig())
    for part, d in (("mismatch", DIFFERENCE[:3]), ("staleness", DIFFERENCE[3:])):
        assert found[f"{part}/kl_k1"] == pytest.approx(float(-d.mean()))
        assert found[f"{part}/kl_k3"] == pytest.approx(float((d.exp() - 1 - d).mean()))
        assert found[f"{part}/mean_abs"] == pytest.approx(float(d.abs().mean()))
        assert found[f"{part}/token_share"] == pytest.approx(len(d) / 15)
    fresh = summary(CorrectionConfig(), lag=TURN * 0)
    assert "staleness/kl_k1" not in fresh
    stale = summary(CorrectionConfig(), lag=TURN + 1)
    assert "mismatch/kl_k3" not in stale


@pytest.mark.parametrize("level", LEVELS)
def test_sums_add_up_over_micro_batches_and_a_shared_turn_counts_once(level: Any) -> None:
    config = config_of("mask", level, floor=0.5)
    whole = measured(config)
    top, bottom = (torch.where(torch.eq(ROW, row), TURN, -1) for row in (0, 1))
    torch.testing.assert_close(measured(config, turn=top) + measured(config, turn=bottom), whole)
    again = measured(config, turn=bottom, counted=~ALL)
    found = dict(zip(diagnostics.SUMS, again.tolist(), strict=True))
    assert [found[f"{name}/n"] for name in ("token", "turn", "prefix", "clip", "mismatch", "staleness")] == [0] * 6
    assert found["sequence/n"] == 1
    assert sum(found[f"length/{name}"] for name, _ in diagnostics.LENGTHS) == 0


def test_truncated_shares_are_told_apart_by_the_sign_of_the_advantage() -> None:
    found = summary(CorrectionConfig(cap=2.0))
    assert found["is/truncated_share"] == pytest.approx(2 / 5)
    assert found["is/truncated_share_pos"] == pytest.approx(1 / 3)
    assert found["is/truncated_share_neg"] == pytest.approx(1 / 2)
    assert found["is/mean_weight"] == pytest.approx(float(S.exp().clamp(max=2.0).mean()))
    assert found["clip_share"] == pytest.approx(2 / 15)
    none = CorrectionConfig(action="none", accept_bias=True)
    assert summary(none)["is/truncated_share"] == 0


def test_ess_of_exact_ratios_is_told_at_every_level() -> None:
    found = summary(CorrectionConfig())
    for level in LEVELS:
        exact = weights(config_of("truncate", level, cap=1e9)).per_unit
        assert found[f"is/ess_frac_{level}"] == pytest.approx(effective_share(exact))
        assert found[f"is/chi2_{level}"] == pytest.approx(float(exact.square().mean()) - 1)
    assert found["is/ess_frac_turn_lognormal"] == pytest.approx(math.exp(-float(S.var(correction=0))))


def test_dropped_turns_are_counted_by_their_length() -> None:
    lengths = [1, 8, 9, 32, 33, 128, 129, 512, 513, 8]
    turn = torch.repeat_interleave(torch.arange(10), torch.tensor(lengths))
    dropped = [1, 2, 4, 8]
    mu = torch.zeros(len(turn), dtype=torch.float64)
    prox = torch.where(torch.isin(turn, torch.tensor(dropped)), 5.0, 0.0).double()
    config = CorrectionConfig(gate=1.0)
    everywhere = torch.ones_like(turn, dtype=torch.bool)
    found = summary(
        config,
        numerator=prox,
        mu=mu,
        advantage=mu,
        turn=turn,
        row=turn * 0,
        counted=everywhere,
        lag=turn,
        clipped=~everywhere,
    )
    assert {name: found[f"dropped/turns_len_{name}"] for name, _ in diagnostics.LENGTHS} == pytest.approx(
        {"1-8": 1 / 3, "9-32": 1 / 2, "33-128": 1 / 2, "129-512": 0.0, "over-512": 1.0}
    )
    assert found["dropped/turns_share"] == pytest.approx(0.4)
    assert found["dropped/mean_tokens"] == pytest.approx(sum(lengths[i] for i in dropped) / 4)
    assert found["kept/mean_tokens"] == pytest.approx(sum(n for i, n in enumerate(lengths) if i not in dropped) / 6)


def test_a_turn_of_which_a_token_is_left_is_not_dropped() -> None:
    config = config_of("mask", "token", floor=0.8, cap=1.3)
    found = summary(config)
    # Of turns 1 and 2 every token is outside, of turn 0 one, of turn 4 all three.
    assert found["dropped/turns_share"] == pytest.approx(3 / 6)
    plain = summary(CorrectionConfig())
    assert plain["dropped/turns_share"] == 0
    assert "dropped/mean_tokens" not in plain
    assert "dropped/turns_len_9-32" not in plain
