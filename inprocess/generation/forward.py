"""A forward pass of few operations, for models laid out as Llama, Qwen2 and Qwen3 are, in float32.

A pass of one token in each of a hundred rows of a small model takes as long as its operations are many.  Here the
projections of queries, keys and values are one product and so are gate and up; the norms' weights are multiplied into
the products that follow; and rotary embedding is one complex product, for which a head's channels are paired: channel i
stands beside channel i + D / 2, in queries as in keys, so that their products are the same.

What it computes is the model's up to rounding; the caller compares (``Decoder``), and uses the model itself otherwise.

Shapes: N tokens of a pass (B rows of T), E channels of the model, H heads, K of keys, D channels of a head, C
positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from inprocess.generation.table import KeyValueTable

MODELS = ("llama", "qwen2", "qwen3")
"""``model_type`` of the layouts."""

FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles follow from the position alone."""


class NotLaidOut(Exception):
    """The model is laid out in another way."""


@dataclass(slots=True)
class _Layer:
    """Of one layer, each matrix as it is multiplied from the right; a bias is None where the model has none."""

    qkv: Tensor
    qkv_bias: Tensor | None
    head_norm: Tensor | None
    """float[H + K, D], of queries and keys."""
    out: Tensor
    out_bias: Tensor | None
    up: Tensor
    """Gate and up."""
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class MergedForward:
    """The merged weights of a model.  Raises NotLaidOut where the model is another one than this knows.

    Args:
        model: the transformers model, whose weights are read by ``load``.
        max_tokens: positions of the longest context.
    """

    def __init__(self, model: Any, *, max_tokens: int) -> None:
        config = model.config
        _check_config(config, model.dtype)
        self._model = model
        self._heads, self._key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._channels = int(getattr(config, "head_dim", None) or config.hidden_size // self._heads)
        self._eps = float(config.rms_norm_eps)
        self._middle = int(config.intermediate_size)
        device = model.device
        self._rotation_CD = _rotations(model, max_tokens + 1, self._channels)
        column_C = torch.arange(max_tokens, device=device)
        sees_CC = column_C <= torch.arange(max_tokens + 1, device=device)[:, None]
        self._masks_CC = torch.zeros(sees_CC.shape, dtype=model.dtype, device=device).masked_fill_(~sees_CC, -torch.inf)
        self._layers: list[_Layer] = []
        self.load()

    @torch.no_grad()
    def load(self) -> None:
        """Merge the model's weights as they are now.  Raises NotLaidOut."""
        try:
            base = self._model.model
            self._embedding = base.embed_tokens.weight
            self._layers = [self._merged(layer) for layer in base.layers]
            head = self._model.get_output_embeddings()
            if head.bias is not None:
                raise NotLaidOut("its head has a bias")
            self._head = (head.weight * base.norm.weight).t().contiguous()
        except AttributeError as exc:
            raise NotLaidOut(str(exc)) from None

    def _merged(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        before, between = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        parts = [(attention.q_proj, True), (attention.k_proj, True), (attention.v_proj, False)]
        qkv = torch.cat([self._paired(part.weight) if turned else part.weight for part, turned in parts])
        biases = [
            None if part.bias is None else self._paired(part.bias) if turned else part.bias for part, turned in parts
        ]
        norms = None
        if hasattr(attention, "q_norm"):
            ones = qkv.new_ones(self._heads + self._key_heads, 1)
            norms = ones * self._paired(attention.q_norm.weight)
            norms[self._heads :] = self._paired(attention.k_norm.weight)
        return _Layer(
            qkv=(qkv * before).t().contiguous(),
            qkv_bias=_joined(biases),
            head_norm=norms,
            out=attention.o_proj.weight.t().contiguous(),
            out_bias=attention.o_proj.bias,
            up=(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * between).t().contiguous(),
            up_bias=_joined([mlp.gate_proj.bias, mlp.up_proj.bias]),
            down=mlp.down_proj.weight.t().contiguous(),
            down_bias=mlp.down_proj.bias,
        )

    def _paired(self, weight: Tensor) -> Tensor:
        """[H * D, ...] with each head's halves interleaved."""
        half = self._channels // 2
        return weight.view(-1, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)

    def run(self, table: KeyValueTable, ids_BT: Tensor, positions_BT: np.ndarray, last_B: np.ndarray | None) -> Tensor:
        """float[B, V] after one token of each row; ``table`` was told of the rows (``at``).

        Args:
            ids_BT: int64[B, T], the tokens fed.
            positions_BT: int[B, T], where they stand.
            last_B: int[B], which token of each row; None where there is one only.
        """
        rows, fed = positions_BT.shape
        positions_N = torch.from_numpy(positions_BT.reshape(-1)).to(ids_BT.device)
        length = int(positions_BT.max()) + 1
        mask = self._masks_CC[:, :length].index_select(0, positions_N).view(rows, 1, fed, length)
        groups = self._heads // self._key_heads
        if groups > 1:
            mask = mask[:, :, None].expand(rows, 1, groups, fed, length).reshape(rows, 1, groups * fed, length)
        rotation_N1D = self._rotation_CD.index_select(0, positions_N)[:, None]
        x_NE = F.embedding(ids_BT.reshape(-1), self._embedding)
        for number, layer in enumerate(self._layers):
            mixed = self._attention(number, layer, table, x_NE, rotation_N1D, mask, (rows, fed))
            x_NE = x_NE + _times(mixed, layer.out, layer.out_bias)
            both = _times(self._normed(x_NE), layer.up, layer.up_bias)
            gated = F.silu(both[:, : self._middle]).mul_(both[:, self._middle :])
            x_NE = x_NE + _times(gated, layer.down, layer.down_bias)
        if last_B is not None:
            x_NE = x_NE[torch.from_numpy(np.arange(rows) * fed + last_B).to(ids_BT.device)]
        return torch.mm(self._normed(x_NE), self._head)

    def _attention(
        self,
        number: int,
        layer: _Layer,
        table: KeyValueTable,
        x_NE: Tensor,
        rotation_N1D: Tensor,
        mask: Tensor,
        shape: Sequence[int],
    ) -> Tensor:
        heads, key_heads, channels = self._heads, self._key_heads, self._channels
        (rows, fed), groups = shape, heads // key_heads
        qkv = _times(self._normed(x_NE), layer.qkv, layer.qkv_bias).view(len(x_NE), -1, channels)
        turned = qkv[:, : heads + key_heads]
        if layer.head_norm is not None:
            turned = F.rms_norm(turned, (channels,), None, self._eps) * layer.head_norm
        pairs = torch.view_as_complex(turned.view(*turned.shape[:2], -1, 2))
        turned = torch.view_as_real(pairs * rotation_N1D).flatten(-2)
        keys, values = table.store(number, turned[:, heads:], qkv[:, heads + key_heads :])
        queries = turned[:, :heads].view(rows, fed, key_heads, groups, channels)
        queries = queries.permute(0, 2, 3, 1, 4).reshape(rows, key_heads, groups * fed, channels)
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        found = found.view(rows, key_heads, groups, fed, channels).permute(0, 3, 1, 2, 4)
        return found.reshape(len(x_NE), heads * channels)

    def _normed(self, x_NE: Tensor) -> Tensor:
        return F.rms_norm(x_NE, x_NE.shape[-1:], None, self._eps)


def _check_config(config: Any, dtype: torch.dtype) -> None:
    """Raises NotLaidOut for what ``MergedForward`` does not compute."""
    kind = getattr(config, "model_type", "")
    if kind not in MODELS:
        raise NotLaidOut(f"model_type {kind!r}")
    if dtype != torch.float32:
        raise NotLaidOut(f"weights in {dtype}")
    if config.hidden_act != "silu":
        raise NotLaidOut(f"hidden_act {config.hidden_act!r}")
    if any(each != "full_attention" for each in getattr(config, "layer_types", None) or ()):
        raise NotLaidOut("layers of several types")


def _rotations(model: Any, positions: int, channels: int) -> Tensor:
    """complex64[C, D / 2]: by what the channels of a head are turned at each position."""
    rotary: Any = getattr(model.model, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) not in FIXED_ROTARY:
        raise NotLaidOut("its rotary embedding is of another kind")
    places = torch.arange(positions, device=model.device)[None]
    with torch.no_grad():
        cos, sin = rotary(model.get_input_embeddings().weight[:1], places)
    if cos.shape[-1] != channels:
        raise NotLaidOut("some channels of a head are not turned")
    half = channels // 2
    return torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())


def _joined(biases: Sequence[Tensor | None]) -> Tensor | None:
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    if len(given) < len(biases):
        raise NotLaidOut("some of the merged projections have a bias, others have none")
    return torch.cat(given)


def _times(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix)
