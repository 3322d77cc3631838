"""Which files of a run's folder a joined learner may write there, by rank, and how large each may be.  Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

LINES = ("metrics.jsonl", "trees.jsonl", "lineage.jsonl")
"""Files to whose end lines are added."""

FOLDERS = ("model", "adapter")
"""Folders that appear as a whole."""

MAX_LINE_BYTES = 4 << 20
"""Longer lines stay in the replica."""
MAX_STATUS_BYTES = 1 << 20
MAX_SKIPPED_BYTES = 1 << 30
MAX_MODEL_FILES = 1000

_IN_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A file that is passed on as a whole."""

    file: str
    """Its path in the run's folder."""
    folder: str = ""
    """``model`` or ``adapter``, where it appears with all of that folder only."""
    max_bytes: int | None = None


def status_file(rank: int) -> str:
    """The status file of a rank."""
    return f"status/{role_of(rank)}.json"


def role_of(rank: int) -> str:
    """What a rank is called."""
    return "learner" if rank == 0 else f"learner-{rank}"


def skipped_pattern(rank: int) -> str:
    """Of the batches whose update a rank has skipped."""
    return f"skipped/step-*-rank-{rank}.batch"


def may_add_lines(file: str, rank: int) -> bool:
    """Whether a rank adds lines to ``file``: rank 0 writes for all of them, but each knows what it was trained on."""
    return file in LINES and (rank == 0 or file == "lineage.jsonl")


def whole_file(file: str, rank: int) -> Whole | None:
    """What a rank may pass on under this name; None where that is nothing."""
    if file == status_file(rank):
        return Whole(file=file, max_bytes=MAX_STATUS_BYTES)
    if re.fullmatch(rf"skipped/step-\d{{6,9}}-rank-{rank}\.batch", file):
        return Whole(file=file, max_bytes=MAX_SKIPPED_BYTES)
    folder, slash, name = file.partition("/")
    if rank == 0 and slash and folder in FOLDERS and _IN_FOLDER.fullmatch(name):
        return Whole(file=file, folder=folder)
    return None


class Passes(Protocol):
    """What connects a replica with the run's folder.  Called from any thread; each call waits for the buffer.

    Each raises PeerLost where the buffer does not answer, or another learner has taken this one's place.
    """

    def next_version(self) -> int:
        """As of ``RunDir``."""

    def skip_versions(self, upto: int) -> int:
        """As of ``RunDir``."""

    def pass_on(self) -> None:
        """Returns once all that was written before this call is in the run's folder."""
