"""Messages of a learner that joined by address, without the run's folder: what it is told at the start, the numbers of
its versions, and the files that it passes to the run's folder, which lies beside the buffer.

Every one is a request.  ``life`` tells one process of the learner from the next: the buffer takes files of the newest
life of a rank only.  Files are named as in the run's folder.
"""

from __future__ import annotations

from atpo_async.core.bounds import Count, Id, Name, RawBytes, Size, Text, Version, VersionOrNone
from atpo_async.wire.message import Message

# --- learner -> buffer -----------------------------------------------------------------------------------------


class LearnerHello(Message, frozen=True, tag="learner_hello"):
    """A rank of a joined learner introduces itself.  Answered by ``LearnerWelcome``; by ``NotYet`` while another
    learner is alive; by ``Refused`` for another protocol or run."""

    protocol: Id
    run: Name
    """The run it expects; empty to join whatever runs there."""
    rank: Id
    life: Name
    replica: Name
    """Identity of the replica that it has locked; empty where it has none yet."""
    host: Name
    """Its machine and process, for people."""
    joins: bool = True
    """False: it only looks which run is here; nothing changes, and the answer names no replica."""


class VersionWanted(Message, frozen=True, tag="version_wanted"):
    """Rank 0 asks for the number of its next version, or raises the count.  Answered by ``VersionGiven``."""

    run: Name
    life: Name
    number: Id
    """Of this question within this life: the same question again gets the same answer."""
    above: VersionOrNone = -1
    """No number up to this one is given any more."""
    take: bool = True
    """False: the count is raised, and no number is taken."""


class LinesWritten(Message, frozen=True, tag="lines_written"):
    """Whole lines that the learner has appended to a file of its replica.  Answered by ``FileTaken``."""

    run: Name
    rank: Id
    life: Name
    file: Name
    offset: Size
    """Of the first line in the replica's file: lines that have arrived before are not written again."""
    data: RawBytes
    """uint8[N]."""
    left_out: Size = 0
    """Bytes of the replica's file after these, of lines that are too long to be passed on."""


class FilePart(Message, frozen=True, tag="file_part"):
    """A part of a file that is passed on as a whole; it appears once all of it is there.  Answered by ``FileTaken``."""

    run: Name
    rank: Id
    life: Name
    file: Name
    offset: Size
    total: Size
    digest: Text
    """BLAKE3 of the whole file, 16 bytes of it, hex (``wire.digests``)."""
    data: RawBytes
    """uint8[N]."""


class FolderWritten(Message, frozen=True, tag="folder_written"):
    """All files of a folder have been passed on: it appears now, in place of a former one.  Answered by
    ``FileTaken``."""

    run: Name
    rank: Id
    life: Name
    folder: Name
    files: dict[Name, Size]
    """Name -> bytes."""


class LearnerGone(Message, frozen=True, tag="learner_gone"):
    """A rank ends and has passed everything on.  Answered by ``FileTaken``."""

    run: Name
    rank: Id
    life: Name


JoinedToBuffer = LearnerHello | VersionWanted | LinesWritten | FilePart | FolderWritten | LearnerGone


# --- buffer -> learner -----------------------------------------------------------------------------------------


class LearnerWelcome(Message, frozen=True, tag="learner_welcome"):
    """Buffer's answer to ``LearnerHello``: the run, and how much of the replica's files has arrived."""

    run: Name
    replica: Name
    """Identity of the replica from now on.  Another one than in the hello: what the former replica has not passed on
    is out of date, and not taken any more."""
    settings: RawBytes
    """uint8[N], the run's config.json."""
    facts: RawBytes
    """uint8[N], the run's run.json."""
    taken: dict[Name, Size]
    """File -> bytes of the replica's file that have arrived."""
    evaluations: RawBytes
    """uint8[N], the lines of the run's metrics.jsonl that hold the result of an evaluation."""
    saved_step: Count
    """Batches below are in a checkpoint, as the learner reported: their trees may be gone."""
    saved_where: Text
    """Where that is, for people; empty where it is in the run's folder."""
    policy: Text
    """Identity of the weights in model.path on the buffer's machine (``models.identity``); empty where it has none."""


class VersionGiven(Message, frozen=True, tag="version_given"):
    """Buffer's answer to ``VersionWanted``, once it is on disk."""

    version: Version
    """The number that was taken; where none was, the next one."""
    raised: Count
    """How many numbers the count was raised by."""


class FileTaken(Message, frozen=True, tag="file_taken"):
    """Buffer's answer to a part of a file, once that is on disk."""

    file: Name
    offset: Size
    """What has arrived by now; the learner goes on from there."""


class HelloWanted(Message, frozen=True, tag="hello_wanted"):
    """Buffer does not know this life of the learner, as it has started anew: the learner says hello once more."""


BufferToJoined = LearnerWelcome | VersionGiven | FileTaken | HelloWanted
