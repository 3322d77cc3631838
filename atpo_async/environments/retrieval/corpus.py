"""A corpus of passages as JSONL: which rows are passages, where each lies in the file, and reading one by its place.

A row has ``id`` and ``contents`` (``"title"\\ntext``, as wiki-18 has it), or ``title`` and ``text``.  Rows stay in
their file: of a large corpus, memory holds what the system caches of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from atpo_async.core import texts
from atpo_async.core.errors import SetupError
from atpo_async.environments.retrieval.protocol import Passage, contents_of, split_contents

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells, without reading it, that a file is the one it was."""

    size: int
    mtime_ns: int


def state_of(path: Path) -> FileState:
    """Raises SetupError where the file cannot be read or holds nothing."""
    try:
        with path.open("rb") as file:
            begins = file.read(2)
            at = os.fstat(file.fileno())
    except FileNotFoundError:
        raise SetupError(
            f"{path} is not here; name a JSONL file of passages (id and contents, or title and text)"
        ) from None
    except OSError as exc:
        raise SetupError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    if begins == _GZIP:
        raise SetupError(f"{path} is packed by gzip; passages are read by their place in the file: gunzip it first")
    if not begins:
        raise SetupError(f"{path} is empty; a corpus has one passage a line")
    return FileState(at.st_size, at.st_mtime_ns)


def digest_of(path: Path) -> str:
    """SHA-256 of the file's bytes, as hexadecimal digits.  Reads all of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(slots=True)
class Scan:
    """One reading of a whole corpus: its passages' contents in turn; places and digest once all are read."""

    path: Path
    say: Callable[[str], None] = field(default=lambda line: None)
    places: list[tuple[int, int]] = field(default_factory=list)
    """(byte offset, bytes) of each passage's line."""
    digest: str = ""

    def contents(self) -> Iterator[str]:
        """Raises SetupError for the first line that is no passage, naming file and line."""
        seen = hashlib.sha256()
        place = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                seen.update(line)
                if not line.isspace():
                    try:
                        contents = contents_in(row_in(line))
                    except ValueError as exc:
                        raise SetupError(f"{self.path}, line {number}: {exc}") from None
                    self.places.append((place, len(line)))
                    yield contents
                    if len(self.places) % 1_000_000 == 0:
                        self.say(f"{len(self.places):,} passages of {self.path} read")
                place += len(line)
        self.digest = seen.hexdigest()
        if not self.places:
            raise SetupError(f"{self.path} has no passages, only blank lines")


def row_in(line: bytes) -> dict[str, object]:
    """One line's columns.  Raises ValueError, which says what is wrong with the line."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as exc:
        raise ValueError(f"it is no UTF-8 text (byte {exc.start + 1} of the line)") from None
    except (ValueError, RecursionError) as exc:
        why = f"{exc.msg} at character {exc.pos + 1}" if isinstance(exc, json.JSONDecodeError) else str(exc)
        raise ValueError(f"it is no JSON ({why}): {texts.shortened(line[:200].decode(errors='replace'), 60)}") from None
    if not isinstance(row, dict):
        raise ValueError(f"it is {texts.of_value(row)}: a passage is a JSON object")
    return row


def contents_in(row: Mapping[str, object]) -> str:
    """Contents of a row's passage.  Raises ValueError, which says what the row lacks."""
    contents, title, text = (row.get(name) for name in ("contents", "title", "text"))
    if isinstance(contents, str):
        return contents
    if "contents" not in row and isinstance(title, str) and isinstance(text, str):
        return contents_of(title, text)
    for name, value in (("contents", contents), ("title", title), ("text", text)):
        if name in row and not isinstance(value, str):
            raise ValueError(f"{name} is {texts.of_value(value)}: it must be a text")
    has = ", ".join(texts.shortened(name, 40) for name in list(row)[:10]) or "no columns"
    raise ValueError(f'a passage has "contents", or "title" and "text"; this row has {has}')


class Corpus:
    """A corpus by place.

    Args:
        path: the JSONL file.
        places: int64[N, 2], byte offset and bytes of each passage's line.
    """

    def __init__(self, path: Path, places: np.ndarray) -> None:
        self.path = path
        self._places = places
        self._fd = os.open(path, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._places)

    def document(self, number: int) -> dict[str, str]:
        """``{"id", "contents"}`` of passage ``number``; a row without an id is named by its number.

        Raises:
            SetupError: the file was changed in its place since the index was made of it.
        """
        start, size = self._places[number].tolist()
        # Not through a memory map: reading one of a file that was cut short ends the process.
        line = os.pread(self._fd, size, start)
        try:
            row = row_in(line)
            return {"id": str(row.get("id", number)), "contents": contents_in(row)}
        except ValueError as exc:
            raise SetupError(f"{self.path} was changed since its index was made: start again ({exc})") from None

    def passage(self, number: int, score: float) -> Passage:
        """Passage ``number`` with its score.  Raises SetupError as ``document``."""
        document = self.document(number)
        return Passage(document["id"], *split_contents(document["contents"]), score)

    def close(self) -> None:
        """Close the file; only once nothing reads any more."""
        os.close(self._fd)
