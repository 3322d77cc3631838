"""Decides whether the run can go on with the faults that its environment, its strategy and its engine have.

One fault costs one branch; a run in which every fifth task fails goes on and reports it.  A fault in every task would
only waste time: the run is stopped while the first trees are still growing.

A fault counts as being in every task when a row of trees had it.  Trees are looked at from the latest back to the first
without the fault.  The row must be too long to be an accident, given the share of earlier trees that had the fault;
before any tree went well it must have ``least`` trees.  A tree counts as hit when it has lost a good part of its chains
to the fault.  Trees that grow without it for longer than it took to appear in the others count against it.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from actors.faults.fault import ENGINE_FAILED, Fault, Place
from actors.faults.notices import Clock, FaultNotices, Notify
from atpo_async.core.errors import AtpoError, ConfigError, EngineDead, EnvironmentBroken
from atpo_async.core.texts import shortened
from atpo_async.ops import notices

REMEMBERED = 256
"""Trees; older ones are forgotten."""

BY_ACCIDENT = 1e-6
"""A row of trees with the same fault is no accident below this probability."""

MOST_IN_A_ROW = 40

SLOW_S = 15.0
"""Seconds after the first fault from which on fewer trees are enough, if no chain ever went well."""

LEAST_SLOW = 3

LEAST_CHAINS = 8
"""Chains that the trees of a row must have lost together, unless they are slow."""

ANY = "any"
"""A kind that all faults have in common: for trees in which every chain is lost to another fault."""


@dataclass(slots=True)
class _Tree:
    began: float
    ended: Counter[Place] = field(default_factory=Counter)
    """Chains that came to an end, well or not."""
    lost: Counter[tuple[Place, str]] = field(default_factory=Counter)
    first: dict[str, float] = field(default_factory=dict)
    """Kind -> seconds from the beginning to the first such fault."""
    over: bool = False

    def is_hit(self, place: Place, kind: str, share: float) -> bool:
        lost = self.lost[place, kind]
        return lost > 0 and lost >= share * self.ended[place]

    @property
    def num_good(self) -> int:
        return self.ended.total() - sum(n for (_, kind), n in self.lost.items() if kind == ANY)


class FaultWatch:
    """Counts the faults of one split's trees, reports them, and decides when the run cannot go on.

    Args:
        environment: ``environment.name``, for the texts.
        least: trees that must be hit in a row before any went well.
        notify: takes each line for the user's terminal.
        clock: seconds, monotonic.
    """

    def __init__(
        self, environment: str, *, least: int, notify: Notify = notices.post, clock: Clock = time.monotonic
    ) -> None:
        self._environment = environment
        self._least = least
        self._clock = clock
        self._trees: OrderedDict[str, _Tree] = OrderedDict()
        self._ever_good = False
        self._notices = FaultNotices(environment, notify=notify, clock=clock)
        self._chains = 0

    def began(self, tree_id: str) -> None:
        """A tree is being grown, perhaps not for the first time."""
        self._trees.pop(tree_id, None)
        self._trees[tree_id] = _Tree(self._clock())
        while len(self._trees) > REMEMBERED:
            self._trees.popitem(last=False)

    def over(self, tree_id: str) -> None:
        """The tree grows no further."""
        if (tree := self._trees.get(tree_id)) is not None:
            tree.over = True
            if not tree.ended:  # given up before any of its chains ended: it counts neither way
                del self._trees[tree_id]

    def chain_ended(self, tree_id: str, place: Place, fault: Fault | None) -> None:
        """A chain came to its end, or was lost to ``fault``.

        Raises:
            EnvironmentBroken: the fault is in every task.
            ConfigError: so is one of the expansion strategy.
            EngineDead: the engine answers none of the trees' requests.
        """
        tree = self._trees.get(tree_id)
        if tree is None:
            return
        tree.ended[place] += 1
        self._chains += 1
        if fault is None:
            self._ever_good = True
            return
        for kind in (fault.kind, ANY):
            tree.lost[place, kind] += 1
            tree.first.setdefault(kind, self._clock() - tree.began)
        self._notices.add(fault, chains=self._chains)
        if fault.reason not in ENGINE_FAILED:
            self._judge(place, fault.kind, fault.share, fault)
        self._judge(place, ANY, 1.0, fault)

    # --- whether the run goes on ------------------------------------------------------------------------------------

    def _judge(self, place: Place, kind: str, share: float, fault: Fault) -> None:
        hit: list[_Tree] = []
        quiet: list[_Tree] = []
        latest_first = reversed(self._trees.values())
        spared = 0
        for tree in latest_first:
            if tree.is_hit(place, kind, share):
                hit.append(tree)
            elif not tree.over:
                quiet.append(tree)
            elif tree.ended[place]:
                spared = 1
                break
        if len(hit) < min(LEAST_SLOW, self._least):
            return
        earlier = [tree.is_hit(place, kind, share) for tree in latest_first if tree.ended[place]]
        before = sum(earlier), len(earlier) - sum(earlier) + spared
        now = self._clock()
        slowest = max(tree.first[kind] for tree in hit)
        against = sum(tree.num_good > 1 or now - tree.began > 2 * slowest for tree in quiet)
        enough = self._enough(before, slow=now - min(t.began + t.first[kind] for t in hit) > SLOW_S)
        lost = sum(tree.lost[place, kind] for tree in hit)
        if len(hit) >= enough + 2 * against and (lost >= LEAST_CHAINS or enough < self._least):
            raise self._verdict(place, len(hit), lost, sum(tree.ended[place] for tree in hit), fault)

    def _enough(self, before: tuple[int, int], *, slow: bool) -> int:
        """How many trees in a row: ``before`` are those before them that were hit, and that were not."""
        hit, spared = before
        if not hit + spared:
            return min(self._least, LEAST_SLOW) if slow and not self._ever_good else self._least
        chance = (hit + 1) / (hit + spared + 2)
        return max(self._least, min(MOST_IN_A_ROW, math.ceil(math.log(BY_ACCIDENT) / math.log(chance))))

    def _verdict(self, place: Place, trees: int, lost: int, chains: int, fault: Fault) -> AtpoError:
        """``trees`` in a row lost ``lost`` of their ``chains`` in ``place``, the last one to ``fault``."""
        name = fault.source or f"environment {self._environment!r}"
        detail = fault.detail
        if fault.reason not in ENGINE_FAILED:  # a refused value names the environment too
            detail = detail.removeprefix(f"{name}, ").removeprefix(f"{name}: ")
        latest = f"the latest: {shortened(detail, 500)}"
        if lost < chains:
            what = f"lost chains to the same fault, {lost} of {chains}"
        elif place == "branch":
            what = f"lost every chain that forked off another, {lost} of them"
        else:
            what = "ended without one finished chain"
        row = f"{trees} trees in a row {what}"
        if fault.reason in ENGINE_FAILED:
            why = "does not answer" if fault.reason.endswith("_timeout") else "fails every request"
            return EngineDead(f"{row}, as the engine {why}; {latest}")
        return (ConfigError if fault.source else EnvironmentBroken)(f"{name}: {row}; {latest}")
