"""Copies the weights of a version out of training's way, at the engine's precision, so that the next step may begin.

The torch thread only starts the copies.  On a GPU they run on a stream of their own, through a small buffer on the
device, into pinned memory; the weights must not change before they are over (``Staged.until_read``), which is asked
before the next optimizer step and so, a forward and a backward pass later, costs nothing.  On a CPU the copy itself is
done at once.  Weights that training does not hold (gathered from the ranks for this purpose) are not copied at all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from atpo_async.core.dtypes import PRECISION_BYTES
from atpo_async.core.vocabulary import Precision
from atpo_async.models.causal_lm import in_one_thread, torch_dtype
from atpo_async.wire.messages import TensorSpec
from learner.policy.lora import Merged

log = logging.getLogger("atpo.learner.publisher")

ALIGNMENT = 64

CAST_ELEMENTS = 1 << 25
"""Of the buffer on the device in which weights are cast, a part at a time: 64 MB in half precision."""

POLL_S = 0.2
"""How often a wait looks whether the role has to stop."""


def layout(tensors: Mapping[str, Tensor], precision: Precision) -> tuple[tuple[TensorSpec, ...], int]:
    """Where each floating tensor lies in the payload once it has the engine's precision, still without its digest, and
    the payload's size.  Tied tensors, which are one in memory, are one in the payload."""
    specs: list[TensorSpec] = []
    held_at: dict[object, int] = {}
    end = 0
    # What is made when it is read is not made for this.
    forms = tensors.forms() if isinstance(tensors, Merged) else tensors
    for name, tensor in forms.items():
        if not tensor.is_floating_point():
            continue
        nbytes = tensor.numel() * PRECISION_BYTES[precision]
        held = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        # Of one that has no memory of its own to be told by (empty, or on no device) nothing is known.
        offset = held_at.get(held) if tensor.data_ptr() else None
        if offset is None:
            offset = held_at[held] = -(-end // ALIGNMENT) * ALIGNMENT
            end = offset + nbytes
        specs.append(
            TensorSpec(name=name, dtype=precision, shape=tuple(tensor.shape), offset=offset, nbytes=nbytes, digest="")
        )
    return tuple(specs), end


def places(specs: Sequence[TensorSpec]) -> Iterator[TensorSpec]:
    """One spec of each place of a layout, in order: tied tensors share theirs."""
    end = 0
    for spec in specs:
        if spec.offset >= end:
            end = spec.offset + spec.nbytes
            yield spec


class Staged:
    """The bytes of one version in host memory, from where any thread may write them.

    Args:
        tensors: on whatever device; kept until ``release``.
        precision: of the payload.
        buffer: uint8[total_bytes], into which the copies have been started; None: ``tensors`` themselves do not change.
        event: of the device, after the last copy; None: there is nothing to wait for.
        on_release: called once.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], precision: Precision, *, buffer: Tensor | None = None, event: Any = None,
        on_release: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.specs, self.total_bytes = layout(tensors, precision)
        self._tensors: Mapping[str, Tensor] = tensors
        self._precision = precision
        self._buffer, self._event = buffer, event
        self._on_release: Callable[[], None] | None = on_release

    def lies_in(self, buffer: Tensor, event: Any) -> None:
        """The copies have been started; both as in ``Staged``."""
        self._buffer, self._event = buffer, event

    def until_read(self) -> None:
        """Block until the weights have been read: they may change afterwards.  In any thread."""
        if self._event is not None:
            self._event.synchronize()

    def parts(self) -> Iterator[tuple[TensorSpec, memoryview]]:
        """Each place of the payload once, in order, with its bytes: little-endian, row-major.  Waits for the copies."""
        self.until_read()
        for spec in places(self.specs):
            if self._buffer is not None:
                raw = self._buffer[spec.offset : spec.offset + spec.nbytes]
            else:
                cast = self._tensors[spec.name].detach().to(device="cpu", dtype=torch_dtype(self._precision))
                raw = cast.contiguous().reshape(-1).view(torch.uint8)
            yield spec, raw.numpy().data

    def release(self) -> None:
        """The bytes are not needed any more.  Idempotent."""
        done, self._on_release = self._on_release, None
        if done is not None:
            self.until_read()
            self._tensors, self._buffer = {}, None
            done()


class Stager:
    """Makes ``Staged`` of the policy's weights, one at a time, in a buffer that it keeps.

    Args:
        precision: of the payload.
    """

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._free = threading.Event()
        self._free.set()
        self._stream: Any = None
        self._cast: Tensor | None = None
        """On the device."""

    def stage(
        self, tensors: Mapping[str, Tensor], *, copied: bool, should_stop: Callable[[], bool] = lambda: False
    ) -> Staged | None:
        """Start copying, in the torch thread.

        Waits for: the version before to have been written.  Unblocked by: its ``release``.

        Args:
            tensors: whole.
            copied: they are no part of training, and never change.
            should_stop: asked while it waits.

        Returns None if it had to stop before the buffer was free.
        """
        while not self._free.wait(POLL_S):
            if should_stop():
                return None
        self._free.clear()
        try:
            if copied:
                return Staged(tensors, self._precision, on_release=self._free.set)
            return self._copy(tensors)
        except BaseException:
            self._free.set()
            raise

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> Staged:
        staged = Staged(tensors, self._precision, on_release=self._free.set)
        specs, total = staged.specs, staged.total_bytes
        device = next((tensors[spec.name].device for spec in specs if tensors[spec.name].is_cuda), None)
        if len(self._buffer) != total:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the former one goes first
            self._buffer = _host_memory(total, pinned=device is not None)
        event = None
        if device is None:
            with in_one_thread():
                for spec in places(specs):
                    self._place(spec).copy_(tensors[spec.name].reshape(-1))
        else:
            event = self._start_copies(specs, tensors, device)
        staged.lies_in(self._buffer, event)
        return staged

    def _start_copies(self, specs: tuple[TensorSpec, ...], tensors: Mapping[str, Tensor], device: torch.device) -> Any:
        """Returns the event after the last one."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # After the optimizer step that made these weights.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            if self._cast is None:
                self._cast = torch.empty(CAST_ELEMENTS, dtype=torch_dtype(self._precision), device=device)
            for spec in places(specs):
                self._start_copy(tensors[spec.name].reshape(-1), self._place(spec), self._cast)
            # Threads that wait for it sleep.
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return event

    def _start_copy(self, source: Tensor, target: Tensor, cast: Tensor) -> None:
        """Within the stream, whose order keeps ``cast`` from being overwritten before it has been read."""
        if source.dtype == target.dtype:
            target.copy_(source, non_blocking=True)
            return
        for begin in range(0, len(source), len(cast)):
            part = source[begin : begin + len(cast)]
            there = cast[: len(part)].copy_(part)
            target[begin : begin + len(part)].copy_(there, non_blocking=True)

    def _place(self, spec: TensorSpec) -> Tensor:
        """Flat, in the buffer."""
        return self._buffer[spec.offset : spec.offset + spec.nbytes].view(torch_dtype(self._precision))


def _host_memory(size: int, *, pinned: bool) -> Tensor:
    """uint8[size]; pinned where that is asked for and to be had: copies into other memory hold their thread up."""
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as exc:
            log.warning("no %d bytes of pinned memory for the weights (%s): publishing holds training up", size, exc)
    return torch.empty(size, dtype=torch.uint8)
