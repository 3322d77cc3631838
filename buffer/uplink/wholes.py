"""Files and folders that a joined learner passes to the run's folder: each appears once all of it is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from atpo_async.core.errors import BadMessage
from atpo_async.run.files import sync, sync_folder
from atpo_async.run.replica import names
from atpo_async.wire.digests import file_digests

KEPT_BATCHES = 5
"""Skipped batches of one rank that stay, as with a learner that has the run's folder."""


class WholeFiles:
    """Takes the files of one rank, part by part.  One thread at a time.

    Args:
        run: the run's folder.
        aside: folder for what is not whole yet.
        rank: whose files; each rank may write its own only.
    """

    def __init__(self, run: Path, aside: Path, *, rank: int) -> None:
        self._run = run
        self._aside = aside
        self._rank = rank

    def add(self, file: str, offset: int, data: bytes, *, total: int, digest: str) -> int:
        """Take a part.  Returns how much of the file is there now, ``total`` once it is whole; the next part begins
        there.  No bytes: only ask.

        Raises:
            BadMessage: a file that this rank does not write, or one that is too large.
            OSError: the file system refuses.
        """
        whole = names.whole_file(file, self._rank)
        if whole is None:
            raise BadMessage(f"rank {self._rank} of the learner writes no file {file!r:.80}")
        if (whole.max_bytes is not None and total > whole.max_bytes) or offset + len(data) > total:
            raise BadMessage(f"{file}: {len(data)} bytes at {offset} of {total}, more than it may have")
        part, target = self._places(whole)
        # The status means nothing after a crash of the machine, and comes once a second.
        durable = not file.startswith("status/")
        if target.is_file() and target.stat().st_size == total and whole.folder and _digest(target) == digest:
            return total
        there = part.stat().st_size if part.exists() else 0
        if there > total or (offset == 0 and data):
            there = 0
        if offset != there or (not data and total):
            return there
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab" if offset else "wb") as out:
            out.write(data)
        if offset + len(data) < total:
            return offset + len(data)
        if _digest(part) != digest:
            part.unlink()
            return 0
        self._appear(part, target, durable=durable)
        if file.startswith("skipped/"):
            self._prune(target)
        return total

    def finish(self, folder: str, files: Mapping[str, int]) -> None:
        """Let a folder appear whose files are all there, in place of a former one.

        Raises:
            BadMessage: one that this rank does not write, or whose files are not all there.
            OSError: the file system refuses.
        """
        if self._rank != 0 or folder not in names.FOLDERS or not 0 < len(files) <= names.MAX_MODEL_FILES:
            raise BadMessage(f"rank {self._rank} of the learner writes no folder {folder!r:.80} of {len(files)} files")
        aside, target = self._aside / folder, self._run / folder
        if not aside.is_dir() and not _lacking(target, files):
            return
        if lacking := _lacking(aside, files):
            raise BadMessage(f"{folder} lacks {lacking[0]}, and {len(lacking) - 1} more files")
        for entry in aside.iterdir():
            if entry.name not in files:
                entry.unlink()
        old = target.with_name(f".{folder}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        sync_folder(self._run)
        shutil.rmtree(old, ignore_errors=True)

    def _places(self, whole: names.Whole) -> tuple[Path, Path]:
        """Where the parts of a file are put together, and where it is put when it is whole."""
        target = (self._aside if whole.folder else self._run) / whole.file
        return self._aside / "parts" / whole.file.replace("/", "."), target

    def _appear(self, part: Path, target: Path, *, durable: bool) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if durable:
            sync(part)
        os.replace(part, target)
        if durable:
            sync_folder(target.parent)

    def _prune(self, newest: Path) -> None:
        for old in sorted(newest.parent.glob(Path(names.skipped_pattern(self._rank)).name))[:-KEPT_BATCHES]:
            old.unlink(missing_ok=True)


def _lacking(folder: Path, files: Mapping[str, int]) -> list[str]:
    return [n for n, size in files.items() if not (folder / n).is_file() or (folder / n).stat().st_size != size]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digests(file.fileno(), [(0, os.fstat(file.fileno()).st_size)])[0]
