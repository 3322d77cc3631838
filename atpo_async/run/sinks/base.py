"""The protocol of a metrics sink, the facts of the run that it is given, and the error for a missing library."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from atpo_async.core.errors import SetupError
from atpo_async.run.metrics import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The run whose metrics a sink takes."""

    run_id: str
    """The same when a stopped run goes on."""
    name: str
    folder: Path
    config: Mapping[str, Any]
    """The resolved configuration, as JSON has it."""


class MetricsSink(Protocol):
    """Takes the records of a run, one by one, in the order in which they were written.

    ``Door.make`` makes one of ``(run_facts, **options)``.  It runs on a thread of its own in a process of its own: it
    may block, fail or hang, and training goes on.
    """

    def write(self, record: Record) -> None:
        """Take one record: ``step``, ``version``, ``time`` (Unix seconds), ``source`` and ``metrics``, name -> number.

        Names are unique over the run: an actor's begin with its name (``actor-0/tokens/generated_per_s``).
        """

    def close(self, outcome: str) -> None:
        """The process stops: ``done``, ``interrupted`` (the run may go on later) or ``failed``."""


def library(package: str, *, sink: str) -> ModuleType:
    """Import a sink's library.  Raises SetupError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as exc:
        raise not_installed(package, sink=sink) from exc


def not_installed(package: str, *, sink: str) -> SetupError:
    """A built-in sink's extra of ``pip install`` has the sink's name."""
    return SetupError(
        f"metrics sink {sink!r} needs {package}, which cannot be imported here: pip install 'atpo-async[{sink}]', or "
        f"leave {sink!r} out of metrics.sinks"
    )
