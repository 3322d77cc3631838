"""How many layers must be computed twice so that the largest pass fits, from passes that are measured at the start.

On CUDA, for ``learner.gradient_checkpointing = "auto"``.  The largest pass runs with every layer computed twice, which
takes least; a small one with none and with half of them computed twice shows what a layer keeps, which grows with the
tokens.  Of the memory that is free, the optimizer's moments and an engine's share on the same GPU are set aside.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from accelerate.utils.memory import clear_device_cache

from atpo_async.config import Config
from atpo_async.models.memory.cards import places
from learner.memory.checkpointed_layers import layers_of
from learner.memory.fitting import Failed, Fitting
from learner.memory.out_of_memory import is_out_of_memory, said

MARGIN = 0.06
"""Of the card, which stays free: for fragments, and for what a real pass has besides a made-up one."""

LEAST_TOKENS = 64
"""Of a pass that is tried."""

SMALL = 8
"""The small pass has this part of the tokens."""

log = logging.getLogger("atpo.learner")


class Meter(Protocol):
    """Measures a device's memory, in bytes."""

    def peak(self, run: Callable[[], None]) -> float:
        """What ``run`` takes besides what is there before it."""

    def available(self) -> float:
        """What it may take."""


class CudaMeter:
    """Measures a CUDA device.

    Args:
        device: where the policy and its gradients are.
        set_aside: bytes that will be taken there by others than the passes: the optimizer's moments.
        engines: share of the card that engines on it may take, whether or not they have it yet.
    """

    def __init__(self, device: torch.device, *, set_aside: float, engines: float) -> None:
        self._device, self._set_aside, self._engines = device, set_aside, engines

    def peak(self, run: Callable[[], None]) -> float:
        clear_device_cache(garbage_collection=True)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return float(torch.cuda.max_memory_allocated(self._device) - before)

    def available(self) -> float:
        clear_device_cache(garbage_collection=True)
        free, total = torch.cuda.mem_get_info(self._device)
        ours = torch.cuda.memory_allocated(self._device)
        return min(free, total * (1 - self._engines) - ours) - self._set_aside - MARGIN * total


def share_of_engines(config: Config, rank: int) -> float:
    """Of the GPU of this rank: what vLLM engines of the same run may take of it."""
    if config.actor.engine not in ("auto", "vllm"):
        return 0.0
    gpu = config.learner.gpus[rank] if config.learner.gpus else rank
    beside = [role for role, gpus in places(config) if role.startswith("actor") and gpu in gpus]
    return min(1.0, config.actor.gpu_memory_utilization * len(beside))


def layers_needed(*, layers: int, all_twice: float, kept_by_layer: float, available: float) -> int:
    """The fewest of ``layers`` to compute twice; all of them where even that may not do.

    Args:
        layers: of the model.
        all_twice: bytes of the largest pass with all of them computed twice.
        kept_by_layer: bytes that a layer keeps besides, where it is not.
        available: bytes that are free.
    """
    if kept_by_layer <= 0:
        return 0 if all_twice <= available else layers
    return layers - max(0, min(layers, int((available - all_twice) / kept_by_layer)))


def choose_layers(
    fitting: Fitting, meter: Meter, run: Callable[[int], None], largest: Callable[[float], float]
) -> None:
    """Let as few layers be computed twice as memory allows.  Every rank calls it.

    Args:
        fitting: gets the choice; its micro-batch becomes smaller if the largest pass does not fit in any way.
        meter: of the device.
        run: forward and backward of a made-up pass of so many tokens.
        largest: of a number of each rank.

    Raises:
        SetupError, OutOfMemory: as ``Fitting.make_smaller``.
    """
    layers, kept = len(layers_of(fitting.hf)), fitting.checkpointed_layers
    if not layers:
        log.info("learner.gradient_checkpointing = 'auto': this model has no layers that can be computed twice")
        return
    all_twice = _least(fitting, meter, run, layers)
    tokens = fitting.micro_batch_tokens
    small = max(min(tokens, LEAST_TOKENS), tokens // SMALL)
    half = (layers + 1) // 2
    try:
        fitting.checkpoint(0)
        without = meter.peak(lambda: run(small))
        fitting.checkpoint(half)
        by_layer = (without - meter.peak(lambda: run(small))) / half * tokens / small
        available = meter.available()
        needed = layers_needed(layers=layers, all_twice=all_twice, kept_by_layer=by_layer, available=available)
    except Exception as exc:
        if not is_out_of_memory(exc):
            raise
        by_layer, available, needed = float("inf"), 0.0, layers
    needed = int(largest(max(needed, kept)))
    fitting.checkpoint(needed)
    log.info(
        "%d of %d layers are computed twice (learner.gradient_checkpointing = 'auto'): a pass of %d tokens takes %.1f "
        "GB with all of them so, and %.2f GB more for each that is not; %.1f GB are free for it",
        needed, layers, tokens, all_twice / 2**30, by_layer / 2**30, available / 2**30,
    )  # fmt: skip


def _least(fitting: Fitting, meter: Meter, run: Callable[[int], None], layers: int) -> float:
    """Bytes of the largest pass with all layers computed twice; of a smaller one where it does not fit."""
    while True:
        fitting.checkpoint(layers)
        tokens = fitting.micro_batch_tokens
        try:
            return meter.peak(partial(run, tokens))
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            words = said(exc)
        fitting.make_smaller(Failed(tokens=tokens, longest_path=LEAST_TOKENS), words)
