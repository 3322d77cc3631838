"""Makes a follower's copy the run's journal after the buffer's machine or its disk is lost.

What the lost buffer may have given out since the copy's last commit must not be given again: tree ids get another
prefix, every lease another epoch, batches other numbers, and the version counter passes what the journal speaks of.
A learner must not be ahead of the copy: checkpoints of later steps are put aside.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import numpy as np

from atpo_async import config as configuration
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.links import addresses
from atpo_async.models.policy import checkpoint_step, list_checkpoints
from atpo_async.run.files import sync_folder, write_atomic
from atpo_async.run.rundir import FOLLOWING, PROMOTED, RunDir
from buffer.following.folder import JOURNAL, read_note
from buffer.journal import entries
from buffer.journal.check import DATA
from buffer.journal.marks import MARK, MOST_STREAMS, STREAMS, Mark, Stream, read_mark, read_streams
from buffer.journal.tables import Tables
from buffer.trees.index import ROW

EPOCHS = 1000
"""Added to the epoch of every lease: more than a lost buffer reissued one tree since the copy's last commit."""
BATCHES = 1000
"""Added to the number of the next batch: more than a lost buffer made since.  Ranks that were given shares of a batch
by the lost one and by this one find that out by its number."""
ASIDE = "unmirrored-"
"""Begins the names of checkpoints that are put aside."""
CONNECT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Promoted:
    """What came of a promotion."""

    run: RunDir
    position: int
    step: int
    """A learner may go on from a checkpoint of this step or an earlier one."""
    version: int
    """The next version's number."""
    aside: tuple[Path, ...]
    """Checkpoints that were put aside."""


def promote(folder: Path, *, into: Path | None, certain: bool) -> Promoted:
    """Promote the copy in a follower's folder.

    Args:
        folder: the follower's, which no longer runs.
        into: the run's own folder, where that is left and only its journal was lost; None: the follower's folder
            becomes the run's.
        certain: the user knows that the old buffer is gone.

    Raises:
        SetupError: the old buffer may be alive, the copy is not complete, or the folder is another run's.
    """
    if (folder / PROMOTED).exists() and not (folder / FOLLOWING).exists():
        raise SetupError(f"{folder} was promoted before; the run goes on with `atpo train`")
    note = read_note(folder)
    if not certain:
        _check_gone(folder, note)
    run = _run_of(folder, note, into)
    tables = Tables(folder / JOURNAL, max_bytes=1, sync=True, leased=lambda: False)
    try:
        found = _made_fit(tables, folder)
    finally:
        tables.close()
    version = _pass_versions(run, found.newest + 1)
    aside = _put_aside(run, found.step)
    facts = {
        "run_id": run.run_id, "at": round(time.time(), 3), "stream": found.mark.stream, "commit": found.mark.number,
        "step": found.step, "version": version,
    }  # fmt: skip
    write_atomic(run.path / PROMOTED, json.dumps(facts, indent=2) + "\n")
    if into is not None:
        _move_journal(folder / JOURNAL, run.journal)
    # The last: until now it can be done again.
    (folder / FOLLOWING).unlink()
    sync_folder(folder)
    return Promoted(run=run, position=found.mark.number, step=found.step, version=version, aside=aside)


def _check_gone(folder: Path, note: Mapping[str, Any]) -> None:
    """Raises SetupError where the old buffer answers, or was heard of a short while ago."""
    join = str(note.get("join", ""))
    if join:
        try:
            socket.create_connection(addresses.split(join), timeout=CONNECT_S).close()
        except (OSError, ValueError, UnicodeError):
            pass
        else:
            raise SetupError(
                f"something listens at {join}, where this copy's buffer was: the run may be going on.  Stop it first; "
                "where it is another program that listens, add --certain"
            )
    try:
        patience_s = configuration.load(folder / "config.json", {}).links.give_up_s
    except (ConfigError, OSError) as exc:
        raise SetupError(f"{folder} holds no whole copy: its config.json cannot be read ({exc})") from None
    silent_s = time.time() - float(note.get("heard", 0.0))
    if silent_s < patience_s:
        raise SetupError(
            f"the buffer was heard of {max(silent_s, 0.0):.0f} s ago: it may be cut off from here and still serve "
            f"others.  Make sure that it is gone, and promote after links.give_up_s = {patience_s:g} s, or at once "
            "with --certain"
        )


def _run_of(folder: Path, note: Mapping[str, Any], into: Path | None) -> RunDir:
    """The folder that the run will go on in."""
    if into is None:
        _settle_config(folder)
        run = RunDir.open(folder)
    else:
        run = RunDir.open(into)
        if (run.journal / DATA).exists():
            raise SetupError(f"run {into} has a journal at {run.journal}: put it aside, if it is lost to the run")
    if run.run_id != note.get("run"):
        raise SetupError(f"{folder} is a copy of run {note.get('run')!r}, {run.path} is run {run.run_id!r}")
    return run


