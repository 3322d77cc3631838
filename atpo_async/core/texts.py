"""Shortens foreign texts, such as an error's or a value's, to what fits a line of a log.

A tool's exception may carry the whole page that it failed on.  Nothing here raises, whatever the object's own
``__str__`` or ``__repr__`` does.
"""

from __future__ import annotations

import logging
import os
import reprlib
import traceback
from pathlib import Path

MOST = 300
"""Characters of an error's own text."""

MOST_OF_A_RECORD = 16_000
"""Characters of one record of a log, a traceback included; of a line that a role ends with."""


class _Short(reprlib.Repr):
    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value[: self.maxstring]) + ("..." if len(value) > self.maxstring else "")

    repr_bytearray = repr_bytes


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 60, 80


def counted(number: int, one: str, many: str = "") -> str:
    """``1 tree``, ``2 trees``; ``many`` where the plural is not ``one`` and an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def shortened(text: str, most: int = MOST) -> str:
    """One line of at most ``most`` characters and a note of how many there were."""
    flat = " ".join(text[: 4 * most].split())
    if len(flat) <= most and len(text) <= 4 * most:
        return flat
    return f"{flat[:most]}… ({len(text)} characters)"


def of_error(error: BaseException, most: int = MOST) -> str:
    """``TypeError: its text``, on one line."""
    name = of_type(error)
    try:
        text = str(error)
    except Exception as exc:
        text = f"(its text cannot be read: {type(exc).__name__})"
    said = shortened(text, most)
    return f"{name}: {said}" if said else name


def of_value(value: object, most: int = 80) -> str:
    """A value as Python writes it, on one line."""
    try:
        return shortened(_SHORT.repr(value), most)
    except Exception as exc:
        return f"(it cannot be shown: {type(exc).__name__})"


def of_type(value: object, most: int = 80) -> str:
    """The name of a value's type, on one line."""
    try:
        return shortened(type(value).__name__, most)
    except Exception as exc:  # a metaclass has its own
        return f"(its type cannot be named: {type(exc).__name__})"


def middle_cut(text: str, most: int = MOST_OF_A_RECORD) -> str:
    """Beginning and end of a text that is too long; lines stay lines."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} … {len(text) - 2 * half} characters left out … {text[-half:]}"


def trace_of(error: BaseException) -> str:
    """Its traceback, cut."""
    try:
        return middle_cut("".join(traceback.format_exception(error)))
    except Exception as exc:
        return f"{of_type(error)}, whose traceback cannot be read: {type(exc).__name__}\n"


class BoundedFormatter(logging.Formatter):
    """A formatter that limits the length of each record, for logs that foreign texts are written into."""

    def format(self, record: logging.LogRecord) -> str:
        """As logging's own, cut in the middle."""
        return middle_cut(super().format(record))


def own_line(exc: BaseException, *, apart_from: Path | None = None) -> str:
    """``my_task.py:12, in lookup: return facts[name]``: the user's innermost line, of the first cause that has one.

    A user's file lies below the working folder, and neither among installed packages nor below ``apart_from``.  Empty
    where no line is in one.
    """
    try:
        folder = Path.cwd()
    except OSError:  # it was deleted
        return ""
    causes: list[BaseException] = []
    found: BaseException | None = exc
    while found is not None and found not in causes:
        causes.append(found)
        found = found.__cause__ or found.__context__
    for cause in reversed(causes):
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            path = Path(frame.filename)
            inside = frame.filename.startswith(f"{folder}{os.sep}") and "site-packages" not in path.parts
            if inside and not (apart_from is not None and path.is_relative_to(apart_from)):
                return f"{path.relative_to(folder)}:{frame.lineno}, in {frame.name}: {frame.line or ''}".rstrip()
    return ""
