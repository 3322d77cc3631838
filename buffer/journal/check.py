"""Checks that a journal's file is complete by reading it before it is opened; names the way out where it is not.

Every page that the tables reach is read, with how many and how long in the log.  The records of turns are read too, up
to ``RECORDS_S``: each chunk ends with a checksum of its records.
"""

from __future__ import annotations

import logging
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import lmdb

from atpo_async.core.errors import BadMessage, SetupError
from atpo_async.run.files import sync
from atpo_async.wire.records import frames_in
from buffer.journal.pages import NoTables, Value, walk

log = logging.getLogger("atpo.buffer.journal")

DATA = "data.mdb"
CHUNKS = "chunks"
TABLES = frozenset({CHUNKS, "rows", "state"})
RECORDS_S = 20.0
"""How long records are read at the start; the pages that lead to them are always read in full."""
_SUM = struct.Struct("<8sII")
_SUM_NAME = b"atpo-sum"
_MOST_RECORDS = 1 << 31
_ZEROS = bytes(2048)
"""No entry of rows or state has as many in a row: each of their numbers is written with what it is, or is above 0."""

KEEP = (
    "keep the folder, turns that were acknowledged are in it: put a copy of it that is whole (from a snapshot of the "
    "disk, a backup) in its place; to go on without them rename it, the run then goes on from the learner's checkpoint "
    "and its tasks begin at 0 once more"
)


def with_sum(records: Sequence[bytes]) -> bytes:
    """A chunk as it is written: its records, and behind them their checksum."""
    total = 0
    for record in records:
        total = zlib.crc32(record, total)
    return b"".join((*records, _SUM.pack(_SUM_NAME, total, sum(map(len, records)) & 0xFFFFFFFF)))


def fault_of(chunk: bytes) -> str | None:
    """The fault of a chunk as it was read; None where there is none.

    Earlier programs wrote no checksum: of their chunks the records have to follow one another without a gap.
    """
    if len(chunk) >= _SUM.size:
        name, total, nbytes = _SUM.unpack_from(chunk, len(chunk) - _SUM.size)
        if name == _SUM_NAME and nbytes == len(chunk) - _SUM.size:
            wrong = zlib.crc32(memoryview(chunk)[:nbytes]) != total
            return "it is not what was written, by its checksum" if wrong else None
    try:
        frames_in(chunk, _MOST_RECORDS)
    except BadMessage as exc:
        return str(exc)
    return None


class _Records:
    """Checks the records of a journal, until its time is over."""

    def __init__(self) -> None:
        self.chunks = self.read = self.nbytes = 0
        self._ends_at = time.monotonic() + RECORDS_S

    def look(self, value: Value) -> str | None:
        if value.table not in TABLES:
            return None
        is_chunk = value.table == CHUNKS
        self.chunks += is_chunk
        if is_chunk and time.monotonic() > self._ends_at:
            return None
        try:
            data = value.read()
        except ValueError as exc:
            return str(exc)
        if not is_chunk:
            return "a page of it holds nothing but zeros" if _ZEROS in data else None
        self.read += 1
        self.nbytes += len(data)
        return fault_of(data)


def check(folder: Path) -> None:
    """Read a journal that no process has open.

    Raises:
        SetupError: something in it cannot be read, or is not what was written.
    """
    records = _Records()
    try:
        found = walk(folder / DATA, records.look)
    except NoTables as exc:
        raise SetupError(f"the journal in {folder} is damaged: {DATA} is no journal, {exc}; {KEEP}") from None
    except OSError as exc:
        raise SetupError(f"the journal in {folder} cannot be read: {exc.strerror or exc}; {KEEP}") from exc
    log.info(
        "the journal in %s: %d pages with %d entries read, %d of %d chunks of records (%.1f MB), in %.2f s",
        folder, found.pages, found.entries, records.read, records.chunks, records.nbytes / 1e6, found.seconds,
    )  # fmt: skip
    if found.damage:
        raise SetupError(f"the journal in {folder} is damaged: {found.describe()}; {KEEP}")


def create(folder: Path) -> None:
    """An empty journal's file, put in place as a whole: killed meanwhile, there is none or it is complete.

    Args:
        folder: no other process makes one there.

    Raises:
        OSError, lmdb.Error: the disk does not take it.
    """
    for left in folder.glob(".new-*"):
        _remove(left)
    aside = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        lmdb.open(str(aside)).close()
        sync(aside / DATA)
        os.rename(aside / DATA, folder / DATA)
        sync(folder)
    finally:
        _remove(aside)


def _remove(aside: Path) -> None:
    for file in aside.iterdir():
        file.unlink()
    aside.rmdir()
