"""Exact lag: a line of whole batches between generation and training.  Pure.

With ``staleness.exact_lag`` = k, batch j (0, 1, … from the learner's first) is trained on at version o + j, o being the
learner's version at its first batch, and holds trees wholly sampled by version o + max(0, j - k): its lag is min(j, k).

The rule: when the learner asks for a batch, the line is filled up to k + 1 sets of trees, or to one for each batch
that is left if these are fewer.  All that is missing is grown by the version that asks.  The foremost set is served
when nothing is missing any more and no training tree is under lease.  So k + 1 sets are grown before the first batch
and one before every later one, none unused; and because the learner trains only while no tree is under way, no actor
changes weights inside a tree.

Sets grown together are complete when every one has its trees, or when as many were produced as
``staleness.max_oversampling`` allows; then they are dealt out in the order of their tasks and in equal numbers, so that
the first set holds neither the shortest trees nor all there are.

A learner that starts again asks at a version that is not the next one.  Whole sets are served first, older than k
versions then; one that would be over ``staleness.max_lag`` when its turn came is dropped, and so is what had been
grown of an unfinished set, for no engine has its version any more.  A restarted buffer restores the line as it was;
batches that a learner has lost are put back at its front.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from buffer.journal.entries import DelayLineEntry, TreeSetEntry

Fate = Literal["taken", "inexact", "no_signal", "too_large", "surplus"]
"""The outcome for a tree: it is placed in a set; or another version sampled a part of it, it has no signal, memory is
full, no set needs it."""


@dataclass(frozen=True, slots=True)
class TreeSet:
    """The trees of one batch."""

    version: int
    """All their tokens are of it."""
    tree_ids: tuple[str, ...]

    def snapshot(self) -> TreeSetEntry:
        return TreeSetEntry(version=self.version, tree_ids=self.tree_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """The training trees that may begin now."""

    version: int
    """They are grown by it and by no other."""
    capacity: int
    """How many more are needed, those under lease not counted."""
    held_back: str | None
    """Why no tree may be grown at all, begun ones included; None if some may."""
    enough: str
    """Why no more than ``capacity`` may begin."""

    def why_closed(self, begun: int) -> str | None:
        """Why no tree may begin after ``begun`` others; None if one may."""
        return self.held_back or (self.enough if begun >= self.capacity else None)


@dataclass(frozen=True, slots=True)
class Asked:
    """The effects of a learner's request besides growth: none, unless the learner was restarted."""

    anew: bool = False
    """It has started again: this is not the version after that of the batch it took last."""
    stale: tuple[str, ...] = ()
    """Trees that are dropped because they would have been over ``max_lag``."""
    unfinished: tuple[str, ...] = ()
    """Of a set that was under way."""


@dataclass(slots=True)
class _Growing:
    """Sets under way, grown together by one version."""

    version: int
    num_sets: int
    tree_ids: list[str] = field(default_factory=list)
    produced: int = 0
    """Trees that were received for them, including those without signal and those dropped."""


