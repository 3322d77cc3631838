"""Messages between a buffer and the followers of its journal.

A follower says where it stands and gets the journal as a stream of bytes in parts: the entries of LMDB's tables to put
and to delete, encoded by ``buffer.following.stream``.  It asks for one part after another.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from atpo_async.core.bounds import Count, Id, Name, RawBytes, Seconds, Size, Text
from atpo_async.wire.messages import Message, Refused

PartKind = Literal["chunks", "rest", "commits", "nothing", "again"]
"""What a part holds: records of a copy, the other entries of a copy, commits, nothing within the time; ``again`` where
the copy was broken off and another one has to be asked for."""


class FollowHello(Message, frozen=True, tag="follow_hello"):
    """Follower says where it stands.  Answered by ``Following``, or ``Refused`` with the reason."""

    protocol: Id
    run: Name
    """The run whose journal it holds; empty for a folder that holds none yet."""
    stream: Name
    """The stream of commits of which it holds a copy; empty where it holds none."""
    position: Size
    """Commits of that stream that it has; 0 where it has none."""
    complete: bool
    """Whether it holds a whole copy."""
    chunks: RawBytes
    """Numbers of the chunks that it has, as ranges: pairs of u64 (first, count), little-endian."""


class FollowRequest(Message, frozen=True, tag="follow_request"):
    """Follower asks for the next part, and says what it has on disk.  Answered by ``JournalPart``."""

    run: Name
    part: Id
    """Number of the part, counted from the ``Following`` on."""
    durable: Size
    """Commits of the stream that it has on disk."""
    wait_s: Seconds
    trouble: Text = ""
    """Why it could not write, for the buffer's status; empty where it could."""


FollowerToBuffer = FollowHello | FollowRequest


class Following(Message, frozen=True, tag="following"):
    """Buffer's answer to ``FollowHello``."""

    run: Name
    stream: Name
    """The present stream of commits."""
    position: Size
    """Where the stream of parts begins: for a copy the number of commits that it will hold."""
    copy: bool
    """A copy comes first; False: the commits after ``position``."""
    max_bytes: Size
    """The buffer's ``buffer.max_bytes``: so large may the journal grow, and several times that on disk."""
    value_bytes: Size
    """No entry is larger."""


class SmallFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, eq=False):
    """One of the run folder's small files, whole."""

    name: Name
    data: RawBytes


class JournalPart(Message, frozen=True, tag="journal_part"):
    """Buffer's answer to ``FollowRequest``: the next piece of the stream."""

    part: Id
    kind: PartKind
    data: RawBytes
    ends: bool
    """The copy, or the group of commits, is complete with this part."""
    position: Size
    """Commits that the follower has once it has taken what ends here; else those before."""
    behind: Count
    """Commits that come after."""
    files: tuple[SmallFile, ...]
    """Small files that have changed."""
    finished: bool = False
    """The run is over: there will be no further commit."""


BufferToFollower = Following | JournalPart | Refused
