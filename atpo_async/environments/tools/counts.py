"""Counts of what tools did, by name, until the actor takes them."""

from __future__ import annotations

from collections import Counter

MOST_NAMES = 256
"""Of different counters.  Tools are few; this bounds a slip."""


class Counts:
    """Numbers that add up under names such as ``tool/lookup/calls``."""

    def __init__(self) -> None:
        self._found: Counter[str] = Counter()

    def add(self, name: str, number: float = 1) -> None:
        if name in self._found or len(self._found) < MOST_NAMES:
            self._found[name] += number  # type: ignore[assignment]

    def take(self) -> dict[str, float]:
        """Everything since this was last called."""
        found, self._found = self._found, Counter()
        return {name: float(number) for name, number in found.items()}
