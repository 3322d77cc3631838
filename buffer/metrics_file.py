"""Writes the buffer's own metrics, and those that actors report, each under its own name.

An actor may report anything.  So a report is recorded under its sender's name, and only metrics of actors are taken:
only the buffer's own ``train/success`` gets into the file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from atpo_async.run.metrics import MetricsWriter

log = logging.getLogger("atpo.buffer")

OWN = "buffer"
_RESERVED = re.compile(r"buffer(-\d+)?|supervisor|learner(-\d+)?")
"""Sources that are no actors."""
_NAMESPACES = (
    "actor/",
    "actions/",
    "engine/",
    "environment/",
    "igpo/",
    "tool/",
    "weights/",
    "tokens/generated",
    "time/actor_",
)
"""Namespaces of the metrics of actors."""
_LEARNERS = re.compile(r"weights/(publish_s|unsent_bytes|most_unsent_bytes|kept_reply_bytes|held_back|refused_peers)")
"""In one of the namespaces, and the learner's."""
MAX_NAMES = 256
"""Of a report."""
_MAX_NAME = 120


def may_be_called(name: str) -> bool:
    """Whether an actor may have a name; not one of the other roles' names, as its metrics would be taken for theirs."""
    return _RESERVED.fullmatch(name) is None


class MetricsFile:
    """Writes to ``metrics.jsonl``.

    Args:
        path: None writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.num_refused = 0
        """Numbers of reports that were not taken."""
        self._refused_reports = 0
        self._path = path
        self._writer: MetricsWriter | None = None
        """One for all sources: a thousand actors must not have the file opened anew for each report."""

    def write(self, step: int, version: int, metrics: Mapping[str, float]) -> None:
        """The buffer's own."""
        self._write(OWN, step, version, metrics)

    def report(self, peer: str, step: int, version: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of the actor ``peer``, those that actors may report; the others are counted."""
        taken = {}
        if may_be_called(peer):
            taken = {name: value for name, value in list(metrics.items())[:MAX_NAMES] if _is_an_actors(name)}
        if refused := len(metrics) - len(taken):
            self.num_refused += refused
            self._refused_reports += 1
            # The first, then every thousandth: a broken peer must not fill the disk.
            if self._refused_reports % 1000 == 1:
                example = next(name for name in metrics if name not in taken)
                log.warning(
                    "%d numbers reported by %s are not taken (%d by now), as %r: actors do not report such metrics",
                    refused, peer, self.num_refused, example[:_MAX_NAME],
                )  # fmt: skip
        self._write(peer, step, version, taken)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, source: str, step: int, version: int, metrics: Mapping[str, float]) -> None:
        if self._path is None or not metrics:
            return
        if self._writer is None:
            self._writer = MetricsWriter(self._path, source=OWN)
        self._writer.write(step=step, version=version, metrics=metrics, source=source)


def _is_an_actors(name: str) -> bool:
    known = name.startswith(_NAMESPACES) and _LEARNERS.fullmatch(name) is None
    return known and len(name) <= _MAX_NAME and name.isprintable()
