"""Which kernels a policy's model gets (``learner.kernels``), and what is said about it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._triton import has_triton

from atpo_async.core.errors import SetupError
from atpo_async.core.texts import counted
from learner.kernels import liger
from learner.kernels.kinds import GatedUnits, Kind, Norms, Rotary, is_replaced

log = logging.getLogger("atpo.learner")

Wish = Literal["auto", "liger", "none"]

PRECISIONS: dict[str, tuple[torch.dtype, ...]] = {
    "no": (torch.float32,),
    "bf16": (torch.float32, torch.bfloat16),
    "fp16": (torch.float32, torch.float16),
}
"""That activations may have, by ``learner.mixed_precision``."""


@dataclass(slots=True, kw_only=True)
class Installed:
    """What was chosen, and why."""

    name: Literal["liger", "none"]
    reason: str
    """For the log: one line."""
    compiled_head: bool
    """Whether the numbers of the output head are computed by compiled kernels."""
    counts: dict[str, int] = field(default_factory=dict)
    """Kind -> modules that got a kernel."""


def install(
    model: Any,
    wish: Wish,
    *,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    compiled: Iterable[nn.Module] = (),
) -> Installed:
    """Replace operations of a transformers model by Liger-Kernel's, in this instance alone.

    Each kind is tried against the module that it replaces before it does.  What lies inside a compiled module stays as
    it is: the compiler fuses norms, rotary embedding and activation with what stands around them, and a kernel that it
    cannot look into would cut that apart.

    Args:
        model: before it is wrapped or copied.
        wish: ``learner.kernels``.
        device: where it will run.
        dtypes: that its activations may have.
        compiled: modules that torch.compile compiles.

    Raises:
        SetupError: ``liger`` is asked for and cannot be had, for this machine or for this model.
    """
    on_cuda = _is_cuda(device)
    if wish == "none":
        return Installed(name="none", reason="none: learner.kernels = 'none'", compiled_head=False)
    own = next(model.parameters()).dtype
    compiled_head = on_cuda and own != torch.float64 and has_triton()
    obstacle = liger.obstacle(device, own)
    if obstacle is None and wish == "auto" and not on_cuda:
        obstacle = "the learner is on a CPU"
    if obstacle is not None:
        if wish == "liger":
            raise SetupError(f"learner.kernels = 'liger', but {obstacle}; or use --learner.kernels auto")
        head = "; the output head's numbers are compiled" if compiled_head else ""
        return Installed(name="none", reason=f"none: {obstacle}{head}", compiled_head=compiled_head)
    counts, faults, left = _replaced(model, device, dtypes, compiled)
    _refuse(model, wish, counts, faults, left)
    return Installed(
        name="liger", reason=_said(counts, faults, left, compiled_head), compiled_head=compiled_head, counts=counts
    )


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _replaced(
    model: Any, device: torch.device, dtypes: Sequence[torch.dtype], compiled: Iterable[nn.Module]
) -> tuple[dict[str, int], dict[str, str], int]:
    """How many modules of each kind got a kernel; which kinds did not, and why; how many are the compiler's."""
    functions = liger.functions()
    kinds: list[Kind] = [Norms(functions), Rotary(functions), GatedUnits(functions)]
    inside = {id(module) for root in compiled for module in root.modules()}
    counts: dict[str, int] = {}
    faults: dict[str, str] = {}
    left = 0
    for kind in kinds:
        checked: dict[tuple[Any, ...], str | None] = {}
        count = 0
        for module in [m for m in model.modules() if kind.takes(m)]:
            if is_replaced(module) or id(module) in inside:
                count, left = count + is_replaced(module), left + (not is_replaced(module))
                continue
            key = kind.key(module)
            if key not in checked:
                checked[key] = kind.fault(module, device, dtypes, model)
            fault = checked[key]
            if fault is None:
                module.__class__ = kind.made(module)
                count += 1
            else:
                faults[kind.name] = f"{type(module).__name__}: {fault}"
        counts[kind.name] = count
    return counts, faults, left


def _refuse(model: Any, wish: Wish, counts: dict[str, int], faults: dict[str, str], left: int) -> None:
    """Raises SetupError where kernels are asked for that this model cannot have; else warns of those left out."""
    for name, fault in faults.items():
        said = f"liger-kernel's {name} is not what this model computes ({fault})"
        if wish == "liger":
            raise SetupError(f"learner.kernels = 'liger', but {said}; use --learner.kernels auto, which leaves it out")
        log.warning("%s: left out", said)
    if wish == "liger" and not any(counts.values()) and not left:
        raise SetupError(
            f"learner.kernels = 'liger', but liger-kernel has nothing to replace in a {type(model).__name__}; use "
            "--learner.kernels none"
        )


def _said(counts: dict[str, int], faults: dict[str, str], left: int, compiled_head: bool) -> str:
    parts = [f"{name} ({counted(count, 'module')})" for name, count in counts.items() if count]
    text = f"liger: {', '.join(parts) or 'nothing'}"
    if compiled_head:
        text += "; the output head's numbers are compiled"
    if left:
        text += f"; {counted(left, 'module')} left to the compiler of their layers"
    without = [faults.get(name, f"no {name} of its form") for name in counts if name in faults or not counts[name]]
    if without and not (left and not faults):
        text += f"; left out: {', '.join(without)}"
    return text