def _settle_config(folder: Path) -> None:
    """The configuration names the folder in which the run goes on, and no other place for the journal."""
    file = folder / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        place = folder.resolve()
        data["run"] |= {"name": place.name, "dir": str(place.parent)}
        data["buffer"]["journal_dir"] = None
        configuration.build(data, source=str(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise SetupError(f"{folder} holds no whole copy: {file.name} cannot be read ({exc})") from None
    write_atomic(file, json.dumps(data, indent=2) + "\n")
    for name in ("logs", "checkpoints"):
        (folder / name).mkdir(exist_ok=True)


@dataclass(frozen=True, kw_only=True)
class _Found:
    mark: Mark
    """Before the promotion."""
    newest: int
    """The greatest version number that the journal speaks of."""
    step: int


def _made_fit(tables: Tables, folder: Path) -> _Found:
    """Change the journal so that it can take the lost one's place, all at once."""
    _, rows_db, state_db = tables.tables
    with tables.env.begin(write=True) as txn:
        state = {bytes(key): bytes(value) for key, value in txn.cursor(db=state_db)}
        mark = read_mark(state)
        run = entries.read(state, entries.RUN, entries.RunEntry)
        if mark is None or run is None:
            raise SetupError(f"{folder} holds no whole copy of a journal yet: the first one was not complete")
        rows = np.frombuffer(b"".join(value for _, value in txn.cursor(db=rows_db)), dtype=ROW)
        batches = entries.read_all(state, entries.BATCH, entries.BatchEntry).values()
        newest = max(
            run.version, run.next_version - 1, run.published or 0, int(rows["newest_version"].max(initial=0)),
            *(batch.version + 1 for batch in batches),
        )  # fmt: skip
        step, known = run.saved_step, {batch.step for batch in batches}
        while step in known:
            step += 1
        run.promotions = (run.promotions or 0) + 1
        run.next_batch += BATCHES
        txn.put(entries.RUN, entries.dump(run), db=state_db)
        for tree_id, tree in entries.read_all(state, entries.TREE, entries.TreeStateEntry).items():
            if tree.lease is not None:
                txn.put(entries.TREE + tree_id.encode(), entries.dump(_leased_anew(tree)), db=state_db)
        ended = (*read_streams(state), Stream(name=mark.stream, end=mark.number))[-MOST_STREAMS:]
        # A stream of one commit, this one: no other copy is of it.
        promoted = Mark(stream=secrets.token_hex(8), number=1, last_chunk=mark.last_chunk)
        txn.put(STREAMS, entries.dump(ended), db=state_db)
        txn.put(MARK, entries.dump(promoted), db=state_db)
    return _Found(mark=mark, newest=newest, step=step)


def _leased_anew(tree: entries.TreeStateEntry) -> entries.TreeStateEntry:
    """A tree whose holders are given up: it waits for another one, and turns under its old leases are refused."""
    assert tree.lease is not None
    lease = msgspec.structs.replace(tree.lease, epoch=tree.lease.epoch + EPOCHS, waiting=True)
    epoch = tree.epoch + EPOCHS if tree.growing else tree.epoch
    return msgspec.structs.replace(tree, lease=lease, epoch=epoch)


def _pass_versions(run: RunDir, following: int) -> int:
    """Let the run's counter give no version that the lost buffer's learner may have given; returns the next one.

    One more than the journal speaks of may have been given: a version is given before the buffer hears of it.
    """
    run.skip_versions(following)
    return int((run.path / "version").read_text(encoding="ascii"))


def _put_aside(run: RunDir, step: int) -> tuple[Path, ...]:
    found = []
    for checkpoint in list_checkpoints(run.checkpoints):
        if checkpoint_step(checkpoint) > step:
            aside = checkpoint.with_name(f"{ASIDE}{checkpoint.name}")
            checkpoint.rename(aside)
            found.append(aside)
    return tuple(found)


def _move_journal(source: Path, target: Path) -> None:
    """The journal's file, put in place as a whole."""
    target.mkdir(parents=True, exist_ok=True)
    aside = target / f".{DATA}.{secrets.token_hex(4)}"
    try:
        try:
            os.link(source / DATA, aside)
        except OSError:  # another disk
            shutil.copyfile(source / DATA, aside)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
        aside.rename(target / DATA)
    except OSError as exc:
        aside.unlink(missing_ok=True)
        raise SetupError(f"the journal cannot be moved to {target}: {exc.strerror or exc}") from exc
    except lmdb.Error as exc:
        raise SetupError(f"the journal in {source} cannot be read: {exc}") from exc
    sync_folder(target)
    (source / DATA).unlink()
