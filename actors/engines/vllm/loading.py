"""A version's file into vLLM's workers, by way of our weight-transfer engine (``inside``)."""

from __future__ import annotations

from typing import Any

from actors.engines.base import WeightsFile
from actors.engines.vllm.plugin import INCOMPLETE, UNTOUCHED
from atpo_async.core.errors import EngineDead, ProbeMismatch, WeightsRejected


async def load(llm: Any, weights: WeightsFile, *, tensor_parallel_size: int) -> None:
    """Called while generation is paused.

    Raises:
        WeightsRejected: nothing was touched.
        ProbeMismatch: a worker did not take up all of them.
        EngineDead: it is unknown what the workers hold.
    """
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    manifest = weights.manifest
    info = {
        "path": str(weights.path.absolute()),
        "total_bytes": manifest.total_bytes,
        "names": [spec.name for spec in manifest.tensors],
        "dtypes": [spec.dtype for spec in manifest.tensors],
        "shapes": [list(spec.shape) for spec in manifest.tensors],
        "offsets": [spec.offset for spec in manifest.tensors],
        "nbytes": [spec.nbytes for spec in manifest.tensors],
    }
    try:
        await llm.start_weight_update()
        await llm.update_weights(WeightTransferUpdateRequest(update_info=info))
        await llm.finish_weight_update(weight_version=str(manifest.version))
    except TimeoutError:
        raise
    except Exception as exc:
        label, text = f"weights version {manifest.version}", str(exc)
        if UNTOUCHED in text and tensor_parallel_size == 1:
            raise WeightsRejected(f"{label}: {_after(text, UNTOUCHED)}") from exc
        if UNTOUCHED in text or INCOMPLETE in text:
            raise ProbeMismatch(f"{label}: vLLM did not take up {_after(text, INCOMPLETE, UNTOUCHED)}") from exc
        raise EngineDead(f"{label}: vLLM did not load them: {text}") from exc


def _after(text: str, *marks: str) -> str:
    """What follows the first of ``marks`` that is in ``text``, to the end of its line."""
    mark = next(mark for mark in marks if mark in text)
    return text.partition(mark)[2].strip().splitlines()[0]
