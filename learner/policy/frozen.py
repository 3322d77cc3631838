"""Frozen weights in bfloat16, where it loses nothing: the memory that adapters save is mostly that of the weights.

Layers compute as they do with float32 weights: under autocast in bfloat16, which casts no weight any more, and
elsewhere in the precision of what they are given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FrozenLinear(nn.Linear):
    """A linear layer whose weight may have fewer bits than what it is given."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


class FrozenEmbedding(nn.Embedding):
    """Embeddings that come out in float32, as those of float32 weights do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FrozenLinear, nn.Embedding: FrozenEmbedding}
"""The layers that hold nearly all of a model, and no others: what the model's own classes do is unknown."""


def hold_in_half(hf: Any) -> tuple[int, int]:
    """Let the model hold frozen weights of linear layers and embeddings in bfloat16 where they are numbers of it.

    Returns (bytes of all frozen weights now, bytes before).
    """
    before = _frozen_bytes(hf)
    for module in hf.modules():
        kind = KINDS.get(type(module))
        if kind is None or any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        half = module.weight.detach().to(torch.bfloat16)
        if module.weight.dtype == torch.float32 and torch.equal(half.float(), module.weight):
            module.weight.data = half  # the parameter stays the same one: it may be tied
        module.__class__ = kind
    return _frozen_bytes(hf), before


def _frozen_bytes(hf: Any) -> int:
    return sum(p.numel() * p.element_size() for p in hf.parameters() if not p.requires_grad)
