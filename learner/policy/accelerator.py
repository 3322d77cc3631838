"""Accelerate as a run asks for it: device, precision, deadlines, and whether parameters are sharded."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from learner.policy import precision


def make_accelerator(config: Config) -> Accelerator:
    """Accelerate with this run's device, precision and deadlines.

    ``learner.device = "auto"`` takes CUDA where it is, else the CPU.

    Raises:
        SetupError: CUDA is asked for and absent; fp16 on a CPU; gradients would be divided; the file of
            ``learner.accelerate_config`` asks for something that would train otherwise than this learner says.
    """
    settings = config.learner
    precision.leave_out_environment(settings)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SetupError("learner.device = 'cuda', but torch sees no CUDA device here; use --learner.device cpu")
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    precision.check_half_precision(settings.mixed_precision, on_cpu=on_cpu)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.links.give_up_s + 60)),
        ],
    )
    precision.check_accumulation(accelerator)
    if (problem := _foreign(accelerator)) is not None:
        raise SetupError(f"learner.accelerate_config = {settings.accelerate_config!r} {problem}")
    if not on_cpu:
        precision.keep_float32()
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no rank holds whole parameters (FSDP2)."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def _foreign(accelerator: Any) -> str | None:
    """What the file for ``accelerate launch`` asks for that is not sound with this learner, and the way out."""
    state = accelerator.state
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        return (
            f"is for {kind.value}, which takes optimizer steps by itself, past the guards of this learner; use FSDP2, "
            "as configs/accelerate_fsdp.yaml does"
        )
    plugin = getattr(state, "fsdp_plugin", None) if is_sharded(accelerator) else None
    if plugin is not None and plugin.fsdp_version != 2:
        return "is for the first version of FSDP; set fsdp_version: 2 in its fsdp_config"
    if plugin is not None and plugin.activation_checkpointing:
        return "has fsdp_activation_checkpointing; set it to false: learner.gradient_checkpointing does it"
    sizes = getattr(accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if (getattr(sizes, name, 1) or 1) > 1:
            return (
                f"has {name} = {getattr(sizes, name)}, but each rank of this learner has trees of its own; set it to 1"
            )
    dynamo = getattr(state, "dynamo_plugin", None)
    if dynamo is not None and dynamo.backend != DynamoBackend.NO:
        return "has a dynamo_config; leave it out: layers are compiled by the learner itself (learner.compile)"
    return None
