"""What an actor's engine takes of each of its GPUs, and what it needs at the least."""

from __future__ import annotations

from atpo_async.config import Config
from atpo_async.core.dtypes import PRECISION_BYTES
from atpo_async.models.memory.parts import GB, Part
from atpo_async.models.memory.shape import ModelShape

WORKSPACE_BYTES = 2.0 * GB
"""Of vLLM beside weights and keys: activations of a step of prompts, the sampler's logits, CUDA graphs."""
CONTEXT_BYTES = 0.6 * GB
"""Of the engine's process, where its share does not count it."""


def token_bytes(shape: ModelShape, config: Config) -> float:
    """Of one token's keys and values, on one GPU."""
    whole = 2.0 * shape.layers * shape.key * PRECISION_BYTES[config.model.dtype]
    return whole / config.actor.tensor_parallel_size


def weight_bytes(shape: ModelShape, config: Config) -> float:
    """Of the engine's weights, on one GPU; vLLM holds a tied head once."""
    return shape.parameters * PRECISION_BYTES[config.model.dtype] / config.actor.tensor_parallel_size


def least_bytes(shape: ModelShape, config: Config, *, contexts: int = 1) -> float:
    """Under which vLLM cannot start: weights, workspace, and the keys of so many full contexts."""
    keys = contexts * config.model.max_context_tokens * token_bytes(shape, config)
    return weight_bytes(shape, config) + WORKSPACE_BYTES + keys


def engine_parts(shape: ModelShape, config: Config, *, engine: str, card_bytes: float, actor: int) -> list[Part]:
    """Of one actor on one GPU of ``card_bytes``.  ``engine``: its name, ``auto`` resolved."""
    context = Part(f"CUDA context of actor {actor}", CONTEXT_BYTES)
    if engine == "transformers":
        # Each slot grows to the longest request.
        keys = config.actor.max_num_seqs * config.model.max_context_tokens * token_bytes(shape, config)
        weights = weight_bytes(shape, config) * config.actor.tensor_parallel_size
        return [Part(f"weights of actor {actor}", weights), Part(f"keys and values of actor {actor}", keys), context]
    share = config.actor.gpu_memory_utilization
    return [Part(f"engine of actor {actor}, actor.gpu_memory_utilization = {share:g}", share * card_bytes), context]
