"""Which layers keep nothing but their input for the backward pass, and compute the rest again there.

The first layers do.  The backward pass reaches them last: when one of them is computed again, the later layers have
given back what they kept, so that this needs no memory of its own beside theirs.
"""

from __future__ import annotations

from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer


def layers_of(hf: Any) -> list[GradientCheckpointingLayer]:
    """The layers of a transformers model that can compute their activations again, in order."""
    return [module for module in hf.modules() if isinstance(module, GradientCheckpointingLayer)]


def enable(hf: Any, *, count: int | None = None) -> None:
    """Let a model's layers compute their activations again: all of them, or the first ``count``."""
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hf.train()  # layers do so in training only; dropout is off
    if count is not None:
        checkpoint_first(hf, count)


def checkpoint_first(hf: Any, count: int) -> None:
    """Let the first ``count`` layers of an enabled model compute their activations again, and no other."""
    for number, layer in enumerate(layers_of(hf)):
        layer.gradient_checkpointing = number < count


def checkpointed(hf: Any) -> int:
    """How many layers compute their activations again."""
    return sum(bool(layer.gradient_checkpointing and layer.training) for layer in layers_of(hf))
