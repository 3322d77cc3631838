"""The terminal of a command that goes on when nobody reads it any more."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from rich.console import Console


class LastingConsole(Console):
    """Once its reader has gone (``atpo train … | head``) it says so on stderr and prints nothing more; the default
    ends the process."""

    def __init__(self, *, when_closed: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._when_closed = when_closed

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _discard(sys.stdout)
        try:
            print(f"note: the terminal's output is closed; {self._when_closed}", file=sys.stderr, flush=True)
        except OSError:  # `2>&1 | head`
            _discard(sys.stderr)


def _discard(stream: Any) -> None:
    """What is still written to it, also at the process's end, goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
