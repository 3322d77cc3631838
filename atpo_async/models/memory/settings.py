"""The settings of a configuration that decide how much memory a rank of the learner takes, with what `auto` becomes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atpo_async.config import Config
from atpo_async.run.installed import version_of

Sharding = Literal["none", "ddp", "optimizer", "gradients", "parameters"]
"""What ranks divide among themselves: nothing, or DeepSpeed's stages 1, 2 and 3; FSDP is the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerMemory:
    """Of one rank."""

    ranks: int
    sharding: Sharding
    tokens: int
    """Of the largest forward pass."""
    half: bool
    """Layers compute in half precision over float32 masters."""
    kernels: bool
    """Norms, rotary embedding and activation are fused (Liger-Kernel)."""
    compiled: bool
    checkpointing: bool | Literal["auto"]
    optimizer: Literal["adamw", "adamw8bit", "offload"]
    lora_rank: int
    """0: the whole model is trained."""
    reference: bool
    """A copy of the first policy is kept."""
    entropy: bool


def learner_memory(config: Config, *, on_gpu: bool) -> LearnerMemory:
    """As ``config`` says, on a GPU or on a CPU."""
    learner = config.learner
    lora_rank = int(getattr(getattr(learner, "lora", None), "rank", 0) or 0)
    kernels, compiled = getattr(learner, "kernels", "none"), getattr(learner, "compile", "off")
    return LearnerMemory(
        ranks=learner.num_processes,
        sharding=_sharding(config),
        # A pass holds one whole path at the least.
        tokens=max(learner.micro_batch_tokens, config.model.max_context_tokens),
        half=learner.mixed_precision != "no",
        kernels=kernels == "liger" or (kernels == "auto" and on_gpu and version_of("liger-kernel") is not None),
        compiled=compiled == "on" or (compiled == "auto" and on_gpu),
        checkpointing=learner.gradient_checkpointing,
        optimizer=getattr(learner, "optimizer", "adamw"),
        lora_rank=lora_rank,
        # With adapters the reference is the model without them.
        reference=config.objective.kl_coef > 0 and not lora_rank,
        entropy=config.objective.entropy_coef > 0,
    )


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
    kind = re.search(r"^distributed_type:\s*['\"]?(\w+)", text, re.MULTILINE)
    if kind is None or kind[1] not in ("FSDP", "DEEPSPEED"):
        return several
    if kind[1] == "FSDP":
        return "parameters"
    stage = re.search(r"^\s*zero_stage:\s*(\d)", text, re.MULTILINE)
    stages: dict[str, Sharding] = {"1": "optimizer", "2": "gradients", "3": "parameters"}
    return stages.get(stage[1], several) if stage else several
