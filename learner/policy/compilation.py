"""What torch compiles in this process: which layers, how many graphs so far, and a word where there is no end to it.

Each layer is one graph (``learner.compile``): attention by runs stands in it as an operator, other ways of it cut it in
two.  A graph is for any length of a pass and any number of leaves, and for all layers alike; there is one more without
a gradient, and one for passes of several rows.  What is compiled for each shape, FlexAttention, sees few shapes
(``packing.lengths``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from torch._dynamo.utils import counters

from atpo_async.config import LearnerConfig
from learner.memory.out_of_memory import is_out_of_memory

log = logging.getLogger("atpo.learner")

BACKEND = "inductor"

SMALL_LAYER = 1_000_000
"""Parameters below which a layer is not compiled unasked: a minute of compiling is more than it would ever save."""

FIRST_BATCHES = 5
"""In which a run meets what it has to compile."""


def chosen(model: Any, settings: LearnerConfig, *, device: torch.device, sharded: bool) -> tuple[list[nn.Module], str]:
    """The layers of a transformers model that a run compiles, and why these, or none."""
    if settings.compile == "off":
        return [], "none: learner.compile = 'off'"
    if settings.compile == "auto" and device.type != "cuda":
        return [], "none: the learner is on a CPU"
    if settings.compile == "auto" and sharded:
        return [], "none: parameters are sharded (--learner.compile on compiles all the same)"
    found = layers(model)
    if not found:
        return [], f"none: {type(model).__name__} does not name its layers"
    size = sum(parameter.numel() for parameter in found[0].parameters())
    if settings.compile == "auto" and size < SMALL_LAYER:
        return [], f"none: layers of {size} parameters are too small to be worth it"
    return found, f"{len(found)} of them ({type(found[0]).__name__})"


def layers(model: Any) -> list[nn.Module]:
    """The layers of a transformers model, by the classes that it names for sharding."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    # FSDP makes a class of its own out of a layer's.
    return [module for module in model.modules() if names & {cls.__name__ for cls in type(module).__mro__}]


def keep_little(*, by_runs: bool) -> None:
    """Let compiled code compute norms, rotary embedding and activations again in the backward pass, not keep them.

    Products and attention are kept: ``by_runs`` says that attention is an operator of our own, which torch must be told
    not to compute again; of other ways it might, so that there it computes less again.
    """
    settings: Any = torch._functorch.config
    if by_runs and hasattr(settings, "is_non_builtin_to_include"):
        settings.aggressive_recomputation = settings.is_non_builtin_to_include = True
        return
    settings.ban_recompute_used_far_apart = False
    settings.ban_recompute_long_fusible_chains = False
    settings.ban_recompute_materialized_backward = False


def compile_layers(found: Sequence[nn.Module], trial: Callable[[], None], *, by_runs: bool = False) -> str | None:
    """Compile modules where they are, and try them.  What fails is taken back; returns its fault."""
    keep_little(by_runs=by_runs)
    for layer in found:
        layer.compile(dynamic=True, backend=BACKEND)
    try:
        trial()
    except Exception as exc:
        if is_out_of_memory(exc):
            raise
        for layer in found:
            layer._compiled_call_impl = None
        cause = getattr(exc, "inner_exception", exc)  # of the code generator, where it is that which failed
        lines = str(cause).strip().splitlines()
        return f"{type(cause).__name__}: {lines[0] if lines else ''}"
    return None


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
