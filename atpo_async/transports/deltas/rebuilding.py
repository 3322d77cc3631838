"""An actor's use of differences: keeps the last version that it verified, and rebuilds the next one from it.

Whatever keeps a version from being rebuilt costs it that way and nothing else: it comes whole, and the reason is
counted and logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from atpo_async.transports.base import Payload, ReceiverContext, WantedVersion
from atpo_async.transports.deltas.chains import NoChain, chain_from
from atpo_async.transports.deltas.codec import BadDifference
from atpo_async.transports.deltas.decoding import rebuild
from atpo_async.transports.pulling import ChunkRefused, Pulled, pull
from atpo_async.wire.messages import Difference

log = logging.getLogger("atpo.weights")


class Base(NamedTuple):
    """A version that this actor has verified."""

    version: int
    digest: str
    """Of it as a whole, as announced."""
    payload: Payload
    """Stays after the file's name is gone: no other process has to keep it, and none finds it left behind."""


class Rebuilding:
    """The differences of one actor.

    Args:
        context: of its receiver.
    """

    def __init__(self, context: ReceiverContext) -> None:
        self._context = context
        self._base: Base | None = None
        self._rebuilt = -1
        """The version that was rebuilt last."""
        self._refused = -1
        """The version that was rebuilt and was not what was announced: it is taken whole."""
        self._counts: Counter[str] = Counter()
        self._decode_s = 0.0

    @property
    def is_on(self) -> bool:
        return self._context.settings.max_chain > 0

    @property
    def base(self) -> int:
        """The version that is kept; -1 for none."""
        return -1 if self._base is None else self._base.version

    @property
    def counters(self) -> dict[str, float]:
        """Totals, as ``Receiver.counters``."""
        found = {f"differences/{name}": float(count) for name, count in self._counts.items()}
        if self._decode_s:
            found["differences/decode_s"] = self._decode_s
        return found

    def keep(self, wanted: WantedVersion, path: Path) -> None:
        """``path`` has been verified to be ``wanted``: later versions are rebuilt from it."""
        self.drop()
        if self.is_on:
            with contextlib.suppress(OSError):  # it is gone already: the next version comes whole
                self._base = Base(wanted.manifest.version, wanted.announced.digest, Payload(path))

    def drop(self) -> None:
        """The memory of the version that is kept goes back."""
        self._base = None

    def refused(self, wanted: WantedVersion) -> bool:
        """Whether ``wanted``, which has failed its check, was rebuilt here: it is taken whole then."""
        version = wanted.manifest.version
        if self._rebuilt != version:
            return False
        self._rebuilt, self._refused = -1, version
        self._whole(version, NoChain("refused", "what was rebuilt is not what the learner published"))
        return True

    async def fetch(self, wanted: WantedVersion, target: Path) -> bool:
        """Rebuild the payload in the file ``target``; False where it has to come whole.

        Raises:
            PeerLost: the learner did not answer in time.
            VersionWithdrawn: a newer version has replaced it.
            OSError: the folder of ``target`` cannot take it.
        """
        manifest = wanted.manifest
        self._rebuilt = -1
        if not self.is_on or self._refused == manifest.version:
            return False
        try:
            base, chain = self._base_and_chain(wanted)
            await self._rebuild(base, chain, wanted, target)
        except NoChain as exc:
            self._whole(manifest.version, exc)
            return False
        except ChunkRefused as exc:
            self._whole(manifest.version, NoChain("withdrawn", str(exc)))
            return False
        except BadDifference as exc:
            self._whole(manifest.version, NoChain("damaged", str(exc)))
            return False
        self._rebuilt = manifest.version
        self._counts["versions"] += 1
        self._counts["steps"] += len(chain)
        self._counts["bytes"] += sum(step.nbytes for step in chain)
        self._counts["whole_bytes"] += manifest.total_bytes
        return True

    def _base_and_chain(self, wanted: WantedVersion) -> tuple[Base, Sequence[Difference]]:
        """Raises NoChain."""
        manifest = wanted.manifest
        if self._base is None:
            raise NoChain("no_base", "no earlier version is kept here")
        if self._base.version >= manifest.version:
            raise NoChain("same_version", f"version {self._base.version} is what is kept here")
        chain = chain_from(
            self._base.version,
            self._base.digest,
            manifest.version,
            manifest.differences,
            max_steps=self._context.settings.max_chain,
            total_bytes=manifest.total_bytes,
        )
        return self._base, chain

    async def _rebuild(self, base: Base, chain: Sequence[Difference], wanted: WantedVersion, target: Path) -> None:
        """Raises ChunkRefused, BadDifference, and as ``fetch``."""
        manifest, stop = wanted.manifest, threading.Event()
        with contextlib.ExitStack() as files:
            # Without names: they go with this process, however it ends.
            opened = [files.enter_context(tempfile.TemporaryFile(dir=target.parent)) for _ in chain]
            await pull(
                self._context,
                [
                    Pulled(step.version, step.base, step.nbytes, manifest.chunk_bytes, file.fileno())
                    for step, file in zip(chain, opened, strict=True)
                ],
            )
            payloads = [Payload(file.fileno()) for file in opened]
        files_of = list(zip(chain, payloads, strict=True))
        try:
            self._decode_s += await asyncio.to_thread(_decode, base, files_of, wanted, target, stop)
        finally:
            stop.set()

    def _whole(self, version: int, why: NoChain) -> None:
        """Count and log why a version comes whole; of many such lines not all are logged."""
        name = f"fallback/{why.reason}"
        self._counts[name] += 1
        # The first version of an actor has nothing to be a difference to.
        level = logging.INFO if why.reason == "no_base" else logging.WARNING
        if self._counts[name] & (self._counts[name] - 1) == 0:
            log.log(level, "version %d comes whole, not as differences: %s", version, why)


def _decode(
    base: Base,
    chain: Sequence[tuple[Difference, Payload]],
    wanted: WantedVersion,
    target: Path,
    stop: threading.Event,
) -> float:
    """Check the differences and put them on the base, in a thread.  Returns the seconds.

    Raises BadDifference, OSError, and RebuildingStopped once ``stop`` is set.
    """
    began = time.monotonic()
    for step, payload in chain:
        found = payload.digest
        if found != step.digest:
            raise BadDifference(
                f"the difference from version {step.base} to {step.version} has the digest {found}, the manifest says "
                f"{step.digest}"
            )
    manifest = wanted.manifest
    rebuild(
        base.payload,
        [payload for _, payload in chain],
        manifest.tensors,
        manifest.total_bytes,
        target,
        should_stop=stop.is_set,
    )
    return time.monotonic() - began
