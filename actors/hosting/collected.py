"""Collects what an environment counts (``take_counts``): names and numbers for the actor's metrics, checked."""

from __future__ import annotations

import logging
import math
import numbers
import re
import threading
from collections import Counter
from typing import Any

from atpo_async.core.texts import of_error, of_value
from atpo_async.environments.base import Environment

log = logging.getLogger("atpo.actor.environment")

MOST_NAMES = 128
"""Different counters of one environment; those of further names are left out: a report has space for 256."""

NAMESPACES = ("tool/", "environment/")
"""Counters of other names become ``environment/<name>``, so that none takes the place of one of the actor's own."""

_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+){0,3}")
_LONGEST = 120


class Collected:
    """What one environment has counted, on all of its loops, since it was last taken.

    Args:
        name: ``environment.name``, for the log.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._guard = threading.Lock()
        self._known: set[str] = set()
        self._found: Counter[str] = Counter()
        self._complained = False

    def read(self, environment: Environment) -> None:
        """In the environment's thread, when an episode has been closed.  Never raises."""
        take = getattr(environment, "take_counts", None)
        if not callable(take):
            return
        try:
            for name, number in dict(take()).items():
                self._add(name, number)
        except Exception as exc:
            self._complain(f"take_counts() failed: {of_error(exc)}")

    def _add(self, name: Any, number: Any) -> None:
        if not isinstance(name, str) or len(name) > _LONGEST or not _NAME.fullmatch(name):
            self._complain(f"take_counts() has the name {of_value(name)}; expected letters, digits, _ . - and /")
        elif isinstance(number, bool) or not isinstance(number, numbers.Real) or not math.isfinite(number):
            self._complain(f"take_counts() has {of_value(number)} under {name!r}; expected a finite number")
        else:
            name = name if name.startswith(NAMESPACES) else f"environment/{name}"
            with self._guard:
                if name in self._known or len(self._known) < MOST_NAMES:
                    self._known.add(name)
                    self._found[name] += float(number)  # type: ignore[assignment]

    def _complain(self, text: str) -> None:
        if not self._complained:
            self._complained = True
            log.warning("environment %r: %s; it is left out", self._name, text)

    def take(self) -> dict[str, float]:
        """Name -> sum since this was last called.  For the actor's thread."""
        with self._guard:
            found, self._found = self._found, Counter()
        return {name: float(number) for name, number in found.items() if number}
