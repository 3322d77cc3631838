"""The faults of all trees of one process, training and evaluation apart."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import get_args

import msgspec

from actors.faults.fault import Fault, Place
from actors.faults.notices import Clock, Notify
from actors.faults.watch import FaultWatch
from atpo_async.core.errors import AtpoError, BadMessage
from atpo_async.core.vocabulary import Split
from atpo_async.ops import notices
from atpo_async.wire.checks import check
from atpo_async.wire.messages import Lease

LEAST_AT_FIRST, MOST_AT_FIRST = 4, 8
"""Trees in a row that must be hit before any went well, by how many are grown at once."""


class Faults:
    """The faults of all trees of an actor, or of an evaluation.

    Each split of each environment has its own watch: one that fails in every task is found beside healthy ones.

    Args:
        environments: their names, for the texts.
        at_once: trees that are grown at once.
        notify: takes each line for the user's terminal.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        environments: str | Sequence[str],
        *,
        at_once: int,
        notify: Notify = notices.post,
        clock: Clock = time.monotonic,
    ) -> None:
        least = min(MOST_AT_FIRST, max(LEAST_AT_FIRST, at_once))
        names = (environments,) if isinstance(environments, str) else tuple(environments)
        self._first = names[0]
        self._of: dict[tuple[str, Split], FaultWatch] = {
            (name, kind): FaultWatch(name, least=least, notify=notify, clock=clock)
            for name in names
            for kind in get_args(Split)
        }
        self._growing: dict[str, FaultWatch] = {}
        """By tree."""
        self._verdict: AtpoError | None = None
        """An error found where it could not be raised: raised when the next chain ends."""

    @contextlib.contextmanager
    def growing(self, lease: Lease, environment: str = "") -> Iterator[None]:
        """While the tree of ``lease``, a task of ``environment`` (of the only one, if empty), is grown."""
        watch = self._of[environment or self._first, lease.kind]
        self._growing[lease.tree_id] = watch
        watch.began(lease.tree_id)
        try:
            yield
        finally:
            watch.over(lease.tree_id)
            self._growing.pop(lease.tree_id, None)

    def chain_ended(self, tree_id: str, place: Place, fault: Fault | None) -> None:
        """As ``FaultWatch.chain_ended``."""
        if self._verdict is not None:
            raise self._verdict
        if (watch := self._growing.get(tree_id)) is not None:
            watch.chain_ended(tree_id, place, fault)

    def refused(self, tree_id: str, message: object, reason: str) -> None:
        """The buffer refused ``message``; a fault of the tree if it was refused for its content.

        A turn that came too late, after its lease had lapsed, counts as no fault.
        """
        if (watch := self._growing.get(tree_id)) is None or not isinstance(message, msgspec.Struct):
            return
        try:
            check(message)
        except BadMessage as exc:
            fault = Fault("refused_by_buffer", "value refused by the buffer", f"the buffer refuses it: {reason or exc}")
            try:
                watch.chain_ended(tree_id, "chain", fault)
            except AtpoError as verdict:
                self._verdict = verdict
