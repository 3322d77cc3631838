"""Ready trees: priorities, proportional sampling, eviction.  Pure: versions and random numbers are passed in.

Source: prioritized experience replay (arXiv 1511.05952) with trees as units, the mixed maximum and mean of R2D2
(Kapturowski et al. 2019) as priority, and a schedule that serves what would otherwise grow stale (the promise of
ARCHITECTURE.md that next to nothing is discarded at steady state).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, repeat

import numpy as np
from numpy.typing import NDArray

from atpo_async.core.vocabulary import WeightsOver
from buffer.trees.index import TreeEntry

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

PRIORITY_FLOOR = 0.01
"""Added to every priority, so that a tree whose advantage came out small can still be drawn."""

FANOUT = 16
"""Of the sum tree: two lines of memory."""

WHOLE_LEVEL = 8192
"""A level of the sum tree with at most so many numbers is summed whole: sooner done than its groups are picked out."""

_FREE, _READY, _OUT = 0, 1, 2
_COLUMNS = ("_state", "_own", "_uses", "_limit", "_oldest", "_newest", "_ages_from", "_nbytes", "_entered")
"""What a pool knows of each slot, an array a piece."""


def probabilities(priorities: F64, *, exponent: float, floor: float = PRIORITY_FLOOR) -> F64:
    """P_i ∝ (p_i + floor)^a."""
    scaled: F64 = (priorities + floor) ** exponent
    probability: F64 = scaled / scaled.sum()
    return probability


def importance_weights(
    probability: F64, *, num_trees: int, beta: float, over: WeightsOver, ready: F64 | None = None
) -> F64:
    """w_PER = (N·P_i)^-β of the trees of a batch (ALGORITHM, section 4), as float64[B].

    Args:
        probability: float64[B], P_i of the trees that were drawn.
        num_trees: N, how many were ready.
        beta: β.
        over: what the weights are divided by: ``max``, the largest of the batch; ``mean``, what a tree drawn under P
            weighs on average, Σ P_i w_i over all that were ready; ``none``, nothing.
        ready: float64[N], P of all that were ready, read for ``mean`` alone; ``probability`` where None.
    """
    weight: F64 = (num_trees * probability) ** -beta
    if over == "none" or not len(weight):
        return weight
    p = probability if ready is None else ready
    unit = weight.max() if over == "max" else np.sum(p * (num_trees * p) ** -beta)
    return np.asarray(weight / unit)


def annealed_beta(step: int, *, start: float, num_steps: int) -> float:
    """β at ``step``: from ``start`` in a straight line to 1 at ``num_steps``."""
    return start + (1.0 - start) * min(max(step / max(num_steps, 1), 0.0), 1.0)


class SumTree:
    """Prefix sums over a growing array of non-negative numbers; every operation takes many indices at once.

    A node has ``FANOUT`` children, side by side: few levels, and of each one or two lines of memory are looked at.
    Inner sums are computed again from their children, never adjusted by differences, so they cannot drift.
    """

    def __init__(self, capacity: int = 16) -> None:
        self._levels: list[F64] = []
        """The numbers themselves, then the sums of ever larger groups of them; the last has at most ``FANOUT``."""
        self.grow(capacity)

    @property
    def capacity(self) -> int:
        return len(self._levels[0])

    @property
    def total(self) -> float:
        return float(self._levels[-1].sum())

    def values(self) -> F64:
        """float64[capacity]: a view."""
        return self._levels[0]

    def get(self, indices: I64) -> F64:
        """float64[n]."""
        found: F64 = self._levels[0][indices]
        return found

    def set(self, indices: I64, values: F64) -> None:
        """Put ``values`` at ``indices`` (without duplicates)."""
        if not len(indices):
            return
        self._levels[0][indices] = values
        if len(indices) == 1:
            at = int(indices[0])
            for below, above in pairwise(self._levels):
                at //= FANOUT
                above[at] = below[at * FANOUT : (at + 1) * FANOUT].sum()
            return
        nodes = indices
        for below, above in pairwise(self._levels):
            nodes = nodes // FANOUT
            groups = below.reshape(-1, FANOUT)
            if len(below) <= max(WHOLE_LEVEL, FANOUT * len(nodes)):
                np.einsum("ij->i", groups, out=above[: len(groups)])
            else:
                # A group that is there twice is the same sum twice; to find such ones would cost more.
                above[nodes] = np.einsum("ij->i", groups.take(nodes, axis=0))

    def grow(self, capacity: int) -> None:
        """Make room for at least ``capacity`` numbers."""
        old = self._levels[0] if self._levels else np.zeros(0)
        if self._levels and capacity <= len(old):
            return
        length = _whole_groups(capacity)
        self._levels = [np.zeros(length)]
        while length > FANOUT:
            length = _whole_groups(length // FANOUT)
            self._levels.append(np.zeros(length))
        if len(old):
            self.set(np.arange(len(old)), old)

    def find(self, targets: F64) -> I64:
        """int64[n]: for each target in [0, total) the index whose interval of the prefix sums it falls into.

        Never an index that holds zero while there are others, whatever the rounding.
        """
        target = targets.astype(np.float64, copy=True)
        node = np.zeros(len(target), dtype=np.int64)
        every = np.arange(len(target))
        for level in reversed(self._levels):
            children = level.reshape(-1, FANOUT).take(node, axis=0)
            ends = np.cumsum(children, axis=1)
            last = FANOUT - 1 - np.argmax(children[:, ::-1] > 0, axis=1)
            child = np.minimum((target[:, None] >= ends).sum(axis=1), last)
            target -= np.where(child > 0, ends[every, child - 1], 0.0)
            node = node * FANOUT + child
        return node


def _whole_groups(count: int) -> int:
    return -(-max(count, 1) // FANOUT) * FANOUT


@dataclass(frozen=True, slots=True)
class Drawn:
    """One tree of a batch, with how it was drawn."""

    tree: TreeEntry
    probability: float
    """P_i among the trees that were ready; 1/N where all of them were taken."""
    weight: float
    """w_PER."""
    uses: int
    """How often it was served, this time included."""


@dataclass(frozen=True, slots=True)
class Departure:
    """A tree that left the pool."""

    tree: TreeEntry
    cause: str
    """``used`` up, ``bytes``, ``trees`` (over a limit), ``stale`` before any batch had it, ``retired`` stale after
    one, ``inexact`` of a version that no batch is to have."""
    uses: int
    """Confirmed ones."""
    priority: float


class ReplayPool:
    """Trees that are ready, and those that are out with the learner.

    Adding, drawing and confirming cost O(log N) in the number of trees, with two exceptions: a draw whose weights are
    taken over the mean of all costs O(N), and a priority above all confirmed before weighs anew what no batch has had.

    Where ``freshness`` is below 1, the first draw at a version weighs all ready trees anew: the floor does not age, so
    no factor common to all can stand for a version.  As a tree is ready at ``max_lag + 1`` versions at most, it is
    weighed that often at most, however many there are.

    Args:
        max_uses: a tree leaves after that many confirmed batches.
        max_lag: a tree leaves when all its turns are older than this.
        exponent: a in P_i ~ p_i^a.
        freshness: priority factor per version of lag, that of the oldest turn that is trained on.
        weights_over: what w_PER is divided by.
    """

    def __init__(
        self,
        *,
        max_uses: int,
        max_lag: int,
        exponent: float,
        freshness: float = 1.0,
        weights_over: WeightsOver = "max",
    ) -> None:
        self._max_uses = max_uses
        self._max_lag = max_lag
        self._exponent = exponent
        self._freshness = freshness
        self._weights_over: WeightsOver = weights_over
        self._sums = SumTree()
        self._trees: list[TreeEntry | None] = []
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._state = np.zeros(0, dtype=np.int8)
        self._own = np.zeros(0)
        self._uses = np.zeros(0, dtype=np.int64)
        self._limit = np.zeros(0, dtype=np.int64)
        self._oldest = np.zeros(0, dtype=np.int64)
        self._newest = np.zeros(0, dtype=np.int64)
        self._ages_from = np.zeros(0, dtype=np.int64)
        """Version of the oldest turn that is trained on, when last looked at; kept only where freshness counts."""
        self._versions: dict[int, I64] = {}
        """Slot -> oldest versions of its turns, ascending; kept only where freshness counts."""
        self._nbytes = np.zeros(0, dtype=np.int64)
        self._entered = np.zeros(0, dtype=np.int64)
        self._clock = 0
        self._version = 0
        self._weighed_at = 0
        """Version at which the sums were right for all ready trees."""
        self._highest = 1.0
        self._num_ready = 0
        self._unserved: dict[int, set[int]] = {}
        """Oldest version -> slots of ready trees that no batch has had."""
        self._by_newest: dict[int, set[int]] = {}
        """Newest version -> slots, of trees in whatever state."""
        self._order: deque[tuple[int, int]] = deque()
        """(entered, slot), oldest first; what has left is skipped when it is come upon."""
        self._with_learner: dict[str, int] = {}
        """Tree -> slot.  Small, so what is confirmed is found in the caches, however many trees there are."""
        self.nbytes = 0
        """Bytes of all trees, those with the learner too."""
        self.left: Counter[str] = Counter()
        """How many trees left, by ``Departure.cause``."""
        self.gone: list[Departure] = []
        """Trees that left; whoever keeps their records takes them away."""
        self.changed: set[str] = set()
        """Trees that came, left or have another priority or number of uses; to be taken away likewise."""

    # --- what is there -----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Trees that can be drawn."""
        return self._num_ready

    def __contains__(self, tree_id: object) -> bool:
        """Whether a tree is here, ready or with the learner."""
        return tree_id in self._slots

    def find(self, tree_id: str) -> TreeEntry | None:
        """A tree that is here, ready or with the learner."""
        slot = self._slots.get(tree_id)
        return None if slot is None else self._trees[slot]

    def ready_ids(self) -> list[str]:
        """Trees that can be drawn; O(N)."""
        return [tree_id for tree_id, slot in self._slots.items() if self._state[slot] == _READY]

    @property
    def num_returning(self) -> int:
        """Trees with the learner that come back: this use is not their last."""
        return sum(int(self._uses[slot]) + 1 < int(self._limit[slot]) for slot in self._with_learner.values())

    @property
    def num_out(self) -> int:
        """Trees with the learner."""
        return len(self._with_learner)

    @property
    def mean_priority(self) -> float:
        """Over the trees that can be drawn; O(N)."""
        ready = np.flatnonzero(self._state == _READY)
        return float(self._priorities(ready).mean()) if len(ready) else 0.0

    def is_out(self, tree_id: str) -> bool:
        """Whether the tree is with the learner."""
        return tree_id in self._with_learner

    def kept(self, tree_id: str) -> tuple[float, int, int, int]:
        """(own priority, uses, limit of uses, when it came) of a tree that is here."""
        slot = self._slots[tree_id]
        return float(self._own[slot]), int(self._uses[slot]), int(self._limit[slot]), int(self._entered[slot])

    @property
    def highest(self) -> float:
        """What a tree counts as that no batch has had: the highest priority confirmed so far."""
        return self._highest

    @highest.setter
    def highest(self, priority: float) -> None:
        self._raise_highest(priority)

    def replace(self, tree: TreeEntry) -> None:
        """The same tree with its records in other places."""
        self._trees[self._slots[tree.tree_id]] = tree

    # --- in and out --------------------------------------------------------------------------------------------

    def add(
        self, tree: TreeEntry, *, priority: float, uses: int = 0, limit: int | None = None, entered: int | None = None
    ) -> None:
        """Take in a tree, or a later state of one that is here.

        A tree never served counts as the highest priority confirmed so far: it is seen before its own is believed.

        Args:
            tree: pruned, with at least one turn.
            priority: from its own advantages, above zero.
            uses: how often it was served before it came back with later turns; it may be served once more at least.
            limit: of uses; by ``max_uses`` where None.
            entered: when it came, of one that an earlier process had; ascending over such calls.
        """
        self.changed.add(tree.tree_id)
        slot = self._slots.get(tree.tree_id)
        versions = tree.oldest_versions
        oldest, newest = int(versions.min()), int(versions.max())
        if slot is None:
            slot = self._free.pop() if self._free else self._new_slot()
            self._slots[tree.tree_id] = slot
            self._uses[slot] = uses
            self._limit[slot] = max(self._max_uses, uses + 1) if limit is None else limit
            self._entered[slot] = self._clock if entered is None else entered
            self._clock = max(self._clock, int(self._entered[slot]) + 1)
            self._order.append((int(self._entered[slot]), slot))
            if len(self._order) > 2 * len(self._slots) + 64:
                alive = ((int(self._entered[s]), s) for s in self._slots.values())
                self._order = deque(sorted(alive))
            self._oldest[slot] = oldest
            self._become_ready(slot)
        else:
            self._by_newest[int(self._newest[slot])].discard(slot)
            if self._state[slot] == _READY and self._uses[slot] == 0:
                self._forget_unserved(slot)
                self._unserved.setdefault(oldest, set()).add(slot)
        size = tree.nbytes
        self.nbytes += size - int(self._nbytes[slot])
        self._trees[slot] = tree
        self._nbytes[slot] = size
        self._own[slot] = priority
        self._oldest[slot], self._newest[slot] = oldest, newest
        self._by_newest.setdefault(newest, set()).add(slot)
        if self._freshness < 1:
            self._versions[slot] = np.unique(versions)
            self._ages_from[slot] = oldest
        if self._state[slot] != _READY:
            return
        slots = np.array([slot])
        if self._version - newest > self._max_lag:
            self._drop(slots, "retired" if self._uses[slot] else "stale")
        else:
            self._update(slots)

    def advance(self, version: int) -> int:
        """The learner is at ``version``: drop ready trees without any fresh turn.  Returns how many."""
        if version <= self._version:
            return 0
        self._version = version
        stale: list[int] = []
        for newest in sorted(self._by_newest):
            if version - newest <= self._max_lag:
                break
            slots = self._by_newest[newest]
            stale += [slot for slot in slots if self._state[slot] == _READY]
            # Those with the learner are looked at when they come back.
            if not slots:
                del self._by_newest[newest]
        self._drop_stale(np.array(stale, dtype=np.int64))
        return len(stale)

    def _drop_stale(self, slots: I64) -> None:
        served = self._uses[slots] > 0
        self._drop(slots[~served], "stale")
        self._drop(slots[served], "retired")

    def shrink(self, max_bytes: int, max_trees: int | None = None) -> int:
        """Drop ready trees, oldest first, until all take at most ``max_bytes`` and ``max_trees`` are ready at most.

        Returns how many.
        """
        dropped = 0
        skipped: list[tuple[int, int]] = []
        while self._order and (self.nbytes > max_bytes or (max_trees is not None and self._num_ready > max_trees)):
            cause = "bytes" if self.nbytes > max_bytes else "trees"
            entered, slot = self._order.popleft()
            if self._state[slot] == _FREE or self._entered[slot] != entered:
                continue
            if self._state[slot] == _OUT:
                skipped.append((entered, slot))
                continue
            self._drop(np.array([slot]), cause)
            dropped += 1
        self._order.extendleft(reversed(skipped))
        return dropped

    def draw(self, count: int, *, rng: np.random.Generator, beta: float) -> list[Drawn]:
        """Take up to ``count`` different trees; they stay out until ``confirm`` or ``give_back``.

        Trees that were never served and cannot wait come first (``_urgent``); the others in proportion to priority,
        stratified.  When every ready tree is taken nothing was left to chance: P is 1/N and the weights are 1.
        """
        num_ready = self._num_ready
        if not num_ready or count <= 0:
            return []
        of_all: F64 | None = None
        if num_ready <= count:
            chosen = np.flatnonzero(self._state == _READY)
            probability = np.full(num_ready, 1.0 / num_ready)
            self._sums.set(chosen, np.zeros(num_ready))
        else:
            self._weigh_all()
            total = self._sums.total
            if self._weights_over == "mean":
                of_all = self._sums.get(np.flatnonzero(self._state == _READY)) / total
            parts = self._urgent(count, rng)
            parts.append(self._stratified(count - sum(map(len, parts)), rng))
            chosen = np.concatenate(parts)
            probability = self._weights(chosen) / total
        weight = importance_weights(
            probability, num_trees=num_ready, beta=beta, over=self._weights_over, ready=of_all
        )  # fmt: skip
        return self._hand_out(chosen, probability, weight)

    def take(self, tree_ids: Iterable[str]) -> list[Drawn]:
        """Take these trees, as ``draw`` does, those of them that are ready.  Nothing is left to chance: P is 1/N."""
        chosen = self._ready(tree_ids)
        self._sums.set(chosen, np.zeros(len(chosen)))
        return self._hand_out(chosen, np.full(len(chosen), 1.0 / max(len(chosen), 1)), np.ones(len(chosen)))

    def discard(self, tree_ids: Iterable[str], cause: str) -> int:
        """Let those of these trees go that are ready, for ``cause``.  Returns how many."""
        slots = self._ready(tree_ids)
        self._drop(slots, cause)
        return len(slots)

    def confirm(self, tree_ids: Iterable[str], priorities: Mapping[str, float]) -> None:
        """The learner has trained on these trees: count the use, believe the new priorities, let go what is used up."""
        out = self._with_learner
        found = {tree_id: out.pop(tree_id) for tree_id in tree_ids if tree_id in out}
        if not found:
            return
        slots = np.fromiter(found.values(), np.int64, len(found))
        self.changed.update(found)
        # What has no new priority comes out as nan.
        new = np.fromiter(map(priorities.get, found, repeat(math.nan)), np.float64, len(found))
        known = ~np.isnan(new)
        self._own[slots[known]] = new[known]
        self._uses[slots] += 1
        done = self._uses[slots] >= self._limit[slots]
        self._drop(slots[done], "used")
        back = slots[~done]
        self._state[back] = _READY
        self._num_ready += len(back)
        self._update(back)
        if known.any():
            self._raise_highest(float(new[known].max()))
        self._drop_stale(back[self._version - self._newest[back] > self._max_lag])

    def give_back(self, tree_ids: Iterable[str]) -> None:
        """The batch was never trained on: its trees are ready again, the use not counted."""
        out = self._with_learner
        slots = np.array([out.pop(tree_id) for tree_id in tree_ids if tree_id in out], dtype=np.int64)
        for slot in slots.tolist():
            self._become_ready(slot)
        self._update(slots)
        self._drop_stale(slots[self._version - self._newest[slots] > self._max_lag])

    def undo_use(self, tree_id: str, uses: int) -> None:
        """A batch that was confirmed is undone: a ready tree here has had ``uses`` again."""
        slot = self._slots[tree_id]
        if self._state[slot] != _READY:
            raise ValueError(f"tree {tree_id} is with the learner; give its batch back first")
        self.changed.add(tree_id)
        if self._uses[slot] == 0:
            self._forget_unserved(slot)
        self._uses[slot] = uses
        if uses == 0:
            self._unserved.setdefault(int(self._oldest[slot]), set()).add(slot)
        self._update(np.array([slot]))

    # --- inside ------------------------------------------------------------------------------------------------

    def _become_ready(self, slot: int) -> None:
        self._state[slot] = _READY
        self._num_ready += 1
        if self._uses[slot] == 0:
            self._unserved.setdefault(int(self._oldest[slot]), set()).add(slot)

    def _forget_unserved(self, slot: int) -> None:
        oldest = int(self._oldest[slot])
        slots = self._unserved.get(oldest)
        if slots is not None:
            slots.discard(slot)
            if not slots:
                del self._unserved[oldest]

    def _hand_out(self, chosen: I64, probability: F64, weight: F64) -> list[Drawn]:
        """Trees whose sums are zero already."""
        self._state[chosen] = _OUT
        self._num_ready -= len(chosen)
        drawn = []
        for slot, p, w in zip(chosen.tolist(), probability.tolist(), weight.tolist(), strict=True):
            if self._uses[slot] == 0:
                self._forget_unserved(slot)
            tree = self._tree(slot)
            self._with_learner[tree.tree_id] = slot
            drawn.append(Drawn(tree, p, w, int(self._uses[slot]) + 1))
        return drawn

    def _urgent(self, count: int, rng: np.random.Generator) -> list[I64]:
        """Never-served trees that must go now for none to be lost.

        With ``count`` trees a version, those that expire within k versions must be at most k·count after this batch;
        what is above that goes now, the nearest expiry first, by priority within the same.
        """
        parts: list[I64] = []
        taken = seen = 0
        by_left: dict[int, list[int]] = {}
        for oldest in sorted(self._unserved):
            by_left.setdefault(max(oldest + self._max_lag - self._version, 0), []).append(oldest)
        group: list[int] = []
        for k, versions in by_left.items():
            seen += sum(len(self._unserved[v]) for v in versions)
            group += versions
            need = min(seen - count * k - taken, count - taken)
            if need <= 0:
                continue
            slots = np.sort(np.fromiter(chain.from_iterable(self._unserved[v] for v in group), np.int64))
            # Zero in the sum tree: drawn for an earlier expiry already.
            sums = self._sums.get(slots)
            waiting, sums = slots[sums > 0], sums[sums > 0]
            order = np.argsort(-(rng.random(len(waiting)) ** (1.0 / sums)))
            parts.append(waiting[order[:need]])
            self._sums.set(parts[-1], np.zeros(len(parts[-1])))
            taken += len(parts[-1])
        return parts

    def _stratified(self, count: int, rng: np.random.Generator) -> I64:
        """One draw from each of ``count`` equal strata of the sum; what came twice is drawn again from the rest."""
        parts: list[I64] = [np.zeros(0, dtype=np.int64)]
        while count > 0 and self._sums.total > 0:
            slots = np.unique(stratified(self._sums, rng.random(count)))
            self._sums.set(slots, np.zeros(len(slots)))
            parts.append(slots)
            count -= len(slots)
        return np.concatenate(parts)

    def _priorities(self, slots: I64) -> F64:
        own = np.where(self._uses[slots] == 0, self._highest, self._own[slots])
        if self._freshness == 1:
            return own
        priority: F64 = own * self._freshness ** self._lags(slots)
        return priority

    def _lags(self, slots: I64) -> I64:
        """int64[n]: the greatest lag that would be trained on, that of the oldest turn that is not over ``max_lag``."""
        since = self._version - self._max_lag
        # Each turn comes to its end once, and with it the version that its tree's age counts from.
        for slot in slots[self._ages_from[slots] < since].tolist():
            versions = self._versions[slot]
            fresh = int(np.searchsorted(versions, since))
            self._ages_from[slot] = versions[min(fresh, len(versions) - 1)]
        lags: I64 = np.maximum(self._version - self._ages_from[slots], 0)
        return lags

    def _weights(self, slots: I64) -> F64:
        """float64[n]: what each is drawn in proportion to, at the present version."""
        weights: F64 = (self._priorities(slots) + PRIORITY_FLOOR) ** self._exponent
        return weights

    def _weigh_all(self) -> None:
        """Priorities have aged since the last draw: let the sums say so."""
        if self._freshness < 1 and self._weighed_at < self._version:
            self._update(np.flatnonzero(self._state == _READY))
        self._weighed_at = self._version

    def _update(self, slots: I64) -> None:
        """Trees that are ready have another priority."""
        self._sums.set(slots, self._weights(slots))

    def _raise_highest(self, priority: float) -> None:
        if priority > self._highest:
            self._highest = priority
            slots = [slot for group in self._unserved.values() for slot in group]
            self._update(np.array(slots, dtype=np.int64))

    def _ready(self, tree_ids: Iterable[str]) -> I64:
        slots = [self._slots[t] for t in tree_ids if t in self._slots]
        return np.array([s for s in slots if self._state[s] == _READY], dtype=np.int64)

    def _tree(self, slot: int) -> TreeEntry:
        tree = self._trees[slot]
        assert tree is not None
        return tree

    def _drop(self, slots: I64, cause: str) -> None:
        if not len(slots):
            return
        for slot in slots.tolist():
            tree = self._tree(slot)
            uses = int(self._uses[slot])
            self.gone.append(Departure(tree, cause, uses, float(self._own[slot])))
            self.changed.add(tree.tree_id)
            if self._state[slot] == _READY:
                self._num_ready -= 1
                if uses == 0:
                    self._forget_unserved(slot)
            newest = int(self._newest[slot])
            self._by_newest[newest].discard(slot)
            if not self._by_newest[newest]:
                del self._by_newest[newest]
            del self._slots[tree.tree_id]
            self.nbytes -= int(self._nbytes[slot])
            self._trees[slot] = None
            self._versions.pop(slot, None)
            self._free.append(slot)
            self.left[cause] += 1
        self._state[slots] = _FREE
        self._nbytes[slots] = 0
        self._sums.set(slots, np.zeros(len(slots)))

    def _new_slot(self) -> int:
        slot = len(self._trees)
        self._trees.append(None)
        if slot >= len(self._state):
            room = max(16, 2 * len(self._state))
            for name in _COLUMNS:
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(room - len(old), dtype=old.dtype)]))
            self._sums.grow(room)
        return slot


def stratified(sums: SumTree, uniform: F64) -> I64:
    """int64[n]: one draw from each of n equal strata of the sum, at ``uniform`` (float64[n] in [0, 1)) within it."""
    count = len(uniform)
    return sums.find((np.arange(count) + uniform) / count * sums.total)


def split_by_tokens(tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Positions for each rank: longest first, each to the rank with the least so far; deterministic.

    Every rank gets at least one as long as there are enough.
    """
    loads = [0] * num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for position in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], len(shares[r]), r))
        shares[rank].append(position)
        loads[rank] += tokens[position]
    return [sorted(share) for share in shares]
