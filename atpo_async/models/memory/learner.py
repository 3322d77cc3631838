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
"""Logits that are held at once, and the part of a card that they may fill beyond that (``learner/policy/head.py``)."""
CARD_SHARE = 64
LOGIT_BYTES = 6
"""Of each: in float32, and its gradient in half precision."""
HEAD_BYTES = 6
"""Of each weight of the head in the backward pass: its gradient in float32, and a cast of it."""
CONTEXT_BYTES = 0.6 * 2**30
"""Of a process that uses CUDA: its context and the libraries' workspaces."""
FRAGMENTED = 0.05
"""Share of a learner's memory that its allocator holds in pieces of the wrong size."""
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 2 * 4 / 256, "offload": 0.0}
"""Of an optimizer's states on the GPU, for each trained parameter; adamw8bit has a scale for each block of 256."""
OFFLOAD_BYTES = 0.5 * 2**30
"""Of the buffers through which ``offload`` steps."""


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
"""float32 residual stream, matrix products in half precision, each product's input cast again."""
HALF = PerToken(residual=16, query=6, key=4, inner=8, norm=6)
"""All in half precision; norms keep their input in float32 besides."""
FUSED = PerToken(residual=8, query=6, key=4, inner=6, norm=2)
"""As HALF, norms, rotary embedding and activation by kernels: each keeps its input alone."""
COMPILED = PerToken(residual=4, query=2, key=2, inner=4, norm=2)
"""As HALF, in compiled layers: what products and attention give is kept, the rest is computed again."""


def per_token(memory: LearnerMemory) -> PerToken:
    """What a layer keeps under these settings."""
    if memory.precision == "no":
        return FLOAT32
    if memory.compiled:
        return COMPILED
    if memory.kernels:
        return FUSED
    return AUTOCAST if memory.precision == "fp16" else HALF


def activation_bytes(shape: ModelShape, memory: LearnerMemory, *, checkpointed: bool) -> float:
    """Of the largest forward pass; at the peak of its backward pass half a layer's gradients are beside them."""
    kept = per_token(memory).of(shape)
    boundary = (2.0 if memory.precision == "bf16" else 4.0) * shape.width
    layers = shape.layers * boundary + kept if checkpointed else shape.layers * kept
    return memory.tokens * (layers + 0.5 * kept + 3 * boundary)


def logit_bytes(shape: ModelShape, memory: LearnerMemory, card_bytes: float) -> float:
    """Of the chunk of logits that is held at once, and of the head's gradient beside it."""
    at_once = min(max(LOGITS, card_bytes / CARD_SHARE / 4), memory.tokens * shape.vocab)
    return at_once * LOGIT_BYTES + (0 if memory.lora_rank else HEAD_BYTES * shape.embedding_parameters)


def adapter_parameters(shape: ModelShape, rank: int) -> float:
    """Of LoRA's adapters at every matrix of every layer."""
    width, query, key, inner = shape.width, shape.query, shape.key, shape.inner
    attention = 2 * (width + query) + 2 * (width + key)
    return float(shape.layers * rank * (attention + 3 * (width + inner)))


def learner_parts(
    shape: ModelShape, memory: LearnerMemory, *, checkpointed: bool, card_bytes: float | None = None
) -> list[Part]:
    """Everything that one rank takes.

    Args:
        checkpointed: all layers compute their activations again; what ``auto`` becomes is the caller's to decide.
        card_bytes: of its GPU; None: on a CPU, without a CUDA context and its allocator's fragments.
    """
    weights, cast = _weight_bytes(shape, memory)
    trained = adapter_parameters(shape, memory.lora_rank) if memory.lora_rank else float(shape.parameters)
    shared = memory.ranks if memory.sharding == "parameters" else 1
    # Held in half precision where that loses nothing.
    reference = (2.0 if memory.precision == "bf16" and shape.in_half else 4.0) * shape.parameters
    parts = [
        Part("weights", weights),
        Part("gradients", 4 * trained / shared),
        Part(f"optimizer states ({memory.optimizer})", _state_bytes(memory, trained / shared)),
        Part("weights in half precision", cast),
        Part("gradients on their way to other ranks", _exchange_bytes(shape, memory, trained)),
        Part("reference policy", reference if memory.reference else 0.0),
        Part("implicit reward model", _reward_model_bytes(shape, memory, cast) if memory.reward_model else 0.0),
        Part(
            f"activations of {memory.tokens:,} tokens{', checkpointed' if checkpointed else ''}",
            activation_bytes(shape, memory, checkpointed=checkpointed),
        ),
        Part("logits and the head's gradient", logit_bytes(shape, memory, card_bytes or 0.0)),
    ]
    if card_bytes is not None:
        parts.append(Part("fragments", FRAGMENTED * sum(part.num_bytes for part in parts)))
        parts.append(Part("CUDA context of the learner", CONTEXT_BYTES))
    return [part for part in parts if part.num_bytes]


def _reward_model_bytes(shape: ModelShape, memory: LearnerMemory, cast: float) -> float:
    """Weights, gradients and AdamW's moments in float32; what ranks exchange; the copy that passes compute with."""
    return (
        (4.0 + 4.0 + STATE_BYTES["adamw"]) * shape.parameters + _exchange_bytes(shape, memory, shape.parameters) + cast
    )


def _state_bytes(memory: LearnerMemory, trained: float) -> float:
    buffers = min(OFFLOAD_BYTES, 16.0 * trained) if memory.optimizer == "offload" else 0.0
    return STATE_BYTES[memory.optimizer] * trained + buffers


def _weight_bytes(shape: ModelShape, memory: LearnerMemory) -> tuple[float, float]:
    """(the weights, the copy in half precision that passes compute with); sharded, of the layers gathered at a time."""
    shared = memory.ranks if memory.sharding == "parameters" else 1
    if not memory.lora_rank:
        weights, cast = 4.0 * shape.parameters, 2.0 * shape.parameters
    else:
        # Frozen weights stay as the files have them where passes compute in half precision.
        small = shape.in_half and memory.precision == "bf16" and shared == 1
        adapters = adapter_parameters(shape, memory.lora_rank)
        weights = (2.0 if small else 4.0) * shape.parameters + 4.0 * adapters
        cast = 2.0 * adapters if small else 2.0 * shape.parameters
    if memory.precision == "no":
        cast = 0.0
    elif shared > 1:
        cast = 2.0 * (2 * shape.layer_parameters + shape.outside_parameters)
    return weights / shared, cast


def _exchange_bytes(shape: ModelShape, memory: LearnerMemory, trained: float) -> float:
    if memory.sharding == "parameters":
        return 4.0 * (2 * shape.layer_parameters + shape.outside_parameters)
    return 4.0 * trained if memory.sharding == "ddp" else 0.0
