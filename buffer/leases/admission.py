"""Whether a training tree may begin now, and with weights of which version at least.  Pure.

A tree leased now is consumed after all that are pending: at version ``next + pending·uses // batch``, where ``next`` is
the learner's version at the next batch.  It will be within ``max_lag`` then exactly if it is begun with weights of at
least that version minus ``max_lag``.  This is a lease's ``min_version``; while the learner has not published it, no
lease is granted.  With ``max_lag`` 0 trees are so grown under the very version that consumes them.  With
``staleness.exact_lag`` none of this counts, ``buffer.batches.delay_line`` decides.

It cannot block for ever: when the learner waits at version v for a batch and nothing is under lease any more, at most
batch - 1 trees are pending, each counted with all its uses, so ``min_version`` is at most
v + (max_uses - 1) - max_lag.  The last published version is at least v - (publish_every - 1), which is no less as long
as max_lag >= (publish_every - 1) + (max_uses - 1): the configuration refuses anything else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from atpo_async.config import StalenessConfig
from atpo_async.wire.messages import Leases
from buffer.journal.entries import RunEntry


class Admitted(NamedTuple):
    """Answer to a request for leases, and what it says about the requests of others."""

    leases: Leases
    only_here: bool
    """Where there are no leases: for a reason that holds for this actor, others may get some."""


class LearnerProgress:
    """The version that actors can fetch, and the one at which the learner takes its next batch."""

    def __init__(self) -> None:
        self.published: int | None = None
        """The newest version that actors can fetch; None before the learner's first."""
        self.next_version = 0
        """The learner's version when it takes its next batch, as far as known."""

    def publish(self, version: int) -> None:
        """Actors can fetch ``version``."""
        self.published = version if self.published is None else max(self.published, version)
        self.next_version = max(self.next_version, version)

    def waits_at(self, version: int) -> None:
        """The learner waits for a batch at ``version``."""
        self.next_version = version

    def trained(self, version: int) -> None:
        """The learner is at ``version``, or past it: its next request for a batch may overtake this message."""
        self.next_version = max(self.next_version, version)

    def consumed(self, version: int) -> None:
        """A batch was served at ``version``; the next is one version on."""
        self.next_version = version + 1

    def snapshot(self, run: RunEntry) -> None:
        """Write what ``restore`` reads."""
        run.published, run.next_version = self.published, self.next_version

    def restore(self, run: RunEntry) -> None:
        """As an earlier process left it."""
        self.published, self.next_version = run.published, run.next_version


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """What the other shards of a buffer have: admission counts the trees of all of them."""

    under_lease: int = 0
    """Training trees that are grown, and leases that are being asked for."""
    ready: int = 0
    """Trees that wait to be served and are not under lease."""
    produced: int = 0
    """Training trees that became ready since the last batch, those without signal too."""
    blocked_by: str | None = None
    """The evaluation of another shard that comes before any training tree."""


NOTHING_ELSE = Elsewhere()


class LagRule:
    """Admission by ``staleness.max_lag``.

    Args:
        staleness: trees per batch, max_lag, max_uses, max_oversampling.
        progress: of the learner.
    """

    def __init__(self, staleness: StalenessConfig, progress: LearnerProgress) -> None:
        self._staleness = staleness
        self._progress = progress

    def least_version(self, pending: int) -> int:
        """The oldest version with which a tree begun now, after ``pending`` others, is still fresh at its first use.

        Each pending tree is taken to be used ``max_uses`` times before it, though some have had uses already.
        """
        s = self._staleness
        return max(self._progress.next_version + pending * s.max_uses // s.trees_per_batch - s.max_lag, 0)

    def version_of(self, engine_version: int | None, pending: int) -> int:
        """The version with which an actor begins a tree now, after ``pending`` others."""
        newest = engine_version if engine_version is not None and engine_version >= 0 else self._progress.published or 0
        return max(newest, self.least_version(pending))

    def batches_after_next(self, version: int) -> int:
        """How many batches after the next one may still use a tree that was begun with ``version``."""
        return version + self._staleness.max_lag - self._progress.next_version

    def missing(self, pending: int) -> int | None:
        """Trees that the batch under way still needs, besides ``pending`` ones; None where several are under way."""
        s = self._staleness
        return s.max_trees_pending - pending if s.max_lag == 0 else None

    def missing_at_the_end(self, pending: int, steps_left: int | None) -> int | None:
        """Trees that the run still needs, besides ``pending`` ones, for so many batches; None where there is no end."""
        s = self._staleness
        return None if steps_left is None else math.ceil(steps_left * s.trees_per_batch / s.max_uses) - pending

    def why_closed(self, *, under_lease: int, ready: int, produced: int, memory_full: bool) -> str | None:
        """Why no new training tree may begin now; None if one may.

        Args:
            under_lease: training trees that are grown.
            ready: trees that wait to be served and are not under lease.
            produced: training trees that became ready since the last batch, those without signal too.
            memory_full: the buffer is at its byte limit.
        """
        s = self._staleness
        published, pending = self._progress.published, under_lease + ready
        if published is None:
            return "the learner has not published its first version"
        if memory_full:
            return "buffer.max_bytes or buffer.max_trees is reached: the learner must take trees first"
        if pending >= s.max_trees_pending:
            return f"{pending} trees are pending, staleness.max_lag = {s.max_lag} allows {s.max_trees_pending}"
        if s.max_lag == 0 and produced + under_lease >= s.max_oversampling * s.trees_per_batch:
            # The short batch that is served now would make these stale.
            return f"{produced} trees came since the last batch, enough for a short one"
        if (least := self.least_version(pending)) > published:
            return (
                f"a tree begun now would be older than staleness.max_lag = {s.max_lag} when consumed: version "
                f"{least} must be published first, {published} is"
            )
        return None
