"""The settings of a configuration that decide how much memory a rank of the learner takes, with what `auto` becomes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atpo_async.config import Config
from atpo_async.config.credit_rule import reads_reference
from atpo_async.config.loss_rules import needs_of_parts

Sharding = Literal["none", "ddp", "parameters"]
"""What ranks do with the policy: there is one rank; each holds all of it; each holds its share (FSDP)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerMemory:
    """Of one rank."""

    ranks: int
    sharding: Sharding
    tokens: int
    """Of the largest forward pass."""
    precision: Literal["no", "bf16", "fp16"]
    """Of the passes, over float32 weights."""
    kernels: bool
    """Norms, rotary embedding and activation are fused (Liger-Kernel)."""
    compiled: bool
    checkpointing: bool | Literal["auto"]
    optimizer: Literal["adamw", "adamw8bit", "offload"]
    lora_rank: int
    """0: the whole model is trained."""
    reference: bool
    """A copy of the first policy is kept."""
    reward_model: bool = False
    """An implicit reward model is trained beside the policy."""


def learner_memory(config: Config, *, on_gpu: bool) -> LearnerMemory:
    """As ``config`` says, on a GPU or on a CPU."""
    learner = config.learner
    kernels, compiled, sharding = learner.kernels, learner.compile, _sharding(config)
    return LearnerMemory(
        ranks=learner.num_processes,
        sharding=sharding,
        # A pass holds one whole path at the least.
        tokens=max(learner.micro_batch_tokens, config.model.max_context_tokens),
        precision=learner.mixed_precision,
        # On a machine without one, `auto` is taken for what a GPU machine with the extra `gpu` does.
        kernels=kernels == "liger" or (kernels == "auto" and on_gpu),
        compiled=compiled == "on" or (compiled == "auto" and on_gpu and sharding != "parameters"),
        checkpointing=learner.gradient_checkpointing,
        optimizer=learner.optimizer,
        lora_rank=learner.lora.rank,
        # With adapters the reference is the model without them.
        reference=_has_reference(config) and not learner.lora.rank,
        reward_model=config.implicit_reward.enabled,
    )


def _has_reference(config: Config) -> bool:
    return bool(config.objective.kl_coef or reads_reference(config.credit) or needs_of_parts(config).reference)


def _sharding(config: Config) -> Sharding:
    """What the ranks divide, by the file of ``learner.accelerate_config`` (read as text: it is flat YAML)."""
    file = config.learner.accelerate_config
    several: Sharding = "ddp" if config.learner.num_processes > 1 else "none"
    if file is None:
        return several
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return several
    return "parameters" if re.search(r"^distributed_type:\s*['\"]?FSDP\b", text, re.MULTILINE) else several
