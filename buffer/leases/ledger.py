"""Task leases, admission, evaluations.  Pure: the clock is passed in, monotonic seconds.

**Admission.**  A tree leased now is consumed after all that are pending: at version ``next + pending·uses // batch``,
where ``next`` is the learner's version at the next batch.  It will be within ``max_lag`` then exactly if it is begun
with weights of at least that version minus ``max_lag``.  This is a lease's ``min_version``; while the learner has not
published it, no lease is granted.  With ``max_lag`` 0 trees are so grown under the very version that consumes them.
With ``staleness.exact_lag`` none of this counts, ``buffer.batches.delay_line`` decides.

It cannot block for ever: when the learner waits at version v for a batch and nothing is under lease any more, at most
batch - 1 trees are pending, each counted with all its uses, so ``min_version`` is at most
v + (max_uses - 1) - max_lag.  The last published version is at least v - (publish_every - 1), which is no less as long
as max_lag >= (publish_every - 1) + (max_uses - 1): the configuration refuses anything else.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from atpo_async.config import StalenessConfig
from atpo_async.core.vocabulary import Split
from buffer.batches.delay_line import Admission

UNSEEN_REPORTS = 3
"""An actor whose reports leave a lease out so often does not know of it; one or two may be older than the lease."""
REMEMBERED_EVALUATIONS = 8
"""Done ones, for a learner that asks for a result once more."""
FORGOTTEN_S = 3600.0
"""An actor that holds nothing and was silent for so long is forgotten."""


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
    """Lapsed or returned, waits for another holder; its last one may still come back before that."""
    eval_step: int = -1
    refused: str = ""
    """Why something that its holder sent of the tree was refused for its content; empty where nothing was."""


class RetriedTask(NamedTuple):
    """A training task to lease anew: no batch has had its tree."""

    task_index: int
    attempts: int
    """Trees grown of it in vain."""


class Outcome(NamedTuple):
    """What came of one task of an evaluation that did not fail."""

    success: float | None
    """In [0, 1]; None where the environment did not say."""
    num_turns: int
    versions: tuple[int, int]
    """Oldest and newest of those that sampled its turns."""


@dataclass(slots=True)
class Evaluation:
    """One greedy evaluation on the held-out tasks."""

    step: int
    version: int
    num_tasks: int
    blocking: bool
    next_task: int = 0
    results: dict[int, float | None] = field(default_factory=dict)
    """Task -> success in [0, 1]; None where its tree failed, and of those that are ``unknown``."""
    unknown: set[int] = field(default_factory=set)
    """Tasks that were done and of which the environment did not say whether they succeeded."""
    turns: int = 0
    """Of the trees that are done."""
    versions: tuple[int, int] | None = None
    """Oldest and newest of those that sampled these turns: beside training, weights change under an evaluation."""

    @property
    def done(self) -> bool:
        return len(self.results) >= self.num_tasks

    @property
    def num_failed(self) -> int:
        return sum(result is None for result in self.results.values()) - len(self.unknown)

    @property
    def success(self) -> float | None:
        """Share of successful tasks among those that are known, a failed tree counted as no success; None until all
        are done.

        None too where nothing but failed and unknown ones is there: that says nothing about the policy.
        """
        if not self.done or all(result is None for result in self.results.values()):
            return None
        return sum(result or 0.0 for result in self.results.values()) / (len(self.results) - len(self.unknown))

    def add(self, task: int, outcome: Outcome | None) -> None:
        """One task is done; None: its tree failed."""
        self.results[task] = None if outcome is None else outcome.success
        if outcome is None:
            return
        if outcome.success is None:
            self.unknown.add(task)
        self.turns += outcome.num_turns
        oldest, newest = self.versions or outcome.versions
        self.versions = min(oldest, outcome.versions[0]), max(newest, outcome.versions[1])


@dataclass(frozen=True, slots=True)
class Granted:
    """Answer to a request for leases."""

    leases: tuple[HeldLease, ...]
    closed_because: str | None
    """Why there are not more."""


class Ledger:
    """Who grows what, and who may begin.

    Args:
        staleness: trees per batch, max_lag, max_uses, max_oversampling.
        lifetime_s: of a lease that is not renewed.
        silent_s: an actor of whom nothing is heard for that long has lost its leases.
        max_reissues: a task is given up after that many lost holders.
        seed: the run's.
        prefix: begins every tree id; never used by an earlier buffer of the run.
        max_tasks: no training task from this one on; None for no end.
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
    ) -> None:
        self._staleness = staleness
        self._lifetime_s = lifetime_s
        self._silent_s = silent_s
        self._max_reissues = max_reissues
        self._seed = seed
        self.prefix = prefix
        self._max_tasks = max_tasks
        self.next_task = 0
        """The first training task never leased."""
        self.next_number = 1
        """Of the next tree."""
        self.again: deque[RetriedTask] = deque()
        """Training tasks to lease first."""
        self.changed: set[str] = set()
        """Trees whose leases changed; whoever keeps them takes the names away."""
        self._attempts: dict[int, int] = {}
        """Training task under lease -> trees grown of it in vain, where there were any."""
        self._held: dict[str, HeldLease] = {}
        self._num_held: Counter[Split] = Counter()
        self._waiting: dict[Split, dict[str, None]] = {"eval": {}, "train": {}}
        """Leases that wait for another holder, in the order in which they came to."""
        self._heard: dict[str, float] = {}
        self.evaluations: dict[int, Evaluation] = {}
        self.changed_evaluations: set[int] = set()
        """Steps whose evaluation came, went or got on; whoever keeps them takes the steps away."""
        self.published: int | None = None
        """The newest version that actors can get; None before the learner's first."""
        self.next_version = 0
        """The learner's version when it takes its next batch, as far as known."""
        self.given_up = 0
        """Tasks that lost too many holders, or whose trees came too late too often."""

    # --- the learner's progress --------------------------------------------------------------------------------

    def publish(self, version: int) -> None:
        """Actors can get ``version``."""
        self.published = version if self.published is None else max(self.published, version)
        self.next_version = max(self.next_version, version)

    def learner_at(self, version: int) -> None:
        """The learner waits for a batch at ``version``."""
        self.next_version = version

    def trained(self, version: int) -> None:
        """The learner has come to ``version``, or gone past it: a request for the batch after overtakes this."""
        self.next_version = max(self.next_version, version)

    def consumed(self, version: int) -> None:
        """A batch was served at ``version``; the next is one version on."""
        self.next_version = version + 1

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
    ) -> Granted:
        """Up to ``count`` leases for ``actor``: first what was lost, then evaluation, then new training trees.

        Args:
            actor: who asks.
            count: how many it can grow.
            now: seconds.
            ready: trees that wait to be served and are not under lease.
            produced: training trees that became ready since the last batch, those without signal too.
            memory_full: the buffer is at its byte limit.
            exact: with ``staleness.exact_lag``, what decides about training trees instead of the three above.
        """
        self.heard(actor, now)
        leases: list[HeldLease] = []
        reason: str | None = None
        begun = 0
        while len(leases) < count:
            blocking = self._blocking()
            held_back = blocking is not None or (exact is not None and exact.held_back is not None)
            held = self._reissue(held_back) or self._evaluate()
            if held is None:
                reason = self._why_blocked(blocking) or (
                    self._why_closed(ready, produced, memory_full) if exact is None else exact.why_closed(begun)
                )
                if reason is not None:
                    break
                held = self._begin(self._least_version(ready) if exact is None else exact.version)
                begun += 1
            held.holder, held.expires_at, held.waiting = actor, now + self._lifetime_s, False
            held.unseen, held.refused = 0, ""
            self.changed.add(held.tree_id)
            leases.append(held)
        return Granted(tuple(leases), reason)

    def _reissue(self, blocked: bool) -> HeldLease | None:
        """A lost lease, evaluation first; training ones wait while they are ``blocked``."""
        for kind, waiting in self._waiting.items():
            if self.published is None or not waiting or (kind == "train" and blocked):
                continue
            tree_id = next(iter(waiting))
            del waiting[tree_id]
            self.changed.add(tree_id)
            held = self._held[tree_id]
            held.epoch += 1
            return held
        return None

    def _evaluate(self) -> HeldLease | None:
        for evaluation in self.evaluations.values():
            if not self._runnable(evaluation) or evaluation.next_task >= evaluation.num_tasks:
                continue
            task = evaluation.next_task
            evaluation.next_task += 1
            self.changed_evaluations.add(evaluation.step)
            tree_id = f"{self.prefix}-e{evaluation.step}v{evaluation.version}-{task:06d}"
            return self._hold(tree_id, task, "eval", evaluation.version, evaluation.step)
        return None

    def _begin(self, min_version: int) -> HeldLease:
        version = max(min_version, 0)
        if not self.again:
            task, self.next_task = self.next_task, self.next_task + 1
            return self._hold(f"{self.prefix}-{task:08d}", task, "train", version, -1)
        task, attempts = self.again.popleft()
        self.restore_attempts(task, attempts)
        # Another id than before: an old holder may still send turns of the tree that was given up.
        return self._hold(f"{self.prefix}-{task:08d}.{self.next_number}", task, "train", version, -1)

    def _hold(self, tree_id: str, task: int, kind: Split, min_version: int, eval_step: int) -> HeldLease:
        seed = int(np.random.SeedSequence([self._seed, int(kind == "eval"), task]).generate_state(1)[0])
        held = HeldLease(tree_id, self.next_number, task, kind, seed, 0, "", 0.0, min_version, eval_step=eval_step)
        self.next_number += 1
        self._keep(held)
        return held

    def _keep(self, held: HeldLease) -> None:
        self._held[held.tree_id] = held
        self._num_held[held.kind] += 1

    def _least_version(self, ready: int) -> int:
        """The oldest version with which a tree begun now is still fresh at its first use.

        Each pending tree is taken to be used ``max_uses`` times before it, though some have had uses already.
        """
        s = self._staleness
        return self.next_version + (self.num_training + ready) * s.max_uses // s.trees_per_batch - s.max_lag

    def _why_closed(self, ready: int, produced: int, memory_full: bool) -> str | None:
        """Why no new training tree may begin now; None if one may."""
        s = self._staleness
        pending = self.num_training + ready
        if self.published is None:
            return "the learner has not published its first version"
        if self.all_leased:
            return f"all run.max_tasks = {self._max_tasks} tasks are leased or done"
        if memory_full:
            return "buffer.max_bytes or buffer.max_trees is reached: the learner must take trees first"
        if pending >= s.max_trees_pending:
            return f"{pending} trees are pending, staleness.max_lag = {s.max_lag} allows {s.max_trees_pending}"
        if s.max_lag == 0 and produced + self.num_training >= s.max_oversampling * s.trees_per_batch:
            # The short batch that comes now would leave these behind, stale.
            return f"{produced} trees came since the last batch, enough for a short one"
        if self._least_version(ready) > self.published:
            return (
                f"a tree begun now would be older than staleness.max_lag = {s.max_lag} when consumed: version "
                f"{self._least_version(ready)} must be published first, {self.published} is"
            )
        return None

    def _runnable(self, evaluation: Evaluation) -> bool:
        return self.published is not None and evaluation.version <= self.published

    def _blocking(self) -> Evaluation | None:
        """An evaluation that keeps training leases back.  Not before its version is out: training may lead there."""
        for evaluation in self.evaluations.values():
            if evaluation.blocking and not evaluation.done and self._runnable(evaluation):
                return evaluation
        return None

    @staticmethod
    def _why_blocked(evaluation: Evaluation | None) -> str | None:
        if evaluation is None:
            return None
        done = f"{len(evaluation.results)} of {evaluation.num_tasks} done"
        return f"the evaluation of step {evaluation.step} comes first: {done}"

    # --- renewing and losing -------------------------------------------------------------------------------------

    def heard(self, actor: str, now: float) -> None:
        """``actor`` gave a sign of life at ``now``; word of an earlier one changes nothing."""
        self._heard[actor] = max(now, self._heard.get(actor, now))

    def renew(self, actor: str, tree_ids: Iterable[str], now: float) -> list[HeldLease]:
        """``actor`` still works on these.  One that lapsed and nobody else has taken yet is its again.

        Returns:
            Leases it does not know of: granted, and the answer never reached it.  Each wants ``reissue``.
        """
        self.heard(actor, now)
        named = set(tree_ids)
        for tree_id in named:
            held = self._held.get(tree_id)
            if held is None or held.holder != actor:
                continue
            held.unseen = 0
            held.expires_at = now + self._lifetime_s
            if held.waiting:
                held.waiting = False
                self.changed.add(tree_id)
                del self._waiting[held.kind][tree_id]

        unknown = []
        for held in self.held_by(actor):
            if held.tree_id not in named:
                held.unseen += 1
                if held.unseen >= UNSEEN_REPORTS:
                    unknown.append(held)
        return unknown

    def forgive(self, away_s: float, now: float) -> None:
        """The buffer stood still for so long: nobody was silent or late in that time."""
        for actor in self._heard:
            self._heard[actor] = now
        for held in self._held.values():
            held.expires_at += away_s

    def lapsed(self, now: float) -> list[HeldLease]:
        """Leases whose time is over or whose holder is silent; each wants ``reissue`` or ``end``."""
        gone = [actor for actor, heard in self._heard.items() if now - heard > FORGOTTEN_S]
        for actor in set(gone) - {held.holder for held in self._held.values()}:
            del self._heard[actor]
        return [
            held
            for held in self._held.values()
            if not held.waiting and (held.expires_at <= now or now - self._heard.get(held.holder, now) > self._silent_s)
        ]

    def held_by(self, actor: str, tree_ids: Sequence[str] | None = None) -> list[HeldLease]:
        """What ``actor`` holds, of ``tree_ids`` only if given."""
        if tree_ids is None:
            asked = iter(self._held.values())
        else:
            asked = (self._held[tree_id] for tree_id in dict.fromkeys(tree_ids) if tree_id in self._held)
        return [held for held in asked if held.holder == actor and not held.waiting]

    def reissue(self, tree_id: str, *, lost: bool) -> bool:
        """Put a lease up for another holder; False if its task is given up instead.

        Args:
            tree_id: under lease.
            lost: whether the holder was lost; a lease handed back in good order counts for nothing.
        """
        held = self._held[tree_id]
        self.changed.add(tree_id)
        held.lost += lost
        if held.lost > self._max_reissues:
            self.given_up += 1
            self.end(tree_id)
            return False
        held.waiting = True
        self._waiting[held.kind][tree_id] = None
        return True

    def end(self, tree_id: str) -> HeldLease | None:
        """The tree is done; its lease goes."""
        held = self._held.pop(tree_id, None)
        if held is not None:
            self.changed.add(tree_id)
            self._num_held[held.kind] -= 1
            if held.waiting:
                del self._waiting[held.kind][tree_id]
        return held

    def attempts(self, task: int) -> int:
        """Trees of a training task that were grown in vain."""
        return self._attempts.get(task, 0)

    def settled(self, task: int) -> None:
        """A training task has come to its end: trained on, or without anything to learn from."""
        self._attempts.pop(task, None)

    def lease_again(self, task: int, *, in_vain: bool = True) -> bool:
        """A training task whose tree is gone before any batch had it is leased anew; False if it is given up instead.

        Args:
            task: its index.
            in_vain: whether the tree came too late, which counts against the task; a learner that starts over does
                not.
        """
        attempts = self._attempts.pop(task, 0) + in_vain
        if attempts > self._max_reissues:
            self.given_up += 1
            return False
        self.again.append(RetriedTask(task, attempts))
        return True

    def revoke_training(self) -> list[HeldLease]:
        """End every training lease: what is grown under them can no longer be used.  Their tasks are leased again."""
        revoked = [held for held in self._held.values() if held.kind == "train"]
        for held in revoked:
            self.end(held.tree_id)
            self.lease_again(held.task_index, in_vain=False)
        return revoked

    def restore_attempts(self, task: int, attempts: int) -> None:
        """Trees of a training task that an earlier process saw grown in vain."""
        if attempts:
            self._attempts[task] = attempts

    def restore(self, held: HeldLease, *, now: float) -> None:
        """A lease as an earlier process left it: its holder has its whole lifetime to be heard of again."""
        held.expires_at = now + self._lifetime_s
        self._keep(held)
        if held.waiting:
            self._waiting[held.kind][held.tree_id] = None
        elif held.holder:
            self._heard[held.holder] = now

    @property
    def all_leased(self) -> bool:
        """Whether no training task is left to begin."""
        return self._max_tasks is not None and not self.again and self.next_task >= self._max_tasks

    # --- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, *, step: int, version: int, num_tasks: int, blocking: bool) -> list[str]:
        """Begin an evaluation; the same again changes nothing, another version begins anew.

        Returns:
            Trees of the evaluation that this one replaces.
        """
        there = self.evaluations.get(step)
        if there is not None and (there.version, there.num_tasks) == (version, num_tasks):
            return []
        replaced = [held.tree_id for held in self._held.values() if held.eval_step == step]
        for tree_id in replaced:
            self.end(tree_id)
        self.evaluations[step] = Evaluation(step, version, num_tasks, blocking)
        self.changed_evaluations.add(step)
        done = sorted(each.step for each in self.evaluations.values() if each.done)
        for old in done[:-REMEMBERED_EVALUATIONS]:
            del self.evaluations[old]
            self.changed_evaluations.add(old)
        return replaced

    def record(self, held: HeldLease, outcome: Outcome | None) -> Evaluation | None:
        """The result of one evaluation tree (None: it failed).  Returns the evaluation if that was its last."""
        evaluation = self.evaluations.get(held.eval_step)
        if evaluation is None or evaluation.done:
            return None
        evaluation.add(held.task_index, outcome)
        self.changed_evaluations.add(held.eval_step)
        return evaluation if evaluation.done else None

    # --- what is there -----------------------------------------------------------------------------------------

    def __contains__(self, tree_id: object) -> bool:
        return tree_id in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def num_training(self) -> int:
        """Training trees under lease, those that wait for another holder too."""
        return self._num_held["train"]

    def training_trees(self) -> list[str]:
        """Training trees under lease."""
        return [held.tree_id for held in self._held.values() if held.kind == "train"]

    def held(self, tree_id: str) -> HeldLease | None:
        """The lease of a tree, if it has one."""
        return self._held.get(tree_id)

    def kind(self, tree_id: str) -> Split | None:
        held = self._held.get(tree_id)
        return None if held is None else held.kind

    def actors_alive(self, now: float) -> int:
        """Actors that were heard lately."""
        return sum(now - heard <= self._silent_s for heard in self._heard.values())
