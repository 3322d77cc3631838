"""Stores the versions that actors can fetch: the newest and the one before, each with its manifest and its file.

A third one is kept while an actor is fetching it whole: over a thin link that takes longer than the learner takes for
two versions, and the actor would never have its first.  It goes where the next one would find no space beside it.  The
files stay open, so that a version is served even if its file is removed.  The transport carries the bytes
(``atpo_async.transports``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from atpo_async.config import WeightsConfig
from atpo_async.run.host import host_id
from atpo_async.transports.base import OfferedVersion, Payload, SenderContext, Transport
from atpo_async.transports.registry import make_transport
from atpo_async.wire import messages as m
from atpo_async.wire.digests import root_of
from learner.weights.differences import Differences
from learner.weights.files import VersionFiles, free_beside, remove
from learner.weights.staging import Staged

NUM_VERSIONS = 2

FETCHED_WITHIN_S = 15.0
"""Since the last request for a part of it: until then a version counts as being fetched."""


class WeightsStore:
    """Versions on local storage, offered through a transport.  Knows no sockets.

    Args:
        run: identity of the run.
        fallback: folder to use where there is no shared memory, or not enough.
        settings: chunk size, probe tolerance, and which transport.
        transport: carries the bytes; None: the one that ``settings`` name.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        run: str,
        fallback: Path,
        settings: WeightsConfig,
        transport: Transport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._settings = run, settings
        self._sender = (transport or make_transport(settings)).sender(SenderContext(run=run, settings=settings))
        self._files = VersionFiles(run=run, fallback=fallback)
        self._differences = Differences(settings)
        self._clock = clock
        self._fetched = -1, 0.0
        """The version that an actor fetches whole, and when it last asked for a part of it.  Of several the first: they
        cost the memory of one."""
        # Replaced as a whole, never changed: one thread adds versions while another answers requests.
        self._versions: Mapping[int, OfferedVersion] = {}

    @property
    def newest(self) -> int | None:
        return max(self._versions, default=None)

    @property
    def counters(self) -> dict[str, float]:
        """The transport's counters (``Sender.counters``), and those of the differences."""
        return self._sender.counters | self._differences.counters

    def add(
        self,
        version: int,
        staged: Staged,
        *,
        probe_tokens: np.ndarray,
        probe_logprobs: np.ndarray,
        adapter_scale: float | None = None,
        adapter_base: str | None = None,
    ) -> m.WeightsAnnounced:
        """Write a version, drop all but the newest two, and return what to announce.

        Args:
            version: number of it.
            staged: its weights; not released here.
            probe_tokens: int32[S, T].
            probe_logprobs: float[S * (T - 1)].
            adapter_scale: they are adapters, whose products count so often; None: they are whole.
            adapter_base: digest of the weights under them.

        Raises:
            SetupError: it cannot be written.
        """
        self._make_space(staged.total_bytes)
        file = self._files.write(version, staged)
        manifest = m.WeightsManifest(
            run=self._run,
            version=version,
            total_bytes=file.total_bytes,
            chunk_bytes=self._settings.chunk_bytes,
            tensors=file.tensors,
            probe_token_ids=probe_tokens.astype(np.int32).reshape(-1),
            probe_logprobs=probe_logprobs.astype(np.float32),
            probe_tolerance=self._settings.probe_tolerance,
            probe_sequences=len(probe_tokens),
            adapter_scale=adapter_scale,
            adapter_base=adapter_base,
        )
        offered = OfferedVersion(manifest=manifest, path=file.path, payload=Payload(file.path))
        self._sender.offer(offered)
        every = {**self._versions, version: offered}
        self._keep(every, {*sorted(every)[-NUM_VERSIONS:], *self._being_fetched()})
        self._differences.offer(offered)
        return self.announcement(version)

    def _make_space(self, nbytes: int) -> None:
        """A third version goes where it would drive the next one out of memory: actors of this host come first."""
        newest = set(sorted(self._versions)[-NUM_VERSIONS:])
        for number, old in self._versions.items():
            if number not in newest and free_beside(old.path) < nbytes:
                self._fetched = -1, 0.0
                self._keep(self._versions, newest)
                return

    def _keep(self, every: Mapping[int, OfferedVersion], kept: set[int]) -> None:
        self._versions = {number: old for number, old in every.items() if number in kept}
        for number, old in every.items():
            if number not in kept:
                self._sender.withdraw(number)
                # An actor that has it mapped is not affected: the name goes, the pages stay.
                remove(old.path)

    def announcement(self, version: int) -> m.WeightsAnnounced:
        offered = self._versions[version]
        return m.WeightsAnnounced(
            run=self._run,
            version=version,
            total_bytes=offered.manifest.total_bytes,
            digest=root_of(offered.manifest.tensors, offered.manifest.total_bytes),
            host_id=host_id(),
            shm_path=self._sender.place(offered),
        )

    async def ready(self, request: m.ActorToLearner) -> None:
        """Waits for: the difference that the actor would take, a few seconds at most.  Unblocked by: the thread that
        makes it, beside training."""
        if isinstance(request, m.ManifestRequest) and request.run == self._run:
            await self._differences.ready(request.version, request.base)

    def answer(self, request: m.ActorToLearner) -> m.LearnerToActor:
        """The reply to an actor's request, at once; after ``ready`` it names the differences that were waited for."""
        newest = self.newest
        if request.run != self._run:
            return m.Refused(reason=f"this learner serves run {self._run!r}, not {request.run!r}")
        if newest is None:
            return m.Refused(reason=f"run {self._run!r} has not published any weights yet")
        if isinstance(request, m.AnnouncementRequest):
            return self.announcement(newest)
        if isinstance(request, m.ChunkRequest):
            self._differences.asked()
            if request.base >= 0:
                return self._differences.answer(request)
        offered = self._versions.get(request.version)
        if offered is None:
            return m.VersionGone(version=request.version, newest=newest)
        if isinstance(request, m.ManifestRequest):
            return self._differences.describe(offered.manifest, request.base)
        if self._being_fetched() <= {request.version}:
            self._fetched = request.version, self._clock()
        return self._sender.answer(request, offered) or m.Refused(
            reason=f"this learner serves no chunks (weights.transport = {self._settings.transport!r}); give the actor "
            "the same transport"
        )

    def _being_fetched(self) -> set[int]:
        version, asked_at = self._fetched
        return {version} if self._clock() - asked_at < FETCHED_WITHIN_S else set()

    def close(self) -> None:
        """Remove every file.  Idempotent."""
        self._versions = {}
        self._differences.close()
        self._sender.close()
        self._files.close()
