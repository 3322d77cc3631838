"""Which faults an environment or an engine has, how often, and whether the run can go on with them.

One fault costs one branch, and a task in five that fails is a run that goes on and says so.  The same fault in every
task is a run that would only burn time: it is stopped while the first trees are still growing.

When is it in every task?  Trees are looked at from the latest back to the first without the fault.  So many in a row
must have lost a good part of their chains to it that this is no accident at the share of trees that had it before; at
first, before any tree went well, ``least`` of them.  Trees that grow on without it for longer than it took to come in
the others speak against it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import msgspec

from atpo_async.core.errors import AtpoError, BadMessage, ConfigError, EngineDead, EnvironmentBroken
from atpo_async.core.texts import shortened
from atpo_async.core.vocabulary import Split
from atpo_async.ops import notices
from atpo_async.wire.checks import check
from atpo_async.wire.messages import Lease

Tell = Callable[[str, str], None]

Place = Literal["chain", "branch"]
"""Whether a chain began at the prompt, or forks off another: a replay that always fails leaves the first ones alone."""

EXPANSION_FAILED = "expansion_failed"
"""Why branches are lost that the expansion strategy did not choose."""

ENGINE_FAILED = frozenset({"generate_timeout", "generate_failed"})

REMEMBERED = 256
"""Trees; older ones are forgotten."""

BY_ACCIDENT = 1e-6
"""A run of trees with the same fault is no accident below this chance."""

MOST_IN_A_ROW = 40

SLOW_S = 15.0
"""So long after the first fault, with nothing that ever went well, fewer trees are enough."""

LEAST_SLOW = 3

LEAST_CHAINS = 8
"""That such a row of trees must have lost, unless they are slow."""

ANY = "any"
"""The kind that every fault is: for trees in which each chain ends in another one."""

SAY_AGAIN_S = 60.0
"""After this, and then each time twice as late, the count of a known fault is told again."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a chain was lost."""

    reason: str
    """What it is counted under: ``actor/failed/<reason>``."""
    kind: str
    """What faults with one cause have in common."""
    detail: str
    """One line: what, where, and the way out."""
    source: str = ""
    """The setting at fault; empty where it is the environment, or the engine."""

    @property
    def share(self) -> float:
        """Of a tree's chains in one place, how many must be lost to it for the tree to count as hit.

        A value of the wrong type is a slip in code that is always the same; a tool that raises may do so at random.
        """
        return 0.25 if self.kind.startswith("value of ") else 0.8


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
    """Counts the faults of one split's trees, tells of them, and says when the run cannot go on.

    Args:
        environment: ``environment.name``, for the texts.
        least: trees that must be hit in a row before any went well.
        tell: takes a line for the user's terminal, and what lines of other processes say the same.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        environment: str,
        *,
        least: int,
        tell: Tell = notices.tell,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._environment = environment
        self._least = least
        self._tell = tell
        self._clock = clock
        self._trees: OrderedDict[str, _Tree] = OrderedDict()
        self._ever_good = False
        self._told: dict[str, _Told] = {}
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
            if not tree.ended:  # given up before any of its chains ended: it says nothing
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
        self._say(fault)
        if fault.reason not in ENGINE_FAILED:
            self._judge(place, fault.kind, fault.share, fault)
        self._judge(place, ANY, 1.0, fault)

    # --- whether it goes on ----------------------------------------------------------------------------------------

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
        if fault.reason not in ENGINE_FAILED:  # what comes of its values names it too
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
            why = "does not answer" if fault.reason == "generate_timeout" else "fails every request"
            return EngineDead(f"{row}, as the engine {why}; {latest}")
        return (ConfigError if fault.source else EnvironmentBroken)(f"{name}: {row}; {latest}")

    # --- what the user hears ---------------------------------------------------------------------------------------

    def _named(self, fault: Fault) -> str:
        if fault.source:
            return f"{fault.source}: {fault.detail}"
        mine = fault.reason not in ENGINE_FAILED and self._environment not in fault.detail
        return f"environment {self._environment!r}, {fault.detail}" if mine else fault.detail

    def _say(self, fault: Fault) -> None:
        """The first of a kind at once, then how many there were, ever more rarely."""
        now = self._clock()
        told = self._told.get(fault.kind)
        if told is None:
            if len(self._told) >= MOST_KINDS:
                return
            self._told[fault.kind] = _Told(now + SAY_AGAIN_S, chains=self._chains)
            self._tell(f"a branch failed and is left out, the run goes on: {self._named(fault)}", fault.kind)
            return
        told.count += 1
        if now < told.again_at:
            return
        of = self._chains - told.chains
        self._tell(f"{told.count} more of {of} branches failed like that: {self._named(fault)}", fault.kind)
        told.wait_s *= 2
        told.again_at = now + told.wait_s
        told.count, told.chains = 0, self._chains


class Faults:
    """The faults of all trees of an actor, or of an evaluation: each split has its own watch.

    Args:
        environment: ``environment.name``, for the texts.
        at_once: trees that are grown at once.
        tell: takes a line for the user's terminal, and what lines of other processes say the same.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        environment: str,
        *,
        at_once: int,
        tell: Tell = notices.tell,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        least = min(MOST_AT_FIRST, max(LEAST_AT_FIRST, at_once))
        self._of: dict[Split, FaultWatch] = {
            kind: FaultWatch(environment, least=least, tell=tell, clock=clock) for kind in get_args(Split)
        }
        self._kinds: dict[str, Split] = {}
        self._verdict: AtpoError | None = None
        """Found where nobody could be stopped: raised at the next chance."""

    @contextlib.contextmanager
    def growing(self, lease: Lease) -> Iterator[None]:
        """While the tree of ``lease`` is grown."""
        self._kinds[lease.tree_id] = lease.kind
        self._of[lease.kind].began(lease.tree_id)
        try:
            yield
        finally:
            self._of[lease.kind].over(lease.tree_id)
            self._kinds.pop(lease.tree_id, None)

    def chain_ended(self, tree_id: str, place: Place, fault: Fault | None) -> None:
        """As ``FaultWatch.chain_ended``."""
        if self._verdict is not None:
            raise self._verdict
        if (kind := self._kinds.get(tree_id)) is not None:
            self._of[kind].chain_ended(tree_id, place, fault)

    def refused(self, tree_id: str, message: object, reason: str) -> None:
        """The buffer did not take ``message``; a fault of the tree if that is for what it holds.

        What came too late, after its lease had lapsed, is nobody's fault.
        """
        if (kind := self._kinds.get(tree_id)) is None or not isinstance(message, msgspec.Struct):
            return
        try:
            check(message)
        except BadMessage as exc:
            fault = Fault("refused_by_buffer", "value refused by the buffer", f"the buffer refuses it: {reason or exc}")
            try:
                self._of[kind].chain_ended(tree_id, "chain", fault)
            except AtpoError as verdict:
                self._verdict = verdict


