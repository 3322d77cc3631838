"""Checks that an LMDB file holds every page that its tables reach: reads each once, without a map, and counts them.

LMDB maps its file, and reading a page beyond the end of a mapped file kills the process.  The file's size proves
nothing: a page that was allocated and freed within one commit is counted, and never written where it was the last.  So
the trees are followed here, with plain reads, before the file is mapped.

Layout (lmdb.h, mdb.c of LMDB 0.9, native byte order): pages of ``psize`` bytes, each begins with its number (u64), u16,
flags (u16), and two u16 that end its list of nodes and begin its nodes' data, or the number of pages (u32) where it is
a long value's first.  Pages 0 and 1 are the two newest roots; the one with the greater transaction number counts.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MAGIC, VERSION = 0xBEEFC0DE, 1
_HEAD = struct.Struct("=QHHHH")
_LONG = struct.Struct("=QHHI")
_META = struct.Struct("=IIQQ")
_TABLE = struct.Struct("=IHHQQQQQ")
_LAST = struct.Struct("=QQ")
_NODE = struct.Struct("=HHHH")
_NUMBER = struct.Struct("=Q")
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE, _FIXED = 0x01, 0x02, 0x04, 0x08, 0x20
_LONG_VALUE, _SUBTREE = 0x01, 0x02
_NO_PAGE = 2**64 - 1
_LEAST_PAGE, _MOST_PAGE = 256, 65536
FREE, MAIN = "the list of free pages", "the list of tables"


class NoTables(Exception):
    """The file is no LMDB file at all."""


class _Bad(Exception):
    """One page, or what hangs on it, cannot be read."""


class Value(NamedTuple):
    """One entry of a table, its value still unread."""

    table: str
    key: bytes
    read: Callable[[], bytes]
    """Reads it.  Raises ValueError where the file ends before."""


class _Table(NamedTuple):
    """A tree: its root's page and how many levels it has."""

    root: int
    depth: int


@dataclass(slots=True)
class Found:
    """The contents of a file, and the parts of it that cannot be read."""

    size: int
    """Bytes of the file."""
    pages: int = 0
    """Read; of a long value its first."""
    entries: int = 0
    seconds: float = 0.0
    damage: dict[str, list[str]] = field(default_factory=dict)
    """Table -> what is wrong with it, one line each."""
    tables: set[str] = field(default_factory=set)
    """All that were found."""

    def add_damage(self, table: str, fact: str) -> None:
        self.damage.setdefault(table, []).append(fact)

    def describe(self) -> str:
        """What is damaged, and what is whole.  Only where there is damage."""
        count = sum(map(len, self.damage.values()))
        table, facts = min(self.damage.items(), key=lambda each: each[0] == FREE)
        more = f", and {count - 1} more like it" if count > 1 else ""
        whole = sorted(self.tables - self.damage.keys() - {FREE, MAIN})
        return f"{table}: {facts[0]}{more} (whole: {', '.join(whole) or 'no table'})"


def walk(file: Path, look: Callable[[Value], str | None] = lambda value: None) -> Found:
    """Follow every table of an LMDB file to its last page.

    Args:
        file: no process writes to it meanwhile.
        look: called with every entry of a named table; returns its fault, or None.

    Raises:
        NoTables: not an LMDB file.
        OSError: the disk does not give it.
    """
    began = time.monotonic()
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        walker = _Walker(descriptor, look)
        walker.follow()
    finally:
        os.close(descriptor)
    walker.found.seconds = time.monotonic() - began
    return walker.found


