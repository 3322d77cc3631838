"""A version's file into vLLM's workers, by way of our weight-transfer engine (``inside``)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.engines.base import WeightsFile
from actors.engines.vllm.plugin import INCOMPLETE, LOAD, READ, READ_MARK, UNTOUCHED
from atpo_async.core.errors import EngineDead, ProbeMismatch, WeightsRejected

LOOK_S = 0.002
"""Between two looks whether the worker has read a file."""


async def read_ahead(llm: Any, weights: WeightsFile) -> None:
    """Let the one worker read the file into its pinned memory, while it generates.

    Waits for: the worker's thread.  Unblocked by: its mark beside the file; the caller has a deadline.

    Raises as ``load``.
    """
    mark = Path(f"{weights.path}{READ_MARK}")
    with _named(weights, tensor_parallel_size=1):
        await llm.start_weight_update()
        await _update(llm, weights, stage=READ)
    while not _taken_away(mark):  # noqa: ASYNC110  (another process makes it)
        await asyncio.sleep(LOOK_S)


async def load(
    llm: Any, weights: WeightsFile, *, tensor_parallel_size: int, was_read: bool = False, directly: bool = True
) -> None:
    """Called while generation is paused.

    Args:
        was_read: by ``read_ahead``.
        directly: it may be copied straight into the parameters, where nothing speaks against that.

    Raises:
        WeightsRejected: nothing was touched.
        ProbeMismatch: a worker did not take up all of them.
        EngineDead: it is unknown what the workers hold.
    """
    with _named(weights, tensor_parallel_size=tensor_parallel_size):
        if not was_read:
            await llm.start_weight_update()
        await _update(llm, weights, stage=LOAD, directly=directly)
        await llm.finish_weight_update(weight_version=str(weights.manifest.version))


def _taken_away(mark: Path) -> bool:
    """Whether it was there; it is not afterwards."""
    try:
        mark.unlink()
    except FileNotFoundError:
        return False
    return True


async def _update(llm: Any, weights: WeightsFile, *, stage: str, directly: bool = True) -> None:
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
        "stage": stage,
        "directly": directly,
    }
    await llm.update_weights(WeightTransferUpdateRequest(update_info=info))


@contextlib.contextmanager
def _named(weights: WeightsFile, *, tensor_parallel_size: int) -> Iterator[None]:
    """What a worker raises, as this program's errors."""
    try:
        yield
    except TimeoutError:
        raise
    except Exception as exc:
        label, text = f"weights version {weights.manifest.version}", str(exc)
        if UNTOUCHED in text and tensor_parallel_size == 1:
            raise WeightsRejected(f"{label}: {_after(text, UNTOUCHED)}") from exc
        if UNTOUCHED in text or INCOMPLETE in text:
            raise ProbeMismatch(f"{label}: vLLM did not take up {_after(text, INCOMPLETE, UNTOUCHED)}") from exc
        raise EngineDead(f"{label}: vLLM did not load them: {text}") from exc


def _after(text: str, *marks: str) -> str:
    """What follows the first of ``marks`` that is in ``text``, to the end of its line."""
    mark = next(mark for mark in marks if mark in text)
    return text.partition(mark)[2].strip().splitlines()[0]