class DelayLine:
    """The sets that are whole, and those under way.

    Args:
        lag: k.
        max_lag: a set older than this is not served.
        trees_per_set: of one batch.
        max_oversampling: a set is complete, though short, once this many times ``trees_per_set`` trees came for it.
        num_steps: batches of the run.
    """

    def __init__(self, *, lag: int, max_lag: int, trees_per_set: int, max_oversampling: float, num_steps: int) -> None:
        self.lag = lag
        self._max_lag = max_lag
        self._trees_per_set = trees_per_set
        self._max_produced = math.ceil(max_oversampling * trees_per_set)
        self._num_steps = num_steps
        self.ahead = 0
        """So many more trees than are needed may be begun; their leases are withdrawn once no more are needed."""
        self._whole: deque[TreeSet] = deque()
        self._growing: _Growing | None = None
        self.version: int | None = None
        """At which the learner last asked; None before that."""
        self._served = False
        """A set was taken out at that version, and not given back."""

    def __len__(self) -> int:
        """Sets that are whole."""
        return len(self._whole)

    @property
    def greatest_lag(self) -> int:
        """Of the whole sets when each one's turn comes."""
        return max((self.version or 0) + i - each.version for i, each in enumerate(self._whole)) if self._whole else 0

    @property
    def needed(self) -> int:
        """Trees to come until the sets under way are complete, if all that come have a signal."""
        return 0 if self._growing is None else self._needed(self._growing)

    @property
    def most_needed(self) -> int:
        """The same if none that comes has one."""
        growing = self._growing
        return 0 if growing is None else growing.num_sets * self._max_produced - growing.produced

    @property
    def ready(self) -> bool:
        """Whether the foremost set may be served."""
        return self._growing is None and bool(self._whole)

    def ask(self, *, step: int, version: int, under_lease: int, memory_full: bool = False) -> Asked:
        """The learner waits for the batch of ``step`` at ``version``: plan the trees that it needs.

        Args:
            step: batches trained before this one.
            version: the learner's, never below an earlier one.
            under_lease: training trees being grown; none at a version other than the last one, which no actor could
                finish.
            memory_full: no further tree fits: the sets under way are as complete as they can be.
        """
        self._settle(under_lease, memory_full)
        asked = self._move_to(version) if version != self.version else Asked()
        wanted = max(min(self.lag + 1, self._num_steps - step), 1)
        under_way = self._growing.num_sets if self._growing is not None else 0
        if (missing := wanted - len(self._whole) - under_way) > 0:
            self._growing = self._growing or _Growing(version, 0)
            self._growing.num_sets += missing
        return asked

    def pop(self) -> TreeSet:
        """Take the foremost set out, to be served."""
        self._served = True
        return self._whole.popleft()

    def give_back(self, sets: Sequence[TreeSet]) -> None:
        """Sets that were served and never trained on, in their order."""
        self._served = self._served and not sets
        self._whole.extendleft(reversed(sets))

    # --- growing -----------------------------------------------------------------------------------------------

    def admit(
        self, *, under_lease: int, published: int | None, engine_version: int | None, memory_full: bool
    ) -> Admission:
        """The trees that an actor may begin.

        Args:
            under_lease: training trees being grown.
            published: the newest version that actors can get.
            engine_version: the version that the requesting actor generates with; None where unknown.
            memory_full: no further tree fits.
        """
        growing = self._growing
        if growing is None:
            at = "has not asked for its first batch" if self.version is None else f"is at version {self.version}"
            whole = f"{len(self._whole)} batches are ready"
            why = f"staleness.exact_lag = {self.lag}: {whole} and no other is due, the learner {at}"
            return Admission(version=self.version or 0, capacity=0, held_back=why, enough=why)
        enough = f"{self.describe()}, {under_lease} under lease"
        if memory_full:
            enough = f"buffer.max_bytes is reached: {enough}"
        return Admission(
            version=growing.version,
            capacity=0 if memory_full else max(self._needed(growing) + self.ahead - under_lease, 0),
            held_back=self._held_back(growing.version, published, engine_version),
            enough=enough,
        )

    def _held_back(self, version: int, published: int | None, engine_version: int | None) -> str | None:
        wanted = f"staleness.exact_lag = {self.lag} wants trees of version {version}"
        if published is None:
            return "the learner has not published its first version"
        if published < version:
            return f"{wanted}, the newest published is {published}"
        if published > version:
            return f"{wanted}, and {published} is out: the learner has to ask for a batch at that version first"
        if engine_version is not None and engine_version > version:
            return f"{wanted}, this actor's engine has {engine_version}"
        return None

    def place(self, tree_id: str, versions: Iterable[int], *, signal: bool, fits: bool) -> Fate:
        """Place a usable tree that was received.

        Args:
            tree_id: its id.
            versions: all that sampled a token of it.
            signal: whether its chains earned different returns.
            fits: whether there is memory for it.
        """
        growing = self._growing
        if growing is None:
            return "surplus"
        # Counted whether it is placed or not: an actor whose trees are never exact must not block the run.
        growing.produced += 1
        if any(version != growing.version for version in versions):
            return "inexact"
        if not signal:
            return "no_signal"
        if not fits:
            return "too_large"
        if len(growing.tree_ids) >= growing.num_sets * self._trees_per_set:
            return "surplus"
        growing.tree_ids.append(tree_id)
        return "taken"

    def _needed(self, growing: _Growing) -> int:
        """Trees to come until the sets under way are complete, if all that come have a signal."""
        return min(
            growing.num_sets * self._trees_per_set - len(growing.tree_ids),
            growing.num_sets * self._max_produced - growing.produced,
        )

    def _settle(self, under_lease: int, memory_full: bool) -> None:
        """Deal the sets under way out once they are complete and no tree is grown any more."""
        growing = self._growing
        if growing is None or under_lease or (self._needed(growing) > 0 and not memory_full):
            return
        self._growing = None
        trees = sorted(growing.tree_ids)
        for i in range(growing.num_sets):
            share = len(trees) // (growing.num_sets - i)
            self._whole.append(TreeSet(growing.version, tuple(trees[:share])))
            del trees[:share]

    # --- a learner that starts again ---------------------------------------------------------------------------

    def _move_to(self, version: int) -> Asked:
        """Only trees of ``version`` can be grown from now on.  In an undisturbed run nothing is under way here."""
        anew = self.version is not None and not (self._served and version == self.version + 1)
        self.version, self._served = version, False
        unfinished: list[str] = []
        if self._growing is not None:
            growing, self._growing = self._growing, None
            trees, size = sorted(growing.tree_ids), self._trees_per_set
            whole = len(trees) // size
            self._whole += [TreeSet(growing.version, tuple(trees[i * size : (i + 1) * size])) for i in range(whole)]
            unfinished = trees[whole * size :]
        stale: list[str] = []
        fresh: deque[TreeSet] = deque()
        for each in self._whole:
            if version + len(fresh) - each.version > self._max_lag:
                stale.extend(each.tree_ids)
            else:
                fresh.append(each)
        self._whole = fresh
        return Asked(anew, tuple(stale), tuple(unfinished))

    # --- snapshot ------------------------------------------------------------------------------------------------

    def snapshot(self) -> DelayLineEntry:
        """What ``restore`` needs."""
        growing = self._growing
        return DelayLineEntry(
            whole=tuple(each.snapshot() for each in self._whole),
            growing=None
            if growing is None
            else (growing.version, growing.num_sets, tuple(growing.tree_ids), growing.produced),
            version=self.version,
            served=self._served,
        )

    def restore(self, entry: DelayLineEntry) -> None:
        """The line as an earlier process left it."""
        self._whole = deque(TreeSet(each.version, each.tree_ids) for each in entry.whole)
        if entry.growing is not None:
            version, num_sets, tree_ids, produced = entry.growing
            self._growing = _Growing(version, num_sets, list(tree_ids), produced)
        self.version, self._served = entry.version, entry.served

    def describe(self) -> str:
        """What the line waits for, as text."""
        growing = self._growing
        if growing is None:
            return f"staleness.exact_lag = {self.lag}: {len(self._whole)} batches are ready, nothing is under way"
        return (
            f"staleness.exact_lag = {self.lag}: version {growing.version} grows {growing.num_sets} "
            f"batch{'es' if growing.num_sets > 1 else ''}, {len(growing.tree_ids)} of "
            f"{growing.num_sets * self._trees_per_set} trees are there"
        )
