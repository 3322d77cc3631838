"""Weights in: announcement -> fetch -> verify.  The engine swaps only what has passed here.

On the learner's own host its file is linked and checked; elsewhere chunks are pulled with bounded requests in flight.
Either way the bytes are complete and hashed before anything sees them, and an older version is never taken.

They lie in shared memory, beside the learner's, on the disk where that is full; whoever removes the folder makes this
actor fetch once more, into a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import tempfile
from pathlib import Path

from actors.engines.base import WeightsFile
from atpo_async.config import WeightsConfig
from atpo_async.core.errors import AtpoError, PeerLost, SetupError, WeightsRejected
from atpo_async.links.announcements import Listener
from atpo_async.links.client import Client
from atpo_async.run.host import host_id
from atpo_async.run.scratch import SHARED_MEMORY, Scratch, sweep, sweep_dead, weights_folder
from atpo_async.wire.messages import (
    AnnouncementRequest,
    Chunk,
    ChunkRequest,
    ManifestRequest,
    Refused,
    VersionGone,
    WeightsAnnounced,
    WeightsManifest,
)

log = logging.getLogger("atpo.actor.weights")

CHUNKS_IN_FLIGHT = 4
"""Enough to hide a round trip, few enough that heartbeats are never stuck behind megabytes."""


class NoRoom(AtpoError):
    """Neither shared memory nor the disk takes a version; both may later."""


def scratch_for(run: str, shm_path: str | None, *, on_disk: bool = False) -> Scratch:
    """A private folder for this actor's copies: beside the learner's file, so that it can be hard-linked.

    What killed actors of this run left there goes, and what killed runs left in shared memory.

    Args:
        run: identity of the run.
        shm_path: the learner's file, where this host can see it.
        on_disk: in the folder for temporary files instead.

    Raises:
        SetupError: no folder is ours to write.
        OSError: there is no space left.
    """
    beside = Path(shm_path).parent.parent if shm_path else None
    prefix = f"{weights_folder(run).name}."
    places = [] if on_disk else [beside, SHARED_MEMORY]
    problems = []
    for parent in [place for place in places if place is not None] + [Path(tempfile.gettempdir())]:
        if not parent.is_dir():
            continue
        if swept := [*sweep(parent, prefix), *sweep_dead()]:
            log.info("removed what killed processes left: %s", ", ".join(map(str, swept)))
        try:
            return Scratch(parent, prefix)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # there may be room later
            problems.append(f"{parent}: {exc.strerror or exc}")
    raise SetupError(f"no folder for the weights that are fetched can be made ({'; '.join(problems)}); set TMPDIR")


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class WeightsFetcher:
    """Fetches and verifies versions for one actor.

    Args:
        run: only weights of this run are taken.
        client: to the learner's weights endpoint.
        listener: to its announcements.
        settings: chunk and time limits.
    """

    def __init__(self, *, run: str, client: Client, listener: Listener, settings: WeightsConfig) -> None:
        self._run = run
        self._client = client
        self._listener = listener
        self._settings = settings
        self._scratch: Scratch | None = None
        self._on_disk = False
        """Shared memory was full the last time."""
        self.version = -1
        """Newest version handed out."""
        self.silent = False
        """The learner did not answer when last asked."""

    @property
    def endpoint(self) -> str:
        """Of the learner, as far as known here."""
        return self._client.endpoint

    async def newest(self, *, timeout_s: float) -> WeightsAnnounced | None:
        """What the learner has now, or None if it has nothing or does not answer in time."""
        try:
            answer = await self._client.request(AnnouncementRequest(run=self._run), timeout_s=timeout_s)
        except PeerLost as exc:
            log.warning("the learner does not say which weights it has: %s", exc)
            self.silent = True
            return None
        self.silent = False
        if isinstance(answer, WeightsAnnounced):
            return answer
        if isinstance(answer, Refused):
            log.info("no weights yet: %s", answer.reason)
        return None

    async def next(self) -> WeightsAnnounced | None:
        """The next newer version, or None after ``poll_s`` without one.

        Waits for: an announcement.  Unblocked by: the publisher, or the poll that makes up for a lost announcement.
        """
        heard = await self._listener.next(timeout_s=self._settings.poll_s)
        # Announcements pile up while a swap is under way: only the last one counts.
        while heard is not None and (later := await self._listener.next(timeout_s=0.0)) is not None:
            heard = later
        if not isinstance(heard, WeightsAnnounced) or heard.run != self._run:
            heard = await self.newest(timeout_s=self._settings.poll_s * 2)
        return heard if heard is not None and heard.run == self._run and heard.version > self.version else None

    async def fetch(self, announced: WeightsAnnounced) -> WeightsFile | None:
        """Bring one version here, whole and verified; None if a newer one has replaced it meanwhile.

        Raises:
            WeightsRejected: bytes and hash differ, or it is an older version.
            NoRoom: there is no place for it here.
            PeerLost: the learner did not answer in time.
        """
        if announced.version <= self.version:
            raise WeightsRejected(f"version {announced.version} is not newer than {self.version}, which is in use")
        manifest = await self._manifest(announced.version)
        if manifest is None:
            return None
        if manifest.sha256 != announced.sha256:
            raise WeightsRejected(f"version {announced.version}: manifest and announcement name different payloads")
        path = await self._bring(announced, manifest)
        if path is None:
            return None
        self.version = announced.version
        return WeightsFile(path=path, manifest=manifest)

    def forget(self, version: int) -> None:
        """The engine has not taken ``version`` up: it may be fetched again."""
        self.version = min(self.version, version - 1)

    def release(self, weights: WeightsFile) -> None:
        """The engine has read it: remove this actor's link or copy."""
        with contextlib.suppress(OSError):
            weights.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    # --- parts -------------------------------------------------------------------------------------------------

    async def _manifest(self, version: int) -> WeightsManifest | None:
        answer = await self._client.request(
            ManifestRequest(run=self._run, version=version), timeout_s=self._settings.fetch_timeout_s
        )  # fmt: skip
        if isinstance(answer, VersionGone):
            return None
        if not isinstance(answer, WeightsManifest) or answer.version != version or answer.run != self._run:
            raise WeightsRejected(f"version {version}: the learner answered {type(answer).__name__}, not its manifest")
        return answer

    async def _bring(self, announced: WeightsAnnounced, manifest: WeightsManifest) -> Path | None:
        """Where the verified bytes are; None if the version is gone.  Raises NoRoom if they fit nowhere."""
        problem: OSError | None = None
        if self._on_disk:  # there may be room in memory again, and then they need not even be copied
            self.close()
            self._on_disk = False
        # Once more in a new folder where somebody has removed it, and once on the disk.
        for _ in range(3):
            try:
                return await self._bring_once(announced, manifest)
            except FileNotFoundError as exc:
                problem = exc
                log.warning("version %d: the folder for it was removed (%s); fetching again", manifest.version, exc)
            except OSError as exc:
                problem = exc
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT) or self._on_disk:
                    break
                self._on_disk = True
                log.warning("version %d does not fit into shared memory (%s); taking it to disk", manifest.version, exc)
            self.close()
        where = "" if self._scratch is None else f" in {self._scratch.path}"
        self.close()
        raise NoRoom(
            f"version {manifest.version}: its {manifest.total_bytes} bytes cannot be written{where}: {problem}; free "
            "some space"
        ) from problem

    async def _bring_once(self, announced: WeightsAnnounced, manifest: WeightsManifest) -> Path | None:
        """Raises OSError where this actor's folder cannot take it."""
        same_host = self._settings.shared_memory and announced.host_id == host_id()
        shared = announced.shm_path if same_host else None
        if self._scratch is None or not self._scratch.exists:
            self.close()
            self._scratch = scratch_for(self._run, shared, on_disk=self._on_disk)
        target = self._scratch.path / f"v{manifest.version}.bin"
        target.unlink(missing_ok=True)
        if (shared is None or not self._link(Path(shared), target)) and not await self._pull(manifest, target):
            return None
        await asyncio.to_thread(self._verify, manifest, target)
        return target

    def _link(self, source: Path, target: Path) -> bool:
        """A hard link keeps the bytes even when the learner drops the version in the middle of our reading."""
        try:
            os.link(source, target)
        except OSError as exc:
            log.info("shared weights %s cannot be linked (%s); pulling them instead", source, exc)
            return False
        return True

    async def _pull(self, manifest: WeightsManifest, target: Path) -> bool:
        num_chunks = -(-manifest.total_bytes // manifest.chunk_bytes)
        room = asyncio.Semaphore(CHUNKS_IN_FLIGHT)
        gone = False
        file = os.open(target, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)

        async def one(index: int) -> None:
            nonlocal gone
            async with room:
                if gone:
                    return
                answer = await self._client.request(
                    ChunkRequest(run=self._run, version=manifest.version, index=index),
                    timeout_s=self._settings.fetch_timeout_s,
                )
            if isinstance(answer, VersionGone):
                gone = True
                return
            expected = min(manifest.chunk_bytes, manifest.total_bytes - index * manifest.chunk_bytes)
            if not isinstance(answer, Chunk) or answer.index != index or len(answer.data) != expected:
                raise WeightsRejected(f"version {manifest.version}: chunk {index} came wrong or short")
            os.pwrite(file, answer.data.data, index * manifest.chunk_bytes)

        try:
            async with asyncio.timeout(self._settings.fetch_timeout_s), asyncio.TaskGroup() as pulls:
                for index in range(num_chunks):
                    pulls.create_task(one(index), name=f"chunk-{manifest.version}-{index}")
        except TimeoutError:
            raise PeerLost(
                f"weights version {manifest.version}: not all of {num_chunks} chunks came within "
                f"{self._settings.fetch_timeout_s} s (weights.fetch_timeout_s)"
            ) from None
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            os.close(file)
        return not gone

    def _verify(self, manifest: WeightsManifest, path: Path) -> None:
        size = path.stat().st_size
        found = sha256_of(path) if size == manifest.total_bytes else f"{size} bytes"
        if found != manifest.sha256:
            path.unlink(missing_ok=True)
            raise WeightsRejected(
                f"version {manifest.version}: payload is {found}, the manifest says {manifest.total_bytes} bytes of "
                f"{manifest.sha256}; it was not applied"
            )
