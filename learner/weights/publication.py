"""Publishes versions: the torch thread copies the weights aside, and the rest is done while the next step trains.

``prepare`` holds training up; it makes the probe and starts the copies (``learner.weights.staging``).  A thread of its
own then writes and hashes the version (``learner.weights.store``), and the event loop announces it to actors and to the
buffer once it is whole, strictly in the order of versions.

Who waits for whom: ``prepare`` waits for the bytes of the version before to have been written, never for the buffer or
for actors; writing and announcing wait for the disk and the buffer, never for training.  So the learner may wait for
trees that can only be grown with a version that is still being written.  What fails aside is raised by the next call of
``begin``, ``check`` or ``settled``.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from atpo_async.config import Config
from atpo_async.core.errors import AtpoError
from atpo_async.links.advertised import told
from atpo_async.models.adapters import base_digest
from atpo_async.models.sources import model_folder
from atpo_async.ops.disk import until_written
from atpo_async.status import waits
from atpo_async.wire.messages import VersionPublished, WeightsAnnounced
from learner.batches.buffer_peer import BufferPeer
from learner.training.trainer import Trainer
from learner.weights.probe import draw_probe, is_drawn_at, probe_shape
from learner.weights.publisher import Publisher
from learner.weights.staging import Staged, Stager

log = logging.getLogger("atpo.learner")


class PublicationGivenUp(AtpoError):
    """The role ends while a version waits for space on the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A version whose bytes are on their way into host memory, with its probe."""

    version: int
    staged: Staged
    probe_tokens: np.ndarray
    """int32[S, T]."""
    probe_logprobs: np.ndarray
    """float32[S * (T - 1)]."""
    since_s: float
    """``time.monotonic`` when these weights were made."""


class Publication:
    """The published versions of the learner's weights.

    Args:
        config: of the run.
        trainer: whose weights; used in the torch thread only.
        publisher: rank 0's; None on the others, which only take part in gathering the weights.
        buffer: is sent each version.
        written: called with each version and the seconds from its weights being made until it was announced.
    """

    def __init__(
        self,
        config: Config,
        *,
        trainer: Trainer,
        publisher: Publisher | None,
        buffer: BufferPeer,
        written: Callable[[int, float], None] = lambda version, write_s: None,
    ) -> None:
        self.published = 0
        """The newest version that actors can fetch."""
        self.newest = 0
        """The newest version that is, or will be, published."""
        self._config = config
        self._trainer = trainer
        self._publisher = publisher
        self._buffer = buffer
        self._written = written
        # As of the count of versions (``ranks``): torch's own limit comes after it.
        self._give_up_s = config.links.give_up_s if trainer.accelerator.num_processes > 1 else None
        self._probe = np.zeros(probe_shape(config), dtype=np.int32)
        """int32[S, T]."""
        self._count = 0
        """Publications since this learner began."""
        # Adapters are merged before they are rounded.
        self._stager = Stager("float32" if trainer.whole.adapter_scale is not None else config.model.dtype)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._task: asyncio.Task[None] | None = None
        """Of the newest version that was begun; it waits for those before."""
        self._closing = threading.Event()

    def is_due(self, step: int) -> bool:
        """Whether the weights after ``step`` batches are published: the last ones always are."""
        return step % self._config.staleness.publish_every == 0 or step == self._config.run.steps

    # --- in the torch thread

    def prepare(self, version: int, *, should_stop: Callable[[], bool] = lambda: False) -> Prepared | None:
        """In the torch thread, on every rank: start to copy the weights as they are, and make their probe.

        Waits for: the version before to have been written.  Unblocked by: the thread that writes it.

        Returns what ``begin`` takes; None on ranks other than 0, and where the role had to stop first.
        """
        since_s = time.monotonic()
        self._count += 1
        whole = self._trainer.whole
        if self._publisher is None and not whole.sharded:
            return None
        if is_drawn_at(self._count):
            seed = (self._config.run.seed, version)
            self._probe = draw_probe(self._trainer, self._probe.shape, seed=seed)
        tensors = whole.published()
        staged = None
        if self._publisher is not None:
            # Before the probe, whose forward pass the device then runs beside the copies.
            with waits.waiting("the learner", "the version before to be written", on=waits.DISK):
                staged = self._stager.stage(
                    tensors, copied=whole.sharded, should_stop=lambda: should_stop() or self._closing.is_set()
                )
        try:
            logprobs = whole.probe(self._probe)
        except BaseException:
            if staged is not None:
                staged.release()
            raise
        if staged is None:
            return None
        self._trainer.steps.before_update = staged.until_read
        return Prepared(
            version=version,
            staged=staged,
            probe_tokens=self._probe,
            probe_logprobs=np.nan_to_num(logprobs, nan=0.0, posinf=0.0, neginf=-1e4),
            since_s=since_s,
        )

    # --- on the event loop

    def begin(self, prepared: Prepared | None) -> None:
        """Write and announce a version beside training.  Raises what kept an earlier one from being published."""
        if prepared is None:
            return
        try:
            self.check()
        except BaseException:
            prepared.staged.release()
            raise
        self.newest = prepared.version
        self._task = asyncio.create_task(
            self._publish(prepared, after=self._task), name=f"publish version {prepared.version}"
        )

    def check(self) -> None:
        """Raises what kept a version from being published: SetupError (the disk), PeerLost (the buffer)."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def settled(self) -> None:
        """Waits for: every version that was begun to be announced.  Unblocked by: the disk and the buffer.

        Raises as ``check``.
        """
        if self._task is not None:
            await asyncio.shield(self._task)

    async def write(self, prepared: Prepared | None) -> WeightsAnnounced | None:
        """Write a version and return what is to be announced.  Raises SetupError."""
        if prepared is None:
            return None
        writing = asyncio.get_running_loop().run_in_executor(self._thread, self._write, prepared)
        with waits.waiting("the learner", f"version {prepared.version} of the weights to be written", on=waits.DISK):
            return await writing

    async def announce(self, announcement: WeightsAnnounced | None) -> None:
        """Announce to actors and the buffer what ``write`` has written.  Raises PeerLost as ``BufferPeer.send``."""
        if announcement is None or self._publisher is None:
            return
        self.published = announcement.version
        self.newest = max(self.newest, announcement.version)
        await self._publisher.announce(announcement)
        await self.tell_buffer()

    async def tell_buffer(self) -> None:
        """Report the published version and its endpoints, on rank 0 only.  Raises PeerLost as ``BufferPeer.send``, and
        as ``check``."""
        if self._publisher is None:
            return
        self.check()
        await self._buffer.send(
            VersionPublished(
                run=self._buffer.run_id,
                version=self.published,
                weights_endpoint=self._told(self._publisher.weights_endpoint),
                announce_endpoint=self._told(self._publisher.announce_endpoint),
            )
        )

    def _told(self, bound: str) -> str:
        """By the buffer's address of now: it may have moved, and this learner reach it from another one of its own."""
        return told(bound, buffer=self._buffer.link.endpoint, advertise=self._config.links.advertise)

    async def close(self) -> None:
        """The role ends: what is being written is finished, what waits for space is given up.  Idempotent."""
        self._closing.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    @property
    def counters(self) -> dict[str, float]:
        """Counters of what was sent to actors; empty on ranks other than 0."""
        if self._publisher is None:
            return {}
        return {f"weights/{name}": value for name, value in self._publisher.counters.items()}

    async def _publish(self, prepared: Prepared, *, after: asyncio.Task[None] | None) -> None:
        try:
            if after is not None:
                await after
        except BaseException:
            prepared.staged.release()
            raise
        await self.announce(await self.write(prepared))
        self._written(prepared.version, time.monotonic() - prepared.since_s)

    def _write(self, prepared: Prepared) -> WeightsAnnounced:
        """In the thread for it."""
        publisher = self._publisher
        if publisher is None:
            raise AssertionError("only rank 0 writes versions")

        def add() -> WeightsAnnounced:
            return publisher.store.add(
                prepared.version,
                prepared.staged,
                probe_tokens=prepared.probe_tokens,
                probe_logprobs=prepared.probe_logprobs,
                adapter_scale=self._trainer.whole.adapter_scale,
                adapter_base=self._adapter_base,
            )

        try:
            return until_written(
                f"version {prepared.version} of the weights", add, log=log, give_up_s=self._give_up_s, sleep=self._pause
            )
        finally:
            prepared.staged.release()

    @functools.cached_property
    def _adapter_base(self) -> str | None:
        if self._trainer.whole.adapter_scale is None:
            return None
        return base_digest(model_folder(self._config.model.path))

    def _pause(self, seconds: float) -> None:
        if self._closing.wait(seconds):
            raise PublicationGivenUp("the learner ends; this version was not published")
