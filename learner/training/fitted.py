"""Training on a batch that runs out of memory: it is planned again, in smaller passes, and the step is begun anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from atpo_async.wire.messages import Batch
from learner.memory.fitting import Failed, Fitting
from learner.memory.out_of_memory import is_out_of_memory, said
from learner.training.passes import Part, Planner

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedBatch:
    """The parts of a batch, whose passes become smaller where one of them does not fit."""

    fitting: Fitting
    planner: Planner
    model: nn.Module
    parts: Sequence[Part]
    batch: Batch
    version: int

    def run(self, passes: Callable[[], T]) -> T:
        """The result of ``passes()``, which runs forward and backward passes of the parts and changes no weight before
        all of them are through; called again with smaller ones after each out-of-memory error.

        Raises:
            SetupError: a single path does not fit.
            OutOfMemory: all ranks have to start again.
        """
        while True:
            try:
                return passes()
            except Exception as exc:
                if not is_out_of_memory(exc):
                    raise
                # Only its words: the error holds the frames, and these the activations.
                words = said(exc)
            self._make_smaller(words)

    def _make_smaller(self, words: str) -> None:
        self.model.zero_grad(set_to_none=True)
        failed = Failed(
            tokens=max(part.largest_pass for part in self.parts),
            longest_path=max(part.longest_path for part in self.parts),
        )
        self.fitting.make_smaller(failed, words)
        self.planner.micro_batch_tokens = self.fitting.micro_batch_tokens
        for part in self.parts:
            self.planner.plan_again(part, self.batch, self.version)
