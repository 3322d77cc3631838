"""Tensors of a checkpoint, whole in one safetensors file whatever shards the ranks hold: written and read one by one.

A rank holds a whole tensor at most for as long as it is written or read, so neither the card nor the host's memory has
to hold a second model or its moments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from atpo_async.core.dtypes import FILE_DTYPES

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""What checkpointed and compiled modules add to a parameter's name."""

_TAGS = {getattr(torch, name): tag for tag, name in FILE_DTYPES.items()}


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once, by the name that it has without wrappers; where parameters are sharded, the shards."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # After a forward pass without a backward one, the outermost parts hold copies of their whole parameters.
            part.reshard()
    return {_plain(name): parameter for name, parameter in module.named_parameters()}


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def write_tensors(path: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file.  Every rank calls it with the same names; where a tensor is in shards they wait for
    one another.

    Args:
        path: None on the ranks that write nothing.
        tensors: of any device.

    Raises:
        OSError: the file system refuses.
    """
    parts = _whole(tensors, keep=path is not None)
    fault: Exception | None = None
    try:
        if path is not None:
            _write(path, tensors, parts)
    # Any error: the other ranks gather the rest in any case, and this one has to take part.
    except Exception as exc:
        fault = exc
    for _ in parts:
        pass
    if fault is not None:
        raise fault


def _write(path: Path, tensors: Mapping[str, Tensor], parts: Iterator[Tensor]) -> None:
    with path.open("wb") as file:
        file.write(_header(tensors))
        for tensor in parts:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Wide numbers first, so that each tensor lies at a multiple of its numbers' size."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {}
    end = 0
    for name in _order(tensors):
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _TAGS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _whole(tensors: Mapping[str, Tensor], *, keep: bool) -> Iterator[Tensor]:
    """Each tensor in the file's order, whole; on the CPU where it is kept."""
    for name in _order(tensors):
        whole = _gathered(tensors[name].detach())
        yield whole.cpu().contiguous() if keep else whole


def _gathered(tensor: Tensor) -> Tensor:
    """All of it.  Waits for: every rank that holds a part."""
    if not isinstance(tensor, DTensor):
        return tensor
    kind = tensor.device_mesh.device_type
    # Offloaded shards lie in memory that the group of ranks cannot exchange.
    held: Any = tensor if tensor.device.type == kind else tensor.to(kind)
    whole: Tensor = held.full_tensor()
    return whole


def read_tensors(path: Path, like: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a safetensors file: where the one of ``like`` with its name is in shards, this rank's.

    Raises:
        OSError, SafetensorError: the file is damaged or not there.
        ValueError: a tensor has another shape than the one of ``like``.
    """
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            tensor = file.get_tensor(name)
            own = like.get(name)
            if own is not None and own.shape != tensor.shape:
                raise ValueError(f"{name} has the shape {list(tensor.shape)}, the model's has {list(own.shape)}")
            yield name, tensor if own is None else sharded_like(own, tensor)


def sharded_like(own: Tensor, whole: Tensor) -> Tensor:
    """``whole``, or this rank's shard of it where ``own`` is one.  No rank waits for another."""
    if not isinstance(own, DTensor):
        return whole
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
