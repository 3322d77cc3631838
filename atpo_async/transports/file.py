"""Weights as a file on the learner's host: an actor there links it, and no byte is copied."""

from __future__ import annotations

import os
from pathlib import Path

from atpo_async.config import WeightsConfig
from atpo_async.run.host import host_id
from atpo_async.transports.base import (
    OfferedVersion,
    Receiver,
    ReceiverContext,
    Sender,
    SenderContext,
    TransportUnavailable,
    WantedVersion,
)


class FileTransport:
    """For actors on the learner's host, unless ``weights.shared_memory`` is off."""

    def sender(self, context: SenderContext) -> Sender:
        return _FileSender(context.settings)

    def receiver(self, context: ReceiverContext) -> Receiver:
        return _FileReceiver(context.settings)


class _FileSender(Sender):
    def __init__(self, settings: WeightsConfig) -> None:
        self._settings = settings

    def offer(self, version: OfferedVersion) -> None:
        """The file is where actors can link it already."""

    def place(self, version: OfferedVersion) -> str | None:
        return str(version.path.resolve()) if self._settings.shared_memory else None


class _FileReceiver(Receiver):
    def __init__(self, settings: WeightsConfig) -> None:
        self._settings = settings

    async def fetch(self, wanted: WantedVersion, target: Path) -> None:
        source = self._source(wanted)
        try:
            # A link keeps the bytes even when the learner withdraws the version in the middle of our reading.
            os.link(source, target)
        except OSError as exc:
            raise TransportUnavailable(f"shared weights {source} cannot be linked ({exc})") from exc

    def beside(self, wanted: WantedVersion) -> Path | None:
        try:
            return self._source(wanted).parent.parent
        except TransportUnavailable:
            return None

    def _source(self, wanted: WantedVersion) -> Path:
        if not self._settings.shared_memory:
            raise TransportUnavailable("weights.shared_memory is off")
        if wanted.announced.host_id != host_id():
            raise TransportUnavailable("the learner is on another machine")
        if wanted.announced.shm_path is None:
            raise TransportUnavailable("the learner offers no file")
        return Path(wanted.announced.shm_path)
