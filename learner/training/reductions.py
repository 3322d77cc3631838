"""Sums, minima and concatenations over all ranks.  Every rank calls each of them at the same point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor


class Reductions:
    """The numbers of all ranks, for each of them."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    @property
    def _is_alone(self) -> bool:
        return bool(self._accelerator.num_processes == 1)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """float64, by place."""
        if self._is_alone:
            return values
        tensor = send_to_device(torch.from_numpy(values.astype(np.float64)), self._accelerator.device)
        total: np.ndarray = self._accelerator.reduce(tensor, reduction="sum").cpu().numpy()
        return total

    def sum_of(self, values: Tensor) -> list[float]:
        """A tensor's places, each added up."""
        total: list[float] = self._accelerator.reduce(values, reduction="sum").tolist()
        return total

    def gather(self, value: float) -> list[float]:
        """Each rank's number, in the order of the ranks."""
        if self._is_alone:
            return [value]
        tensor = send_to_device(torch.tensor([float(value)], dtype=torch.float64), self._accelerator.device)
        return [float(v) for v in self._accelerator.gather(tensor).tolist()]

    def least(self, value: float) -> float:
        """The smallest of all ranks' numbers."""
        return min(self.gather(value))

    def same_everywhere(self, values: Sequence[float]) -> list[float]:
        """Rank 0's numbers, on every rank."""
        if self._is_alone:
            return list(values)
        return self.sum(np.array(values if self._accelerator.is_main_process else [0.0] * len(values))).tolist()  # type: ignore[no-any-return]

    def concatenated(self, own: Tensor) -> Tensor:
        """Every rank's one-dimensional tensor, one behind the other."""
        if self._is_alone:
            return own
        sizes = [int(size) for size in self.gather(own.numel())]
        padded = torch.zeros(max([1, *sizes]), dtype=own.dtype, device=own.device)
        padded[: own.numel()] = own
        gathered = self._accelerator.gather(padded).reshape(len(sizes), -1)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
