"""Several transports, of which an actor takes the first that can bring a version to it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from atpo_async.core.errors import WeightsRejected
from atpo_async.core.texts import of_error
from atpo_async.transports.base import (
    OfferedVersion,
    Receiver,
    ReceiverContext,
    Sender,
    SenderContext,
    Transport,
    TransportUnavailable,
    VersionWithdrawn,
    WantedVersion,
)
from atpo_async.transports.chunks import ChunkTransport
from atpo_async.transports.file import FileTransport
from atpo_async.wire.messages import ChunkRequest, LearnerToActor

log = logging.getLogger("atpo.weights")

H = TypeVar("H")
R = TypeVar("R")


class Chain:
    """Transports by name, in the order in which they are tried.

    Every one but the last may fail in any way: that costs a version the next transport, not the run.

    Args:
        transports: by name.
        level: at which it is logged that one was not used; of many such lines not all are logged.
    """

    def __init__(self, transports: Mapping[str, Transport], *, level: int = logging.WARNING) -> None:
        self._transports = dict(transports)
        self._level = level

    def sender(self, context: SenderContext) -> Sender:
        senders = {name: transport.sender(context) for name, transport in self._transports.items()}
        return _ChainSender(senders, _Failures(senders, self._level))

    def receiver(self, context: ReceiverContext) -> Receiver:
        receivers = {name: transport.receiver(context) for name, transport in self._transports.items()}
        return _ChainReceiver(receivers, _Failures(receivers, self._level), limit_s=context.settings.fetch_timeout_s)


def auto() -> Chain:
    """A file where actor and learner share a host, chunks elsewhere."""
    return Chain({"file": FileTransport(), "chunks": ChunkTransport()}, level=logging.INFO)


class _Failures:
    """Counts failures of the transports of a chain; those of all but the last one are not raised."""

    def __init__(self, halves: Mapping[str, object], level: int) -> None:
        self._last = next(reversed(list(halves)))
        self._level = level
        self.counts: Counter[str] = Counter()

    def is_last(self, name: str) -> bool:
        return name == self._last

    def add(self, name: str, what: str, error: BaseException) -> None:
        self.counts[name] += 1
        if self.counts[name] & (self.counts[name] - 1) == 0:
            said = str(error) if isinstance(error, TransportUnavailable) else of_error(error)
            log.log(self._level, "weights.transport = %r did not %s: %s", name, what, said)

    @contextlib.contextmanager
    def spared(self, name: str, what: str) -> Iterator[None]:
        """Counts whatever the block raises, unless it comes from the last transport."""
        try:
            yield
        except Exception as exc:
            if self.is_last(name):
                raise
            self.add(name, what, exc)

    def each(self, halves: Mapping[str, H], what: str, act: Callable[[H], object]) -> None:
        """``act`` with every one, whatever another raises."""
        for name, half in halves.items():
            with self.spared(name, what):
                act(half)

    def first(self, halves: Mapping[str, H], what: str, ask: Callable[[H], R | None]) -> R | None:
        """The first answer that is not None."""
        for name, half in halves.items():
            with self.spared(name, what):
                if (found := ask(half)) is not None:
                    return found
        return None


class _ChainSender(Sender):
    def __init__(self, senders: Mapping[str, Sender], failures: _Failures) -> None:
        self._senders = senders
        self._failures = failures

    def offer(self, version: OfferedVersion) -> None:
        what = f"offer version {version.manifest.version}"
        self._failures.each(self._senders, what, lambda sender: sender.offer(version))

    def withdraw(self, version: int) -> None:
        self._failures.each(self._senders, f"withdraw version {version}", lambda sender: sender.withdraw(version))

    def place(self, version: OfferedVersion) -> str | None:
        what = f"say where version {version.manifest.version} is"
        return self._failures.first(self._senders, what, lambda sender: sender.place(version))

    def answer(self, request: ChunkRequest, version: OfferedVersion) -> LearnerToActor | None:
        for name, sender in self._senders.items():
            with self._failures.spared(name, f"answer a request for version {request.version}"):
                if (found := sender.answer(request, version)) is not None:
                    return found
        return None

    @property
    def counters(self) -> dict[str, float]:
        found = {f"send_failed/{name}": float(count) for name, count in self._failures.counts.items()}
        self._failures.each(self._senders, "count what it sent", lambda sender: found.update(sender.counters))
        return found

    def close(self) -> None:
        self._failures.each(self._senders, "close", lambda sender: sender.close())


class _ChainReceiver(Receiver):
    def __init__(self, receivers: Mapping[str, Receiver], failures: _Failures, *, limit_s: float) -> None:
        self._receivers = receivers
        self._failures = failures
        self._limit_s = limit_s
        self._fetched: Counter[str] = Counter()
        self._last = ""
        """The one that brought the last version."""

    async def fetch(self, wanted: WantedVersion, target: Path) -> None:
        for name, receiver in self._receivers.items():
            _clear(target)
            if self._failures.is_last(name):
                await receiver.fetch(wanted, target)
            else:
                try:
                    await self._try(receiver, wanted, target)
                except TransportUnavailable as exc:
                    self._failures.add(name, f"bring version {wanted.manifest.version}", exc)
                    continue
            self._fetched[name] += 1
            self._last = name
            return

    async def _try(self, receiver: Receiver, wanted: WantedVersion, target: Path) -> None:
        """Raises TransportUnavailable for all that says nothing of the version itself or of this actor's disk."""
        try:
            async with asyncio.timeout(self._limit_s):
                await receiver.fetch(wanted, target)
        except (TransportUnavailable, VersionWithdrawn, WeightsRejected):
            raise
        except TimeoutError as exc:
            raise TransportUnavailable(f"it took over {self._limit_s:g} s (weights.fetch_timeout_s)") from exc
        except Exception as exc:
            if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise TransportUnavailable(of_error(exc)) from exc
        _check_there(target)

    def verified(self, wanted: WantedVersion, path: Path) -> None:
        what = f"take note of version {wanted.manifest.version}"
        self._failures.each(self._receivers, what, lambda receiver: receiver.verified(wanted, path))

    def refused(self, wanted: WantedVersion) -> bool:
        brought_by = {name: receiver for name, receiver in self._receivers.items() if name == self._last}
        what = f"say how else to bring version {wanted.manifest.version}"
        return bool(self._failures.first(brought_by, what, lambda receiver: receiver.refused(wanted)))

    @property
    def base(self) -> int:
        bases = self._failures.first(
            self._receivers, "say what it has", lambda half: half.base if half.base >= 0 else None
        )
        return -1 if bases is None else bases

    def beside(self, wanted: WantedVersion) -> Path | None:
        what = "say where a file is best made"
        return self._failures.first(self._receivers, what, lambda receiver: receiver.beside(wanted))

    @property
    def counters(self) -> dict[str, float]:
        found = {f"fetched/{name}": float(count) for name, count in self._fetched.items()}
        found |= {f"fetch_failed/{name}": float(count) for name, count in self._failures.counts.items()}
        self._failures.each(self._receivers, "count what it fetched", lambda half: found.update(half.counters))
        return found

    def close(self) -> None:
        self._failures.each(self._receivers, "close", lambda receiver: receiver.close())


def _clear(target: Path) -> None:
    """Remove what an earlier transport left: it may be a link to the learner's own file, which must not change."""
    target.unlink(missing_ok=True)


def _check_there(target: Path) -> None:
    if not target.is_file():
        raise TransportUnavailable(f"it returned without a file at {target}")
