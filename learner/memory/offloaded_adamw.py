"""AdamW whose moments lie in the host's memory and pass through the device, a piece at a time, in each step.

The update is torch's fused AdamW on the device, as that of ``learner.optimizer = "adamw"``.  Gradients never
leave the device: they add up there over the passes of a step, and are unscaled and clipped before it is known whether
the step is taken.  A library that copies gradients to the host while they are computed (torchao's CPUOffloadOptimizer)
takes them before they are clipped, once for every pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

PIECE = 1 << 25
"""Numbers of a parameter that are updated at once: the device holds the moments of two pieces, 512 MB in float32."""

SLAB_BYTES = 1 << 30
"""Pinned memory is taken in powers of two: one parameter at a time would waste up to half of it."""

MOMENTS = ("exp_avg", "exp_avg_sq")


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW with the moments of parameters that are on CUDA in pinned host memory: 8 bytes a parameter in float32.

    A step moves them to the device and back, 16 bytes a parameter over the bus, both directions at once.  On another
    device nothing moves.

    Args:
        params, lr, betas, eps, weight_decay: as AdamW's.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        # Not declared as fused: the gradient scaler would hand its scale over to this step, and leave the check to it.
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._slab: Tensor | None = None
        self._used = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; all of it is done when this returns."""
        assert closure is None
        given = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        on_cuda = [p for p, _ in given if p.is_cuda]
        way = _Pipeline(on_cuda) if on_cuda else _InPlace()
        for parameter, group in given:
            _update(parameter, self._moments_of(parameter), group, way)
        way.finish()

    def _moments_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            # Fused AdamW counts in float32, on the parameter's device.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {name: self._zeros_like(parameter) for name in MOMENTS}
        return state

    def _zeros_like(self, parameter: nn.Parameter) -> Tensor:
        if not parameter.is_cuda:
            return torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        size = parameter.numel() * parameter.element_size()
        if size > SLAB_BYTES:
            return torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=True).zero_()
        if self._slab is None or self._used + size > SLAB_BYTES:
            self._slab, self._used = torch.empty(SLAB_BYTES, dtype=torch.uint8, pin_memory=True), 0
        found = self._slab[self._used : self._used + size].view(parameter.dtype).view(parameter.shape).zero_()
        self._used += -(-size // 64) * 64
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, without moving the moments to the parameters' device on the way."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, entry in state_dict["state"].items():
            own = self._moments_of(parameters[index])
            for name, value in entry.items():
                own[name].copy_(value)


def _update(parameter: nn.Parameter, state: dict[str, Tensor], group: dict[str, Any], way: _InPlace) -> None:
    """One parameter, piece by piece."""
    assert parameter.grad is not None
    whole = (parameter.view(-1), parameter.grad.reshape(-1), *(state[name].view(-1) for name in MOMENTS))
    before = state["step"].clone()
    for begin in range(0, parameter.numel(), PIECE):
        values, slopes, *moments = (tensor[begin : begin + PIECE] for tensor in whole)
        state["step"].copy_(before)  # every piece is in the same step of the parameter
        with way.on_device(moments) as (first, second):
            _adamw(values, slopes, first, second, state["step"], group)


def _adamw(
    parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: Tensor, group: dict[str, Any]
) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        [parameter], [gradient], [first], [second], [], [step],
        fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, lr=group["lr"],
        weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip


class _InPlace:
    """Moments that lie where their parameters are."""

    @contextlib.contextmanager
    def on_device(self, moments: list[Tensor]) -> Iterator[list[Tensor]]:
        """The moments where a kernel of the parameter's device reads and writes them."""
        yield moments

    def finish(self) -> None:
        """Wait until the last moments are in the host's memory, where a checkpoint reads them."""


class _Pipeline(_InPlace):
    """Moments on their way to the device and back, each direction in a stream of its own, two pieces at a time.

    Args:
        parameters: on one CUDA device; the longest decides about the size of the buffers there.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        device = parameters[0].device
        size = max(min(p.numel(), PIECE) * p.element_size() for p in parameters)
        self._buffers = [[torch.empty(size, dtype=torch.uint8, device=device) for _ in MOMENTS] for _ in range(2)]
        self._current = torch.cuda.current_stream(device)
        self._inwards, self._outwards = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        # What the current stream did before with the buffers' memory comes first.
        self._inwards.wait_stream(self._current)
        self._free: list[torch.cuda.Event | None] = [None, None]
        self._count = 0

    @contextlib.contextmanager
    def on_device(self, moments: list[Tensor]) -> Iterator[list[Tensor]]:
        slot, self._count = self._count % 2, self._count + 1
        here = [
            buffer[: tensor.numel() * tensor.element_size()].view(tensor.dtype)
            for buffer, tensor in zip(self._buffers[slot], moments, strict=True)
        ]
        with torch.cuda.stream(self._inwards):
            if (free := self._free[slot]) is not None:
                self._inwards.wait_event(free)
            for mine, theirs in zip(here, moments, strict=True):
                mine.copy_(theirs, non_blocking=True)
        self._current.wait_stream(self._inwards)
        yield here
        with torch.cuda.stream(self._outwards):
            self._outwards.wait_stream(self._current)
            for mine, theirs in zip(here, moments, strict=True):
                theirs.copy_(mine, non_blocking=True)
            self._free[slot] = self._outwards.record_event()

    def finish(self) -> None:
        self._outwards.synchronize()
