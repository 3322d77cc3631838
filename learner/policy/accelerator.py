"""Accelerate as a run asks for it: device, precision, deadlines, and whether parameters are sharded."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from learner.policy import precision

SHARDED: tuple[Any, ...] = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Where no rank holds whole parameters.  These paths have not been measured on GPUs."""


def make_accelerator(config: Config) -> Accelerator:
    """Accelerate with this run's device, precision and deadlines.

    ``learner.device = "auto"`` takes CUDA where it is, else the CPU.

    Raises:
        SetupError: CUDA is asked for and absent; fp16 on a CPU; gradients would be divided.
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
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type in SHARDED
