"""Adapter folders in peft's format: what they hold, and how adapters and the weights beside them become whole weights.

An adapter of a layer is two matrices A (rank, in) and B (out, rank); the layer's whole weight is W + scale * B @ A.
Learner, actors and readers of a run merge by the one function here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async.core.errors import SetupError
from atpo_async.models.tensor_files import read_header, weight_files
from atpo_async.wire.digests import TENSOR_DIGEST_BYTES, file_digests

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""Of a tensor's name in an adapter folder; what follows is the layer's name in the transformers model."""
A, B = ".lora_A.weight", ".lora_B.weight"
"""Ends of the names of an adapter's two matrices, in folders and in the stream of weights."""

PLAIN = {
    "bias": "none", "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    "fan_in_fan_out": False, "layer_replication": None, "trainable_token_indices": None, "lora_bias": False,
    "target_parameters": None,
}  # fmt: skip
"""Settings of an adapter_config.json -> the only value (or none, or an empty one) that plain pairs of matrices have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """The adapters of a model."""

    scale: float
    tensors: Mapping[str, Any]
    """``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``, by the names of the layers in the model."""

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(name.removesuffix(A) for name in self.tensors if name.endswith(A))

    def whole(self, name: str, weight: Any) -> Any:
        """The tensor ``name`` of a model without adapters -> with its own merged in; the same one where it has none."""
        layer = name.removesuffix(".weight")
        if layer + A not in self.tensors:
            return weight
        return merge(weight, self.tensors[layer + A], self.tensors[layer + B], self.scale)


def scale_of(*, rank: int, alpha: float, rslora: bool) -> float:
    """How often the product of an adapter's matrices counts."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def merge(weight: Any, a: Any, b: Any, scale: float) -> Any:
    """float32[out, in] (float64 where the adapter is): ``weight + scale * b @ a`` on the weight's device, no gradient.

    In peft's order of operations: in float32 the bits are those of its ``merge_and_unload``.
    """
    delta = (b.detach().to(weight.device) @ a.detach().to(weight.device)) * scale
    return weight.detach().to(delta.dtype) + delta


def base_digest(folder: Path) -> str:
    """Of a model folder's weights, hex: names, precisions, shapes and every byte, in whatever files they lie.

    Adapters are merged into the weights that they were trained over, and into no others.

    Raises SetupError as ``tensor_files.read_header`` does, OSError.
    """
    from blake3 import blake3

    found: dict[str, tuple[str, list[int], str]] = {}
    for path in weight_files(folder):
        header = read_header(path)
        with path.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            offsets = [entry["data_offsets"] for entry in header.values()]
            digests = file_digests(file.fileno(), [(begin + first, end - first) for first, end in offsets])
        for (name, entry), digest in zip(header.items(), digests, strict=True):
            found[name] = entry["dtype"], entry["shape"], digest
    return str(blake3(json.dumps(sorted(found.items())).encode()).hexdigest(length=TENSOR_DIGEST_BYTES))


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read(folder: Path) -> Adapters:
    """The adapters of a folder, on the CPU, as they are stored.

    Raises:
        SetupError: a file is missing or damaged; they are more than pairs of matrices; a matrix lacks its other one.
    """
    from safetensors.torch import load_file

    said = _settings(folder)
    header = read_header(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else None
    if header is None:
        raise SetupError(f"adapter folder {folder} has no {WEIGHTS}; save the adapter in that format (save_pretrained)")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    check_pairs(tensors, f"adapter folder {folder}")
    rank, alpha = int(said["r"]), float(said["lora_alpha"])
    scale = scale_of(rank=rank, alpha=alpha, rslora=bool(said.get("use_rslora", False)))
    return Adapters(scale=scale, tensors=tensors)


def check_pairs(tensors: Mapping[str, Any], where: str) -> None:
    """Raises SetupError for anything but the two matrices of linear layers that multiply."""
    for name, tensor in tensors.items():
        end, other = (A, B) if name.endswith(A) else (B, A)
        twin = tensors.get(name.removesuffix(end) + other) if name.endswith(end) else None
        ranks = None if twin is None else {t.shape[axis] for t, axis in _by_rank(end, tensor, twin)}
        if ranks is None or len(ranks) != 1:
            raise SetupError(
                f"{where}: {name} {tuple(tensor.shape)} is no matrix of a pair {A[1:]}, {B[1:]} of a linear layer; "
                "this program takes plain LoRA adapters"
            )


def _by_rank(end: str, tensor: Any, twin: Any) -> list[tuple[Any, int]]:
    """Of two matrices, each with the axis that is the rank; none where one is no matrix."""
    if tensor.dim() != 2 or twin.dim() != 2:
        return []
    return [(tensor, 0), (twin, 1)] if end == A else [(tensor, 1), (twin, 0)]


def _settings(folder: Path) -> dict[str, Any]:
    """Raises SetupError for settings of anything but plain LoRA."""
    file = folder / CONFIG
    try:
        said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = said["peft_type"]
        if int(said["r"]) < 1 or not float(said["lora_alpha"]):
            raise ValueError("r and lora_alpha are numbers above 0")
    except OSError as exc:
        raise SetupError(f"adapter folder {folder}: {CONFIG} cannot be read: {exc.strerror}; check the path") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise SetupError(f"adapter folder {folder}: {CONFIG} is none of a LoRA adapter ({exc}); save it again") from exc
    odd = [f"{name} = {said[name]!r}" for name, value in PLAIN.items() if said.get(name) and said[name] != value]
    if kind != "LORA" or odd:
        raise SetupError(
            f"adapter folder {folder}: {CONFIG} has {', '.join(odd) or f'peft_type = {kind!r}'}; this program takes "
            "plain LoRA adapters of linear layers: merge this one into a model folder with peft (merge_and_unload)"
        )
    return said


def merged_tensors(model: Path, adapters: Adapters) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of every tensor in a model folder's files, adapters merged in; the others as they are stored.

    Raises SetupError where the files lack a layer, or it has another shape.
    """
    from safetensors import safe_open

    missing = {f"{layer}.weight" for layer in adapters.layers}
    for file in weight_files(model):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                yield name, _fitting(model, adapters, name, opened.get_tensor(name))
                missing.discard(name)
    if missing:
        raise _other_model(model, min(missing), "no such tensor")


def _fitting(model: Path, adapters: Adapters, name: str, weight: Any) -> Any:
    layer = name.removesuffix(".weight")
    if layer + A in adapters.tensors:
        wanted = (adapters.tensors[layer + B].shape[0], adapters.tensors[layer + A].shape[1])
        if tuple(weight.shape) != wanted:
            raise _other_model(model, name, f"shape {tuple(weight.shape)}, the adapter is for {wanted}")
    return adapters.whole(name, weight)


def _other_model(model: Path, name: str, what: str) -> SetupError:
    return SetupError(
        f"model.path = {str(model)!r}: {name} has an adapter, but the model folder has {what}; adapters fit the model "
        "that they were trained on only"
    )