class _Walker:
    """One file, while it is read."""

    def __init__(self, descriptor: int, look: Callable[[Value], str | None]) -> None:
        self._fd = descriptor
        self._look = look
        self.found = Found(os.fstat(descriptor).st_size)
        self._psize, self._last, self._roots = self._newest()
        self._seen = bytearray(self._last // 8 + 1)
        """A bit for each page: a page that is reached twice is damage, and may be a cycle."""

    def _newest(self) -> tuple[int, int, dict[str, _Table]]:
        """Bytes of a page, number of the last one, and the two trees that everything hangs on."""
        newest: tuple[int, int, int, dict[str, _Table]] | None = None
        psize = self._page_bytes()
        for number in (0, 1):
            page = os.pread(self._fd, psize, number * psize)
            if len(page) < _HEAD.size + _META.size + 2 * _TABLE.size + _LAST.size:
                raise NoTables(f"it has {self.found.size} bytes, and begins with two pages of {psize}")
            magic, version, _, _ = _META.unpack_from(page, _HEAD.size)
            if not _HEAD.unpack_from(page)[2] & _META_PAGE or magic != MAGIC:
                raise NoTables(f"page {number} is none of LMDB's")
            if version & 0xFFFF != VERSION:
                raise NoTables(f"it has LMDB's format {version}, this program reads {VERSION}")
            at = _HEAD.size + _META.size
            free, main = (_table(page, at + i * _TABLE.size) for i in (0, 1))
            last, txn = _LAST.unpack_from(page, at + 2 * _TABLE.size)
            if newest is None or txn > newest[0]:
                newest = txn, psize, last, {FREE: free, MAIN: main}
        assert newest is not None
        return newest[1:]

    def _page_bytes(self) -> int:
        """LMDB keeps it where another table has a number of no use."""
        start = os.pread(self._fd, _HEAD.size + _META.size + _TABLE.size, 0)
        if len(start) < _HEAD.size + _META.size + _TABLE.size:
            raise NoTables(f"it has {len(start)} bytes")
        psize = int(_TABLE.unpack_from(start, _HEAD.size + _META.size)[0])
        if not _LEAST_PAGE <= psize <= _MOST_PAGE or psize & (psize - 1):
            raise NoTables("page 0 is none of LMDB's")
        return psize

    def follow(self) -> None:
        for name, table in self._roots.items():
            for key, data in self._entries(name, table):
                if name == MAIN and isinstance(data, _Table):
                    self._follow_named(key.decode(errors="replace"), data)

    def _follow_named(self, name: str, table: _Table) -> None:
        self.found.tables.add(name)
        for key, data in self._entries(name, table):
            if isinstance(data, _Table):
                continue  # of values that share a key: the journal has none
            fact = self._look(Value(name, key, data))
            if fact is not None:
                self.found.add_damage(name, f"the value under {_shown(key)}: {fact}")

    def _entries(self, name: str, table: _Table) -> Iterator[tuple[bytes, Callable[[], bytes] | _Table]]:
        """(key, how to read its value, or the tree that hangs there), of all leaves that can be read."""
        ahead = [(table.root, 1)] if table.root != _NO_PAGE else []
        while ahead:
            number, depth = ahead.pop()
            try:
                page = self._page(number)
                kind = _HEAD.unpack_from(page)[2] & (_BRANCH | _LEAF | _OVERFLOW | _META_PAGE)
                if kind != (_LEAF if depth == table.depth else _BRANCH):
                    raise _Bad(f"page {number} is no {'leaf' if depth == table.depth else 'branch'}")
                nodes = _nodes(page, number)
                if kind == _BRANCH:
                    below = [lo | hi << 16 | flags << 32 for _, lo, hi, flags, _ in nodes]
                    ahead += [(child, depth + 1) for child in reversed(below)]
                    continue
            except _Bad as exc:
                self.found.add_damage(name, str(exc))
                continue
            for at, lo, hi, flags, key_bytes in nodes:
                self.found.entries += 1
                key = page[at + _NODE.size : at + _NODE.size + key_bytes]
                try:
                    yield key, self._data(page, at + _NODE.size + key_bytes, lo | hi << 16, flags, number)
                except _Bad as exc:
                    self.found.add_damage(name, f"the value under {_shown(key)}: {exc}")

    def _data(self, page: bytes, at: int, size: int, flags: int, number: int) -> Callable[[], bytes] | _Table:
        held = _NUMBER.size if flags & _LONG_VALUE else size
        if at + held > self._psize:
            raise _Bad(f"it ends behind page {number}")
        if flags & _SUBTREE:
            if size < _TABLE.size:
                raise _Bad(f"page {number} has {size} bytes for a table")
            return _table(page, at)
        if not flags & _LONG_VALUE:
            return lambda: page[at : at + size]
        first: int = _NUMBER.unpack_from(page, at)[0]
        head = self._page(first)
        owner, _, kind, pages = _LONG.unpack_from(head)
        if not kind & _OVERFLOW or pages * self._psize < _HEAD.size + size:
            raise _Bad(f"page {first} is not the first of a value of {size} bytes")
        start = first * self._psize + _HEAD.size
        if start + size > self.found.size:
            raise _Bad(
                f"its pages {owner} to {owner + pages - 1} lie beyond the end of the file at {self.found.size} bytes"
            )
        return lambda: self._read(start, size)

    def _read(self, start: int, size: int) -> bytes:
        data = os.pread(self._fd, size, start)
        if len(data) < size:
            raise ValueError(f"the file ends {size - len(data)} bytes before it does")
        return data

    def _page(self, number: int) -> bytes:
        if not 2 <= number <= self._last:
            raise _Bad(f"page {number} is asked for, there are 2 to {self._last}")
        if self._seen[number // 8] >> number % 8 & 1:
            raise _Bad(f"page {number} is reached twice")
        self._seen[number // 8] |= 1 << number % 8
        page = os.pread(self._fd, self._psize, number * self._psize)
        if len(page) < self._psize:
            raise _Bad(f"page {number} lies beyond the end of the file at {self.found.size} bytes")
        self.found.pages += 1
        if _HEAD.unpack_from(page)[0] != number:
            raise _Bad(f"page {number} holds something else" if any(page) else f"page {number} holds nothing but zeros")
        return page


def _table(page: bytes, at: int) -> _Table:
    _, _, depth, _, _, _, _, root = _TABLE.unpack_from(page, at)
    return _Table(root, depth)


def _nodes(page: bytes, number: int) -> list[tuple[int, int, int, int, int]]:
    """(offset, the two low halves of what it holds, flags or high part, bytes of its key) of each node."""
    _, _, flags, lower, upper = _HEAD.unpack_from(page)
    if flags & _FIXED:
        return []
    if not _HEAD.size <= lower <= upper <= len(page) or lower % 2:
        raise _Bad(f"page {number} has its nodes from {upper} on and their list up to {lower}, of {len(page)} bytes")
    found = []
    for (at,) in struct.iter_unpack("=H", page[_HEAD.size : lower]):
        if not upper <= at <= len(page) - _NODE.size:
            raise _Bad(f"page {number} has a node at {at}, they are from {upper} on")
        lo, hi, node_flags, key_bytes = _NODE.unpack_from(page, at)
        if at + _NODE.size + key_bytes > len(page):
            raise _Bad(f"page {number} has a key of {key_bytes} bytes at {at}, of {len(page)} bytes")
        found.append((at, lo, hi, node_flags, key_bytes))
    return found


def _shown(key: bytes) -> str:
    return str(int.from_bytes(key, "big")) if len(key) == 8 else key.decode(errors="replace")
