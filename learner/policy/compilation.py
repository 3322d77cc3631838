"""What torch compiles in this process: which layers, how many graphs so far, and a word where there is no end to it.

Layers are compiled once for any length (the lengths of a pass are symbols), in the same code for all of them; what is
compiled for each shape, FlexAttention, sees few shapes (``packing.lengths``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch._dynamo.utils import counters

log = logging.getLogger("atpo.learner")

VARIANTS = 64
"""Of one function, before torch falls back to the function as it stands.  Its own limit, 8, is soon met by the shapes
that FlexAttention is compiled for, each with a gradient and without; what it falls back to holds T * T."""

FIRST_BATCHES = 5
"""In which a run meets what it has to compile."""


def raise_limit() -> None:
    """Let torch keep ``VARIANTS`` of a function."""
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)


def num_graphs() -> int:
    """Graphs compiled in this process so far, those of FlexAttention included."""
    return int(counters["stats"]["unique_graphs"])


@dataclass
class Compilations:
    """Counts the graphs of a learner, batch by batch."""

    batches: int = 0
    begun_with: int = field(default_factory=num_graphs)
    reported: int = 0
    _shapes: set[tuple[int, ...]] = field(default_factory=set)
    """Of all passes so far: rows, tokens of a row."""

    @property
    def total(self) -> int:
        return num_graphs() - self.begun_with

    def after_batch(self, shapes: Iterable[tuple[int, ...]]) -> None:
        """Count a batch with passes of these shapes; warn if it still had something compiled after the first few."""
        self.batches += 1
        new = sorted(set(shapes) - self._shapes)
        self._shapes.update(new)
        more, self.reported = self.total - self.reported, self.total
        if more and self.batches > FIRST_BATCHES:
            named = ", ".join(f"{rows} x {length}" for rows, length in new[:5]) or "none that is new"
            log.warning(
                "batch %d of this process had %d more graphs compiled (%d in all), each takes seconds to a minute; "
                "shapes of passes (rows x tokens) that came for the first time: %s",
                self.batches,
                more,
                self.total,
                named,
            )
