"""The leases of a run: granted, renewed, lapsed, reissued and ended.  Pure: the clock is passed in.

Seconds are monotonic.  ``leases.tasks`` and ``leases.evaluations`` hold the tasks, ``leases.admission`` decides whether
a new training tree may begin, and ``leases.presence`` which actors are alive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from atpo_async.config import StalenessConfig
from atpo_async.core.mixture import TaskLabels
from atpo_async.core.naming.shards import WHOLE, Shard
from atpo_async.core.vocabulary import Split
from buffer.batches.delay_line import Admission
from buffer.journal.entries import RunEntry, TreeStateEntry
from buffer.leases.admission import NOTHING_ELSE, LagRule, LearnerProgress
from buffer.leases.evaluations import Evaluations
from buffer.leases.limits import ShareLimits
from buffer.leases.presence import ActorPresence
from buffer.leases.rates import Rates
from buffer.leases.shares import remaining_trees
from buffer.leases.table import HeldLease, LeaseTable
from buffer.leases.tasks import TrainingTasks

UNSEEN_REPORTS = 3
"""An actor whose reports leave a lease out so often does not know of it; one or two may be older than the lease."""


@dataclass(frozen=True, slots=True)
class Granted:
    """Answer to a request for leases."""

    leases: tuple[HeldLease, ...]
    closed_because: str | None
    """Why there are not more."""
    only_here: bool = False
    """That reason holds for this actor; another may get some."""


@dataclass(slots=True)
class _Asked:
    """A request for leases, and what came of it so far."""

    actor: str
    now: float
    ready: int
    produced: int
    memory_full: bool
    exact: Admission | None
    engine_version: int | None
    steps_left: int | None
    begun: int = 0
    """New training trees."""
    refused_here: bool = False
    """There was a tree, and this actor may not have it."""
    only_here: bool = False


class Ledger:
    """The leases of one run.

    Args:
        staleness: trees per batch, max_lag, max_uses, max_oversampling.
        lifetime_s: of a lease that is not renewed.
        silent_s: an actor that sends nothing for that long has lost its leases.
        max_reissues: a task is given up after that many lost holders.
        seed: the run's.
        prefix: begins every tree id; never used by an earlier buffer of the run.
        max_tasks: no training task from this one on; None for no end.
        labels: of the tasks, where the run has several environments.
        alone: no other actor is to be expected beside the first one.
        shard: only its tasks are leased.
    """

    def __init__(
        self,
        *,
        staleness: StalenessConfig,
        lifetime_s: float,
        silent_s: float,
        max_reissues: int,
        seed: int,
        prefix: str,
        max_tasks: int | None = None,
        labels: TaskLabels | None = None,
        alone: bool = True,
        shard: Shard = WHOLE,
    ) -> None:
        self._lifetime_s = lifetime_s
        self._max_reissues = max_reissues
        self._seed = seed
        self.prefix = prefix
        self.tasks = TrainingTasks(max_tasks=max_tasks, max_attempts=max_reissues, shard=shard)
        self.evaluations = Evaluations(labels, shard)
        self.progress = LearnerProgress()
        self.actors = ActorPresence(silent_s)
        self._rule = LagRule(staleness, self.progress)
        self.elsewhere = NOTHING_ELSE
        """What other shards have, as last heard; admission counts it."""
        self.next_number = 1
        """Of the next tree."""
        self._changed: set[str] = set()
        self.rates = Rates()
        self.limits = ShareLimits(staleness, self.rates, self.actors, alone=alone)
        self._leases = LeaseTable(assigned=self.rates.assigned, unassigned=self.rates.unassigned)

    # --- granting ----------------------------------------------------------------------------------------------

    def grant(
        self,
        actor: str,
        count: int,
        *,
        now: float,
        ready: int,
        produced: int = 0,
        memory_full: bool = False,
        exact: Admission | None = None,
        engine_version: int | None = None,
        steps_left: int | None = None,
    ) -> Granted:
        """Up to ``count`` leases for ``actor``: first what was lost, then evaluation, then new training trees.

        Args:
            actor: that requests them.
            count: how many it can grow.
            now: seconds.
            ready: trees that wait to be served and are not under lease.
            produced: training trees that became ready since the last batch, those without signal too.
            memory_full: the buffer is at its byte limit.
            exact: with ``staleness.exact_lag``, what decides about training trees instead of the three above.
            engine_version: that the actor generates with; None or below 0 where unknown.
            steps_left: batches of the run that are still to be taken; None where there is no end.
        """
        self.actors.heard(actor, now)
        self.actors.asks(actor)
        self.rates.now = now
        asked = _Asked(actor, now, ready, produced, memory_full, exact, engine_version, steps_left)
        leases: list[HeldLease] = []
        reason: str | None = None
        while len(leases) < count:
            found = self._next(asked)
            if not isinstance(found, HeldLease):
                reason, asked.only_here = found, asked.only_here or asked.refused_here
                break
            self._leases.assign(found, actor)
            found.expires_at, found.unseen, found.refused = now + self._lifetime_s, 0, ""
            self.limits.granted(found.kind)
            self._changed.add(found.tree_id)
            leases.append(found)
        return Granted(tuple(leases), reason, only_here=asked.only_here)

    def _next(self, asked: _Asked) -> HeldLease | str:
        """A lease without a holder, or why there is none."""
        published = self.progress.published
        blocking, exact = self.evaluations.blocking(published), asked.exact
        held_back = self.elsewhere.blocked_by if blocking is None else blocking.as_reason()
        blocked = held_back is not None or (exact is not None and exact.held_back is not None)
        asked.refused_here = False
        limited: dict[Split, str | None] = {}
        kinds: tuple[Split, ...] = ("eval",) if blocked else ("eval", "train")
        for kind in kinds if published is not None else ():
            held = self._leases.first_waiting(kind)
            if held is not None and self._may(asked, kind, limited):
                held.epoch += 1
                return held
        if self.evaluations.num_to_lease(published) and self._may(asked, "eval", limited):
            return self._for_evaluation()
        why = held_back or (
            self._why_closed(asked) if exact is None else exact.why_closed(asked.begun)
        )  # fmt: skip
        if why is not None:
            # Of what this actor is refused another may get some.
            return next((each for each in limited.values() if each is not None), why)
        if not self._may(asked, "train", limited):
            return str(limited["train"])
        asked.begun += 1
        least = self._rule.least_version(self._pending(asked))
        return self._for_training(least if exact is None else max(exact.version, 0))

    def _may(self, asked: _Asked, kind: Split, limited: dict[Split, str | None]) -> bool:
        """Whether this actor may have a tree of a kind; ``limited`` holds why not."""
        if kind not in limited:
            limited[kind] = self._why_not_here(asked, kind)
        asked.refused_here = asked.refused_here or limited[kind] is not None
        return limited[kind] is None

    def _why_not_here(self, asked: _Asked, kind: Split) -> str | None:
        """Why this actor gets no tree of a kind though there are some; None if it may have one."""
        waiting = self._leases.num_waiting(kind)
        if kind == "eval":
            remaining: int | None = self.evaluations.num_to_lease(self.progress.published) + waiting
        else:
            version = self._rule.version_of(asked.engine_version, self._pending(asked))
            left = self._rule.batches_after_next(version)
            if (why := self.limits.why_no_training(asked.actor, batches_left=left, now=asked.now)) is not None:
                return why
            remaining = self._training_left(asked)
            remaining = None if remaining is None else remaining + waiting
        return self.limits.why_left(asked.actor, kind, remaining, asked.now)

    def _training_left(self, asked: _Asked) -> int | None:
        """Training trees that are still to be begun, for the batch under way or in the run; None where there is no
        end."""
        if asked.exact is not None:
            return max(asked.exact.capacity - asked.begun, 0)
        pending = self._pending(asked)
        return remaining_trees(
            self._rule.missing(pending), self.tasks.num_left, self._rule.missing_at_the_end(pending, asked.steps_left)
        )

    def _pending(self, asked: _Asked) -> int:
        """Training trees that come before one begun now, those of other shards too."""
        return self.num_training + asked.ready + self.elsewhere.under_lease + self.elsewhere.ready

    def _for_evaluation(self) -> HeldLease:
        found = self.evaluations.next_task(self.progress.published)
        assert found is not None
        evaluation, task = found
        tree_id = f"{self.prefix}-e{evaluation.step}v{evaluation.version}-{task:06d}"
        return self._hold(tree_id, task, "eval", evaluation.version, evaluation.step)

    def _for_training(self, min_version: int) -> HeldLease:
        task, anew = self.tasks.begin()
        # A new tree id: an old holder may still send turns of the tree that was given up.
        tree_id = f"{self.prefix}-{task:08d}" + (f".{self.next_number}" if anew else "")
        return self._hold(tree_id, task, "train", min_version, -1)

    def _hold(self, tree_id: str, task: int, kind: Split, min_version: int, eval_step: int) -> HeldLease:
        seed = int(np.random.SeedSequence([self._seed, int(kind == "eval"), task]).generate_state(1)[0])
        held = HeldLease(tree_id, self.next_number, task, kind, seed, 0, "", 0.0, min_version, eval_step=eval_step)
        self.next_number += 1
        self._leases.put(held)
        return held

    def _why_closed(self, asked: _Asked) -> str | None:
        """Why no new training tree may begin now; None if one may."""
        if self.progress.published is not None and self.tasks.all_leased:
            return f"all run.max_tasks = {self.tasks.max_tasks} tasks are leased or done"
        others = self.elsewhere
        return self._rule.why_closed(
            under_lease=self.num_training + others.under_lease, ready=asked.ready + others.ready,
            produced=asked.produced + others.produced, memory_full=asked.memory_full,
        )  # fmt: skip

    # --- renewing and losing -----------------------------------------------------------------------------------

    def renew(self, actor: str, tree_ids: Iterable[str], now: float) -> list[HeldLease]:
        """``actor`` still works on these.  One that lapsed and has no other holder yet is renewed.

        Returns:
            Leases that it does not know of: granted, and the answer never reached it.  Call ``reissue`` for each.
        """
        self.actors.heard(actor, now)
        self.rates.now = now
        named = set(tree_ids)
        for tree_id in named:
            held = self._leases.find(tree_id)
            if held is None or held.holder != actor:
                continue
            held.unseen = 0
            held.expires_at = now + self._lifetime_s
            if held.waiting:
                self._changed.add(tree_id)
                self._leases.assign(held, actor)

        unknown = []
        for held in self.held_by(actor):
            if held.tree_id not in named:
                held.unseen += 1
                if held.unseen >= UNSEEN_REPORTS:
                    unknown.append(held)
        return unknown

    def goes_on(self, former: str, actor: str, now: float) -> int:
        """The process that was called ``former`` is called ``actor`` from now on.  Returns the number of its leases."""
        self.rates.now = now
        self.actors.goes_on(former, actor, now)
        moved = self._leases.hand_over(former, actor)
        self.rates.goes_on(former, actor)
        for held in moved:
            held.unseen = 0
            held.expires_at = max(held.expires_at, now + self._lifetime_s)
            self._changed.add(held.tree_id)
        return len(moved)

    def hello(self, actor: str, now: float) -> None:
        """A new process of this name: its rate is measured anew.  Call ``reissue`` or ``end`` for what it held."""
        self.rates.now = now
        self.rates.forget(actor)
        self.actors.heard(actor, now)
        self.actors.asks(actor)

    def excuse(self, away_s: float, now: float) -> None:
        """The buffer itself stood still for so long: no silence or delay in that time counts."""
        self.actors.excuse(now)
        self.rates.excuse(away_s)
        for held in self._leases:
            held.expires_at += away_s

    def lapsed(self, now: float) -> list[HeldLease]:
        """Leases whose time is over or whose holder is silent; call ``reissue`` or ``end`` for each."""
        self.rates.now = now
        for actor in self.actors.forget_long_gone(now, (held.holder for held in self._leases)):
            self.rates.forget(actor)
        return [
            held
            for held in self._leases
            if not held.waiting and (held.expires_at <= now or self.actors.is_silent(held.holder, now))
        ]

    def held_by(self, actor: str, tree_ids: Sequence[str] | None = None) -> list[HeldLease]:
        """The leases that ``actor`` holds, of ``tree_ids`` only if given."""
        if tree_ids is None:
            return self._leases.held_by(actor)
        asked = (self._leases.find(tree_id) for tree_id in dict.fromkeys(tree_ids))
        return [held for held in asked if held is not None and held.holder == actor and not held.waiting]

    def reissue(self, tree_id: str, *, lost: bool) -> bool:
        """Put a lease up for another holder; False if its task is given up instead.

        Args:
            tree_id: under lease.
            lost: whether the holder was lost; a lease handed back in good order counts for nothing.
        """
        held = self._leases.find(tree_id)
        assert held is not None
        self._changed.add(tree_id)
        held.lost += lost
        if held.lost > self._max_reissues:
            self.tasks.give_up()
            self._drop(tree_id)
            return False
        self._leases.free(held)
        return True

    def end(self, tree_id: str) -> HeldLease | None:
        """The tree is done; its lease goes."""
        if (held := self._leases.find(tree_id)) is not None:
            self.rates.ended(held)
        return self._drop(tree_id)

    def turn(self, tree_id: str, *, now: float, lag: int) -> None:
        """A turn of a tree came, ``lag`` versions behind the learner."""
        self.rates.now = now
        if (held := self._leases.find(tree_id)) is not None:
            self.rates.turn(held, lag=lag)

    def _drop(self, tree_id: str) -> HeldLease | None:
        held = self._leases.pop(tree_id)
        if held is not None:
            self._changed.add(tree_id)
        return held

    def revoke_training(self) -> list[HeldLease]:
        """End every training lease: their trees can no longer be used.  Their tasks are leased again."""
        revoked = [held for held in self._leases if held.kind == "train"]
        for held in revoked:
            self._drop(held.tree_id)
            self.tasks.retry(held.task_index, in_vain=False)
        return revoked

    def withdraw(self, tree_ids: Sequence[str]) -> None:
        """End training leases of which nothing came; their tasks come next again, in this order."""
        for tree_id in reversed(tree_ids):
            if (held := self._drop(tree_id)) is not None:
                self.tasks.put_back(held.task_index)

    def evaluate(self, *, step: int, version: int, num_tasks: int, blocking: bool) -> list[str]:
        """Begin an evaluation; the same again changes nothing, another version begins anew.

        Returns:
            Trees of the evaluation that this one replaces: their leases are ended.
        """
        if not self.evaluations.begin(step=step, version=version, num_tasks=num_tasks, blocking=blocking):
            return []
        replaced = [held.tree_id for held in self._leases if held.eval_step == step]
        for tree_id in replaced:
            self._drop(tree_id)
        return replaced

    # --- snapshot ----------------------------------------------------------------------------------------------

    def drain_changes(self) -> set[str]:
        """Trees whose leases changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def snapshot(self, run: RunEntry) -> None:
        """Write what ``restore`` reads."""
        run.next_number = self.next_number
        self.tasks.snapshot(run)
        self.progress.snapshot(run)

    def restore(self, run: RunEntry) -> None:
        """Cursor and versions as an earlier process left them."""
        self.next_number = run.next_number
        self.tasks.restore(run)
        self.progress.restore(run)

    def restore_lease(self, tree_id: str, tree: TreeStateEntry, *, now: float) -> None:
        """A lease as an earlier process left it: its holder has the full lifetime to renew it."""
        self.rates.now = now  # the time before this process does not count as work of its holder
        self.tasks.restore_attempts(tree.task_index, tree.attempts)
        lease = tree.lease
        if lease is None:
            return
        held = HeldLease(
            tree_id, tree.number, tree.task_index, tree.kind, lease.seed, lease.epoch, lease.holder,
            now + self._lifetime_s, lease.min_version, lost=lease.lost, waiting=lease.waiting,
            eval_step=lease.eval_step,
        )  # fmt: skip
        self._leases.put(held)
        if held.holder and not held.waiting:
            self.actors.heard(held.holder, now)

    # --- queries--------------------------------------------------------------------------------------

    def __contains__(self, tree_id: object) -> bool:
        return tree_id in self._leases

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def num_training(self) -> int:
        """Training trees under lease, those that wait for another holder too."""
        return self._leases.num("train")

    def num_waiting(self, kind: Split) -> int:
        """Leases that wait for another holder."""
        return self._leases.num_waiting(kind)

    def training_trees(self) -> list[str]:
        """Training trees under lease."""
        return [held.tree_id for held in self._leases if held.kind == "train"]

    def held(self, tree_id: str) -> HeldLease | None:
        """The lease of a tree, if it has one."""
        return self._leases.find(tree_id)

    def kind(self, tree_id: str) -> Split | None:
        held = self._leases.find(tree_id)
        return None if held is None else held.kind
