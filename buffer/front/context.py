"""What the handlers of the front share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from atpo_async.config import Config
from atpo_async.core.errors import BadMessage
from buffer.front.shards import Shards
from buffer.handlers.changes import Changes
from buffer.handlers.context import REFUSALS_LOGGED
from buffer.metrics_file import MetricsFile

log = logging.getLogger("atpo.buffer")


@dataclass(kw_only=True)
class FrontContext:
    """The parts of one front that its handlers use."""

    config: Config
    run: str
    shards: Shards
    metrics: MetricsFile
    changes: Changes
    clock: Callable[[], float]
    finished: bool = False
    """The learner has done its steps."""
    num_refused: int = 0
    server_counters: Callable[[], dict[str, float]] = dict
    """Of the front's sockets, named as the buffer's."""
    num_unreadable: Callable[[], int] = int
    """Messages that came to them and are none."""
    _told: int = 0
    """Of those and ``num_refused``, in the metrics of earlier batches."""

    def take_metrics(self) -> dict[str, float]:
        """What the front adds to the metrics of a batch."""
        bad = self.num_refused + self.num_unreadable()
        new, self._told = bad - self._told, bad
        return {
            "buffer/bad_messages": float(new),
            "buffer/refused_metrics": float(self.metrics.num_refused),
            **self.server_counters(),
        }

    @property
    def step(self) -> int:
        """The step of the learner's last request."""
        return max((state.step for state in self.shards.states), default=0)

    @property
    def version(self) -> int:
        """The learner's version, as last reported."""
        return max((state.version for state in self.shards.states), default=0)

    @property
    def saved_step(self) -> int:
        """Batches below are in a checkpoint of the learner, as it reported."""
        return max((state.saved_step for state in self.shards.states), default=0)

    def check_run(self, message: Any) -> None:
        """Raises BadMessage for a message of another run."""
        if message.run != self.run:
            raise BadMessage(f"{type(message).__name__} belongs to run {message.run!r}, this buffer to {self.run!r}")

    def note_refusal(self, peer: str, what: str, exc: BadMessage) -> None:
        """Count and log a message that is refused here."""
        self.num_refused += 1
        if self.num_refused <= REFUSALS_LOGGED or self.num_refused % 1000 == 0:
            log.warning("refused %s of %s (%d by now): %s", what, peer, self.num_refused, exc)
