"""Limits what the code of an environment prints into the actor's log: so much of each call, and in all."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from actors.hosting.loop_thread import current_call

MOST_OF_A_CALL = 2_000
"""Characters: enough to see what a new tool is given."""

MOST_IN_ALL = 2_000_000
"""Characters of one stream.  Calls come by the million."""


class Printed(io.TextIOBase):
    """A stream that passes on what is printed outside of an environment's calls, and the beginning of the rest.

    Args:
        stream: the process's own.
        most_of_a_call, most_in_all: as ``MOST_OF_A_CALL`` and ``MOST_IN_ALL``.
    """

    def __init__(self, stream: TextIO, *, most_of_a_call: int = MOST_OF_A_CALL, most_in_all: int = MOST_IN_ALL) -> None:
        self._stream = stream
        self._most_of_a_call = most_of_a_call
        self._left = most_in_all
        self._guard = threading.Lock()

    def write(self, text: str) -> int:
        """All of it, as far as the caller can tell."""
        call = current_call()
        if call is None:
            return self._stream.write(text)
        with self._guard:
            before, call.printed = call.printed, call.printed + len(text)
            kept = text[: max(0, min(self._most_of_a_call - before, self._left))]
            reached = before <= self._most_of_a_call < call.printed and self._left > 0
            self._left -= len(kept)
            last = bool(kept) and self._left == 0
        if kept:
            self._stream.write(kept)
        if last:
            self._stream.write("\n(the environment has printed so much that nothing more of it is shown)\n")
        elif reached:
            self._stream.write(f"\n(what {call.what} prints beyond {self._most_of_a_call} characters is left out)\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def writable(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """While the block runs ``sys.stdout`` and ``sys.stderr`` are limited.  Handlers of logging keep the streams that
    they were made with."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Printed(before[0]), Printed(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
