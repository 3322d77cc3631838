"""Triton's interpreter as Liger-Kernel's kernels need it, small models of several families, and whole distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from learner.kernels.vocabulary import Scoring

VOCAB = 31
FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
}


def let_triton_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the interpreter what the compiler has: scalars of type float32, and the library's reciprocal root."""
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    # The interpreter replaces what `tl.math` holds while it runs a kernel, so the name is looked up there and then.
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.math.rsqrt(x))


def small_model(family: str, **changes: Any) -> Any:
    """A model of two narrow layers with random weights, norms' too."""
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    settings = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128,
        "initializer_range": 0.3, "attn_implementation": "sdpa",
    }  # fmt: skip
    made = model(config(**(settings | changes)))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return made.eval()


def dense(head: Any, hidden: Tensor, target: Tensor, scoring: Scoring) -> Tensor:
    """The same numbers from whole distributions, by what torch differentiates itself."""
    logs = (head(hidden) * scoring.scale).log_softmax(-1)
    lines = [logs.gather(-1, target[:, None])[:, 0]]
    if scoring.wanted.entropy:
        lines.append(-(logs.exp() * logs).sum(-1))
    if scoring.wanted.min_p is not None:
        chances = logs.exp().detach()
        top = chances.amax(-1)
        kept = torch.where(chances >= scoring.wanted.min_p * top[:, None], chances, 0.0).sum(-1)
        lines += [kept.log(), top.log()]
    return torch.stack(lines) if len(lines) > 1 else lines[0]
