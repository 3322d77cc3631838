"""The reference policy of ``objective.kl_coef``: half the memory where nothing is lost by it, and the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training import trainer as training
from learner.training.trainer import Trainer
from tests.learner_support import flat_gradient, make_batch, make_config, make_model


def in_bfloat16(folder: Path) -> Path:
    """A model folder whose weights are numbers of bfloat16."""
    hf = AutoModelForCausalLM.from_pretrained(make_model(folder, tie=False), dtype=torch.bfloat16)
    hf.save_pretrained(folder)
    return folder


def one_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], torch.Tensor, int]:
    """Metrics, gradient of the second step of two, and the bytes of the reference."""
    config = make_config(folder, learner={"lr": 1e-2}, objective={"kl_coef": 0.5})
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
    trainer.train(make_batch(), version=3)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(trainer.optimizer, "step", lambda: seen.append(flat_gradient(trainer.policy)))
    report = trainer.train(make_batch(step=1), version=3)
    reference: Any = trainer.steps.loss.reference
    parameters = getattr(reference, "policy", reference).parameters()
    return report.metrics, seen[0], sum(p.numel() * p.element_size() for p in parameters)


def test_a_reference_in_bfloat16_has_the_numbers_of_one_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_bfloat16(tmp_path)
    metrics, gradient, num_bytes = one_step(folder, monkeypatch)
    monkeypatch.setattr(training, "hold_in_half", lambda hf: (1, 1))
    expected, same, whole = one_step(folder, monkeypatch)
    assert metrics["loss/kl_reference"] > 0
    assert metrics == expected
    assert torch.equal(gradient, same)
    assert num_bytes < 0.6 * whole


def test_weights_that_bfloat16_would_round_are_held_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path)
    metrics, gradient, num_bytes = one_step(folder, monkeypatch)
    monkeypatch.setattr(training, "hold_in_half", lambda hf: (1, 1))
    expected, same, whole = one_step(folder, monkeypatch)
    assert metrics == expected
    assert torch.equal(gradient, same)
    assert num_bytes == whole
