"""Makes whole weights of a version that came as adapters: merged into the model folder that every actor has.

Only the adapters travel (megabytes).  Engines take up whole weights by their own way, in mid-request, with exact
versions; so they need not know of adapters.
"""

from __future__ import annotations

import asyncio
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from actors.engines.base import WeightsFile
from actors.weights.copies import Copies
from atpo_async.core.dtypes import PRECISION_BYTES
from atpo_async.core.errors import SetupError, WeightsRejected
from atpo_async.core.vocabulary import Precision
from atpo_async.models import adapters, causal_lm
from atpo_async.wire.messages import TensorSpec, WeightsManifest

ALIGNMENT = 64


class Merging:
    """Merges for one actor, into files of its own.

    Args:
        run: identity of the run.
        model: folder of the weights under the adapters.
        precision: that the engine holds weights in.
    """

    def __init__(self, *, run: str, model: Path, precision: Precision) -> None:
        self._model, self._precision = model, precision
        self._copies = Copies(run)

    async def whole(self, weights: WeightsFile) -> WeightsFile:
        """The version with its adapters merged in: every tensor of the engine, at its precision.

        Raises:
            WeightsRejected: the adapters are not for this model, or were trained over other weights of it.
            NoSpace: the merged weights fit nowhere here.
        """
        manifest = weights.manifest
        try:
            await asyncio.to_thread(self._check_base, manifest)
            pairs = await asyncio.to_thread(_read, weights)
            specs, total = await asyncio.to_thread(self._layout)
            merged = msgspec.structs.replace(manifest, adapter_scale=None, total_bytes=total, tensors=specs)

            async def write(target: Path) -> None:
                await asyncio.to_thread(self._write, target, merged, pairs)

            path = await self._copies.make(merged, write, beside=weights.path.parent.parent)
        except SetupError as exc:
            raise WeightsRejected(f"weights version {manifest.version} came as adapters: {exc}") from exc
        return WeightsFile(path=path, manifest=merged)

    def close(self) -> None:
        self._copies.close()

    @cached_property
    def _checkpoint(self) -> causal_lm.Checkpoint:
        return causal_lm.examine(self._model)

    @cached_property
    def _base(self) -> str:
        return adapters.base_digest(self._model)

    def _check_base(self, manifest: WeightsManifest) -> None:
        """Raises SetupError for adapters over other weights than this actor has."""
        if manifest.adapter_base not in (None, self._base):
            raise SetupError(
                f"model.path = {str(self._model)!r} holds other weights here than the learner's model.path (digest "
                f"{self._base}, the learner's {manifest.adapter_base}); give both the same folder, or use "
                "--learner.lora.publish merged"
            )

    def _layout(self) -> tuple[tuple[TensorSpec, ...], int]:
        """Of the merged payload: what the model's files hold, and tied tensors under each of their names."""
        specs: dict[str, TensorSpec] = {}
        end = 0
        for name, shape in self._checkpoint.shapes.items():
            count = 1
            for size in shape:
                count *= size
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            end = offset + count * PRECISION_BYTES[self._precision]
            specs[name] = TensorSpec(
                name=name, dtype=self._precision, shape=shape, offset=offset, nbytes=end - offset, digest=""
            )
        for alias, other in self._checkpoint.skeleton.all_tied_weights_keys.items():
            if alias not in specs:
                specs[alias] = msgspec.structs.replace(specs[other], name=alias)
        return tuple(specs.values()), end

    def _write(self, target: Path, merged: WeightsManifest, pairs: adapters.Adapters) -> None:
        """Raises SetupError for adapters of another model, OSError."""
        places = {spec.name: spec.offset for spec in merged.tensors}
        with target.open("wb") as file:
            for name, tensor in adapters.merged_tensors(self._model, pairs):
                if name in places:
                    _put(file, places[name], tensor, self._precision)
            file.truncate(merged.total_bytes)


def _put(file: BinaryIO, offset: int, tensor: Any, precision: Precision) -> None:
    held = tensor.to(causal_lm.torch_dtype(precision)).contiguous().reshape(-1)
    file.seek(offset)
    file.write(held.view(causal_lm.torch_dtype("uint8")).numpy().data)


def _read(weights: WeightsFile) -> adapters.Adapters:
    """The adapters of a verified payload.  Raises SetupError where they are no pairs of matrices."""
    import torch

    manifest = weights.manifest
    assert manifest.adapter_scale is not None
    payload = bytearray(weights.path.read_bytes())
    found: dict[str, Any] = {}
    for spec in manifest.tensors:
        raw = torch.frombuffer(payload, dtype=torch.uint8, count=spec.nbytes, offset=spec.offset)
        found[spec.name] = raw.clone().view(causal_lm.torch_dtype(spec.dtype)).view(spec.shape)
    adapters.check_pairs(found, "the payload")
    return adapters.Adapters(scale=manifest.adapter_scale, tensors=found)
