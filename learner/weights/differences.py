"""Makes the differences between successive versions for actors that ask for them, and keeps the last few.

A difference is made in a thread of its own, after its version has been announced: neither training nor actors of the
learner's host wait for it.  None is made before an actor has asked for a part of a version or has named the one that it
has: then it is on another host.  From then on each version's is made as soon as the version is there, so that it is
ready, or on its way, when it is asked for, and so that an actor that takes long for its first version, which comes
whole, finds those that it has missed.  Once no actor has asked for ``QUIET_VERSIONS`` versions, none are made any
longer; a learner whose actors are all on its host never makes one.

Who waits for whom: an actor's request for a manifest waits for the difference that leads to it, at most ``WAIT_S`` at a
time; the thread waits for nothing but the disk.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import msgspec

from atpo_async.config import WeightsConfig
from atpo_async.core.texts import of_error
from atpo_async.transports.base import OfferedVersion, Payload
from atpo_async.transports.deltas.blocks import same_layout
from atpo_async.transports.deltas.chains import steps_back
from atpo_async.transports.deltas.codec import CODEC
from atpo_async.transports.deltas.encoding import EncodingStopped, encode
from atpo_async.transports.pulling import chunk_length, num_chunks
from atpo_async.wire.digests import root_of
from atpo_async.wire.messages import Chunk, ChunkRequest, Difference, LearnerToActor, Refused, WeightsManifest

log = logging.getLogger("atpo.learner.publisher")

QUIET_VERSIONS = 16
"""Versions without a request after which no actor is thought to take differences."""

WAIT_S = 10.0
"""That a request for a manifest is held, and no longer than a quarter of ``weights.fetch_timeout_s``, the time limit of
a request; the actor then asks again."""


class Kept(NamedTuple):
    """A difference that actors can fetch."""

    difference: Difference
    payload: Payload
    """Of a file without a name."""
    chunk_bytes: int


class Job(NamedTuple):
    """A difference that is being made."""

    base: OfferedVersion
    new: OfferedVersion
    done: Future[None]


class Differences:
    """The differences of one learner.  ``offer`` is called in the thread that writes versions, the rest on the loop.

    Args:
        settings: how many are kept.
    """

    def __init__(self, settings: WeightsConfig) -> None:
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="differences")
        self._lock = threading.Lock()
        """Over what follows but ``_kept``, which is replaced as a whole."""
        self._before: OfferedVersion | None = None
        self._newest: OfferedVersion | None = None
        self._quiet = QUIET_VERSIONS
        """Versions since an actor last asked."""
        self._running: Job | None = None
        self._next: Job | None = None
        """Made when the running one is done."""
        self._tried = -1
        """The version to which the last difference was begun: what has failed is not begun again."""
        self._closing = threading.Event()
        self._kept: tuple[Kept, ...] = ()
        """Oldest first, each on the base of the one after it."""
        self._counts: Counter[str] = Counter()
        self._encode_s = 0.0
        self._ratio = 0.0

    @property
    def is_on(self) -> bool:
        return self._settings.max_chain > 0

    @property
    def counters(self) -> dict[str, float]:
        """Totals since the start; of what is kept, and of the last one's size, as they are now."""
        counts = dict(self._counts)  # at once: the thread adds to it
        found = {f"differences/{name}": float(count) for name, count in counts.items()}
        if counts:
            found["differences/encode_s"] = self._encode_s
            found["differences/ratio"] = self._ratio
            found["differences/kept_bytes"] = float(sum(kept.difference.nbytes for kept in self._kept))
        return found

    def offer(self, version: OfferedVersion) -> None:
        """A version can be fetched from now on, and is about to be announced."""
        with self._lock:
            self._before, self._newest = self._newest, version
            self._quiet += 1
            if self.is_on and self._quiet <= QUIET_VERSIONS:
                self._make()

    def asked(self) -> None:
        """An actor fetches something over the network."""
        self._quiet = 0

    async def ready(self, version: int, base: int) -> None:
        """An actor that has ``base`` asks how to get ``version``.

        Waits for: the difference that leads there.  Unblocked by: the thread that makes it, or ``WAIT_S``.
        """
        if base < 0 or not self.is_on:
            return
        with self._lock:
            self._quiet = 0
            newest, before = self._newest, self._before
            if (
                newest is not None and newest.manifest.version == version > self._tried
                and before is not None and before.manifest.version == base
            ):  # fmt: skip
                self._make()
            job = self._job_of(version)
        if job is not None and self._leads_from(base, job):
            limit_s = min(WAIT_S, self._settings.fetch_timeout_s / 4)
            await asyncio.wait([asyncio.wrap_future(job.done)], timeout=limit_s)

    def describe(self, manifest: WeightsManifest, base: int) -> WeightsManifest:
        """The manifest with what leads to its version; ``base``: what the actor has, -1 for nothing."""
        if base < 0 or not self.is_on:
            return manifest
        with self._lock:
            job = self._job_of(manifest.version)
        return msgspec.structs.replace(
            manifest,
            differences=steps_back(manifest.version, self._named()),
            differences_pending=job is not None and self._leads_from(base, job),
        )

    def answer(self, request: ChunkRequest) -> LearnerToActor:
        """The reply to an actor that asks for a part of a difference."""
        for kept in self._kept:
            if (kept.difference.version, kept.difference.base) == (request.version, request.base):
                break
        else:
            return Refused(reason=f"no difference from version {request.base} to {request.version} is kept any longer")
        size, chunk_bytes = kept.difference.nbytes, kept.chunk_bytes
        if request.index >= num_chunks(size, chunk_bytes):
            return Refused(reason=f"that difference has {size} bytes: chunk {request.index} is none of it")
        data = kept.payload.read(request.index * chunk_bytes, chunk_length(size, chunk_bytes, request.index))
        return Chunk(version=request.version, base=request.base, index=request.index, data=data)

    def close(self) -> None:
        """What is being made is given up.  Idempotent."""
        self._closing.set()
        self._thread.shutdown()
        self._kept = ()
        self._before = self._newest = None

    # --- under the lock

    def _job_of(self, version: int) -> Job | None:
        jobs = (self._running, self._next)
        return next((job for job in jobs if job is not None and job.new.manifest.version == version), None)

    def _make(self) -> None:
        """Have the difference that leads to the newest version made."""
        base, new = self._before, self._newest
        if base is None or new is None or self._closing.is_set():
            return
        self._tried = new.manifest.version
        if self._running is None:
            self._running = Job(base, new, Future())
            self._thread.submit(self._work)
        elif self._next is None:
            self._next = Job(base, new, Future())
        else:
            # Versions come faster than differences are made: one takes the way of two.
            former, self._next = self._next, Job(self._next.base, new, Future())
            former.done.set_result(None)
            self._counts["skipped"] += 1

    # --- beside training

    def _work(self) -> None:
        job = self._running
        while job is not None:
            try:
                self._add(job)
            except EncodingStopped as exc:
                self._counts["not_made/too_large" if not self._closing.is_set() else "not_made/closing"] += 1
                log.info("no difference to version %d: %s", job.new.manifest.version, exc)
            except Exception as exc:  # costs the actors that difference: they take the version whole
                self._counts["not_made/failed"] += 1
                log.warning("no difference to version %d could be made: %s", job.new.manifest.version, of_error(exc))
            with self._lock:
                self._running, self._next = self._next, None
                following = self._running
            job.done.set_result(None)
            job = following

    def _add(self, job: Job) -> None:
        """Raises EncodingStopped, OSError."""
        began = time.monotonic()
        base, new = job.base.manifest, job.new.manifest
        if base.total_bytes != new.total_bytes or not same_layout(base.tensors, new.tensors):
            self._kept = ()
            raise EncodingStopped(f"version {base.version} has other tensors")
        # Beside the version, where there was space for that; without a name, so that nothing is left behind.
        with tempfile.TemporaryFile(dir=job.new.path.parent) as file:
            made = encode(
                job.base.payload, job.new.payload, new.tensors, file,
                max_bytes=new.total_bytes, should_stop=self._closing.is_set,
            )  # fmt: skip
            payload = Payload(file.fileno())
        difference = Difference(
            version=new.version, base=base.version, base_digest=root_of(base.tensors, base.total_bytes),
            nbytes=made.nbytes, digest=made.digest, codec=CODEC,
        )  # fmt: skip
        self._keep(Kept(difference, payload, new.chunk_bytes), limit=new.total_bytes)
        self._encode_s += time.monotonic() - began
        self._ratio = made.nbytes / max(1, new.total_bytes)
        self._counts["made"] += 1
        self._counts["made_bytes"] += made.nbytes
        self._counts["made_whole_bytes"] += new.total_bytes

    def _keep(self, kept: Kept, *, limit: int) -> None:
        """Of those before, as many as ``weights.max_chain`` and the size of a version allow."""
        chain = (
            [*self._kept, kept] if self._kept and self._kept[-1].difference.version == kept.difference.base else [kept]
        )
        chain = chain[-self._settings.max_chain :]
        while len(chain) > 1 and sum(each.difference.nbytes for each in chain) >= limit:
            chain.pop(0)
        self._kept = tuple(chain)

    # --- anywhere

    def _named(self) -> list[Difference]:
        return [kept.difference for kept in self._kept]

    def _leads_from(self, base: int, job: Job) -> bool:
        """Whether an actor that has ``base`` can use what ``job`` makes, perhaps after differences before it."""
        at = job.base.manifest.version
        running = self._running
        if running is not None and running is not job and running.new.manifest.version == at:
            at = running.base.manifest.version
        return base == at or any(step.base == base for step in steps_back(at, self._named()))
