"""Publishes versions: writes them for the engines, then announces them to actors and the buffer.

``learner.weights.store`` holds the written versions, ``learner.weights.publisher`` serves them.
"""

from __future__ import annotations

import functools
import logging

import numpy as np

from atpo_async.config import Config
from atpo_async.ops.disk import until_written
from atpo_async.wire.messages import VersionPublished, WeightsAnnounced
from learner.batches.buffer_peer import BufferPeer
from learner.training.trainer import Trainer
from learner.weights.probe import draw_probe, is_drawn_at, probe_shape
from learner.weights.publisher import Publisher

log = logging.getLogger("atpo.learner")


class Publication:
    """The published versions of the learner's weights.

    Args:
        config: of the run.
        trainer: whose weights; used in the torch thread only.
        publisher: rank 0's; None on the others, which only take part in gathering the weights.
        buffer: is sent each version.
    """

    def __init__(self, config: Config, *, trainer: Trainer, publisher: Publisher | None, buffer: BufferPeer) -> None:
        self.published = 0
        """The newest version that actors can fetch."""
        self._config = config
        self._trainer = trainer
        self._publisher = publisher
        self._buffer = buffer
        # As of the count of versions (``ranks``): torch's own limit comes after it.
        self._give_up_s = config.links.give_up_s if trainer.accelerator.num_processes > 1 else None
        self._probe = np.zeros(probe_shape(config), dtype=np.int32)
        """int32[S, T]."""
        self._count = 0
        """Publications since this learner began."""

    def is_due(self, step: int) -> bool:
        """Whether the weights after ``step`` batches are published: the last ones always are."""
        return step % self._config.staleness.publish_every == 0 or step == self._config.run.steps

    def store(self, version: int) -> WeightsAnnounced | None:
        """In the torch thread, on every rank: write the weights as they are where actors can get them, as ``version``.

        Returns what is to be announced; None on ranks other than 0.
        """
        self._count += 1
        if self._publisher is None and not self._trainer.whole.sharded:
            return None
        if is_drawn_at(self._count):
            seed = (self._config.run.seed, version)
            self._probe = draw_probe(self._trainer, self._probe.shape, seed=seed)
        tensors = self._trainer.whole.published()
        logprobs = self._trainer.whole.probe(self._probe)
        if self._publisher is None:
            return None
        add = functools.partial(
            self._publisher.store.add,
            version,
            tensors,
            probe_tokens=self._probe,
            probe_logprobs=np.nan_to_num(logprobs, nan=0.0, posinf=0.0, neginf=-1e4),
        )
        return until_written(f"version {version} of the weights", add, log=log, give_up_s=self._give_up_s)

    @property
    def counters(self) -> dict[str, float]:
        """Counters of what was sent to actors; empty on ranks other than 0."""
        if self._publisher is None:
            return {}
        return {f"weights/{name}": value for name, value in self._publisher.counters.items()}

    async def announce(self, announcement: WeightsAnnounced | None) -> None:
        """Announce to actors and the buffer what ``store`` has written.  Raises PeerLost as ``BufferPeer.send``."""
        if announcement is None or self._publisher is None:
            return
        self.published = announcement.version
        await self._publisher.announce(announcement)
        await self.tell_buffer()

    async def tell_buffer(self) -> None:
        """Report the published version and its endpoints, on rank 0 only.  Raises PeerLost as ``BufferPeer.send``."""
        if self._publisher is None:
            return
        await self._buffer.send(
            VersionPublished(
                run=self._buffer.run_id,
                version=self.published,
                weights_endpoint=self._publisher.weights_endpoint,
                announce_endpoint=self._publisher.announce_endpoint,
            )
        )
