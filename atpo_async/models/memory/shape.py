"""How large a model is: parameters, layers and widths, from its config.json and the headers of its weight files.

Neither torch nor transformers is needed.  A model on the Hub is not fetched: its shape is known for the names in
``PUBLISHED``, and for what the local cache holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async.core.errors import SetupError
from atpo_async.models.tensor_files import read_headers

_HEADS = ("lm_head.weight", "language_model.lm_head.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder of equal layers; parameters of tied embeddings count once."""

    parameters: int
    layer_parameters: int
    """Of one layer."""
    vocab: int
    layers: int
    width: int
    """Channels of the residual stream."""
    inner: int
    """Channels of the MLP that one token uses (with experts: of those it is sent to)."""
    query: int
    """Channels of all query heads together."""
    key: int
    """Channels of all key heads together; as many for the values."""
    qk_norm: bool
    """Queries and keys are normalised, as in Qwen3."""
    in_half: bool
    """Its files hold numbers of two bytes."""

    @property
    def embedding_parameters(self) -> int:
        """Of the embeddings alone; an untied head has as many."""
        return self.vocab * self.width

    @property
    def outside_parameters(self) -> int:
        """Of what is in no layer: embeddings, head, last norm."""
        return self.parameters - self.layers * self.layer_parameters


def of_config(said: Mapping[str, Any]) -> ModelShape:
    """From the content of a config.json.  Raises SetupError naming the field that it lacks."""
    text: Mapping[str, Any] = said.get("text_config") or said
    try:
        width, layers, heads = (
            _size(text, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
        vocab, dense = _size(text, "vocab_size"), _size(text, "intermediate_size")
        head = _size(text, "head_dim", width // heads)
        query, key = heads * head, _size(text, "num_key_value_heads", heads) * head
        experts = int(text.get("num_experts") or text.get("num_local_experts") or 0)
        each = _size(text, "moe_intermediate_size", dense) if experts else dense
        used = _size(text, "num_experts_per_tok", 1) if experts else 1
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as exc:
        raise SetupError(f"config.json gives no size of the model: {exc}") from None
    kind = str(text.get("model_type", ""))
    qk_norm = kind.startswith("qwen3")
    bias = (query + 2 * key) if kind == "qwen2" or text.get("attention_bias") else 0
    attention = 2 * width * query + 2 * width * key + bias + (2 * head if qk_norm else 0)
    layer = attention + 3 * width * each * max(1, experts) + width * experts + 2 * width
    # An untied head has weights of its own; transformers' default is a tied one.
    tied = bool(text.get("tie_word_embeddings", said.get("tie_word_embeddings", True)))
    return ModelShape(
        parameters=layers * layer + vocab * width * (1 if tied else 2) + width,
        layer_parameters=layer, vocab=vocab, layers=layers, width=width, inner=each * used, query=query, key=key,
        qk_norm=qk_norm, in_half=str(text.get("dtype") or text.get("torch_dtype") or "") in ("bfloat16", "float16"),
    )  # fmt: skip


def _size(said: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A number of a config.json, ``default`` where that gives none.

    Raises KeyError where there is neither, TypeError, ValueError or OverflowError where it is no number from 1 on.
    """
    size = default if default is not None and not said.get(name) else int(said[name])
    if size < 1:
        raise ValueError(f"{name} is {size}")
    return size


def of_folder(folder: Path) -> ModelShape:
    """From a model folder: config.json, and the parameters as its weight files have them.

    Raises SetupError where either cannot be read.
    """
    file = folder / "config.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise SetupError(f"model file {file} cannot be read: {exc}") from None
    if not isinstance(said, dict):
        raise SetupError(f"model file {file} holds no table")
    shape = of_config(said)
    headers = read_headers(folder)
    tensors = {name: math.prod(entry["shape"]) for name, entry in headers.items()}
    if said.get("tie_word_embeddings", True):
        # Some files hold the head beside the embeddings it is tied to.
        tensors = {name: size for name, size in tensors.items() if name not in _HEADS}
    total = sum(tensors.values())
    in_layers = sum(size for name, size in tensors.items() if ".layers." in name) // shape.layers
    return ModelShape(
        parameters=total, layer_parameters=in_layers or shape.layer_parameters, vocab=shape.vocab, layers=shape.layers,
        width=shape.width, inner=shape.inner, query=shape.query, key=shape.key,
        qk_norm=any(".q_norm." in name for name in tensors),
        in_half=all(entry["dtype"] in ("BF16", "F16") for entry in headers.values()),
    )  # fmt: skip


def _qwen3(width: int, inner: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, tied=False),
}
"""What decides the size of models on the Hub, as their config.json have it; ``-Base`` models have the same."""


def shape_of(path: str) -> ModelShape | None:
    """The shape of ``model.path``: of a folder here, of a name in ``PUBLISHED``, or of the Hub's cache; else None.

    Raises SetupError where a folder is there and cannot be read.
    """
    if path and (Path(path) / "config.json").is_file():
        return of_folder(Path(path))
    if (known := PUBLISHED.get(path.removesuffix("-Base"))) is not None:
        return of_config(known)
    return _of_cache(path) if "/" in path else None


def _of_cache(name: str) -> ModelShape | None:
    try:
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(name, "config.json")
    except (ImportError, ValueError):
        return None
    return of_config(json.loads(Path(file).read_text(encoding="utf-8"))) if isinstance(file, str) else None
