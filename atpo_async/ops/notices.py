"""Notices: rare lines of a role for the user's terminal, which would be missed in a log.

A role appends them to a file in the run's scratch folder, and its supervisor reads them there.  A role that joined by
hand has a terminal of its own: its log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from atpo_async.core.texts import shortened
from atpo_async.run import tail

FILE = "ATPO_NOTICES"
"""Environment variable: where a supervised role writes them, [key, text] as JSON a line."""

MOST_CHARACTERS = 700
MOST_LINES = 200
"""Of one process, so that no fault floods the terminal or the disk."""

SAME_S = 50.0

log = logging.getLogger("atpo.notice")

_posted = 0


def post(line: str, key: str = "") -> None:
    """Post one line for the user, which also goes to this role's log.  Never raises.

    Args:
        line: what happened.
        key: equal for lines that report the same; of several actors one such line is shown.
    """
    global _posted
    text = shortened(line, MOST_CHARACTERS)
    log.warning("%s", text)
    _posted += 1
    path = os.environ.get(FILE)
    if path is None or _posted > MOST_LINES:
        return
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, json.dumps([key[:MOST_CHARACTERS], text]).encode() + b"\n")
        finally:
            os.close(file)
    except OSError as exc:
        log.warning("that line could not be passed on to %s: %s", path, exc.strerror)


class Tail:
    """Reads the notices of roles, from now on.

    Args:
        path: their file; it need not exist yet.
        clock: seconds, monotonic.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shown_at: dict[str, float] = {}
        self._tail = tail.Tail(path, offset=path.stat().st_size if path.exists() else 0)

    def new(self) -> list[str]:
        """Notices since the last call, without those whose key was shown in the last ``SAME_S`` seconds."""
        return [text for raw in self._tail.new() for key, text in _parsed(raw) if self._is_new(key)]

    def _is_new(self, key: str) -> bool:
        now = self._clock()
        if key and now - self._shown_at.get(key, -math.inf) < SAME_S:
            return False
        self._shown_at[key] = now
        return True


def _parsed(raw: bytes) -> list[tuple[str, str]]:
    """Key and text of one line of the file; nothing where it is none."""
    with contextlib.suppress(ValueError, TypeError):
        key, text = json.loads(raw)
        if isinstance(key, str) and isinstance(text, str):
            return [(key, text)]
    return []
