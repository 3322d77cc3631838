"""Decides which rows are held out, and in which order rows are taken.  Pure.

Numbers are mixed here (splitmix64) and not by a library's generator, whose stream may change with its version: actors
on several machines must agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNUSABLE = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
"""Key of a row that cannot be used; it is never held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Positions of rows."""

    train: np.ndarray
    """int32[N], in file order."""
    held_out: np.ndarray


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


def order(positions: np.ndarray, seed: int) -> np.ndarray:
    """int32[N]: the same positions, shuffled by ``seed``."""
    return positions[np.argsort(mixed(np.arange(len(positions)), seed), kind="stable")].astype(np.int32)


def by_share(keys: np.ndarray, share: float) -> Parts:
    """Hold out about ``share`` of the keys, each by its own value: rows that are added later move no other.

    Where chance leaves none, the lowest key is held out.

    Args:
        keys: uint64[N], the same for rows that must be on one side.
        share: in (0, 1).
    """
    drawn = mixed(keys, 0)
    drawn[keys == UNUSABLE] = UNUSABLE
    most = max(int(share * 2**64), int(drawn.min()) + 1)
    held = (drawn < np.uint64(min(most, int(UNUSABLE)))) & (keys != UNUSABLE)
    return Parts(train=_positions(~held), held_out=_positions(held))


def without(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """int32[M]: positions of the keys that are not among ``others``."""
    return _positions(~np.isin(keys, others[others != UNUSABLE]))


def _positions(chosen: np.ndarray) -> np.ndarray:
    return np.flatnonzero(chosen).astype(np.int32)
