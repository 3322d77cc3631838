"""Pseudo-random numbers that are the same on every machine and with every version of every library.  Pure.

By splitmix64: a library's generator may change its stream, and the processes of a run must agree on an order.
"""

from __future__ import annotations

import numpy as np


def mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """uint64[N]: one pseudo-random number for each of ``numbers``, another one for every seed."""
    with np.errstate(over="ignore"):
        z = numbers.astype(np.uint64) + np.uint64(_of_seed(seed))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
        return z ^ (z >> np.uint64(31))


def _of_seed(seed: int) -> int:
    z = (seed * 0x9E37_79B9_7F4A_7C15 + 0x9E37_79B9_7F4A_7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) % 2**64
    return z ^ (z >> 27)


def shuffled(count: int, seed: int) -> np.ndarray:
    """int64[count]: 0 to count - 1 in an order that ``seed`` decides."""
    return np.argsort(mixed(np.arange(count), seed), kind="stable")
