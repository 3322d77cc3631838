"""Importance weights and diagnostics against reference values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from atpo_async.config import CorrectionConfig, ObjectiveConfig
from learner import correction, objective

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "at2po_vectors.json").read_text())
CASE = VECTORS["decoupled"]
CASES: list[tuple[str, CorrectionConfig]] = [
    ("none", CorrectionConfig(action="none", accept_bias=True)),
    ("turn_sum_truncate", CorrectionConfig(action="truncate", level="turn", cap=2.0)),
    ("turn_mean_truncate", CorrectionConfig(action="truncate", level="turn", cap=2.0, exponent="geometric")),
    ("turn_sum_mask_0.5_2", CorrectionConfig(action="mask", level="turn", cap=2.0, floor=0.5)),
    ("token_truncate", CorrectionConfig(action="truncate", level="token", cap=2.0)),
]


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def indices() -> tuple[torch.Tensor, torch.Tensor]:
    turn = torch.tensor(CASE["turn_id"])
    row = torch.arange(2)[:, None].expand_as(turn)
    return torch.where(turn < 0, turn, turn + 3 * row), row


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_decoupled_weights_loss_gradient_and_ess_match_the_reference(name: str, settings: CorrectionConfig) -> None:
    expected = CASE["cases"][name]
    turn, row = indices()
    prox, mu = tensor(CASE["prox_logp"]), tensor(CASE["mu_logp"])
    weights = correction.importance_weights(prox, mu, turn, row, settings)
    torch.testing.assert_close(weights.per_token, tensor(expected["weight_per_token"]), atol=1e-9, rtol=0)
    counts = (turn >= 0).double()
    logp = tensor(CASE["new_logp"]).requires_grad_()
    result = objective.atpo_loss(
        logp, prox, tensor(CASE["adv"]), turn, row, counts / counts.sum(1, keepdim=True) / 2, weights.per_token,
        ObjectiveConfig(clip_low=3e-3, clip_high=4e-3, dual_clip=None),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(result.loss, logp)
    assert result.loss.item() == pytest.approx(expected["loss"], abs=1e-9)
    torch.testing.assert_close(gradient, tensor(expected["grad_new_logp"]), atol=1e-9, rtol=0)
    if name != "none":
        present = weights.per_unit[torch.unique(objective.units(settings.level, turn, row)[turn >= 0])]
        assert correction.effective_share(present) == pytest.approx(expected["ess_frac"], abs=1e-9)


def test_the_dual_clip_case_matches_the_reference() -> None:
    expected = CASE["cases"]["turn_sum_truncate_dualclip_3"]
    turn, row = indices()
    prox = tensor(CASE["prox_logp"])
    weights = correction.importance_weights(prox, tensor(CASE["mu_logp"]), turn, row, CASES[1][1])
    counts = (turn >= 0).double()
    logp = tensor(CASE["new_logp"]).requires_grad_()
    result = objective.atpo_loss(
        logp, prox, tensor(CASE["adv"]), turn, row, counts / counts.sum(1, keepdim=True) / 2, weights.per_token,
        ObjectiveConfig(clip_low=3e-3, clip_high=4e-3, dual_clip=3.0),
    )  # fmt: skip
    assert result.loss.item() == pytest.approx(expected["loss"], abs=1e-9)


def test_truncation_masking_and_ess_match_the_reference_on_single_tokens() -> None:
    zoo = VECTORS["weight_zoo"]
    mu = tensor(zoo["mu_logp"])
    prox = mu + tensor(zoo["log_ratio_pi_over_mu"])
    turn, row = torch.arange(10), torch.zeros(10, dtype=torch.long)

    def weights(settings: CorrectionConfig) -> torch.Tensor:
        return correction.importance_weights(prox, mu, turn, row, settings).per_token

    truncated = weights(CorrectionConfig(level="token", cap=2.0))
    torch.testing.assert_close(truncated, tensor(zoo["tis_C2"]), atol=1e-9, rtol=0)
    masked = weights(CorrectionConfig(action="mask", level="token", cap=2.0, floor=0.5))
    torch.testing.assert_close(masked, tensor(zoo["mis_0.5_2"]), atol=1e-9, rtol=0)
    exact = (prox - mu).exp()
    assert correction.effective_share(exact) == pytest.approx(zoo["ess_frac"], abs=1e-9)


def measured(settings: CorrectionConfig, **changes: torch.Tensor) -> torch.Tensor:
    turn, row = indices()
    prox, mu = tensor(CASE["prox_logp"]), tensor(CASE["mu_logp"])
    given = {
        "prox": prox, "mu": mu, "advantage": tensor(CASE["adv"]), "turn": turn, "row": row,
        "counted": torch.ones_like(turn, dtype=torch.bool), "same_version": torch.tensor(CASE["token_version"]) == 5,
        "clipped": torch.zeros_like(turn, dtype=torch.bool),
    } | changes  # fmt: skip
    weights = correction.importance_weights(given["prox"], given["mu"], given["turn"], given["row"], settings)
    return correction.sums(**given, weights=weights, settings=settings)


def test_diagnostics_match_the_reference() -> None:
    settings = CorrectionConfig(level="turn", cap=2.0)
    found = correction.summary(measured(settings).tolist(), settings)
    token, turn = CASE["diagnostics_token"], CASE["diagnostics_turn_sum"]
    assert found["kl/mu_prox_k1"] == pytest.approx(token["kl_mu_prox_k1"], abs=1e-9)
    assert found["kl/mu_prox_k3"] == pytest.approx(token["kl_k3"], abs=1e-9)
    assert found["is/chi2_token"] == pytest.approx(token["chi2"], abs=1e-9)
    assert found["is/ess_frac_token"] == pytest.approx(token["ess_frac"], abs=1e-9)
    assert found["is/chi2_turn"] == pytest.approx(turn["chi2"], abs=1e-9)
    assert found["is/ess_frac_turn"] == pytest.approx(turn["ess_frac"], abs=1e-9)
    assert found["is/ess_frac"] == pytest.approx(CASE["cases"]["turn_sum_truncate"]["ess_frac"], abs=1e-9)
    assert found["is/truncated_share"] == pytest.approx(1 / 6)
    assert found["is/truncated_share_pos"] == pytest.approx(1 / 3)
    assert found["is/truncated_share_neg"] == 0


def test_engine_mismatch_is_measured_on_tokens_of_the_very_version_only() -> None:
    settings = CorrectionConfig()
    found = correction.summary(measured(settings).tolist(), settings)
    d = (tensor(CASE["prox_logp"]) - tensor(CASE["mu_logp"]))[torch.tensor(CASE["token_version"]) == 5]
    assert found["mismatch/kl_k3"] == pytest.approx(float((d.exp() - 1 - d).mean()))
    assert found["mismatch/token_share"] == pytest.approx(3 / 15)
    nothing = measured(settings, same_version=torch.zeros(2, 14, dtype=torch.bool))
    assert "mismatch/kl_k3" not in correction.summary(nothing.tolist(), settings)


def test_sums_add_up_over_micro_batches_and_a_shared_turn_counts_once() -> None:
    settings = CorrectionConfig(level="turn")
    whole = measured(settings)
    turn, _ = indices()
    top, bottom = turn.clone(), turn.clone()
    top[1], bottom[0] = -1, -1
    torch.testing.assert_close(measured(settings, turn=top) + measured(settings, turn=bottom), whole)
    again = measured(settings, turn=bottom, counted=torch.zeros_like(turn, dtype=torch.bool))
    found = dict(zip(correction.SUMS, again.tolist(), strict=True))
    assert found["token/n"] == found["turn/n"] == found["clip/n"] == 0


def test_a_sequence_weight_is_the_product_over_its_turns() -> None:
    turn, row = indices()
    prox, mu = tensor(CASE["prox_logp"]), tensor(CASE["mu_logp"])
    weights = correction.importance_weights(prox, mu, turn, row, CorrectionConfig(level="sequence", cap=1e9))
    product = torch.stack([tensor(CASE["turn_sum_logratio"])[:3].sum(), tensor(CASE["turn_sum_logratio"])[3:].sum()])
    torch.testing.assert_close(weights.per_unit, product.exp(), atol=1e-9, rtol=0)
