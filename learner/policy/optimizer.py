"""The optimizer of a policy, as ``learner.optimizer`` names it: where its moments lie, and in how many bits.

Moments of AdamW in float32 take 8 bytes a parameter.  ``adamw8bit`` (torchao) takes 2, and compiles its step once for
each shape; ``offload`` keeps all 8 in the host's memory.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from atpo_async.config import LearnerConfig
from atpo_async.core.errors import SetupError
from atpo_async.models.memory.learner import STATE_BYTES
from learner.memory.offloaded_adamw import MOMENTS, PIECE, OffloadedAdamW

log = logging.getLogger("atpo.learner")


def make_optimizer(
    policy: nn.Module, settings: LearnerConfig, *, device: torch.device, sharded: bool = False
) -> torch.optim.Optimizer:
    """AdamW of one kind or another; norms and biases are decayed like the rest (the default decay is 0).

    Args:
        policy: its parameters that require a gradient are optimized.
        device: where they will be.
        sharded: no rank holds whole parameters.

    Raises:
        SetupError: the kind needs a package that is missing, or does not go with sharding.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    common: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw8bit":
        rounded: torch.optim.Optimizer = _eight_bits()(parameters, **common)
        return rounded
    if settings.optimizer == "offload":
        if sharded:
            raise SetupError(
                "learner.optimizer = 'offload' with sharded parameters: FSDP has an offload of its own; set "
                f"fsdp_offload_params: true in learner.accelerate_config = {settings.accelerate_config!r}, and "
                "learner.optimizer to adamw"
            )
        if device.type == "cuda":
            return OffloadedAdamW(parameters, **common)
        log.info("learner.optimizer = 'offload' is adamw here: on a CPU all memory is the host's")
    return torch.optim.AdamW(parameters, **common, fused=not sharded)


def _eight_bits() -> Any:
    """torchao's AdamW8bit.  Raises SetupError where it cannot be loaded."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as exc:
        raise SetupError(
            f"learner.optimizer = 'adamw8bit' needs torchao, which cannot be loaded ({exc}): pip install "
            "'atpo-async[gpu]', or use --learner.optimizer offload or adamw"
        ) from exc
    return _compiled_afresh(AdamW8bit)


def _compiled_afresh(kind: Any) -> Any:
    """The optimizer without torch's cache of differentiated graphs, whose key does not tell moments in 8 bits that are
    in shards from others of that shape: a process would be given the other kind's graph from the disk."""
    from torch._functorch import config

    def step(self: Any, closure: Any = None) -> Any:
        with config.patch(enable_autograd_cache=False):
            return kind.step(self, closure)

    return type(kind.__name__, (kind,), {"step": step, "__module__": __name__})


def state_bytes(optimizer: torch.optim.Optimizer, kind: str) -> float:
    """What the moments of an optimizer that has taken no step yet will take on the device, at most, on this rank."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    local = [getattr(parameter, "to_local", lambda p=parameter: p)() for parameter in parameters]
    if kind == "offload":
        return float(2 * len(MOMENTS) * max(min(p.numel(), PIECE) * p.element_size() for p in local))
    each = STATE_BYTES[kind] if kind == "adamw8bit" else None
    return float(sum(p.numel() * (each or 2.0 * p.element_size()) for p in local))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step have this learning rate, in every group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)  # a compiled step reads it from there
        else:
            group["lr"] = rate


def groups_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's settings, group by group, as JSON has them: rates, betas, decay."""
    return [
        {
            key: value.item() if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
            if key != "params"
        }
        for group in optimizer.param_groups
    ]


def set_settings(optimizer: torch.optim.Optimizer, settings: list[dict[str, Any]]) -> None:
    """The reverse of ``groups_settings``."""
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        for key, value in own.items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
