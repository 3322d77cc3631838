"""Attention over packed trees (``tree_packing``): what a row's place sees, on each device.

Source: ALGORITHM, section 5.  Registered with transformers under ``NAME``; the layout comes down to it through the
model's keyword arguments as ``tree_layout``.  Without one it is transformers' SDPA, so flat rows lose nothing.

Shapes: B rows, T tokens of a row, H heads.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from learner.packing import TreeLayout

NAME = "atpo_tree"
"""Of this attention in transformers' registries."""


class DeviceLayout:
    """A ``TreeLayout`` on its device.  A plain object, so that no wrapper looks into it for tensors to move."""

    def __init__(self, layout: TreeLayout, device: torch.device) -> None:
        self.position_ids = torch.from_numpy(layout.position_ids).to(device)
        """int64[B, T]."""
        self.exit = torch.from_numpy(layout.exit).to(device)
        """int64[B, T]."""
        self.depth = int(layout.position_ids.max(initial=-1)) + 1
        """Tokens of the longest path."""
        self.stub = torch.zeros((1, 1, 0, 0), dtype=torch.bool, device=device)
        """Stands where transformers would build a mask.  Whoever uses it as one fails."""
        self._mask: Tensor | None = None

    def model_arguments(self) -> dict[str, Any]:
        """What the model is called with besides its tokens."""
        return {"position_ids": self.position_ids, "attention_mask": self.stub, "tree_layout": self}

    def mask(self) -> Tensor:
        """bool[B, 1, T, T]: whether place q (third) sees place k (fourth)."""
        if self._mask is None:
            place = torch.arange(self.exit.shape[1], device=self.exit.device)
            before = place[None, :] <= place[:, None]
            self._mask = (before[None] & (place[None, :, None] < self.exit[:, None, :]))[:, None]
        return self._mask


def to_device(layout: TreeLayout, device: torch.device | str) -> DeviceLayout:
    """What ``Policy.forward`` takes."""
    return DeviceLayout(layout, torch.device(device))


def every_way(layout: TreeLayout, device: torch.device) -> list[DeviceLayout]:
    """The layout in each way that attention may be computed on ``device``, for a check of the model."""
    return [to_device(layout, device)]


def install(hf: Any) -> None:
    """Let a transformers model that uses SDPA use this attention, which is the same without a layout."""
    if getattr(hf.config, "_attn_implementation", None) == "sdpa" and hf._can_set_attn_implementation():
        hf.set_attn_implementation(NAME)


def obstacle(hf: Any, *, max_tokens: int) -> str | None:
    """Why a model cannot take packed trees, as far as its configuration and signature tell; None where they do not.

    Args:
        hf: the transformers model, after ``install``.
        max_tokens: of the longest context: a sliding window at least as long changes nothing.
    """
    config = hf.config
    if getattr(hf, "_is_stateful", False):
        return "it has recurrent layers, whose state runs through tokens in the order they stand"
    window = getattr(config, "sliding_window", None)
    slides = window is not None and window < max_tokens and getattr(config, "use_sliding_window", True)
    types = getattr(config, "layer_types", None)
    if types is not None:
        harmless = {"full_attention"} | (set() if slides else {"sliding_attention"})
        others = sorted(set(types) - harmless)
        if others:
            return f"it has layers of type {', '.join(others)}"
    elif slides:
        return f"its attention slides over {window} tokens, fewer than model.max_context_tokens = {max_tokens}"
    if "position_ids" not in inspect.signature(hf.base_model.forward).parameters:
        return "it takes no position_ids"
    if config._attn_implementation != NAME:
        return f"its attention is {config._attn_implementation!r}, which cannot be replaced"
    return None


def tree_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    tree_layout: DeviceLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, H, T, D] and so on, result [B, T, H, D].

    Raises:
        NotImplementedError: the layer wants of a packed row what it cannot have there.
    """
    if tree_layout is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
        return result
    if sliding_window is not None and sliding_window < tree_layout.depth:
        raise NotImplementedError(
            f"a sliding window of {sliding_window} tokens in a packed tree {tree_layout.depth} deep"
        )
    extra = [name for name in ("s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
    if extra or dropout:
        raise NotImplementedError(f"attention with {extra[0] if extra else 'dropout'} over packed trees")
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    out = scaled_dot_product_attention(query, key, value, attn_mask=tree_layout.mask(), scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, tree_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
