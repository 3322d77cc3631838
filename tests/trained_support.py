"""Loss and gradient of one batch under any settings of the learner, for comparisons of two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.learner_support import flat_gradient, make_batch, make_config

VERSION = 3


def trainer_of(folder: Path, **learner: object) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)  # it holds a process to one precision
    config = make_config(folder, learner=learner)
    return Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))


def trained(folder: Path, **learner: object) -> tuple[float, torch.Tensor, Trainer]:
    """Loss and gradient of a batch, which changes no weight."""
    trainer = trainer_of(folder, max_grad_norm=1e9, **learner)
    trainer.warm_up()
    found: list[torch.Tensor] = []
    optimizer: Any = trainer.optimizer
    optimizer.step = lambda: found.append(flat_gradient(trainer.policy).clone())
    loss = trainer.train(make_batch(), version=VERSION).metrics["train/loss"]
    return loss, found[0], trainer
