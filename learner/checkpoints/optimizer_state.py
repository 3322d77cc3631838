"""The optimizer's state as the plain tensors of a checkpoint, and back, also into an optimizer of another kind.

``<index of the parameter>.<name>`` is one tensor: ``exp_avg``, ``exp_avg_sq``, ``step``.  A moment in 8 bits is three:
``exp_avg.codes`` (uint8, in the parameter's shape), ``exp_avg.scale`` (a number for each block) and ``exp_avg.qmap``
(the value of each code).

AdamW with its moments on the device, with them on the host and in shards have the same state.  Moments in 8 bits are
made of full ones by rounding, and the other way about by taking the codes' values: no kind begins with moments of zero.
Shards in 8 bits are written as full moments, for their blocks begin anew with each shard, and are rounded again.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.checkpoints.tensors import sharded_like

log = logging.getLogger("atpo.learner")

ENTRY = frozenset({"step", "exp_avg", "exp_avg_sq"})
"""Of a parameter."""
PARTS = ("codes", "scale", "qmap")
"""Of a moment in 8 bits, as torchao's ``OptimState8bit`` calls them."""


def tensors_of(optimizer: Any) -> dict[str, Tensor]:
    """The state of an optimizer.  Where its parameters are in shards, so are the tensors."""
    found: dict[str, Tensor] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for name, value in ((name, _full(value)) for name, value in entry.items()):
            parts = {f"{name}.{part}": getattr(value, part) for part in PARTS} if _is_8bit(value) else {name: value}
            found |= {f"{index}.{key}": torch.as_tensor(part).detach().contiguous() for key, part in parts.items()}
    return found


def load_into(optimizer: Any, tensors: dict[str, Tensor]) -> None:
    """Moments and step counts from ``tensors``; rates, betas and decay are the configuration's, which may be new.

    Raises:
        KeyError, ValueError, RuntimeError: they are not of these parameters.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    in_8bit = hasattr(inner, "_new_buffer")  # torchao's: it decides by size which parameters' moments are rounded
    state: dict[int, dict[str, Any]] = {}
    changed = 0
    for index, entry in _entries(tensors).items():
        if not 0 <= index < len(parameters):
            raise ValueError(f"it has moments of parameter {index}, the policy has {len(parameters)}")
        if entry.keys() != ENTRY:
            raise ValueError(f"of parameter {index} it has {', '.join(sorted(entry))}, not {', '.join(sorted(ENTRY))}")
        parameter = parameters[index]
        state[index] = own = {}
        for name, value in entry.items():
            shape = value["codes"].shape if isinstance(value, dict) else value.shape
            if name != "step" and shape != parameter.shape:
                raise ValueError(f"{name} of parameter {index} has shape {list(shape)}, not {list(parameter.shape)}")
            if name == "step":
                own[name] = value
            elif not in_8bit:
                own[name] = sharded_like(parameter, _full(value))
                changed += isinstance(value, dict)
            else:
                own[name] = inner._new_buffer(parameter, name == "exp_avg")
                changed += _fill(own[name], value)
    if changed:
        log.warning(
            "%d moments of the checkpoint are %s: learner.optimizer was another one when it was written",
            changed,
            "rounded to 8 bits" if in_8bit else "those of 8 bits, in full precision from here on",
        )
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _full(value: Any) -> Tensor:
    """The moment itself: of its parts, and of a shard in 8 bits; anything else as it is."""
    if isinstance(value, dict):
        return _values(value)
    if isinstance(value, DTensor) and _is_8bit(local := value.to_local()):
        values = local.dequantize()
        return DTensor.from_local(
            values, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    return torch.as_tensor(value) if not _is_8bit(value) else value


def _is_8bit(value: Any) -> bool:
    return all(hasattr(value, part) for part in PARTS)


def _entries(tensors: dict[str, Tensor]) -> dict[int, dict[str, Any]]:
    """Parameter -> name -> tensor, or the parts of one in 8 bits."""
    found: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, name, *part = key.split(".")
        entry = found.setdefault(int(index), {})
        if part:
            entry.setdefault(name, {})[part[0]] = tensor
        else:
            entry[name] = tensor
    return found


def _values(parts: dict[str, Tensor]) -> Tensor:
    """float32, in the parameter's shape: the numbers that a moment in 8 bits stands for (torchao's formula).

    Raises KeyError, ValueError or RuntimeError where the parts are none of one.
    """
    codes, scale, qmap = (parts[part] for part in PARTS)
    if codes.dtype != torch.uint8 or qmap.shape != (256,):
        raise ValueError(f"a moment in 8 bits has codes of {codes.dtype} and a table of {list(qmap.shape)} values")
    return (qmap[codes.int()].view(len(scale), -1) * scale[:, None]).view(codes.shape)


def _fill(buffer: Any, value: Any) -> bool:
    """Put a moment into ``buffer``; whether that took rounding or undoing it."""
    if isinstance(buffer, DTensor):
        with torch.no_grad():
            local = buffer.to_local()  # in 8 bits where its size allows it
            shard: Any = sharded_like(buffer, _full(value))
            local.copy_(shard.to_local().to(local.device))
        return False
    if not _is_8bit(buffer):
        rounded = isinstance(value, dict)
        buffer.copy_(_values(value) if rounded else value)
        return rounded
    if isinstance(value, Tensor):
        buffer.copy_(value.to(buffer.device, torch.float32))
        return True
    same_blocks = value["scale"].shape == buffer.scale.shape and torch.equal(value["qmap"], buffer.qmap.cpu())
    if not same_blocks:  # another version of the library
        buffer.copy_(_values(value).to(buffer.device))
        return True
    for part in PARTS:
        getattr(buffer, part).copy_(value[part])
    return False
