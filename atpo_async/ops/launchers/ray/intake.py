"""Writes what a host tells into the run's folder: the log, the status files, notices, the role's last words."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from atpo_async.ops.exits import DOING
from atpo_async.ops.launchers.ray.messages import End, News

_STATUS_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.json")
_DOING_FILE = re.compile(r"(\.[0-9]+)?" + re.escape(DOING))
MOST_NAME = 120


class Intake:
    """The files of one attempt, as one host of it tells them.

    Args:
        log: takes the output; not there yet.
        status: folder of the run's status files.
        notices: file that the supervisor reads lines for the terminal from.
        error_file: of the attempt.
    """

    def __init__(self, log: Path, *, status: Path, notices: Path, error_file: Path) -> None:
        self.taken = 0
        """Bytes of the log that are on disk here."""
        self._log = log
        self._status = status
        self._notices = notices
        self._error_file = error_file
        self._own: set[str] = set()
        log.touch(exist_ok=False)

    def take(self, news: News) -> None:
        """In the order in which they were told.  Raises OSError where the log cannot be written, which is then asked
        for again."""
        if news.log:
            _append(self._log, news.log)
            self.taken += len(news.log)
        for name, content in news.statuses.items():
            if len(name) <= MOST_NAME and _STATUS_FILE.fullmatch(name):
                self._own.add(name)
                with contextlib.suppress(OSError):
                    self._status.mkdir(exist_ok=True)
                    aside = self._status / f".{name}.told"
                    aside.write_bytes(content)
                    aside.replace(self._status / name)
        if news.notices:
            with contextlib.suppress(OSError):
                _append(self._notices, b"".join(news.notices))

    def end(self, end: End) -> None:
        """The role's last words, where its supervisor looks for them."""
        with contextlib.suppress(OSError):
            if end.error:
                self._error_file.write_bytes(end.error)
            for suffix, content in end.doing.items():
                if _DOING_FILE.fullmatch(suffix):
                    self._error_file.with_name(f"{self._error_file.stem}{suffix}").write_bytes(content)

    def forget(self) -> None:
        """Its processes are gone without a word: their status would look as if they ran."""
        for name in self._own:
            with contextlib.suppress(OSError):
                (self._status / name).unlink(missing_ok=True)


def _append(file: Path, data: bytes) -> None:
    """All of it or, where the disk refuses, nothing."""
    fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(fd).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(fd, data[written:])
        except OSError:
            os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)
