"""What sinks of experiment trackers have in common: the tracker's run begins with the first record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from atpo_async.core.doors import Option
from atpo_async.run.metrics import Record
from atpo_async.run.sinks.base import RunFacts


class TrackerSink(ABC):
    """A run of ours as a run of a tracker.

    Beginning it late keeps a network that is down from being a fault of the set-up: the first record fails, as any
    later one would, and the next one tries again.
    """

    def __init__(self, library: ModuleType, run: RunFacts, options: Mapping[str, Option]) -> None:
        self.library, self.facts, self.options = library, run, options
        self._run: Any = None

    def settings(self, **own: Any) -> dict[str, Any]:
        """For the tracker's ``init``: what all trackers call alike, its ``own``, and the user's options over both."""
        common = {"project": "atpo-async", "resume": "allow", "config": dict(self.facts.config)}
        return {**common, **own, **self.options}

    @abstractmethod
    def begin(self) -> Any:
        """Begin the tracker's run, or go on with it where ours goes on."""

    @abstractmethod
    def log(self, run: Any, record: Record) -> None:
        """Hand a record to the tracker's run."""

    @abstractmethod
    def finish(self, run: Any, outcome: str) -> None:
        """End the tracker's run."""

    def write(self, record: Record) -> None:
        if self._run is None:
            self._run = self.begin()
        self.log(self._run, record)

    def close(self, outcome: str) -> None:
        if self._run is not None:
            self.finish(self._run, outcome)
