"""What the objective promises of units, surrogates, clips and masked places; its reference numbers: test_vectors.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.config import ObjectiveConfig, doors
from learner.loss import objective, units
from learner.loss.loading import load_surrogate
from learner.loss.objective import Loss
from learner.loss.surrogates.clip import clipped_loss
from learner.loss.tokens import ActionTokens

ROOT = Path(__file__).resolve().parent.parent
SURROGATES = doors.SURROGATE.choices()
LEVELS = get_args(ObjectiveConfig.model_fields["ratio_level"].annotation)


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def evaluate(
    config: ObjectiveConfig,
    logp: Any,
    *,
    prox: Any = None,
    mu: Any = None,
    advantage: Any = None,
    turn: list[int] | None = None,
    row: list[int] | None = None,
    weight: Any = None,
    correction: Any = None,
    reference: Any = None,
    entropy: Any = None,
) -> tuple[Loss, torch.Tensor]:
    """The loss and its gradient by token; each token is a turn of its own unless told otherwise."""
    logp = tensor(logp).requires_grad_()
    given: dict[str, Any] = {
        "prox": logp.detach() if prox is None else tensor(prox),
        "mu": logp.detach() if mu is None else tensor(mu),
        "advantage": torch.ones_like(logp) if advantage is None else tensor(advantage),
        "turn": torch.arange(len(logp)) if turn is None else torch.tensor(turn),
        "row": torch.zeros(len(logp), dtype=torch.long) if row is None else torch.tensor(row),
        "weight": torch.ones_like(logp) if weight is None else tensor(weight),
        "correction": torch.ones_like(logp) if correction is None else tensor(correction),
        "reference": None if reference is None else tensor(reference),
        "entropy": None if entropy is None else tensor(entropy),
    }
    result = objective.atpo_loss(ActionTokens(logp=logp, **given), config, load_surrogate(config))
    (gradient,) = torch.autograd.grad(result.loss, logp)
    return result, gradient


log_probs = st.lists(st.floats(-5, -0.01), min_size=6, max_size=6)
advantages = st.lists(st.floats(0.1, 3) | st.floats(-3, -0.1), min_size=6, max_size=6)
TURNS, ROWS = [0, 0, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("surrogate", SURROGATES)
@given(logp=log_probs, advantage=advantages)
@settings(max_examples=20)
def test_every_surrogate_starts_as_the_plain_policy_gradient(
    surrogate: Any, level: Any, logp: list[float], advantage: list[float]
) -> None:
    weight, correction = [0.1, 0.2, 0.3, 0.1, 0.2, 0.1], [1.0, 2.0, 0.5, 0.0, 1.5, 1.0]
    result, gradient = evaluate(
        ObjectiveConfig(surrogate=surrogate, ratio_level=level), logp, advantage=advantage, weight=weight,
        correction=correction, turn=TURNS, row=ROWS,
    )  # fmt: skip
    torch.testing.assert_close(gradient, -tensor(weight) * tensor(correction) * tensor(advantage))
    assert not result.clipped.any()
    assert not result.log_ratio.any()


@given(log_probs, log_probs, log_probs, advantages, st.sampled_from(["clip", "tv"]))
@settings(max_examples=60)
def test_the_gradient_at_token_level_is_the_slope_of_the_loss(
    logp: list[float], prox: list[float], mu: list[float], advantage: list[float], surrogate: Any
) -> None:
    config = ObjectiveConfig(surrogate=surrogate, ratio_level="token", clip_low=0.2, clip_high=0.3, dual_clip=3.0)
    result, gradient = evaluate(config, logp, prox=prox, mu=mu, advantage=advantage)
    assert torch.equal(gradient == 0, result.clipped)
    step = 1e-6
    for i in range(len(logp)):
        up, down = list(logp), list(logp)
        up[i], down[i] = up[i] + step, down[i] - step
        above, below = (evaluate(config, x, prox=prox, mu=mu, advantage=advantage)[0] for x in (up, down))
        if not torch.equal(above.clipped, below.clipped):
            continue  # A kink lies between them.
        slope = (above.loss - below.loss).item() / (2 * step)
        assert slope == pytest.approx(gradient[i].item(), rel=1e-4, abs=1e-6)


def test_the_dual_clip_bounds_the_loss_of_a_bad_action_that_became_likely() -> None:
    ratio, advantage = tensor([5.0, 5.0, 2.0]), tensor([-1.0, 1.0, -1.0])
    loss, clipped = clipped_loss(ratio, advantage, clip_low=0.2, clip_high=0.3, dual_clip=3.0)
    assert loss.tolist() == pytest.approx([3.0, -1.3, 2.0])
    assert clipped.tolist() == [True, True, False]
    unbounded, _ = clipped_loss(ratio, advantage, clip_low=0.2, clip_high=0.3, dual_clip=None)
    assert unbounded.tolist() == pytest.approx([5.0, -1.3, 2.0])


def test_cispo_keeps_the_gradient_of_tokens_that_a_clip_would_silence() -> None:
    logs = [1.0, 1.0, -1.0, -1.0]
    given: dict[str, Any] = {"prox": [-2.0] * 4, "advantage": [1.0, -1.0, 1.0, -1.0]}
    config = ObjectiveConfig(surrogate="cispo", ratio_level="token", clip_low=0.2, clip_high=0.3)
    result, gradient = evaluate(config, [x - 2.0 for x in logs], **given)
    assert gradient.tolist() == pytest.approx([-1.3, 1.3, -0.8, 0.8])
    assert not result.clipped.any()
    clip = config.model_copy(update={"surrogate": "clip"})
    assert evaluate(clip, [x - 2.0 for x in logs], **given)[0].clipped.tolist() == [True, False, False, True]


def test_clip_keep_leaves_the_upper_side_its_gradient_and_nothing_else() -> None:
    ratios, signs = [1.1, 1.5, 0.7, 0.7, 1.5, 4.0], [1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
    given: dict[str, Any] = {"prox": [-2.0] * 6, "advantage": signs}
    config = ObjectiveConfig(surrogate="clip-keep", ratio_level="token", clip_low=0.2, clip_high=0.28)
    losses, gradients = [], []
    for i in range(6):
        one = {name: values[i : i + 1] for name, values in given.items()}
        result, gradient = evaluate(config, [math.log(ratios[i]) - 2.0], **one)
        losses.append(result.loss.item())
        gradients.append(gradient.item())
    assert losses == pytest.approx([-1.1, -1.28, -0.7, 0.8, 1.5, 3.0])
    assert gradients == pytest.approx([-1.1, -1.28, -0.7, 0.0, 1.5, 0.0])
    kept, gradient = evaluate(config, [math.log(x) - 2.0 for x in ratios], **given)
    assert kept.clipped.tolist() == [False, False, False, True, False, True]
    clip, silenced = evaluate(
        config.model_copy(update={"surrogate": "clip"}), [math.log(x) - 2.0 for x in ratios], **given
    )
    assert clip.loss.item() == pytest.approx(kept.loss.item())
    assert silenced.tolist() == pytest.approx([-1.1, 0.0, -0.7, 0.0, 1.5, 0.0])
    # A ratio so large that it is cut off has no gradient; the token's own log-prob still has one.
    far, gradient = evaluate(config, [-0.1], prox=[-30.0], advantage=[1.0])
    assert (far.loss.item(), gradient.item()) == pytest.approx((-1.28, -1.28))
    assert not far.clipped.any()


def test_the_policy_gradient_forgets_how_far_the_policy_has_moved() -> None:
    config = ObjectiveConfig(surrogate="policy-gradient", ratio_level="token")
    _, gradient = evaluate(config, [-1.0, -9.0], prox=[-4.0, -0.1], advantage=[2.0, -0.5])
    assert gradient.tolist() == [-2.0, 0.5]


def test_the_distance_mask_silences_only_tokens_that_move_away_from_the_behaviour_policy() -> None:
    near, far = [-1.0, -1.0], [-3.0, -0.1]  # Probability 0.37 against 0.05 and 0.90.
    config = ObjectiveConfig(surrogate="tv", ratio_level="token", tv_limit=0.25)
    more, _ = evaluate(config, near, mu=far, advantage=[1.0, 1.0])
    less, _ = evaluate(config, near, mu=far, advantage=[-1.0, -1.0])
    assert more.clipped.tolist() == [True, False]
    assert less.clipped.tolist() == [False, True]
    assert not evaluate(config, near, mu=[-1.1, -0.9], advantage=[1.0, 1.0])[0].clipped.any()


@pytest.mark.parametrize(("level", "expected"), [("token", [0.1, 0.3, -0.2]), ("sequence", [0.2 / 3] * 3)])
def test_a_ratio_level_decides_over_which_tokens_the_log_ratio_is_averaged(level: Any, expected: list[float]) -> None:
    turn, row = torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.long)
    logp = tensor([-0.9, -0.7, -1.2]).requires_grad_()
    logs = objective.log_ratio(logp, tensor([-1.0, -1.0, -1.0]), units.units(level, turn, row))
    assert logs.tolist() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(logs.sum(), logp)
    assert gradient.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_reference_pulls_back_and_nothing_pulls_where_the_policies_agree(estimator: Any) -> None:
    config = ObjectiveConfig(kl_coef=0.5, kl_estimator=estimator)
    given: dict[str, Any] = {"advantage": [0.0] * 3, "weight": [1.0, 2.0, 2.0], "correction": [1.0, 1.0, 0.5]}
    result, gradient = evaluate(config, [-1.0, -1.0, -1.0], reference=[-1.0, -1.5, -0.5], **given)
    d = tensor([0.0, -0.5, 0.5])
    k, slope = (d.square() / 2, -d) if estimator == "k2" else (d.exp() - 1 - d, 1 - d.exp())
    corrected = tensor([1.0, 2.0, 1.0])
    torch.testing.assert_close(result.kl, (corrected * k).sum())
    torch.testing.assert_close(result.loss.detach(), 0.5 * result.kl)
    torch.testing.assert_close(gradient, 0.5 * corrected * slope)
    # Descending the loss makes a token less likely where it is likelier than under the reference.
    assert gradient[0] == 0
    assert gradient[1] > 0 > gradient[2]


@given(st.floats(-50, -1e-3), st.floats(-50, -1e-3), st.sampled_from(["k2", "k3"]))
def test_a_divergence_by_token_is_finite_and_never_negative(logp: float, reference: float, estimator: Any) -> None:
    found = objective.kl_to_reference(tensor(logp), tensor(reference), estimator)
    assert torch.isfinite(found)
    assert found >= -1e-12
    assert objective.kl_to_reference(tensor(logp), tensor(logp), estimator) == 0


def test_the_entropy_bonus_is_weighted_but_not_corrected() -> None:
    entropy = tensor([1.0, 2.0, 3.0]).requires_grad_()
    config = ObjectiveConfig(entropy_coef=0.1)
    logp = tensor([-1.0, -1.0, -1.0]).requires_grad_()
    turn, none = torch.tensor([0, 1, -1]), torch.zeros(3, dtype=torch.float64)
    tokens = ActionTokens(
        logp=logp, prox=logp.detach(), mu=logp.detach(), advantage=none, turn=turn, row=torch.zeros_like(turn),
        weight=tensor([0.5, 0.25, 9.0]), correction=none, entropy=entropy,
    )  # fmt: skip
    result = objective.atpo_loss(tokens, config, load_surrogate(config))
    assert result.entropy.item() == pytest.approx(1.0)
    assert result.loss.item() == pytest.approx(-0.1)
    (gradient,) = torch.autograd.grad(result.loss, entropy)
    assert gradient.tolist() == pytest.approx([-0.05, -0.025, 0.0])


def test_terms_that_are_off_are_measured_if_their_numbers_are_there_and_change_nothing() -> None:
    plain, gradient = evaluate(ObjectiveConfig(), [-1.0, -2.0])
    assert plain.kl == plain.entropy == 0
    off, same = evaluate(ObjectiveConfig(), [-1.0, -2.0], reference=[-1.5, -2.0], entropy=[1.0, 0.5])
    assert off.kl > 0
    assert off.entropy == 1.5
    assert off.loss.item() == plain.loss.item()
    torch.testing.assert_close(same, gradient)
    assert not off.kl.requires_grad
    assert not off.entropy.requires_grad


@pytest.mark.parametrize("term", ["kl_coef", "entropy_coef"])
def test_a_term_without_its_numbers_is_an_error_and_not_silently_off(term: str) -> None:
    with pytest.raises(ValueError, match=rf"objective.{term} = 0.25 needs"):
        evaluate(ObjectiveConfig.model_validate({term: 0.25}), [-1.0])


@pytest.mark.parametrize("noise", [80.0, float("inf"), float("nan")])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_masked_place_changes_nothing_whatever_it_holds(surrogate: Any, noise: float) -> None:
    config = ObjectiveConfig(surrogate=surrogate, kl_coef=0.1, entropy_coef=0.1)
    clean: dict[str, Any] = {
        "logp": [-1.0, -2.0, 0.0, -0.5], "prox": [-1.1, -1.9, 0.0, -0.5], "mu": [-1.2, -1.8, 0.0, -0.6],
        "advantage": [1.0, 1.0, 0.0, -1.0], "weight": [0.5, 0.5, 0.0, 0.5], "correction": [1.0, 1.0, 0.0, 1.0],
        "reference": [-1.0, -1.0, 0.0, -1.0], "entropy": [1.0, 0.5, 0.0, 2.0],
    }  # fmt: skip
    noisy = {name: [*values[:2], noise, values[3]] for name, values in clean.items()}
    turn, row = [0, 0, -1, 1], [0, 0, 0, 0]
    expected, gradient = evaluate(config, turn=turn, row=row, **clean)
    found, noisy_gradient = evaluate(config, turn=turn, row=row, **noisy)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(noisy_gradient, gradient)
    assert noisy_gradient[2] == 0
    assert not found.clipped[2]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_huge_log_ratio_stays_finite(surrogate: Any) -> None:
    for logp, prox in ((0.0, -1500.0), (-1500.0, 0.0)):
        config = ObjectiveConfig(surrogate=surrogate, dual_clip=None, kl_coef=1.0, ratio_level="token")
        result, gradient = evaluate(config, [logp], prox=[prox], mu=[prox], advantage=[-1.0], reference=[prox])
        assert torch.isfinite(result.loss)
        assert torch.isfinite(gradient).all()
        # Without the pull of the reference, a token without gradient is one that is said to be clipped.
        alone = config.model_copy(update={"kl_coef": 0.0})
        result, gradient = evaluate(alone, [logp], prox=[prox], mu=[prox], advantage=[-1.0])
        assert bool(result.clipped[0]) == (float(gradient.abs()) < 1e-100)


def test_a_forward_pass_without_tokens_has_a_loss_of_zero_that_can_be_differentiated() -> None:
    for surrogate in SURROGATES:
        result, gradient = evaluate(ObjectiveConfig(surrogate=surrogate), [])
        assert result.loss == 0
        assert gradient.shape == (0,)


def test_a_nan_of_the_model_shows_in_the_loss() -> None:
    for surrogate in SURROGATES:
        result, _ = evaluate(ObjectiveConfig(surrogate=surrogate), [-1.0, float("nan")])
        assert torch.isnan(result.loss)


def test_every_module_of_the_package_is_a_surrogate_that_can_be_loaded_and_is_described() -> None:
    algorithm = (ROOT / "docs" / "ALGORITHM.md").read_text()
    for name in SURROGATES:
        assert load_surrogate(ObjectiveConfig(surrogate=name)).metrics == ()
        assert f"`{name}`" in algorithm, f"docs/ALGORITHM.md, section 3, says nothing of {name}"


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(0, 60))
def test_a_prefix_sums_the_turns_of_its_own_row_down_to_its_last(rows: list[list[int]], gap: int) -> None:
    turns, row_of, values, expected = [], [], [], {}
    number = 0
    for r, lengths in enumerate(rows):
        total = 0.0
        for length in lengths:
            turns += [number] * length
            row_of += [r] * length
            values += [float(number + 1)] * length
            total += (number + 1) * length
            expected[number] = total
            number += 1
        number += gap
    turn, row = torch.tensor(turns), torch.tensor(row_of)
    per_turn = units.unit_sum(tensor(values), turn, units.num_units(turn))
    found = units.prefix_sum(per_turn, turn, row)
    assert {n: found[n].item() for n in expected} == pytest.approx(expected)


def test_one_rows_infinity_stays_out_of_the_prefixes_before_it() -> None:
    turn, row = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])
    found = units.prefix_sum(tensor([1.0, 2.0, float("inf")]), turn, row)
    assert found.tolist() == [1.0, 3.0, float("inf")]
