"""What an out-of-memory error is, and what a user can do about one: named with the device and three settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from atpo_async.core.texts import shortened
from atpo_async.models.memory.advice import LORA_RANK

SAID_BY_LIBRARIES = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate",
)
"""In errors of other types than torch's own: one that the compiler has wrapped, a kernel's memory, the workspace of a
library, the CPU's allocator."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory was too small for what was asked of it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in SAID_BY_LIBRARIES)


def said(error: BaseException) -> str:
    """The first sentences of an out-of-memory error, in one line: its advice is not for this program."""
    text = " ".join(str(error).split()) or type(error).__name__
    return shortened(text.partition(" If reserved but unallocated")[0], 300)


def device_name(device: torch.device) -> str:
    """``NVIDIA H100 80GB HBM3 (79.2 GB)``."""
    if device.type != "cuda":
        return f"the {device.type.upper()}"
    found = torch.cuda.get_device_properties(device)
    return f"{found.name} ({found.total_memory / 2**30:.1f} GB)"


def ways_out(config: Config, *, of_a_pass: bool) -> str:
    """Three settings that save memory and are not made yet, for the end of a sentence.

    Args:
        of_a_pass: what a forward pass keeps is too much, besides weights, gradients and moments.
    """
    learner = config.learner
    found = []
    if of_a_pass and learner.gradient_checkpointing is False:
        found.append("--learner.gradient_checkpointing true (a third more compute)")
    if learner.mixed_precision == "no" and learner.device != "cpu":
        found.append("--learner.mixed_precision bf16")
    whole = learner.accelerate_config is None
    if learner.optimizer == "adamw":
        # Shards are not offloaded by the learner's own optimizer.
        either = "offload (moments in the host's memory) or adamw8bit" if whole else "adamw8bit"
        found.append(f"--learner.optimizer {either}")
    elif learner.optimizer == "adamw8bit" and whole:
        found.append("--learner.optimizer offload (moments in the host's memory)")
    if not learner.lora.rank:
        found.append(f"--learner.lora.rank {LORA_RANK} (only adapters are trained)")
    with_file = " with learner.accelerate_config" if whole else ""
    found.append(f"FSDP over more GPUs (learner.num_processes{with_file})")
    found.append("a GPU without an engine on it (learner.gpus and actor.gpus), or with more memory")
    found.append("a lower actor.gpu_memory_utilization")
    return f"{', '.join(found[:2])}, or {found[2]}"


@contextlib.contextmanager
def explained(what: str, config: Config, device: torch.device) -> Iterator[None]:
    """Where the block runs out of memory, which no smaller pass would mend: the error names it with the way out.

    Args:
        what: was under way, as the subject of a sentence.

    Raises:
        SetupError: the block ran out of memory.
    """
    try:
        yield
    except Exception as exc:
        if not is_out_of_memory(exc):
            raise
        raise SetupError(
            f"{what} ran out of the memory of {device_name(device)}: {said(exc)}; use "
            f"{ways_out(config, of_a_pass=False)}"
        ) from exc
