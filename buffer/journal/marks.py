"""The entries by which a journal and its copies know how far they are: the mark of the last commit, earlier streams.

Each process of a buffer begins a stream of commits, counted from 1.  The mark is written with every commit, so that a
copy and its mark are of one commit.  Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from buffer.journal import entries

MARK, STREAMS = b"mark", b"streams"
"""Keys in the table ``state``."""
MOST_STREAMS = 1000
"""Earlier streams that are remembered: a follower that was away for more starts of the buffer copies all anew."""


class Mark(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How far a journal is."""

    stream: str
    number: int
    """Commits of the stream."""
    last_chunk: int
    """The greatest number that a chunk ever had: none is given twice, so that a copy may keep the chunks it has."""


class Stream(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A stream of an earlier process."""

    name: str
    end: int
    """Number of its last commit."""


def read_mark(state: Mapping[bytes, bytes]) -> Mark | None:
    """The mark among a journal's entries; None where there is none.  Raises SetupError where it is damaged."""
    return entries.read(state, MARK, Mark)


def read_streams(state: Mapping[bytes, bytes]) -> tuple[Stream, ...]:
    """The earlier streams, oldest first.  Raises SetupError where they are damaged."""
    found: tuple[Stream, ...] | None = entries.read(state, STREAMS, tuple[Stream, ...])
    return found or ()


def dump(value: object) -> bytes:
    return entries.dump(value)
