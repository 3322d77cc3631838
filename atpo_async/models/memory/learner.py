"""What one rank of the learner takes of its GPU: weights, gradients, optimizer, activations, and what is beside them.

The activations are those that autograd keeps of a Qwen3 layer, counted tensor by tensor; with other decoders of equal
layers they come near.  Letters: C channels of the residual stream, Q of all query heads, K of all key heads, I of the
MLP; all bytes are of one token in one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from atpo_async.models.memory.parts import Part
from atpo_async.models.memory.settings import LearnerMemory
from atpo_async.models.memory.shape import ModelShape

LOGITS = 1 << 26
"""Logits that are held at once (``learner/policy/head.py``); with entropies half as many and their distribution."""
LOGIT_BYTES = 14
"""Of each: in half precision, in float32, their log-softmax and its gradient."""
CONTEXT_BYTES = 0.6 * 2**30
"""Of a process that uses CUDA: its context and the libraries' workspaces."""
FRAGMENTED = 0.05
"""Share of a learner's memory that its allocator holds in pieces of the wrong size."""
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "offload": 0.0}
"""Of an optimizer's states on the GPU, for each trained parameter; adamw8bit has a scale for each block of 256."""


@dataclass(frozen=True, slots=True)
class PerToken:
    """Bytes that a layer keeps for its backward pass: of one token, by the channels they grow with."""

    residual: float
    query: float
    key: float
    inner: float
    norm: float = 0.0
    """Of the channels of Q and K where queries and keys are normalised."""

    def of(self, shape: ModelShape) -> float:
        """Bytes of one token in one layer."""
        normed = (shape.query + shape.key) * self.norm if shape.qk_norm else 0.0
        return (
            self.residual * shape.width + self.query * shape.query + self.key * shape.key + self.inner * shape.inner
        ) + normed


FLOAT32 = PerToken(residual=24, query=14, key=8, inner=16, norm=8)
"""Everything in float32; each norm keeps its input and its normalised input, and the product's input."""
AUTOCAST = PerToken(residual=26, query=6, key=4, inner=8, norm=6)
"""float32 residual stream, matrix products in bfloat16, each product's input cast again."""
FUSED = PerToken(residual=8, query=6, key=4, inner=6, norm=2)
"""All in half precision, norms, rotary embedding and activation by kernels that keep their input alone."""
COMPILED = PerToken(residual=6, query=4, key=4, inner=4, norm=2)
"""As FUSED, and what is cheap is computed again instead of kept."""


def per_token(memory: LearnerMemory) -> PerToken:
    """What a layer keeps under these settings."""
    if not memory.half:
        return FLOAT32
    if memory.kernels:
        return COMPILED if memory.compiled else FUSED
    return AUTOCAST


def activation_bytes(shape: ModelShape, memory: LearnerMemory, *, checkpointed: bool) -> float:
    """Of the largest forward pass; at the peak of its backward pass half a layer's gradients are beside them."""
    kept = per_token(memory).of(shape)
    boundary = (2.0 if memory.half and memory.kernels else 4.0) * shape.width
    layers = shape.layers * boundary + kept if checkpointed else shape.layers * kept
    return memory.tokens * (layers + 0.5 * kept + 3 * boundary)


def logit_bytes(shape: ModelShape, memory: LearnerMemory) -> float:
    """Of the chunk of logits that is held at once."""
    return float(min(LOGITS, memory.tokens * shape.vocab) * LOGIT_BYTES)


def adapter_parameters(shape: ModelShape, rank: int) -> float:
    """Of LoRA's adapters at every matrix of every layer."""
    width, query, key, inner = shape.width, shape.query, shape.key, shape.inner
    attention = 2 * (width + query) + 2 * (width + key)
    return float(shape.layers * rank * (attention + 3 * (width + inner)))


def learner_parts(shape: ModelShape, memory: LearnerMemory, *, checkpointed: bool, on_gpu: bool = True) -> list[Part]:
    """Everything that one rank takes.

    Args:
        checkpointed: all layers compute their activations again; what ``auto`` becomes is the caller's to decide.
        on_gpu: with a CUDA context and casts to half precision that are kept.
    """
    shared = memory.ranks if memory.sharding == "parameters" else 1
    trained = adapter_parameters(shape, memory.lora_rank) if memory.lora_rank else float(shape.parameters)
    whole = float(shape.parameters) + (trained if memory.lora_rank else 0.0)
    gradients = memory.ranks if memory.sharding in ("parameters", "gradients") else 1
    states = memory.ranks if memory.sharding in ("parameters", "gradients", "optimizer") else 1
    parts = [
        Part("weights, float32", 4 * whole / shared),
        Part("gradients", 4 * trained / gradients),
        Part(f"optimizer states ({memory.optimizer})", STATE_BYTES[memory.optimizer] * trained / states),
        Part("weights in half precision", _cast_bytes(shape, memory) if memory.half else 0.0),
        Part("gradients on their way to other ranks", _exchange_bytes(shape, memory, trained)),
        Part("reference policy", 4.0 * shape.parameters if memory.reference else 0.0),
        Part(
            f"activations of {memory.tokens:,} tokens{', checkpointed' if checkpointed else ''}",
            activation_bytes(shape, memory, checkpointed=checkpointed),
        ),
        Part("a chunk of logits", logit_bytes(shape, memory)),
    ]
    if on_gpu:
        parts.append(Part("fragments", FRAGMENTED * sum(part.num_bytes for part in parts)))
        parts.append(Part("CUDA context of the learner", CONTEXT_BYTES))
    return [part for part in parts if part.num_bytes]


def _cast_bytes(shape: ModelShape, memory: LearnerMemory) -> float:
    """The copy that the layers compute with; sharded, of the layers that are gathered at a time."""
    if memory.sharding == "parameters":
        return 2.0 * (2 * shape.layer_parameters + shape.outside_parameters)
    return 2.0 * shape.parameters


def _exchange_bytes(shape: ModelShape, memory: LearnerMemory, trained: float) -> float:
    if memory.sharding == "parameters":
        return 4.0 * (2 * shape.layer_parameters + shape.outside_parameters)
    return 4.0 * trained if memory.sharding == "ddp" else 0.0
