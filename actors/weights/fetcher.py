"""Fetches weights: announcement -> manifest -> fetch -> verify.  An engine gets only verified weights.

A transport brings the bytes (``atpo_async.transports``).  They are complete and their digests are checked before
the engine reads them, and an older version is never taken.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from actors.engines.base import WeightsFile
from actors.weights.copies import Copies, NoSpace
from actors.weights.merging import Merging
from atpo_async.config import WeightsConfig
from atpo_async.core.errors import PeerLost, WeightsRejected
from atpo_async.links.announcements import Listener
from atpo_async.links.client import Client
from atpo_async.run.host import host_id
from atpo_async.transports.base import ReceiverContext, Transport, VersionWithdrawn, WantedVersion
from atpo_async.transports.host_copies import HostCopies
from atpo_async.transports.pulling import manifest_of
from atpo_async.transports.registry import make_transport
from atpo_async.transports.verification import verify
from atpo_async.wire import messages as m
from atpo_async.wire.digests import root_of

log = logging.getLogger("atpo.actor.weights")

_STALLS = 4
"""Another actor of the host is waited for until it shows no progress for this part of ``weights.fetch_timeout_s``."""


class WeightsFetcher:
    """Fetches and verifies versions for one actor.

    Args:
        run: only weights of this run are taken.
        client: to the learner's weights endpoint.
        listener: to its announcements.
        settings: time limits, and which transport.
        transport: brings the bytes; None: the one that ``settings`` name.
        merging: makes whole weights of adapters; None: those are rejected.
    """

    def __init__(
        self,
        *,
        run: str,
        client: Client,
        listener: Listener,
        settings: WeightsConfig,
        transport: Transport | None = None,
        merging: Merging | None = None,
    ) -> None:
        self._merging = merging
        self._run, self._settings = run, settings
        self._client, self._listener = client, listener
        self._context = ReceiverContext(run=run, settings=settings, ask=self._ask)
        self._receiver = (transport or make_transport(settings)).receiver(self._context)
        self._copies = Copies(run)
        self._host = HostCopies(run, stall_s=settings.fetch_timeout_s / _STALLS)
        self._taken_counts: dict[str, float] = {}
        self.version = -1
        """Newest version handed out."""
        self.verify_s = 0.0
        """How long the last one was verified, or waited for another actor to do so."""
        self.hashed = False
        """This actor hashed it itself."""
        self._refused = -1
        """A version that the engine has refused: no note of another actor counts for it."""
        self.silent = False
        """The learner did not answer when last asked."""

    @property
    def endpoint(self) -> str:
        """Of the learner, as far as known here."""
        return self._client.endpoint

    @property
    def limit_s(self) -> float:
        """How long ``fetch`` may take: for the manifest, for the bytes by way of the transport, for differences and for
        the whole file where those bring nothing, and once more where what they bring is not the version."""
        return 5 * self._settings.fetch_timeout_s

    async def newest(self, *, timeout_s: float) -> m.WeightsAnnounced | None:
        """The newest announcement of the learner, or None if it has none or does not answer in time."""
        try:
            answer = await self._client.request(m.AnnouncementRequest(run=self._run), timeout_s=timeout_s)
        except PeerLost as exc:
            log.warning("the learner does not answer which weights it has: %s", exc)
            self.silent = True
            return None
        self.silent = False
        if isinstance(answer, m.WeightsAnnounced):
            return answer
        if isinstance(answer, m.Refused):
            log.info("no weights yet: %s", answer.reason)
        return None

    async def next(self) -> m.WeightsAnnounced | None:
        """The next newer version, or None after ``poll_s`` without one.

        Waits for: an announcement.  Unblocked by: the publisher, or the poll that makes up for a lost announcement.
        """
        heard = await self._listener.next(timeout_s=self._settings.poll_s)
        # Announcements pile up while a swap is under way: only the last one counts.
        while heard is not None and (later := await self._listener.next(timeout_s=0.0)) is not None:
            heard = later
        if not isinstance(heard, m.WeightsAnnounced) or heard.run != self._run:
            heard = await self.newest(timeout_s=self._settings.poll_s * 2)
        return heard if heard is not None and heard.run == self._run and heard.version > self.version else None

    async def fetch(self, announced: m.WeightsAnnounced) -> WeightsFile | None:
        """Bring one version here, verified and whole, adapters merged; None if a newer one has replaced it meanwhile.

        Raises:
            WeightsRejected: bytes and digests differ, or it is an older version.
            NoSpace: it fits nowhere here.
            PeerLost: the learner did not answer in time.
            TransportUnavailable: no transport of the configuration can bring it here.
        """
        if announced.version <= self.version:
            raise WeightsRejected(f"version {announced.version} is not newer than {self.version}, which is in use")
        manifest = await self._manifest(announced.version)
        if manifest is None:
            return None
        if root_of(manifest.tensors, manifest.total_bytes) != announced.digest:
            raise WeightsRejected(f"version {announced.version}: manifest and announcement name different payloads")
        wanted = WantedVersion(announced=announced, manifest=manifest)
        beside = self._receiver.beside(wanted)

        async def bring(target: Path) -> None:
            if beside is None and self._settings.shared_memory:
                self.hashed = await self._host.bring(
                    manifest,
                    target,
                    lambda part: self._receiver.fetch(wanted, part),
                    again=announced.version == self._refused,
                    refused=lambda: self._receiver.refused(wanted),
                )
                self.verify_s = self._host.check_s
                return
            await self._receiver.fetch(wanted, target)
            try:
                await self._verify(wanted, target)
            except WeightsRejected:
                if not self._receiver.refused(wanted):
                    raise
                await self._receiver.fetch(wanted, target)
                await self._verify(wanted, target)

        try:
            path = await self._copies.make(manifest, bring, beside=beside)
        except VersionWithdrawn:
            return None
        except NoSpace:
            self._host.close()
            raise
        self._receiver.verified(wanted, path)
        weights = WeightsFile(path=path, manifest=manifest)
        if manifest.adapter_scale is not None:
            weights = await self._merged(weights)
        self.version = announced.version
        return weights

    async def _verify(self, wanted: WantedVersion, path: Path) -> None:
        """Raises WeightsRejected, with ``path`` removed."""
        began, announced = time.monotonic(), wanted.announced
        shared = None
        if announced.shm_path is not None and announced.host_id == host_id():
            shared = Path(announced.shm_path)
        again = announced.version == self._refused
        self.hashed = await asyncio.to_thread(verify, wanted.manifest, path, shared=shared, again=again)
        self.verify_s = time.monotonic() - began

    async def _merged(self, adapters: WeightsFile) -> WeightsFile:
        try:
            if self._merging is None:
                raise WeightsRejected(
                    f"version {adapters.manifest.version} came as adapters, which nothing here merges"
                )
            return await self._merging.whole(adapters)
        finally:
            self._copies.remove(adapters.path)

    def forget(self, version: int) -> None:
        """The engine has not loaded ``version``: it may be fetched again."""
        self.version = min(self.version, version - 1)
        self._refused = version

    def release(self, weights: WeightsFile) -> None:
        """The engine has read it: remove this actor's link or copy."""
        self._copies.remove(weights.path)

    def take_counts(self) -> dict[str, float]:
        """Metrics of the transport: what has happened since they were last taken."""
        now = {f"weights/{name}": value for name, value in self._receiver.counters.items()}
        now |= {"weights/fetched_for_host": self._host.fetched, "weights/shared_by_host": self._host.shared}
        since = {name: value - self._taken_counts.get(name, 0.0) for name, value in now.items()}
        self._taken_counts = now
        if whole := since.get("weights/differences/whole_bytes"):
            since["weights/differences/ratio"] = since["weights/differences/bytes"] / whole
        return {name: value for name, value in since.items() if value}

    def close(self) -> None:
        self._receiver.close()
        self._host.close()
        self._copies.close()
        if self._merging is not None:
            self._merging.close()

    async def _manifest(self, version: int) -> m.WeightsManifest | None:
        """None if a newer version has replaced it.

        Waits for: the differences that lead to it.  Unblocked by: the learner having made them, or giving up.
        """
        return await manifest_of(self._context, version, base=self._receiver.base)

    async def _ask(self, request: m.ActorToLearner) -> m.LearnerToActor:
        answer: m.LearnerToActor = await self._client.request(request, timeout_s=self._settings.fetch_timeout_s)
        self._host.progress()
        return answer
