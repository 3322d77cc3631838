"""The surrogate against reference values, and what it promises about turns, clips and masked places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from atpo_async.config import ObjectiveConfig
from learner import objective

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "at2po_vectors.json").read_text())
PAPER = ObjectiveConfig(clip_low=3e-3, clip_high=4e-3, dual_clip=None)


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def indices(turn_id: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn ids by row -> turn occurrences numbered over the batch, and rows."""
    turn = torch.tensor(turn_id)
    row = torch.arange(turn.shape[0])[:, None].expand_as(turn)
    return torch.where(turn < 0, turn, turn + 100 * row), row


def mean_of_means(turn: torch.Tensor) -> torch.Tensor:
    """Weights of seq-mean-token-mean."""
    counts = (turn >= 0).double()
    return counts / counts.sum(1, keepdim=True) / turn.shape[0]


def evaluate(
    case: dict[str, Any], turn_id: list[list[int]], settings: ObjectiveConfig
) -> tuple[objective.Surrogate, torch.Tensor]:
    turn, row = indices(turn_id)
    logp = tensor(case["new_logp"]).requires_grad_()
    result = objective.atpo_loss(
        logp,
        tensor(case["old_logp"]),
        tensor(case["adv"]),
        turn,
        row,
        mean_of_means(turn),
        torch.ones_like(logp),
        settings,
    )
    (gradient,) = torch.autograd.grad(result.loss, logp)
    return result, gradient


def test_the_loss_and_its_gradient_match_the_reference() -> None:
    case = VECTORS["atpo_loss"]
    result, gradient = evaluate(case, case["turn_id"], PAPER)
    assert result.loss.item() == pytest.approx(case["loss"], abs=1e-9)
    torch.testing.assert_close(gradient, tensor(case["grad_new_logp"]), atol=1e-9, rtol=0)
    counts = tensor(case["mask"]) > 0
    torch.testing.assert_close(result.log_ratio.exp()[counts], tensor(case["ratio"])[counts], atol=1e-9, rtol=0)
    assert result.clipped[counts].double().mean().item() == pytest.approx(case["clipfrac"], abs=1e-9)


def test_turns_without_an_observation_between_them_stay_two_turns() -> None:
    case = VECTORS["adjacent_turns"]
    two, gradient_two = evaluate(case, case["by_turn_id"]["turn_id"], PAPER)
    one, gradient_one = evaluate(case, case["by_mask_run_official"]["turn_id"], PAPER)
    assert two.loss.item() == pytest.approx(case["by_turn_id"]["loss"], abs=1e-9)
    assert one.loss.item() == pytest.approx(case["by_mask_run_official"]["loss"], abs=1e-9)
    torch.testing.assert_close(gradient_two, tensor(case["by_turn_id"]["grad"]), atol=1e-9, rtol=0)
    torch.testing.assert_close(gradient_one, tensor(case["by_mask_run_official"]["grad"]), atol=1e-9, rtol=0)


def test_the_dual_clip_bounds_the_loss_of_a_bad_action_that_became_likely() -> None:
    ratio, advantage = tensor([5.0, 5.0, 2.0]), tensor([-1.0, 1.0, -1.0])
    loss, clipped = objective.clipped_loss(ratio, advantage, clip_low=0.2, clip_high=0.3, dual_clip=3.0)
    assert loss.tolist() == pytest.approx([3.0, -1.3, 2.0])
    assert clipped.tolist() == [True, True, False]
    unbounded, _ = objective.clipped_loss(ratio, advantage, clip_low=0.2, clip_high=0.3, dual_clip=None)
    assert unbounded.tolist() == pytest.approx([5.0, -1.3, 2.0])


@pytest.mark.parametrize(("level", "expected"), [("token", [0.1, 0.3, -0.2]), ("sequence", [0.2 / 3] * 3)])
def test_a_ratio_level_decides_over_which_tokens_the_log_ratio_is_averaged(level: Any, expected: list[float]) -> None:
    turn, row = torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.long)
    logp = tensor([-0.9, -0.7, -1.2]).requires_grad_()
    logs = objective.log_ratio(logp, tensor([-1.0, -1.0, -1.0]), objective.units(level, turn, row))
    assert logs.tolist() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(logs.sum(), logp)
    assert gradient.tolist() == [1.0, 1.0, 1.0]


def test_token_level_without_clipping_is_the_plain_policy_gradient() -> None:
    turn, row = torch.tensor([[0, 0, -1, 1]]), torch.zeros(1, 4, dtype=torch.long)
    logp = tensor([[-1.0, -0.5, 0.0, -2.0]]).requires_grad_()
    advantage = tensor([[2.0, 2.0, 0.0, -1.0]])
    settings = ObjectiveConfig(ratio_level="token")
    result = objective.atpo_loss(
        logp, logp.detach(), advantage, turn, row, mean_of_means(turn), torch.ones_like(logp), settings
    )
    (gradient,) = torch.autograd.grad(result.loss, logp)
    torch.testing.assert_close(gradient, -advantage / 3)


def test_a_masked_place_changes_nothing_whatever_it_holds() -> None:
    case = VECTORS["atpo_loss"]
    noisy = {**case, "new_logp": [row[:] for row in case["new_logp"]]}
    noisy["new_logp"][0][3] = 80.0
    result, gradient = evaluate(noisy, case["turn_id"], PAPER)
    assert result.loss.item() == pytest.approx(case["loss"], abs=1e-9)
    assert gradient[0, 3] == 0


def test_a_huge_log_ratio_stays_finite() -> None:
    turn, row = torch.tensor([0]), torch.tensor([0])
    logp = tensor([0.0]).requires_grad_()
    result = objective.atpo_loss(logp, tensor([-500.0]), tensor([-1.0]), turn, row, tensor([1.0]), tensor([1.0]), PAPER)
    assert torch.isfinite(result.loss)
