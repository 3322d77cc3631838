"""A version's file as tensors inside vLLM's worker: mapped, or read ahead into pinned memory while requests run.

vLLM's worker runs one call after another, and generates nothing meanwhile.  So a GPU's worker reads the file in a
thread, before generation is paused; from pinned memory it then reaches the device at the full speed of the bus.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo

from actors.engines.vllm.plugin import LOAD, READ_MARK
from atpo_async.models.causal_lm import torch_dtype
from atpo_async.wire.digests import NUM_THREADS

READ_BYTES = 1 << 24
"""Read by one thread at a time."""

log = logging.getLogger(__name__)


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
    stage: str = LOAD
    directly: bool = True
    """It may be copied straight into the parameters."""


class Reader:
    """Reads one file ahead at a time."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        """Pinned, uint8; kept from version to version."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read weights")
        self._reading: tuple[str, Future[None]] | None = None

    def read_ahead(self, info: FileUpdateInfo) -> None:
        """Start to read; returns at once.  Raises OSError, ValueError: the file is not what the lists say."""
        payload = _mapped(info)
        _tensors(payload, info)
        self._settle()
        # Here, in the thread that has the worker's device as its own.
        if self._buffer is None or len(self._buffer) != len(payload):
            self._buffer = None
            self._buffer = pinned(len(payload))
        if self._buffer is None:
            _mark_read(info.path)
        else:
            self._reading = info.path, self._thread.submit(_read, self._buffer, info.path)

    def tensors(self, info: FileUpdateInfo) -> dict[str, torch.Tensor]:
        """By name: from what was read ahead, or mapped from the file.  Raises as ``read_ahead``."""
        ahead = self._reading is not None and self._reading[0] == info.path
        self._settle()
        payload = _mapped(info)
        if ahead and self._buffer is not None and len(self._buffer) == len(payload):
            payload = self._buffer
        return _tensors(payload, info)

    def _settle(self) -> None:
        """Waits for what is being read.  Raises what it raised."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading[1].result()

    def close(self) -> None:
        self._thread.shutdown()


def _read(buffer: torch.Tensor, path: str) -> None:
    """In several threads: vLLM lets torch's operations have one only.  Raises OSError."""
    whole = buffer.numpy().data
    try:
        with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(NUM_THREADS) as pool:
            parts = range(0, len(whole), READ_BYTES)
            list(pool.map(lambda at: _read_part(file.fileno(), whole[at : at + READ_BYTES], at), parts))
    finally:
        _mark_read(path)


def _read_part(file: int, part: memoryview, at: int) -> None:
    while part:
        count = os.preadv(file, [part], at)
        if count == 0:
            raise OSError(f"the file ends at {at}, {len(part)} bytes early")
        part, at = part[count:], at + count


def _mark_read(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # the actor has removed its folder
        Path(path + READ_MARK).touch()


def pinned(size: int) -> torch.Tensor | None:
    """uint8[size] that the device reads without a copy between; None where the system gives none."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as exc:
        log.warning("no %d bytes of pinned memory for the weights (%s): they are loaded more slowly", size, exc)
        return None


def _mapped(info: FileUpdateInfo) -> torch.Tensor:
    size = Path(info.path).stat().st_size
    if size != info.total_bytes:
        raise ValueError(f"{info.path} has {size} bytes, expected {info.total_bytes}")
    # A private mapping: nothing is read before it is used, and the file cannot be written through it.
    return torch.from_file(info.path, shared=False, size=size, dtype=torch.uint8)


def _tensors(payload: torch.Tensor, info: FileUpdateInfo) -> dict[str, torch.Tensor]:
    found = {}
    lists = zip(info.names, info.dtypes, info.shapes, info.offsets, info.nbytes, strict=True)
    for name, dtype_name, shape, offset, nbytes in lists:
        dtype = torch_dtype(dtype_name)
        if nbytes != math.prod(shape) * dtype.itemsize or offset < 0 or offset + nbytes > len(payload):
            raise ValueError(
                f"{name}: {nbytes} bytes at {offset} do not hold {dtype_name}{shape} in {len(payload)} bytes"
            )
        raw = payload[offset : offset + nbytes]
        if offset % dtype.itemsize:
            raw = raw.clone()
        found[name] = raw.view(dtype).view(shape)
    return found
