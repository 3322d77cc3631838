"""The implicit reward model in a checkpoint: its weights, its optimizer's moments, its counters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.checkpoints import optimizer_state
from learner.checkpoints.tensors import parameters_of, read_tensors
from learner.implicit.reward_model import ImplicitReward
from learner.policy.model import Policy

log = logging.getLogger("atpo.learner")

WEIGHTS, MOMENTS = "implicit.safetensors", "implicit-optimizer.safetensors"


def files_of(reward: ImplicitReward) -> dict[str, Mapping[str, Tensor]]:
    """File -> its tensors."""
    return {WEIGHTS: parameters_of(reward.policy), MOMENTS: optimizer_state.tensors_of(reward.optimizer)}


def counters_of(reward: ImplicitReward) -> dict[str, int]:
    """As JSON."""
    return {"updates": reward.updates, "skipped": reward.skipped}


def load_into(reward: ImplicitReward, path: Path, counters: Mapping[str, Any] | None, *, policy: Policy) -> None:
    """From the checkpoint in ``path``; of one that has none, the model begins with the policy's weights there.

    Raises:
        OSError, KeyError, ValueError, RuntimeError, SafetensorError: it is damaged, or of another model.
    """
    own = parameters_of(reward.policy)
    if counters is None:
        log.warning("checkpoint %s has no implicit reward model: it begins with the policy's weights there", path)
        with torch.no_grad():
            for name, parameter in parameters_of(policy).items():
                own[name].copy_(parameter)
        return
    left = set(own)
    with torch.no_grad():
        for name, tensor in read_tensors(path / WEIGHTS, own):
            if name not in left:
                raise ValueError(f"its parameter {name} in {WEIGHTS} is none of the model's")
            own[name].copy_(tensor)
            left.remove(name)
    if left:
        raise ValueError(f"{WEIGHTS} lacks parameters of the model: {sorted(left)[:4]}")
    optimizer_state.load_into(reward.optimizer, dict(read_tensors(path / MOMENTS, {})))
    reward.updates, reward.skipped = int(counters["updates"]), int(counters["skipped"])
