"""Ready trees: priorities, proportional sampling, eviction.  Pure: versions and random numbers are passed in.

Source: prioritized experience replay (arXiv 1511.05952) with trees as units, the mixed maximum and mean of R2D2
(Kapturowski et al. 2019) as priority, and a schedule that serves what would otherwise grow stale (the promise of
ARCHITECTURE.md that next to nothing is discarded at steady state).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from atpo_async.tree import Turn, TurnTree

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
WeightsOver = Literal["max", "mean", "none"]

PRIORITY_FLOOR = 0.01
"""Added to every priority, so that a tree whose advantage came out small can still be drawn."""

TURN_OVERHEAD_BYTES = 900
"""What the objects around a turn's arrays take in CPython, measured and rounded up."""

_FREE, _READY, _OUT = 0, 1, 2


def turn_nbytes(turn: Turn) -> int:
    """Bytes that keeping a turn in memory takes."""
    return TURN_OVERHEAD_BYTES + turn.observation.nbytes + turn.action.nbytes + turn.logprobs.nbytes


def tree_nbytes(tree: TurnTree) -> int:
    """Bytes that keeping a tree in memory takes."""
    return tree.prompt.nbytes + sum(turn_nbytes(turn) for turn in tree)


def tree_priority(advantages: F64, *, max_share: float) -> float:
    """``η·max|A| + (1-η)·mean|A|`` over the tree's turns (ALGORITHM, section 4)."""
    size = np.abs(advantages)
    return float(max_share * size.max() + (1 - max_share) * size.mean()) if len(size) else 0.0


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

    Inner sums are computed again from their two halves, never adjusted by differences, so they cannot drift.
    """

    def __init__(self, capacity: int = 16) -> None:
        self._size = 1 << max(capacity - 1, 1).bit_length()
        self._nodes = np.zeros(2 * self._size)

    @property
    def capacity(self) -> int:
        return self._size

    @property
    def total(self) -> float:
        return float(self._nodes[1])

    def values(self) -> F64:
        """float64[capacity]: a view."""
        return self._nodes[self._size :]

    def set(self, indices: I64, values: F64) -> None:
        """Put ``values`` at ``indices`` (without duplicates)."""
        if not len(indices):
            return
        self._nodes[self._size + indices] = values
        nodes = np.unique((self._size + indices) // 2)
        while nodes[0] >= 1:
            self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]
            nodes = np.unique(nodes // 2)

    def grow(self, capacity: int) -> None:
        """Make room for at least ``capacity`` numbers."""
        if capacity <= self._size:
            return
        old = self.values()
        self._size = 1 << (capacity - 1).bit_length()
        self._nodes = np.zeros(2 * self._size)
        self.set(np.arange(len(old)), old)

    def find(self, targets: F64) -> I64:
        """int64[n]: for each target in [0, total) the index whose interval of the prefix sums it falls into.

        Never an index that holds zero while there are others, whatever the rounding.
        """
        target = targets.astype(np.float64, copy=True)
        node = np.ones(len(target), dtype=np.int64)
        for _ in range(self._size.bit_length() - 1):
            left = self._nodes[2 * node]
            right = (target >= left) & (self._nodes[2 * node + 1] > 0)
            target = np.where(right, target - left, target)
            node = 2 * node + right
        return node - self._size


@dataclass(frozen=True, slots=True)
class Drawn:
    """One tree of a batch, with how it was drawn."""

    tree: TurnTree
    probability: float
    """P_i among the trees that were ready; 1/N where all of them were taken."""
    weight: float
    """w_PER."""
    uses: int
    """How often it was served, this time included."""


class ReplayPool:
    """Trees that are ready, and those that are out with the learner.

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
        self._trees: list[TurnTree | None] = []
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._state = np.zeros(0, dtype=np.int8)
        self._own = np.zeros(0)
        self._uses = np.zeros(0, dtype=np.int64)
        self._limit = np.zeros(0, dtype=np.int64)
        self._oldest = np.zeros(0, dtype=np.int64)
        self._newest = np.zeros(0, dtype=np.int64)
        self._versions: dict[int, I64] = {}
        """Slot -> oldest version of each turn, ascending; kept only where freshness counts."""
        self._nbytes = np.zeros(0, dtype=np.int64)
        self._entered = np.zeros(0, dtype=np.int64)
        self._clock = 0
        self._version = 0
        self._highest = 1.0
        self.nbytes = 0
        """Bytes of all trees, those with the learner too."""
        self.left: Counter[str] = Counter()
        """Why trees left: ``used`` up, ``bytes``, ``stale`` before any batch had them, ``retired`` stale after one,
        ``inexact`` of a version that no batch is to have."""

    # --- what is there -----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Trees that can be drawn."""
        return int(np.count_nonzero(self._state == _READY))

    def __contains__(self, tree_id: object) -> bool:
        """Whether a tree is here, ready or with the learner."""
        return tree_id in self._slots

    @property
    def num_returning(self) -> int:
        """Trees with the learner that come back: this use is not their last."""
        return int(np.count_nonzero((self._state == _OUT) & (self._uses + 1 < self._limit)))

    @property
    def mean_priority(self) -> float:
        ready = np.flatnonzero(self._state == _READY)
        return float(self._priorities(ready).mean()) if len(ready) else 0.0

    def is_out(self, tree_id: str) -> bool:
        """Whether the tree is with the learner."""
        slot = self._slots.get(tree_id)
        return slot is not None and bool(self._state[slot] == _OUT)

    def unserved_tasks(self) -> list[int]:
        """Task of every ready tree that no batch has had."""
        return [self._tree(int(s)).task_index for s in np.flatnonzero((self._state == _READY) & (self._uses == 0))]

    def ready_ids(self) -> list[str]:
        return [tree_id for tree_id, slot in self._slots.items() if self._state[slot] == _READY]

    # --- in and out --------------------------------------------------------------------------------------------

    def add(self, tree: TurnTree, *, priority: float, uses: int = 0) -> None:
        """Take in a tree, or a later state of one that is here.

        A tree never served counts as the highest priority confirmed so far: it is seen before its own is believed.

        Args:
            tree: pruned, with at least one turn.
            priority: from its own advantages, above zero.
            uses: how often it was served before it came back with later turns; it may be served once more at least.
        """
        slot = self._slots.get(tree.tree_id)
        if slot is None:
            slot = self._free.pop() if self._free else self._new_slot()
            self._slots[tree.tree_id] = slot
            self._state[slot] = _READY
            self._uses[slot] = uses
            self._limit[slot] = max(self._max_uses, uses + 1)
            self._entered[slot] = self._clock
            self._clock += 1
        versions = sorted(turn.oldest_version for turn in tree)
        size = tree_nbytes(tree)
        self.nbytes += size - int(self._nbytes[slot])
        self._trees[slot] = tree
        self._nbytes[slot] = size
        self._own[slot] = priority
        self._oldest[slot], self._newest[slot] = versions[0], versions[-1]
        if self._freshness < 1:
            self._versions[slot] = np.array(versions)
        self._update(np.array([slot]))

    def advance(self, version: int) -> int:
        """The learner is at ``version``: drop ready trees without any fresh turn.  Returns how many."""
        if version > self._version:
            self._version = version
            if self._freshness < 1:
                self._update(np.flatnonzero(self._state == _READY))
        stale = np.flatnonzero((self._state == _READY) & (self._version - self._newest > self._max_lag))
        served = self._uses[stale] > 0
        self._drop(stale[~served], "stale")
        self._drop(stale[served], "retired")
        return len(stale)

    def shrink(self, max_bytes: int) -> int:
        """Drop ready trees, oldest first, until all together take at most ``max_bytes``.  Returns how many."""
        ready = np.flatnonzero(self._state == _READY)
        ready = ready[np.argsort(self._entered[ready])]
        dropped = 0
        while self.nbytes > max_bytes and dropped < len(ready):
            self._drop(ready[dropped : dropped + 1], "bytes")
            dropped += 1
        return dropped

    def draw(self, count: int, *, rng: np.random.Generator, beta: float) -> list[Drawn]:
        """Take up to ``count`` different trees; they stay out until ``confirm`` or ``give_back``.

        Trees that were never served and cannot wait come first (``_urgent``); the others in proportion to priority,
        stratified.  When every ready tree is taken nothing was left to chance: P is 1/N and the weights are 1.
        """
        ready = np.flatnonzero(self._state == _READY)
        if not len(ready) or count <= 0:
            return []
        if len(ready) <= count:
            chosen, probability = ready, np.full(len(ready), 1.0 / len(ready))
            of_all = probability
        else:
            scaled = self._sums.values()
            total = self._sums.total
            of_all = scaled[ready] / total
            parts = self._urgent(ready, count, rng)
            parts.append(self._stratified(count - sum(map(len, parts)), rng))
            chosen = np.concatenate(parts)
            self._update(chosen)  # their sums were set to zero while drawing; P needs them once more
            probability = scaled[chosen] / total
        weight = importance_weights(probability, num_trees=len(ready), beta=beta, over=self._weights_over, ready=of_all)
        return self._hand_out(chosen, probability, weight)

    def take(self, tree_ids: Iterable[str]) -> list[Drawn]:
        """Take these trees, as ``draw`` does, those of them that are ready.  Nothing is left to chance: P is 1/N."""
        chosen = self._ready(tree_ids)
        return self._hand_out(chosen, np.full(len(chosen), 1.0 / max(len(chosen), 1)), np.ones(len(chosen)))

    def discard(self, tree_ids: Iterable[str], cause: str) -> int:
        """Let those of these trees go that are ready, for ``cause``.  Returns how many."""
        slots = self._ready(tree_ids)
        self._drop(slots, cause)
        return len(slots)

    def confirm(self, tree_ids: Iterable[str], priorities: Mapping[str, float]) -> None:
        """The learner has trained on these trees: count the use, believe the new priorities, let go what is used up."""
        slots = self._out(tree_ids)
        for slot in slots:
            priority = priorities.get(self._tree(int(slot)).tree_id)
            if priority is not None:
                self._own[slot] = priority
                self._raise_highest(priority)
        self._uses[slots] += 1
        done = self._uses[slots] >= self._limit[slots]
        self._drop(slots[done], "used")
        self._state[slots[~done]] = _READY
        self._update(slots[~done])
        self.advance(self._version)

    def give_back(self, tree_ids: Iterable[str]) -> None:
        """The batch was never trained on: its trees are ready again, the use not counted."""
        slots = self._out(tree_ids)
        self._state[slots] = _READY
        self._update(slots)
        self.advance(self._version)

    # --- inside ------------------------------------------------------------------------------------------------

    def _hand_out(self, chosen: I64, probability: F64, weight: F64) -> list[Drawn]:
        self._state[chosen] = _OUT
        self._update(chosen)
        return [
            Drawn(self._tree(int(slot)), float(p), float(w), int(self._uses[slot]) + 1)
            for slot, p, w in zip(chosen, probability, weight, strict=True)
        ]

    def _urgent(self, ready: I64, count: int, rng: np.random.Generator) -> list[I64]:
        """Never-served trees that must go now for none to be lost.

        With ``count`` trees a version, those that expire within k versions must be at most k·count after this batch;
        what is above that goes now, the nearest expiry first, by priority within the same.
        """
        fresh = ready[self._uses[ready] == 0]
        left = np.maximum(self._oldest[fresh] + self._max_lag - self._version, 0)
        parts: list[I64] = []
        taken = 0
        for k in np.unique(left):
            group = fresh[left <= k]
            # Zero in the sum tree: drawn for an earlier expiry already.
            waiting = group[self._sums.values()[group] > 0]
            need = min(len(group) - count * int(k) - (len(group) - len(waiting)), count - taken)
            if need <= 0:
                continue
            order = np.argsort(-(rng.random(len(waiting)) ** (1.0 / self._sums.values()[waiting])))
            parts.append(waiting[order[:need]])
            self._sums.set(parts[-1], np.zeros(need))
            taken += need
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
        lag = np.array([self._lag(int(slot)) if self._state[slot] != _FREE else 0 for slot in slots])
        priority: F64 = own * self._freshness**lag
        return priority

    def _lag(self, slot: int) -> int:
        """The greatest lag that would be trained on: that of the oldest turn that is not over ``max_lag``."""
        versions = self._versions[slot]
        fresh = versions[np.searchsorted(versions, self._version - self._max_lag) :]
        return max(self._version - int(fresh[0] if len(fresh) else versions[-1]), 0)

    def _update(self, slots: I64) -> None:
        scaled = (self._priorities(slots) + PRIORITY_FLOOR) ** self._exponent
        self._sums.set(slots, np.where(self._state[slots] == _READY, scaled, 0.0))

    def _raise_highest(self, priority: float) -> None:
        if priority > self._highest:
            self._highest = priority
            self._update(np.flatnonzero((self._state == _READY) & (self._uses == 0)))

    def _out(self, tree_ids: Iterable[str]) -> I64:
        slots = [self._slots[t] for t in tree_ids if t in self._slots]
        return np.array([s for s in slots if self._state[s] == _OUT], dtype=np.int64)

    def _ready(self, tree_ids: Iterable[str]) -> I64:
        slots = [self._slots[t] for t in tree_ids if t in self._slots]
        return np.array([s for s in slots if self._state[s] == _READY], dtype=np.int64)

    def _tree(self, slot: int) -> TurnTree:
        tree = self._trees[slot]
        assert tree is not None
        return tree

    def _drop(self, slots: I64, cause: str) -> None:
        for slot in slots.tolist():
            del self._slots[self._tree(slot).tree_id]
            self.nbytes -= int(self._nbytes[slot])
            self._trees[slot] = None
            self._versions.pop(slot, None)
            self._free.append(slot)
            self.left[cause] += 1
        self._state[slots] = _FREE
        self._nbytes[slots] = 0
        self._update(slots)

    def _new_slot(self) -> int:
        slot = len(self._trees)
        self._trees.append(None)
        if slot >= len(self._state):
            room = max(16, 2 * len(self._state))
            for name in ("_state", "_own", "_uses", "_limit", "_oldest", "_newest", "_nbytes", "_entered"):
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
