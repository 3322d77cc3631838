"""The leases that are held, and those that wait for another holder: found by tree and by actor.  Pure.

What a message of an actor costs must not depend on how many other actors there are: each actor's leases are kept apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from atpo_async.core.vocabulary import Split
from buffer.journal.entries import LeaseEntry


@dataclass(slots=True)
class HeldLease:
    """One lease."""

    tree_id: str
    number: int
    """Of its tree: given once in a run."""
    task_index: int
    kind: Split
    seed: int
    epoch: int
    holder: str
    expires_at: float
    min_version: int
    lost: int = 0
    """How many holders were lost."""
    unseen: int = 0
    """Reports in a row in which its holder did not name it."""
    waiting: bool = False
    """Lapsed or returned, waits for another holder; the last one may still renew it before that."""
    eval_step: int = -1
    refused: str = ""
    """Why a message of its holder was refused for its content; empty where none was."""
    turns: int = 0
    """Of its tree that came so far, under whichever lease of it."""

    def snapshot(self) -> LeaseEntry:
        return LeaseEntry(
            holder=self.holder, seed=self.seed, epoch=self.epoch, min_version=self.min_version, lost=self.lost,
            waiting=self.waiting, eval_step=self.eval_step,
        )  # fmt: skip


class LeaseTable:
    """All leases of one run.

    Args:
        assigned: called with a lease that has a holder from now on.
        unassigned: called with one that its holder has no more.
    """

    def __init__(
        self,
        *,
        assigned: Callable[[HeldLease], None] = lambda held: None,
        unassigned: Callable[[HeldLease], None] = lambda held: None,
    ) -> None:
        self._assigned, self._unassigned = assigned, unassigned
        self._by_tree: dict[str, HeldLease] = {}
        self._by_holder: dict[str, dict[str, HeldLease]] = {}
        """Actor -> the leases that it holds, by tree."""
        self._num: Counter[Split] = Counter()
        self._waiting: dict[Split, dict[str, None]] = {"eval": {}, "train": {}}
        """Leases that wait for another holder, in the order in which they lapsed or were returned."""

    def __contains__(self, tree_id: object) -> bool:
        return tree_id in self._by_tree

    def __len__(self) -> int:
        return len(self._by_tree)

    def __iter__(self) -> Iterator[HeldLease]:
        return iter(self._by_tree.values())

    def find(self, tree_id: str) -> HeldLease | None:
        return self._by_tree.get(tree_id)

    def num(self, kind: Split) -> int:
        """Leases of a kind, those that wait for another holder too."""
        return self._num[kind]

    def num_waiting(self, kind: Split) -> int:
        """Leases of a kind that wait for another holder."""
        return len(self._waiting[kind])

    def first_waiting(self, kind: Split) -> HeldLease | None:
        """The lease of a kind that has waited longest for another holder."""
        tree_id = next(iter(self._waiting[kind]), None)
        return None if tree_id is None else self._by_tree[tree_id]

    def held_by(self, actor: str) -> list[HeldLease]:
        """The leases that ``actor`` holds."""
        return list(self._by_holder.get(actor, {}).values())

    def num_held_by(self, actor: str) -> int:
        return len(self._by_holder.get(actor, ()))

    # --- changes -----------------------------------------------------------------------------------------------

    def put(self, held: HeldLease) -> None:
        """Add a lease; one without a holder that does not wait is to be assigned at once."""
        self._by_tree[held.tree_id] = held
        self._num[held.kind] += 1
        if held.waiting:
            self._waiting[held.kind][held.tree_id] = None
        elif held.holder:
            self._give(held, held.holder)

    def assign(self, held: HeldLease, actor: str) -> None:
        """``actor`` holds it from now on."""
        if held.waiting:
            held.waiting = False
            del self._waiting[held.kind][held.tree_id]
        self._give(held, actor)

    def free(self, held: HeldLease) -> None:
        """It waits for another holder from now on."""
        self._unassign(held)
        held.waiting = True
        self._waiting[held.kind][held.tree_id] = None

    def hand_over(self, former: str, actor: str) -> list[HeldLease]:
        """What ``former`` holds, ``actor`` holds from now on, and what it lost and no other has yet, ``actor`` may
        renew.  Returns both."""
        theirs = self.held_by(former)
        for held in theirs:
            self._unassign(held)
            self.assign(held, actor)
        lapsed = [held for held in self if held.waiting and held.holder == former]
        for held in lapsed:
            held.holder = actor
        return theirs + lapsed

    def pop(self, tree_id: str) -> HeldLease | None:
        """Remove a lease."""
        held = self._by_tree.pop(tree_id, None)
        if held is not None:
            self._num[held.kind] -= 1
            self._unassign(held)
            self._waiting[held.kind].pop(tree_id, None)
        return held

    def _give(self, held: HeldLease, actor: str) -> None:
        held.holder = actor
        self._by_holder.setdefault(actor, {})[held.tree_id] = held
        self._assigned(held)

    def _unassign(self, held: HeldLease) -> None:
        theirs = self._by_holder.get(held.holder)
        if theirs is None or theirs.pop(held.tree_id, None) is None:
            return
        if not theirs:
            del self._by_holder[held.holder]
        self._unassigned(held)
