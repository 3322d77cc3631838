"""JSON lines and JSON lists: which bytes each row lies in; a row is decoded when it is asked for."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.texts import of_error, of_type, of_value, shortened
from atpo_async.environments.data.rows import Row, columns_of, unreadable

CHUNK = 1 << 22
BOM = b"\xef\xbb\xbf"


class Bytes(Protocol):
    """Bytes by offset."""

    size: int

    def read(self, start: int, end: int) -> bytes: ...

    def changed(self) -> str:
        """What to add to a fault where the file is no longer the one that was opened."""


class FileBytes:
    """Of a file that stays open: one that is replaced meanwhile stays what it was.  Raises SetupError.

    A file that is cut short gives fewer bytes, and so a fault of a row; mapped into memory it would end the process.
    """

    def __init__(self, name: str) -> None:
        try:
            self._fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise SetupError(f"data {name!r} cannot be read: {of_error(exc)}") from exc
        self._opened = self._state()
        self.size = self._opened[0]

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self._fd, end - start, start)

    def changed(self) -> str:
        return "; the file was written to after it was opened" if self._state() != self._opened else ""

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns


class HeldBytes:
    """In memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, start: int, end: int) -> bytes:
        return self._data[start:end]

    def changed(self) -> str:
        return ""


class LineRows:
    """One JSON object a line; blank lines are no rows.

    Held: 20 bytes a row, the file stays on disk.
    """

    def __init__(self, source: Bytes, name: str) -> None:
        self.name = name
        self.num_bytes = source.size
        self._bytes = source
        self._start, self._end, self._line = _lines(source)

    def __len__(self) -> int:
        return len(self._start)

    def columns(self) -> tuple[str, ...]:
        return columns_of(self.parts(()))

    def row(self, at: int) -> Row:
        return _object(self._raw(at), self.where(at), self._bytes.changed)

    def where(self, at: int) -> str:
        return f"{self.name}, line {self._line[at]}"

    def parts(self, names: Sequence[str]) -> Iterator[Row]:
        for at in range(len(self)):
            yield self.row(at)

    def _raw(self, at: int) -> bytes:
        return self._bytes.read(int(self._start[at]), int(self._end[at]))


class ListRows:
    """One JSON list of objects; held as it is written, undecoded.  Raises ConfigError where it is none."""

    def __init__(self, source: Bytes, name: str) -> None:
        self.name = name
        self.num_bytes = source.size
        data = source.read(0, source.size).removeprefix(BOM)
        try:
            self._raws = msgspec.json.decode(data, type=list[msgspec.Raw])
        except (msgspec.DecodeError, RecursionError) as exc:
            raise ConfigError(f"{name}: {_malformed(exc, data)}; expected a JSON list of objects") from None

    def __len__(self) -> int:
        return len(self._raws)

    def columns(self) -> tuple[str, ...]:
        return columns_of(self.parts(()))

    def row(self, at: int) -> Row:
        return _object(bytes(self._raws[at]), self.where(at), lambda: "")

    def where(self, at: int) -> str:
        return f"{self.name}, row {at}"

    def parts(self, names: Sequence[str]) -> Iterator[Row]:
        for at in range(len(self)):
            yield self.row(at)


def open_json(name: str) -> LineRows | ListRows:
    """A file of JSON lines or with one JSON list, by its first character; with ``.gz``, unpacked in memory.

    Raises SetupError where it cannot be read, ConfigError where it is neither.
    """
    source: Bytes = FileBytes(name)
    if name.endswith(".gz"):
        try:
            source = HeldBytes(gzip.decompress(Path(name).read_bytes()))
        except (OSError, EOFError, ValueError) as exc:
            raise SetupError(f"data {name!r} cannot be unpacked: {of_error(exc)}") from exc
    head = source.read(0, 4096).removeprefix(BOM).lstrip()
    return ListRows(source, name) if head.startswith(b"[") and not _is_line(head) else LineRows(source, name)


def _is_line(head: bytes) -> bool:
    """Whether a file that begins with ``[`` holds a list a line: a fault of its first line, better named as that."""
    first, newline, rest = head.partition(b"\n")
    if not newline or not rest.strip():
        return False
    try:
        msgspec.json.decode(first)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _lines(source: Bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64[N] start and end in bytes, int32[N] number from 1, of every line that is not blank."""
    ends = [np.zeros(0, dtype=np.int64)]
    blanks: list[int] = []
    for base in range(0, source.size, CHUNK):
        chunk = np.frombuffer(source.read(base, base + CHUNK), dtype=np.uint8)
        ends.append(np.flatnonzero(chunk == ord("\n")) + base)
    end = np.append(np.concatenate(ends), source.size)
    start = np.concatenate([np.zeros(1, dtype=np.int64), end[:-1] + 1])
    if source.read(0, len(BOM)) == BOM:
        start[0] = len(BOM)
    # Rows are long: only short lines are looked at, and the text is read once.
    blanks = [
        int(at) for at in np.flatnonzero(end - start < 8) if not source.read(int(start[at]), int(end[at])).strip()
    ]
    keep = np.ones(len(end), dtype=bool)
    keep[blanks] = False
    return start[keep], end[keep], (np.flatnonzero(keep) + 1).astype(np.int32)


_AT = re.compile(r"\(byte (\d+)\)")


def _object(raw: bytes, where: str, changed: Any) -> Row:
    """Raises RowRefused where ``raw`` is no JSON object."""
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise unreadable(where, _malformed(exc, raw) + changed()) from None
    if not isinstance(found, dict):
        raise unreadable(where, f"it is {of_value(found)} ({of_type(found)}); expected an object, {{…}}{changed()}")
    return found


def _malformed(exc: Exception, raw: bytes) -> str:
    """``no JSON (invalid character at byte 12): …``, with the text there."""
    said = str(exc).removeprefix("JSON is malformed: ")
    place = _AT.search(said)
    at = int(place.group(1)) if place else 0
    shown = shortened(raw[max(0, at - 20) : at + 40].decode(errors="replace"), 60)
    return f"it is no JSON, {said}: {shown!r}"
