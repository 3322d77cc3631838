"""What every engine checks: the model folder, the device, the tokens of a prompt and the weights of a new version."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from actors.engines.base import EngineSettings, WeightsFile
from atpo_async.core.dtypes import PRECISION_BYTES
from atpo_async.core.errors import GenerationFailed, SetupError, WeightsRejected
from atpo_async.models import causal_lm

TIED_HEAD = "lm_head.weight"
"""Saved checkpoints leave it out when it is tied to the embeddings; streams bring it, for engines keep a copy."""


def check_model_folder(path: Path) -> None:
    """Raises SetupError naming the path."""
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "does not exist"
        raise SetupError(f"model folder {path} {what}; give the folder of a Hugging Face model")


def pick_device(asked: str) -> str:
    """``auto`` is the GPU where there is one.  Raises SetupError if a GPU is asked for and absent."""
    import torch

    if asked not in ("auto", "cpu") and not asked.startswith("cuda"):
        raise SetupError(f"unknown device {asked!r}; use auto, cpu or cuda")
    if asked == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda" if asked == "auto" else asked
    if asked == "auto":
        return "cpu"
    raise SetupError(f"device {asked!r} was asked for, but torch sees no GPU here; use --actor.device cpu")


def check_token_ids(tokens: Sequence[int], *, vocab_size: int, request_id: str) -> None:
    """Raises GenerationFailed for an id that the model has no embedding for: it would fail its whole step."""
    low, high = min(tokens, default=0), max(tokens, default=0)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise GenerationFailed(
            f"request {request_id}: token id {bad} at {tokens.index(bad)}; this model has 0 to {vocab_size - 1}"
        )


def check_scored(
    context: Sequence[int], continuation: Sequence[int], *, max_model_len: int, vocab_size: int | None, request_id: str
) -> None:
    """Raises GenerationFailed for a continuation that cannot be scored after its context; ``vocab_size`` None: not
    known."""
    length = len(context) + len(continuation)
    if not context or not continuation or length >= max_model_len:
        raise GenerationFailed(
            f"request {request_id}: {len(continuation)} tokens to score after a context of {len(context)}; both need "
            f"one at least, and together this engine takes up to {max_model_len - 1}"
        )
    if vocab_size is not None:
        check_token_ids([*context, *continuation], vocab_size=vocab_size, request_id=request_id)


def check_stop_strings(settings: EngineSettings, *, request_id: str) -> None:
    """Raises GenerationFailed for a request with stop strings, of an engine that was started without a tokenizer."""
    if not settings.stop_strings:
        raise GenerationFailed(
            f"request {request_id} has stop strings; the engine was made without EngineSettings(stop_strings=True), "
            "for which it loads the tokenizer"
        )


def checkpoint_shapes(model_path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a published version must bring, from the folder's headers alone.

    Raises SetupError as ``causal_lm.examine``, naming what is missing, damaged or cannot be published.
    """
    return dict(causal_lm.examine(model_path).shapes)


def check_weights(weights: WeightsFile, shapes: Mapping[str, tuple[int, ...]], *, current: int) -> None:
    """What is quick to check before a swap: the version, the file's size, and every tensor's name, shape and place.

    The fetcher has hashed the bytes; hashing them again would take seconds for a large model.  A tied output head may
    be missing: whether an engine needs it, only the probe shows.  Raises WeightsRejected.
    """
    manifest = weights.manifest
    label = f"weights version {manifest.version}"
    if manifest.version < current:
        raise WeightsRejected(f"{label} is older than version {current} in use; an engine never goes back")
    by_name = {spec.name: spec for spec in manifest.tensors}
    if len(by_name) != len(manifest.tensors):
        raise WeightsRejected(f"{label}: a tensor is listed twice among {len(manifest.tensors)}")
    if missing := sorted(set(shapes) - set(by_name)):
        raise WeightsRejected(f"{label}: tensor {missing[0]} is missing ({len(missing)} of {len(shapes)} are)")
    for name, spec in by_name.items():
        expected = shapes.get(name)
        if expected is None and name != TIED_HEAD:
            raise WeightsRejected(f"{label}: tensor {name} is not part of the model")
        if expected is not None and tuple(spec.shape) != expected:
            raise WeightsRejected(f"{label}: tensor {name} has shape {tuple(spec.shape)}, the model {expected}")
        if spec.nbytes != math.prod(spec.shape) * PRECISION_BYTES[spec.dtype]:
            raise WeightsRejected(f"{label}: tensor {name} has {spec.nbytes} bytes for {spec.dtype}{spec.shape}")
        if spec.offset < 0 or spec.offset + spec.nbytes > manifest.total_bytes:
            raise WeightsRejected(f"{label}: tensor {name} ends past the payload of {manifest.total_bytes} bytes")
    try:
        size = weights.path.stat().st_size
    except OSError as exc:
        raise WeightsRejected(f"{label}: cannot read {weights.path}: {exc.strerror}") from exc
    if size != manifest.total_bytes:
        raise WeightsRejected(f"{label}: {weights.path} has {size} bytes, expected {manifest.total_bytes}")
