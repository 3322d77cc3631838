"""Puts checkpoints, and the trained policy, at ``learner.checkpoint_url`` beside training, in a thread of its own.

A store that refuses is tried again for as long as it takes, as a full disk is.  Of checkpoints that wait only the
newest is put there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from atpo_async.core.errors import SetupError
from atpo_async.models.checkpoint_store import CheckpointStore, StoreFault
from atpo_async.run import locks
from atpo_async.status import waits
from learner.checkpoints import checkpoint

T = TypeVar("T")

PAUSE_S, PAUSE_MAX_S = 0.5, 30.0
REPEAT_S = 60.0
"""Between two log lines about a store that goes on refusing."""


class _SupersededError(Exception):
    """A newer checkpoint waits: this one is not needed there any more."""


class Uploads:
    """Uploads of rank 0.

    Args:
        store: at the URL.
        keep: how many checkpoints stay there.
        durable: called in the thread with each checkpoint that is there.
    """

    def __init__(
        self, store: CheckpointStore, *, keep: int, durable: Callable[[Path], None], log: logging.Logger
    ) -> None:
        self.trouble = ""
        """What the store said last, while it refuses."""
        self._store = store
        self._keep = keep
        self._durable = durable
        self._log = log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._closing = threading.Event()
        self._newest: Path | None = None
        self._current: Path | None = None
        self._open: set[Future[None]] = set()

    @property
    def busy(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._open)

    @property
    def in_hand(self) -> Path | None:
        """The checkpoint that must not be removed here, as it is on its way."""
        return self._current

    def begin(self, path: Path) -> None:
        """Put a checkpoint there beside training."""
        self._newest = path
        self._submit(lambda: self._put_checkpoint(path))

    def begin_folder(self, path: Path) -> None:
        """Put another folder there under its own name."""
        self._submit(lambda: self._persist(path.name, lambda: self._store.put(path, may_stop=self._may_stop)))

    async def settled(self) -> None:
        """Waits for: all that was begun to be there.  Unblocked by: the store."""
        while self._open:
            what = f"{self._store.shown()} to have the last checkpoint" + (f" ({self.trouble})" if self.trouble else "")
            with waits.waiting("the learner", what, on=waits.DISK):
                await asyncio.wait([asyncio.wrap_future(future) for future in self._open], timeout=1.0)
            for future in [future for future in self._open if future.done()]:
                self._open.discard(future)

    def close(self) -> None:
        """Begin nothing further; what is on its way is given up."""
        self._closing.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _submit(self, work: Callable[[], object]) -> None:
        def guarded() -> None:
            with contextlib.suppress(_SupersededError):
                work()

        future = self._thread.submit(guarded)
        self._open.add(future)
        future.add_done_callback(self._done)

    def _done(self, future: Future[None]) -> None:
        self._open.discard(future)
        if not future.cancelled() and (exc := future.exception()) is not None:
            self._log.error("nothing was put to %s: %s: %s", self._store.shown(), type(exc).__name__, exc)

    # --- in the thread

    def _may_stop(self) -> None:
        if self._closing.is_set():
            raise _SupersededError

    def _put_checkpoint(self, path: Path) -> None:
        def superseded() -> None:
            self._may_stop()
            if self._newest != path:
                raise _SupersededError

        superseded()
        began, self._current = time.monotonic(), path
        try:
            # One that has begun is finished, though a newer one waits: a slow store would never get any.
            total = self._persist(path.name, lambda: self._store.put(path, may_stop=self._may_stop), superseded)
        finally:
            self._current = None
        self._durable(path)
        took_s = time.monotonic() - began
        self._log.info("%s is whole: %.1f MB in %.1f s", self._store.shown(path.name), total / 1e6, took_s)
        try:
            self._store.keep_newest(self._keep)
        except StoreFault as exc:
            self._log.warning("%s; it is tried again after the next one", exc)

    def _persist(self, name: str, put: Callable[[], T], may_stop: Callable[[], None] | None = None) -> T:
        """``put()``, again and again while the store refuses, until ``may_stop`` raises."""
        pause_s, told = PAUSE_S, -REPEAT_S
        while True:
            try:
                found = put()
            except (StoreFault, OSError) as exc:
                self.trouble = str(exc)
                if time.monotonic() - told > REPEAT_S:
                    told = time.monotonic()
                    self._log.warning("%s is not there yet, it is tried again: %s", self._store.shown(name), exc)
                self._closing.wait(pause_s)
                (may_stop or self._may_stop)()
                pause_s = min(2 * pause_s, PAUSE_MAX_S)
            else:
                self.trouble = ""
                return found


def try_store(store: CheckpointStore, *, give_up_s: float, log: logging.Logger, pause_s: float = PAUSE_S) -> None:
    """Before anything is trained: find out whether checkpoints can be put there.

    Raises SetupError where they cannot: at once where there is no access or no such place, after ``give_up_s`` where
    the store does not answer.
    """
    began, told = time.monotonic(), False
    while True:
        try:
            return store.try_it()
        except StoreFault as exc:
            if exc.refuses or time.monotonic() - began > give_up_s:
                raise SetupError(
                    f"learner.checkpoint_url: {exc}; mend that first, nothing has been trained by this start"
                ) from exc
            if not told:
                log.warning("%s; it is tried again", exc)
            told = True
        with waits.waiting("the learner", f"{store.shown()} to take files", on=waits.DISK):
            time.sleep(pause_s)


def fetch(store: CheckpointStore, name: str, checkpoints: Path, *, log: logging.Logger) -> Path:
    """A checkpoint at the URL, in ``checkpoints``, which ranks on one machine share; fetched where it is not there yet.

    Raises SetupError: it is damaged, or the store or the disk refuses.
    """
    target, aside = checkpoints / name, checkpoints / f".writing-fetched-{name}"
    with locks.alone(checkpoints / "fetch.lock"):
        if target.is_dir():
            return target
        log.info("fetching %s", store.shown(name))
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            store.fetch(name, aside)
            checkpoint.publish(aside, target)
        except (StoreFault, OSError) as exc:
            raise SetupError(f"the checkpoint {store.shown(name)} cannot be fetched: {exc}") from exc
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target
