"""Decides which rows are held out, and in which order rows are taken: the same for every process of a run.  Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atpo_async.core.shuffling import mixed, shuffled

UNUSABLE = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
"""Key of a row that cannot be used; it is never held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Positions of rows."""

    train: np.ndarray
    """int32[N], in file order."""
    held_out: np.ndarray


def order(positions: np.ndarray, seed: int) -> np.ndarray:
    """int32[N]: the same positions, shuffled by ``seed``."""
    found: np.ndarray = positions[shuffled(len(positions), seed)].astype(np.int32)
    return found


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
