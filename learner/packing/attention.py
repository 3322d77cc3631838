"""Attention over packed trees (``packing.tree``): which places each place of a row attends to, on each device.

Source: ALGORITHM, section 5.  Registered with transformers under ``NAME``; the layout comes down to it through the
model's keyword arguments as ``tree_layout``.  Without one it is transformers' SDPA, so flat rows lose nothing.

Four ways to the same numbers:

- *parts*, on a CPU.  A layout is cut where its exits change: such a run of places is a *chain*.  What follows a chain
  in its subtree sees all of it, so attention is a sum of rectangles (queries of a subtree, keys of a chain) and of
  blocks with a mask along the diagonal, joined by their log-sum-exp.  Nothing outside the mask is computed, and nothing
  of size T * T is held.
- *varlen*, on CUDA in half precision: PyTorch's FlashAttention kernel over rows of many lengths, one for each path
  (``attention_varlen``).  It compiles nothing.
- *flex*, on CUDA in any precision: FlexAttention, its block mask computed from the exits, again without T * T.
- *dense*, where neither can be had: SDPA with a mask of T * T.

Shapes: B rows, T tokens of a row, H heads, D channels of a head, P = B * T places.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._triton import has_triton
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from learner.packing import attention_flex, attention_varlen
from learner.packing.attention_flex import block_mask
from learner.packing.attention_kernel import TreeAttention
from learner.packing.attention_parts import Parts
from learner.packing.attention_varlen import Runs
from learner.packing.rows import TreeLayout

NAME = "atpo_tree"
"""Of this attention in transformers' registries."""

Way = Literal["parts", "varlen", "flex", "dense"]

HALF = (torch.bfloat16, torch.float16)
FLASH_CAPABILITY = (8, 0)
"""Of the oldest CUDA devices that PyTorch's FlashAttention runs on."""


class DeviceLayout:
    """A ``TreeLayout`` on its device.  A plain object, so that no wrapper looks into it for tensors to move."""

    def __init__(self, layout: TreeLayout, device: torch.device, way: Way) -> None:
        self.way = way
        self.position_ids = torch.from_numpy(layout.position_ids).to(device)
        """int64[B, T]."""
        self.exit = torch.from_numpy(layout.exit).to(device)
        """int64[B, T]."""
        self.depth = int(layout.position_ids.max(initial=-1)) + 1
        """Tokens of the longest path."""
        self.stub = torch.zeros((1, 1, 0, 0), dtype=torch.bool, device=device)
        """Passed where transformers would build a mask.  Code that uses it as one fails."""
        self.parts = Parts.of(layout.exit, device) if way == "parts" else None
        self.runs = Runs.of(layout.exit, device, layout.filled) if way == "varlen" else None
        self._mask: Tensor | None = None
        # Made with the layout, once, for every pass over it.
        self._block_mask = block_mask(self.exit) if way == "flex" else None

    def model_arguments(self) -> dict[str, Any]:
        """The model's arguments besides its tokens."""
        return {"position_ids": self.position_ids, "attention_mask": self.stub, "tree_layout": self}

    def mask(self) -> Tensor:
        """bool[B, 1, T, T]: whether place q (third) sees place k (fourth)."""
        if self._mask is None:
            place = torch.arange(self.exit.shape[1], device=self.exit.device)
            before = place[None, :] <= place[:, None]
            self._mask = (before[None] & (place[None, :, None] < self.exit[:, None, :]))[:, None]
        return self._mask

    def block_mask(self) -> BlockMask:
        """The same for FlexAttention."""
        if self._block_mask is None:
            self._block_mask = block_mask(self.exit)
        return self._block_mask


def to_device(
    layout: TreeLayout, device: torch.device | str, *, way: Way | None = None, dtype: torch.dtype = torch.float32
) -> DeviceLayout:
    """The layout as ``Policy.forward`` takes it.  ``way``: None for the device's own; ``dtype``: of the pass."""
    device = torch.device(device)
    return DeviceLayout(layout, device, way or ways(device, dtype)[0])


def ways(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Way]:
    """How attention in ``dtype`` can be computed on ``device``, the best first."""
    if device.type == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return ["parts", "dense"]
    if device.type != "cuda":
        return ["dense"]
    found: list[Way] = ["flex"] if has_triton() else ["dense"]
    return ["varlen", *found] if dtype in HALF and _has_flash(device) else found


def _has_flash(device: torch.device) -> bool:
    built = torch.backends.cuda.is_flash_attention_available()
    return bool(built and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY)


def install(hf: Any) -> None:
    """Let a transformers model that uses SDPA use this attention, which is the same without a layout."""
    if getattr(hf.config, "_attn_implementation", None) == "sdpa" and hf._can_set_attn_implementation():
        hf.set_attn_implementation(NAME)


def obstacle(hf: Any, *, max_tokens: int) -> str | None:
    """Why a model cannot take packed trees, from its configuration and signature; None where these show no reason.

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
        NotImplementedError: the layer needs a feature that packed rows do not support.
    """
    if query.dtype != value.dtype:  # rotary positions may be in a higher precision
        query, key = query.to(value.dtype), key.to(value.dtype)
    if tree_layout is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
        return result
    if sliding_window is not None and sliding_window < tree_layout.depth:
        raise NotImplementedError(f"a sliding window of {sliding_window} tokens in a tree {tree_layout.depth} deep")
    extra = [name for name in ("s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
    if extra or dropout:
        raise NotImplementedError(f"attention with {extra[0] if extra else 'dropout'} over packed trees")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if tree_layout.runs is not None and attention_varlen.fits(query, value):
        return _by_runs(query, key, value, tree_layout.runs, scaling), None
    return _uncompiled(query, key, value, tree_layout, scaling), None


def _by_runs(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float | None) -> Tensor:
    rows, _, length, _ = query.shape
    places = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    found = attention_varlen.attend(places[0], places[1], places[2], runs, scale)
    return found.view(rows, length, *found.shape[1:])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(query: Tensor, key: Tensor, value: Tensor, layout: DeviceLayout, scale: float | None) -> Tensor:
    """[B, T, H, D], by what a compiler of the layer around it cannot look into: FlexAttention is compiled by itself."""
    if layout.way in ("varlen", "flex") and attention_flex.fits(query):
        return attention_flex.attend(query, key, value, layout.block_mask(), scale).transpose(1, 2)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if layout.parts is None or value.shape[-1] != query.shape[-1]:
        out = scaled_dot_product_attention(query, key, value, attn_mask=layout.mask(), scale=scale)
        return out.transpose(1, 2).contiguous()
    rows, _, length, _ = query.shape
    places = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    joined: Tensor = TreeAttention.apply(*places, layout.parts, scale)  # type: ignore[no-untyped-call]
    return joined.view(rows, length, *joined.shape[1:])


AttentionInterface.register(NAME, tree_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
