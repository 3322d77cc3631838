"""One thing that takes memory, and how amounts are written."""

from __future__ import annotations

from dataclasses import dataclass

GB = 2**30


@dataclass(frozen=True, slots=True)
class Part:
    """What takes memory on one GPU."""

    name: str
    num_bytes: float


def gb(num_bytes: float) -> str:
    """``12.3``: bytes as GB of 2**30, in tenths."""
    return f"{num_bytes / GB:.1f}"


def total(parts: tuple[Part, ...]) -> float:
    """Bytes of all parts."""
    return sum(part.num_bytes for part in parts)
