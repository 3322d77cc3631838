"""``learner.optimizer = "adamw8bit"``: its steps beside AdamW's, and its checkpoint (make test-kernels)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from atpo_async.config import LearnerConfig
from learner.checkpoints import checkpoint, optimizer_state
from learner.checkpoints.checkpoint import Progress
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.policy.optimizer import make_optimizer, set_rate
from learner.training.trainer import Trainer
from tests.learner_support import make_batch, make_config, make_model

pytestmark = pytest.mark.kernels

CPU = torch.device("cpu")


def train(kind: str, *, steps: int = 40) -> tuple[nn.Linear, torch.optim.Optimizer, float]:
    """A matrix of 8,192 numbers pulled to a target, a bias besides: the model, its optimizer, and the last loss."""
    torch.manual_seed(0)
    model, target = nn.Linear(128, 64), torch.randn(64, 128)
    optimizer = make_optimizer(model, LearnerConfig(lr=0.05, optimizer=kind), device=CPU)
    loss = torch.zeros(())
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model.weight - target).square().mean() + (model.bias - 1).square().mean()
        loss.backward()
        set_rate(optimizer, 0.05 * (1 - step / steps))
        optimizer.step()
    return model, optimizer, loss.item()


def test_eight_bits_learn_what_adamw_learns() -> None:
    (full, _, loss), (rounded, optimizer, with_8bit) = train("adamw"), train("adamw8bit")
    # The weights move by up to 1 on the way: 5 % of that is what rounding the moments may cost.
    assert (full.weight - rounded.weight).abs().max() < 0.05
    assert with_8bit < loss * 1.05
    # Short tensors are not rounded: they take the very steps of AdamW.
    torch.testing.assert_close(full.bias, rounded.bias, rtol=1e-5, atol=1e-6)
    moments = optimizer.state[rounded.weight]["exp_avg"]
    assert moments.codes.dtype == torch.uint8
    assert moments.codes.numel() + 4 * moments.scale.numel() < 1.02 * rounded.weight.numel()


def test_a_checkpoint_brings_the_eight_bits_back_exactly(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", hidden_size=256)

    def trainer() -> Trainer:
        config = make_config(folder, learner={"lr": 1e-3, "optimizer": "adamw8bit"})
        return Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))

    first, second = trainer(), trainer()
    first.train(make_batch(), version=3)
    path = checkpoint.save(tmp_path / "checkpoints", first, Progress(step=1, version=4), keep=1)
    assert isinstance(json.loads((path / "state.json").read_text())["param_groups"][0]["lr"], float)
    checkpoint.load(path, second)
    before, after = (optimizer_state.tensors_of(each.optimizer) for each in (first, second))
    assert any(name.endswith(".codes") for name in before)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    for each in (first, second):
        each.train(make_batch(step=1), version=4)
    for expected, found in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_full_moments_become_rounded_ones_and_are_never_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    full_model, full, _ = train("adamw", steps=5)
    model, rounded, _ = train("adamw8bit", steps=1)
    with caplog.at_level(logging.WARNING, "atpo.learner"):
        optimizer_state.load_into(rounded, optimizer_state.tensors_of(full))
    assert "2 moments of the checkpoint are rounded to 8 bits" in caplog.text
    expected, found = full.state[full_model.weight], rounded.state[model.weight]
    assert found["step"] == 5
    largest = expected["exp_avg"].abs().max()
    assert (found["exp_avg"].dequantize() - expected["exp_avg"]).abs().max() < 0.02 * largest
    back = make_optimizer(full_model, LearnerConfig(), device=CPU)
    optimizer_state.load_into(back, optimizer_state.tensors_of(rounded))
    assert torch.equal(back.state[full_model.weight]["exp_avg"], found["exp_avg"].dequantize())
