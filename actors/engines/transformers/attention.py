"""Attention for requests whose keys and values lie in slots: transformers' SDPA with the mask each layer asks for.

The engine gives the model one causal mask over a slot's columns, and transformers hands a ready mask to every layer as
it is.  A layer whose attention slides over a window passes it to its attention function; here the window is cut out of
the mask.  Features that this attention does not support are refused, not ignored.

Shapes: B requests, T tokens fed to each, L columns attended over (column = position).
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "atpo_slots"
"""Of this attention in transformers' registries."""

windows_seen: ContextVar[dict[int, int | None] | None] = ContextVar("windows_seen", default=None)
"""Layer -> the window it asked for, filled in while it is set."""

_REFUSED = {"softcap": "capped logits", "s_aux": "sinks", "position_bias": "a bias by position", "cache": "paged keys"}


def slot_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it.  Raises NotImplementedError for what is more than a mask."""
    if (seen := windows_seen.get()) is not None:
        seen[int(getattr(module, "layer_idx", len(seen)))] = sliding_window
    if extra := [what for name, what in _REFUSED.items() if kwargs.get(name) is not None]:
        raise NotImplementedError(f"attention with {extra[0]}")
    if attention_mask is not None and sliding_window is not None:
        attention_mask = _within(attention_mask, sliding_window)
    result: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return result


def _within(mask: torch.Tensor, window: int) -> torch.Tensor:
    """bool[B, 1, T, L]: of what a place sees, the last ``window`` columns."""
    if window >= mask.shape[-1]:
        return mask
    column = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(mask, column, 0).amax(-1, keepdim=True)
    return mask & (column > last - window)


AttentionInterface.register(NAME, slot_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def windows_of(config: Any, *, max_tokens: int) -> list[int | None]:
    """The window of each layer that is shorter than the longest context; None for a layer that sees all of it.

    Args:
        config: of the transformers model.
        max_tokens: of the longest context.

    Raises:
        NotImplementedError: a layer's attention is of a kind that no window describes.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    slides = window is not None and window < max_tokens
    types = getattr(config, "layer_types", None)
    if types is None:
        everywhere = slides and getattr(config, "use_sliding_window", True)
        return [window if everywhere else None] * int(config.num_hidden_layers)
    chunk = getattr(config, "attention_chunk_size", None)
    known = {"full_attention", "sliding_attention"}
    if chunk is not None and chunk >= max_tokens:
        known.add("chunked_attention")
    if others := sorted(set(types) - known):
        raise NotImplementedError(f"layers of type {', '.join(others)}")
    return [window if slides and kind == "sliding_attention" else None for kind in types]
