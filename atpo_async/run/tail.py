"""Reads the whole lines that other processes append to a file."""

from __future__ import annotations

from pathlib import Path


class Tail:
    """A place in a file that grows.

    Args:
        path: the file; it may not be there yet.
        offset: bytes from its beginning that are not read any more.
    """

    def __init__(self, path: Path, *, offset: int = 0) -> None:
        self._path = path
        self.offset = offset

    def new(self, *, most_bytes: int = -1) -> list[bytes]:
        """Lines appended since the last call, each with its line break; one not ended yet is left for the next call.

        Args:
            most_bytes: that are read at once; -1: all that are there.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(most_bytes)
        except OSError:
            return []
        end = data.rfind(b"\n") + 1
        self.offset += end
        return [line + b"\n" for line in data[:end].split(b"\n")[:-1]]