LEAST_AT_FIRST, MOST_AT_FIRST = 4, 8
"""Trees in a row that must be hit before any went well, by how many are grown at once."""


class CutActions:
    """Says so when many actions end because they are too long: usually the stop ids are not the model's.

    Args:
        max_action_tokens: ``search.max_action_tokens``, for the text.
        tell: takes a line for the user's terminal, and what lines of other processes say the same.
    """

    def __init__(self, max_action_tokens: int, *, tell: Tell = notices.tell) -> None:
        self._max_tokens = max_action_tokens
        self._tell = tell
        self._actions = self._cut = 0
        self._told = False

    def count(self, actions: int, cut: int) -> None:
        """``cut`` of some more ``actions`` were ended by their length."""
        self._actions += actions
        self._cut += cut
        if self._actions < CUT_LOOKED_AT:
            return
        share = self._cut / self._actions
        if share > CUT_SHARE and not self._told:
            self._tell(
                f"{share:.0%} of {self._actions} actions were cut off at their longest (actions/cut_share; "
                f"search.max_action_tokens = {self._max_tokens}) and not ended by a stop token: are the environment's "
                "stop_token_ids those that the policy ends its turns with?",
                "actions/cut_share",
            )
        self._told = share > CUT_SHARE
        self._actions = self._cut = 0


CUT_SHARE = 1 / 3
CUT_LOOKED_AT = 200
"""Actions in a row that the share is taken of."""

MOST_KINDS = 50
"""Kinds of faults that are told one by one; what comes after them is in the metrics and in the log."""


def first_of(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a user should read: the first error of ours, else the first at all."""
    flat: list[BaseException] = []

    def walk(group: BaseExceptionGroup[BaseException]) -> None:
        for exc in group.exceptions:
            if isinstance(exc, BaseExceptionGroup):
                walk(exc)
            else:
                flat.append(exc)

    walk(failures)
    return next((exc for exc in flat if isinstance(exc, AtpoError)), flat[0])


@dataclass(slots=True)
class _Told:
    again_at: float
    chains: int
    """That had ended when it was told."""
    count: int = 0
    wait_s: float = SAY_AGAIN_S
