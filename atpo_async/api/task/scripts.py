"""Where the actions of a played task come from: a person, lines of a file, or a function."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from atpo_async.api.task.voice import Said
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.texts import of_error
from atpo_async.environments.messages.types import Message

HELP = (
    'an action in one line: text, or a call as {call}; {{"content": …, "tool_calls": […]}} is a whole message; '
    "an empty line ends"
)


class Actions(Protocol):
    """Gives the next action of a conversation."""

    asks_again: bool
    """Whether an action that cannot be written is asked for once more."""

    async def next(self, messages: Sequence[Message]) -> Said | None:
        """None where there is no further one."""

    def where(self) -> str:
        """Of the last action, for errors; ends in ``: `` where it is not empty."""


class Lines:
    """Actions of a file or of standard input, one a line: text, or a message as JSON."""

    def __init__(self, lines: Iterator[str], *, name: str, asks_again: bool = False) -> None:
        self._lines = lines
        self._name = name
        self._number = 0
        self.asks_again = asks_again

    def where(self) -> str:
        """File and line."""
        return f"{self._name}, line {self._number}: "

    async def next(self, messages: Sequence[Message]) -> Said | None:
        """Raises ConfigError for a line that begins like JSON and is none."""
        line = next(self._lines, None)
        self._number += 1
        if line is None or not (words := line.rstrip("\n")).strip():
            return None
        return parsed(words)


def parsed(words: str) -> Said:
    """A line as an action: a JSON object is a message, everything else text."""
    if not words.lstrip().startswith("{"):
        return words
    try:
        found = json.loads(words)
    except ValueError as exc:
        raise ConfigError(f"the action {words!r} begins like JSON and is none: {exc}") from None
    return found if isinstance(found, dict) else words


def typed() -> Lines:
    """What a person types, or a program writes to standard input."""
    return Lines(_prompted(), name="standard input", asks_again=sys.stdin.isatty())


def _prompted() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import_module("readline")
            try:
                yield input("action> ")
            except EOFError:
                return
        elif not (line := sys.stdin.readline()):
            return
        else:
            yield line


def from_file(path: Path) -> Lines:
    """Raises SetupError where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else of_error(exc)
        raise SetupError(f"--actions {path}: {why}; expected a file with one action a line") from exc
    return Lines(iter(lines), name=str(path))


class Function:
    """A scripted policy: ``(messages) -> text or message``, async or not."""

    asks_again = False

    def __init__(self, name: str) -> None:
        self._name = name
        module, _, attribute = name.partition(":")
        try:
            self._function: Any = getattr(import_module(module), attribute)
        except BaseException as exc:  # exit() too
            raise SetupError(f"--policy {name}: {of_error(exc)}; expected module:function") from exc
        if not callable(self._function):
            raise ConfigError(f"--policy {name} is no function; expected one of (messages) that returns an action")

    def where(self) -> str:
        """The function's name."""
        return f"--policy {self._name}: "

    async def next(self, messages: Sequence[Message]) -> Said | None:
        """Raises SetupError for what the function raises."""
        try:
            said = self._function([dict(message) for message in messages])
            if inspect.isawaitable(said):
                said = await said
        except Exception as exc:
            raise SetupError(f"--policy {self._name} failed: {of_error(exc)}") from exc
        if said is not None and not isinstance(said, str | dict):
            raise ConfigError(f"--policy {self._name} returned {type(said).__name__}; expected text, a message or None")
        return said
