"""What the handlers of both sockets share: state, journal, and the checks that apply to every message."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from atpo_async.config import Config
from atpo_async.core.errors import BadMessage, SetupError
from buffer.handlers.changes import Changes
from buffer.journal.journal import Journal
from buffer.metrics_file import MetricsFile
from buffer.state import BufferState

log = logging.getLogger("atpo.buffer")

REFUSALS_LOGGED = 50
"""All of the first ones are logged, then every thousandth: a broken peer must not fill the disk."""


@dataclass(kw_only=True)
class HandlerContext:
    """The parts of one buffer that its handlers use."""

    config: Config
    run: str
    state: BufferState
    journal: Journal
    metrics: MetricsFile
    changes: Changes
    clock: Callable[[], float]
    num_refused: int = 0
    fault: asyncio.Future[None] | None = None
    """Fails with what only the user can mend, a credit mode that raises: the buffer ends with it."""

    @property
    def saved_step(self) -> int:
        """Batches below are in a checkpoint of the learner, as it reported."""
        return self.state.batch_server.saved_step

    def end_with(self, error: SetupError) -> None:
        """The same would happen at every attempt: end the buffer."""
        if self.fault is not None and not self.fault.done():
            self.fault.set_exception(error)

    def check_run(self, message: Any) -> None:
        """Raises BadMessage for a message of another run."""
        if message.run != self.run:
            raise BadMessage(f"{type(message).__name__} belongs to run {message.run!r}, this buffer to {self.run!r}")

    def note_refusal(self, peer: str, message: Any, exc: BadMessage) -> None:
        """Count and log a message that is refused."""
        self.state.count_bad_message()
        self.num_refused += 1
        if self.num_refused <= REFUSALS_LOGGED or self.num_refused % 1000 == 0:
            log.warning("refused %s of %s (%d by now): %s", type(message).__name__, peer, self.num_refused, exc)

    def why_unwritten(self) -> str:
        """Why nothing is committed, for requests that wait for a commit."""
        return f"the buffer's journal cannot be written: {self.journal.held_up or 'its disk is slow'}"
