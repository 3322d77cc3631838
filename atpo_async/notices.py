"""Lines that a role has for the user's terminal: rare ones, which nobody would look for in a log.

A role appends them to a file of the run's scratch folder; the supervisor, which started it, reads them there.  Roles
without a supervisor, joined by hand, have a terminal of their own: their log.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from atpo_async.texts import shortened

FILE = "ATPO_NOTICES"
"""Environment variable: where a supervised role writes them, one JSON string a line."""

MOST_CHARACTERS = 700
MOST_LINES = 200
"""Of one process: whatever goes wrong, a terminal and a disk are spared."""

log = logging.getLogger("atpo.notice")

_told = 0


def tell(line: str) -> None:
    """One line for the user, also in this role's log.  Never raises."""
    global _told
    text = shortened(line, MOST_CHARACTERS)
    log.warning("%s", text)
    _told += 1
    path = os.environ.get(FILE)
    if path is None or _told > MOST_LINES:
        return
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, json.dumps(text).encode() + b"\n")
        finally:
            os.close(file)
    except OSError as exc:
        log.warning("that line could not be passed on to %s: %s", path, exc.strerror)


class Tail:
    """Reads what roles tell, from now on.

    Args:
        path: their file; it may come later, or be gone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def new(self) -> list[str]:
        """Told since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        end = data.rfind(b"\n") + 1
        self._offset += end
        return [line for raw in data[:end].splitlines() if (line := _line(raw))]


def _line(raw: bytes) -> str:
    try:
        text = json.loads(raw)
    except ValueError:
        return ""
    return text if isinstance(text, str) else ""
