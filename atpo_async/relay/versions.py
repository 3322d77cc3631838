"""The versions that a relay holds: fetched once, verified, and served; the newest two, in memory or on a disk."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec

from atpo_async.config import WeightsConfig
from atpo_async.core.errors import AtpoError, WeightsRejected
from atpo_async.relay.differences import KeptDifferences
from atpo_async.run.host import host_id
from atpo_async.run.scratch import SHARED_MEMORY, Scratch, sweep_dead, weights_folder
from atpo_async.transports.base import (
    OfferedVersion,
    Payload,
    ReceiverContext,
    SenderContext,
    VersionWithdrawn,
    WantedVersion,
)
from atpo_async.transports.pulling import manifest_of
from atpo_async.transports.registry import make_transport
from atpo_async.transports.verification import check
from atpo_async.wire import messages as m
from atpo_async.wire.digests import root_of

log = logging.getLogger("atpo.relay")

NUM_VERSIONS = 2
SPARE_BYTES = 16 << 20
"""Left free beside a version: for its differences, and for others."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

Ask = Callable[[m.ActorToLearner], Awaitable[m.LearnerToActor]]


class DoesNotFit(AtpoError):
    """A version has no space here."""


class RelayedVersions:
    """The versions of one run on this host.

    Args:
        run: identity of the run.
        settings: which transport brings and serves them, and time limits.
        ask: one request to the learner, or to the next relay, and its answer.
        folder: where they lie; None: in shared memory, or with the temporary files where that is too small.
    """

    def __init__(self, run: str, settings: WeightsConfig, *, ask: Ask, folder: Path | None) -> None:
        self.fetched = 0
        """Versions that were fetched from upstream."""
        self.fetched_bytes = 0
        """Of the chunks that they came in."""
        self.does_not_fit = ""
        """Why the newest version is not held here; empty where it is."""
        self._run, self._settings = run, settings
        self._upstream, self._folder = ask, folder
        self._context = ReceiverContext(run=run, settings=settings, ask=self._ask)
        transport = make_transport(settings)
        self._receiver = transport.receiver(self._context)
        self._sender = transport.sender(SenderContext(run=run, settings=settings))
        self._differences = KeptDifferences()
        self._scratch: dict[Path, Scratch] = {}
        self._versions: Mapping[int, OfferedVersion] = {}
        self._announced: m.WeightsAnnounced | None = None
        """The newest one that is held, as it was announced here."""
        self._number = 0

    @property
    def newest(self) -> m.WeightsAnnounced | None:
        """As this relay announces it."""
        return self._announced

    def holds(self, announced: m.WeightsAnnounced) -> bool:
        """Whether this very version is the newest one here."""
        mine = self._announced
        return mine is not None and (mine.version, mine.digest) == (announced.version, announced.digest)

    async def take(self, announced: m.WeightsAnnounced) -> m.WeightsAnnounced | None:
        """Fetch, verify and offer a version; what is to be announced, or None if a newer one has replaced it meanwhile.

        Raises:
            DoesNotFit: there is no space for it, even with the earlier ones removed.
            WeightsRejected: what came is not what was announced, or was removed here.
            PeerLost: upstream did not answer in time.
            TransportUnavailable: no transport of the configuration can bring it here.
        """
        began, bytes_before = time.monotonic(), self.fetched_bytes
        manifest = await manifest_of(self._context, announced.version, base=self._receiver.base)
        if manifest is None:
            return None
        if root_of(manifest.tensors, manifest.total_bytes) != announced.digest:
            raise WeightsRejected(f"version {announced.version}: manifest and announcement name different payloads")
        # A learner that fell back publishes anew: what it had published later is worth nothing any more.
        self._keep(lambda number: number < announced.version)
        try:
            path = await self._bring(WantedVersion(announced=announced, manifest=manifest))
        except VersionWithdrawn:
            return None
        try:
            mine = await self._offer(manifest, announced, path)
        except OSError as exc:
            _remove(path)
            raise WeightsRejected(f"version {announced.version}: its file at {path} cannot be read: {exc}") from exc
        self.fetched += 1
        log.info(
            "version %d: fetched in %.2f s, %d bytes of its %d over the network",
            announced.version, time.monotonic() - began, self.fetched_bytes - bytes_before, manifest.total_bytes,
        )  # fmt: skip
        return mine

    def answer(self, request: m.ActorToLearner) -> m.LearnerToActor:
        """The reply to an actor's request."""
        if request.run != self._run:
            return m.Refused(reason=f"this relay serves run {self._run!r}, not {request.run!r}")
        if self._announced is None:
            return none_yet(request)
        if isinstance(request, m.AnnouncementRequest):
            return self._announced
        if isinstance(request, m.ChunkRequest) and request.base >= 0:
            return self._differences.answer(request)
        offered = self._versions.get(request.version)
        if offered is None:
            return m.VersionGone(version=request.version, newest=self._announced.version)
        if isinstance(request, m.ManifestRequest):
            return self._differences.describe(offered.manifest, request.base)
        return self._sender.answer(request, offered) or m.Refused(
            reason=f"this relay serves no chunks (weights.transport = {self._settings.transport!r}); give the actor "
            "the same transport"
        )

    def close(self) -> None:
        """Remove every file.  Idempotent."""
        self._versions, self._announced = {}, None
        self._differences.close()
        self._receiver.close()
        self._sender.close()
        for scratch in self._scratch.values():
            scratch.remove()
        self._scratch.clear()

    # --- bringing one ------------------------------------------------------------------------------------------

    async def _ask(self, request: m.ActorToLearner) -> m.LearnerToActor:
        answer = await self._upstream(request)
        if isinstance(answer, m.Chunk):
            self.fetched_bytes += len(answer.data)
            if answer.base >= 0:
                with contextlib.suppress(OSError):  # costs the actors that difference: they take the version whole
                    self._differences.note(answer)
        return answer

    async def _bring(self, wanted: WantedVersion) -> Path:
        """The file of a version, verified.  Raises DoesNotFit, and as ``take``."""
        nbytes, problem = wanted.manifest.total_bytes, ""
        # The last one stays meanwhile, for actors that are fetching it; where that leaves no space, not even that.
        for num_kept in (NUM_VERSIONS - 1, 0):
            newest = sorted(self._versions)[-num_kept:] if num_kept else []
            self._keep(lambda number, newest=tuple(newest): number in newest)  # type: ignore[misc]
            for place in self._places():
                problem = _why_too_small(place, nbytes)
                if problem:
                    continue
                try:
                    return await self._fetch(wanted, place)
                except OSError as exc:
                    problem = f"{place}: {exc.strerror or exc}"
                    if exc.errno not in FULL:
                        break
        self.does_not_fit = (
            f"version {wanted.manifest.version} has {nbytes} bytes, for which there is no space here ({problem}): "
            "actors fetch it through this relay, each for itself; free some space, or name another folder with --dir"
        )
        raise DoesNotFit(self.does_not_fit)

    async def _fetch(self, wanted: WantedVersion, place: Path) -> Path:
        """Raises OSError, and as ``take``."""
        manifest = wanted.manifest
        folder = self._scratch_in(place)
        self._number += 1
        target = folder / f"v{manifest.version}-{self._number}.bin"
        self._differences.expect(manifest, folder, most=self._settings.max_chain)
        try:
            await self._receiver.fetch(wanted, target)
            try:
                await asyncio.to_thread(check, manifest, target)
            except WeightsRejected:
                if not self._receiver.refused(wanted):
                    raise
                await self._receiver.fetch(wanted, target)
                await asyncio.to_thread(check, manifest, target)
        except BaseException:
            _remove(target)
            raise
        self._receiver.verified(wanted, target)
        return target

    async def _offer(
        self, manifest: m.WeightsManifest, announced: m.WeightsAnnounced, path: Path
    ) -> m.WeightsAnnounced:
        bare = msgspec.structs.replace(manifest, differences=(), differences_pending=False)
        offered = OfferedVersion(manifest=bare, path=path, payload=Payload(path))
        await asyncio.to_thread(self._sender.offer, offered)
        with contextlib.suppress(OSError):  # costs the actors differences: they take the version whole
            await asyncio.to_thread(self._differences.keep, manifest)
        self._versions = {**self._versions, manifest.version: offered}
        self.does_not_fit = ""
        self._announced = msgspec.structs.replace(announced, host_id=host_id(), shm_path=self._sender.place(offered))
        return self._announced

    def _keep(self, stays: Callable[[int], bool]) -> None:
        """Drop the versions that do not stay."""
        for number, offered in list(self._versions.items()):
            if stays(number):
                continue
            self._versions = {each: other for each, other in self._versions.items() if each != number}
            self._sender.withdraw(number)
            # What an actor reads of it now stays until it has read it.
            _remove(offered.path)
        if self._announced is not None and self._announced.version not in self._versions:
            self._announced = None

    def _places(self) -> list[Path]:
        places = [self._folder] if self._folder is not None else [SHARED_MEMORY, Path(tempfile.gettempdir())]
        return [place for place in places if place.is_dir()]

    def _scratch_in(self, place: Path) -> Path:
        """A folder of this process's own.  Raises OSError."""
        scratch = self._scratch.get(place)
        if scratch is None or not scratch.exists:
            if swept := sweep_dead(place):
                log.info("removed what killed processes left: %s", ", ".join(map(str, swept)))
            scratch = self._scratch[place] = Scratch(place, f"{weights_folder(self._run).name}.relay-")
        return scratch.path


def none_yet(request: m.ActorToLearner) -> m.LearnerToActor:
    """The reply of a relay that has no version yet: an actor that heard of one before the relay was started anew asks
    again."""
    if isinstance(request, m.AnnouncementRequest):
        return m.Refused(reason=f"this relay has no weights of run {request.run!r} yet")
    return m.VersionGone(version=request.version, newest=-1)


def _why_too_small(place: Path, nbytes: int) -> str:
    try:
        free = shutil.disk_usage(place).free
    except OSError as exc:
        return f"{place}: {exc.strerror or exc}"
    return f"{place} has {free} bytes free" if free < nbytes + SPARE_BYTES else ""


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
