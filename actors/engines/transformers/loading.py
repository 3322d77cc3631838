"""Weights of a version into the transformers model: read, copied, and compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from actors.engines.base import WeightsFile
from actors.engines.common.checks import TIED_HEAD
from atpo_async.core.errors import ProbeMismatch, WeightsRejected
from atpo_async.models import causal_lm

Copy = Callable[[torch.Tensor, torch.Tensor, str], None]
"""(the model's tensor, the version's, its name)."""


@torch.no_grad()
def take_up(model: Any, weights: WeightsFile, copy: Copy, *, folder: Path) -> None:
    """``folder`` is where the model was loaded from, for errors.

    Raises WeightsRejected before any tensor is changed, ProbeMismatch if one is not what it should be after.
    """
    label = f"weights version {weights.manifest.version}"
    incoming = read(weights)
    try:
        incoming = causal_lm.taken_up(model, incoming)
    except ValueError as exc:
        raise WeightsRejected(f"{label}: {exc}") from exc
    held = model.state_dict()
    if _is_tied(model) and TIED_HEAD in incoming:
        embeddings = next(n for n, t in held.items() if n != TIED_HEAD and _same(t, held[TIED_HEAD]))
        if not torch.equal(incoming[TIED_HEAD], incoming[embeddings]):
            raise WeightsRejected(f"{label}: {TIED_HEAD} differs from {embeddings}, but the model {folder} ties them")
    with causal_lm.in_one_thread():
        for name, tensor in incoming.items():
            copy(held[name], tensor, name)
        held = model.state_dict()
        wrong = [name for name, tensor in incoming.items() if not _same_bits(held[name], tensor)]
    if wrong:
        raise ProbeMismatch(
            f"{label}: after the load {wrong[0]} is not what the learner published ({len(wrong)} of {len(incoming)} "
            "tensors are not)"
        )


def copy_tensor(held: torch.Tensor, tensor: torch.Tensor, name: str) -> None:
    held.copy_(tensor)


def read(weights: WeightsFile) -> dict[str, torch.Tensor]:
    """Every tensor of the file.  Raises WeightsRejected if it cannot be read."""
    manifest = weights.manifest
    try:
        payload = torch.from_file(str(weights.path), shared=False, size=manifest.total_bytes, dtype=torch.uint8)
    except (OSError, RuntimeError) as exc:
        raise WeightsRejected(f"weights version {manifest.version}: cannot read {weights.path}: {exc}") from exc
    found: dict[str, torch.Tensor] = {}
    for spec in manifest.tensors:
        dtype = causal_lm.torch_dtype(spec.dtype)
        raw = payload[spec.offset : spec.offset + spec.nbytes]
        # Views need alignment, which the learner gives and a file need not have.
        aligned = raw if spec.offset % dtype.itemsize == 0 else raw.clone()
        found[spec.name] = aligned.view(dtype).view(spec.shape)
    return found


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _same_bits(held: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether every number is the same, NaN too."""
    bits = {4: torch.int32, 2: torch.int16}[held.element_size()]
    return torch.equal(held.contiguous().view(bits), given.to(held.device, held.dtype).view(bits))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape
