"""Guards against Accelerate changing how gradients add up, the configured precision, or that of the log-probs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from atpo_async.config import LearnerConfig
from atpo_async.core.errors import SetupError
from atpo_async.run import accelerate_environment

log = logging.getLogger("atpo.learner")


def computed_in(mixed_precision: str) -> torch.dtype:
    """Of matrix products and attention under ``learner.mixed_precision``, of a policy in float32."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]


def leave_out_environment(config: LearnerConfig) -> None:
    """Take Accelerate's variables out of this process, unless ``accelerate launch`` set them from the run's own file.

    A warning names those that are removed, except those that the launcher of plain ranks sets.
    """
    if config.accelerate_config is not None:
        other = os.environ.get("ACCELERATE_MIXED_PRECISION", config.mixed_precision)
        if other != config.mixed_precision:
            log.warning(
                "accelerate was launched with mixed precision %r; learner.mixed_precision = %r is what counts",
                other,
                config.mixed_precision,
            )
        return
    found = accelerate_environment.settings(os.environ)
    for name in found:
        del os.environ[name]
    launched = "LOCAL_RANK" in os.environ
    ignored = {k: v for k, v in found.items() if not (launched and k.startswith(accelerate_environment.LAUNCHED))}
    if ignored:
        log.warning("%s", accelerate_environment.not_heeded(ignored))


def check_half_precision(mixed_precision: str, *, on_cpu: bool) -> None:
    """Raises SetupError for fp16 on a CPU, where Accelerate would silently not use it."""
    if mixed_precision == "fp16" and on_cpu:
        raise SetupError(
            "learner.mixed_precision = 'fp16' is for a GPU, and the learner is on a CPU; use --learner.mixed_precision "
            "bf16, or no"
        )


def check_accumulation(accelerator: Accelerator) -> None:
    """Raises SetupError if Accelerate would divide gradients: micro-batches are added up by the learner itself."""
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise SetupError(
            f"accelerate would divide every gradient by {steps} (gradient_accumulation_steps, from "
            "learner.accelerate_config or the environment); set it to 1: learner.micro_batch_tokens sizes the passes"
        )


def keep_float32() -> None:
    """On CUDA, products of float32 numbers are of float32: not of TF32, which keeps 10 bits of them.

    The probe's log-probs are what engines are judged by, and those of packed trees what clips are measured on.  It is
    torch's own default, which a library may have changed, and which FlexAttention heeds only where it was set.
    """
    torch.set_float32_matmul_precision("highest")
    log.info("products of float32 numbers on CUDA are of float32, not of TF32")


def cast_as_sharded(module: nn.Module, accelerator: Accelerator) -> None:
    """Give the parameters of ``module`` the precision that sharding computes with the policy's in.

    FSDP2 casts parameters, autocast the operands of some operations: what is compared with the policy's numbers must
    come from the same casts.  Buffers stay as they are: they hold the frequencies of positions.
    """
    policy = _mixed_precision_of(accelerator)
    if policy is not None and policy.param_dtype is not None:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(policy.param_dtype)


def as_the_policy(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Computes as the wrapped policy does: with autocast, but where sharding casts parameters instead."""
    sharded = accelerator.distributed_type == DistributedType.FSDP
    return contextlib.nullcontext() if sharded else accelerator.autocast()


def _mixed_precision_of(accelerator: Accelerator) -> Any:
    """Of sharding; None without."""
    return getattr(getattr(accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)


def keep_outputs(accelerator: Accelerator) -> None:
    """Let sharding compute in half precision, but not change the policy's outputs or the precision of gradient sums.

    Accelerate's policy for FSDP2 casts the outputs of the outermost module as well: log-probs in bfloat16 move in steps
    of 0.03 nats and more, wider than any clip.
    """
    policy = _mixed_precision_of(accelerator)
    if policy is None:
        return
    plugin: Any = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def check_outputs(logprobs: Tensor) -> None:
    """Raises SetupError if what wraps the policy has cast its log-probs."""
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise SetupError(
            f"log-probs come back as {str(logprobs.dtype).removeprefix('torch.')} through what accelerate wraps the "
            "policy in (learner.accelerate_config); they must be float32: no clip is wider than their steps"
        )
