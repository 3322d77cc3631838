"""The buffer's decisions in one place: every message has a method, none waits.  Pure: clock and randomness come in.

The service brings messages and carries answers; this says what they are.  Seconds are monotonic.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from atpo_async.config import Config
from atpo_async.credit import TreeArrays, credit_as, leaf_tokens, values
from atpo_async.errors import BadMessage
from atpo_async.messages import (
    Batch,
    BatchTree,
    EvalRequest,
    EvalResult,
    Lease,
    Leases,
    SampleRequest,
    Trained,
    VersionPublished,
)
from atpo_async.metrics import Aggregator
from atpo_async.tree import Turn, TurnTree
from buffer.assembly import Assembly, TreeMessage
from buffer.delay_line import Admission, DelayLine, TreeSet
from buffer.journal import Cursor
from buffer.ledger import Evaluation, Held, Ledger
from buffer.replay import Drawn, ReplayPool, annealed_beta, split_by_tokens, tree_nbytes, tree_priority

log = logging.getLogger("atpo.buffer")

SILENT_INTERVALS = 3
"""An actor that missed this many reports and heartbeats has lost its leases."""
SILENT_LEAST_S = 5.0
"""… but not sooner: an engine's start or a swap may hold it up that long."""
NEARLY_FULL = 0.9
"""Share of buffer.max_bytes from which no new tree is admitted while a batch is ready."""
RETRY_S = 0.02
"""When to ask again for leases; the answer itself waits, so this need not be long."""


@dataclass(slots=True)
class _Served:
    """One batch that was given to the learner."""

    batch_id: int
    step: int
    version: int
    trees: tuple[BatchTree, ...]
    num_leaves: int
    num_action_tokens: int
    num_turn_tokens: int
    tree_tokens: tuple[int, ...]
    metrics: dict[str, float]
    num_ranks: int
    exact: TreeSet | None = None
    """The set it was made of, with ``staleness.exact_lag``."""
    trained: set[int] = field(default_factory=set)
    """Ranks that have confirmed their share."""
    priorities: dict[str, float] = field(default_factory=dict)
    """New ones, of those ranks' trees."""
    confirmed: bool = False
    """All ranks have."""

    @property
    def tree_ids(self) -> list[str]:
        return [tree.tree_id for tree in self.trees]


@dataclass(slots=True)
class _Since:
    """Counted since the last batch."""

    began_s: float
    produced: int = 0
    """Training trees that came to their end with a usable tree."""
    turns: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    means: Aggregator = field(default_factory=Aggregator)


class BufferState:
    """Leases, assembly and replay of one run.

    Args:
        config: the run's.
        run: run id.
        cursor: where the data stands.
        rng: draws the batches.
        now: seconds.
    """

    def __init__(self, config: Config, *, run: str, cursor: Cursor, rng: np.random.Generator, now: float) -> None:
        buffer, staleness = config.buffer, config.staleness
        self._config = config
        self._run = run
        self._rng = rng
        self._incarnation = cursor.incarnation
        self._next_batch = cursor.next_batch
        self._beta_steps = buffer.weight_exponent_steps or config.run.steps
        interval_s = max(config.actor.report_every_s, config.links.heartbeat_s)
        self.ledger = Ledger(
            staleness=staleness,
            lifetime_s=buffer.lease_lifetime_s,
            silent_s=max(SILENT_INTERVALS * interval_s, SILENT_LEAST_S),
            max_reissues=buffer.max_reissues,
            seed=config.run.seed,
            prefix=f"b{cursor.incarnation}",
            next_task=cursor.next_task,
            unfinished=cursor.unfinished,
        )
        self.assembly = Assembly()
        self.pool = ReplayPool(
            max_uses=staleness.max_uses,
            max_lag=staleness.max_lag,
            exponent=buffer.priority_exponent,
            freshness=buffer.freshness,
            weights_over=buffer.weights_over,
        )
        self._line: DelayLine | None = None
        """Decides what is grown and served where the lag is to be exact."""
        if staleness.exact_lag is not None:
            self._line = DelayLine(
                lag=staleness.exact_lag,
                max_lag=staleness.max_lag,
                trees_per_set=staleness.trees_per_batch,
                max_oversampling=staleness.max_oversampling,
                num_steps=config.run.steps,
            )
        self._batches: OrderedDict[int, _Served] = OrderedDict()
        self._since = _Since(now)
        self._last_turn_s = now
        self._left_before: Counter[str] = Counter()
        self._given_up_before = 0
        self._partial_uses: dict[str, tuple[int, int]] = {}
        self._late: dict[str, TurnTree] = {}
        self._eval_turns: Counter[int] = Counter()
        self.progress = 0
        """Turns that came and trees that ended, for whoever waits: it stands still only when nothing comes."""
        self.step = 0
        """The step last asked for."""
        self.version = 0
        """The learner's version, as last heard."""
        self.weights_endpoint = ""
        self.announce_endpoint = ""
        self.finished = False
        self.records: list[tuple[int, int, dict[str, float]]] = []
        """(step, version, metrics) for the run's metrics file; the service takes them away."""

    # --- actors ------------------------------------------------------------------------------------------------

    def hello(self, actor: str, now: float) -> None:
        """A (new) process of this name: what the one before it held is lost, and known to be so at once."""
        self.ledger.heard(actor, now)
        for held in self.ledger.held_by(actor):
            self._lost(held)

    def lease(self, actor: str, count: int, now: float, *, engine_version: int | None = None) -> Leases:
        """Up to ``count`` trees to grow, for an actor whose engine has ``engine_version``."""
        if self.finished:
            return Leases(leases=(), closed_because="the run is over", retry_after_s=RETRY_S, finished=True)
        granted = self.ledger.grant(
            actor,
            count,
            now=now,
            ready=self._num_waiting(),
            produced=self._since.produced,
            memory_full=self._memory_full(),
            exact=self._admission(engine_version),
        )
        leases = []
        for held in granted.leases:
            self.assembly.expect(held.tree_id, task_index=held.task_index, kind=held.kind, epoch=held.epoch)
            leases.append(self._lease_message(held))
        return Leases(
            leases=tuple(leases), closed_because=granted.closed_because, retry_after_s=RETRY_S, finished=False
        )

    def _admission(self, engine_version: int | None) -> Admission | None:
        if self._line is None:
            return None
        return self._line.admit(
            under_lease=self.ledger.num_training,
            published=self.ledger.published,
            engine_version=engine_version,
            memory_full=self._memory_full(),
        )

    def _lease_message(self, held: Held) -> Lease:
        return Lease(
            tree_id=held.tree_id,
            task_index=held.task_index,
            kind=held.kind,
            epoch=held.epoch,
            lifetime_s=self._config.buffer.lease_lifetime_s,
            min_version=held.min_version,
            seed=held.seed,
            committed=self.assembly.tree(held.tree_id).turns,
        )

    def is_new(self, message: TreeMessage) -> bool:
        """Whether a message is to be committed; False if it is known.  Raises BadMessage or Conflict."""
        return self.assembly.check(message)

    def take(self, message: TreeMessage, now: float) -> bool:
        """A committed turn, opening or closing.  True if a tree came to its end, or a partial one can be served."""
        if not self.assembly.add(message):
            return False
        if isinstance(message, Turn):
            self.progress += 1
            self._since.turns += 1
            self._last_turn_s = now
        tree_id = message.tree_id
        if self.assembly.is_complete(tree_id):
            self._end(tree_id)
            return True
        if self._config.buffer.ready == "partial" and self.ledger.kind(tree_id) == "train":
            return self._offer_partial(tree_id)
        return False

    def report(self, actor: str, tree_ids: Iterable[str], now: float) -> None:
        """Heartbeat: ``actor`` works on these."""
        self.ledger.renew(actor, tree_ids, now)

    def returned(self, actor: str, tree_ids: Iterable[str]) -> bool:
        """``actor`` hands leases back in good order; others go on from the turns that are there."""
        held = self.ledger.held_by(actor, tuple(tree_ids))
        for each in held:
            self.ledger.reissue(each.tree_id, lost=False)
        return bool(held)

    def tick(self, now: float) -> bool:
        """Look after the leases.  True if any was lost."""
        lapsed = self.ledger.lapsed(now)
        for held in lapsed:
            log.warning("lease of tree %s lapsed, %s held it", held.tree_id, held.holder)
            self._lost(held)
        return bool(lapsed)

    # --- the end of a tree -------------------------------------------------------------------------------------

    def _lost(self, held: Held) -> None:
        """A holder is gone: what is finished is used, what is not goes to another, up to a limit."""
        leaves = len(self.assembly.tree(held.tree_id).leaves())
        if leaves >= (1 if held.kind == "eval" else 2):
            self._end(held.tree_id)
        elif not self.ledger.reissue(held.tree_id, lost=True):
            log.warning("task %d given up: tree %s lost %d holders", held.task_index, held.tree_id, held.lost)
            self.assembly.finish(held.tree_id)
            if held.kind == "eval":
                self._record_evaluation(held, None)

    def _end(self, tree_id: str) -> None:
        """Nothing more will come of this tree."""
        self.progress += 1
        held = self.ledger.end(tree_id)
        whole = self.assembly.finish(tree_id)
        tree = whole.pruned()
        if held is None:
            return
        if held.kind == "eval":
            self._record_evaluation(held, tree)
            return
        # Here and not when the closing comes: a tree may be closed under more than one lease, but ends once.
        self._since.counts["failed_branches"] += whole.failed_branches
        reason = unusable(tree)
        if reason is not None:
            self._since.counts[f"dropped_{reason}"] += 1
            return
        if self._line is None:
            self._count_tree(tree)
            self._admit(tree)
        else:
            self._admit_exact(tree, self._line)

    def _count_tree(self, tree: TurnTree) -> None:
        """The policy's own sampled reward and success: under branch probabilities, trees without signal too."""
        since = self._since
        since.produced += 1
        arrays = TreeArrays.of(tree)
        since.means.mean("train/reward", values(arrays)[1])
        since.means.mean("train/success", values(arrays.with_reward(success_of(tree)))[1])
        since.means.mean("train/leaves_mean", float(arrays.is_leaf.sum()))
        since.means.mean("train/turns_mean", float(len(arrays)))

    def _admit(self, tree: TurnTree) -> None:
        """Into the pool, unless nothing can be learnt from it."""
        priority = self._priority(tree)
        if priority == 0:
            self._since.counts["no_signal_trees"] += 1
            self._partial_uses.pop(tree.tree_id, None)
            return
        if self.pool.is_out(tree.tree_id):
            self._late[tree.tree_id] = tree
            return
        uses, leaves = self._partial_uses.pop(tree.tree_id, (0, 0))
        if uses and len(tree.leaves()) <= leaves:
            return
        self.pool.add(tree, priority=priority, uses=uses)
        self.pool.advance(self.version)
        self.pool.shrink(max(self._config.buffer.max_bytes - self.assembly.nbytes, 0))

    def _admit_exact(self, tree: TurnTree, line: DelayLine) -> None:
        """Into the sets under way, if the version that grows them sampled every token."""
        priority = self._priority(tree)
        versions = {span.version for turn in tree for span in turn.spans}
        room = self.nbytes + tree_nbytes(tree) <= self._config.buffer.max_bytes
        fate = line.place(tree.tree_id, versions, signal=priority > 0, room=room)
        if fate == "inexact":
            self._since.counts["dropped_inexact"] += 1
            log.warning(
                "tree %s is dropped, versions %s sampled it: %s", tree.tree_id, sorted(versions), line.describe()
            )  # fmt: skip
            return
        self._count_tree(tree)
        match fate:
            case "kept":
                self.pool.add(tree, priority=priority)
            case "no_room":
                # This one and not the oldest, as otherwise: the oldest is of a batch that is whole.
                self.pool.left["bytes"] += 1
            case "no_signal":
                self._since.counts["no_signal_trees"] += 1
            case "surplus":
                self._since.counts["dropped_surplus"] += 1

    def _priority(self, tree: TurnTree) -> float:
        # Without turn ratios, which the learner alone has: a tree trace counts as child_mean here.
        advantages = credit_as(tree, self._config.credit).advantages
        return tree_priority(advantages, max_share=self._config.buffer.priority_max_share)

    def _offer_partial(self, tree_id: str) -> bool:
        """Serve a tree that still grows: with enough leaves, and again with as many new ones after it was served."""
        if self.pool.is_out(tree_id):
            return False
        tree = self.assembly.tree(tree_id).pruned()
        uses, leaves = self._partial_uses.get(tree_id, (0, 0))
        if len(tree.leaves()) < leaves + self._config.buffer.partial_min_leaves:
            return False
        priority = self._priority(tree)
        if priority == 0:
            return False
        self.pool.add(tree, priority=priority, uses=uses)
        self.pool.advance(self.version)
        return True

    # --- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, request: EvalRequest) -> None:
        """Begin an evaluation, unless it is the one under way."""
        before = self.ledger.evaluations.get(request.step)
        for tree_id in self.ledger.evaluate(
            step=request.step, version=request.version, num_tasks=request.num_tasks, blocking=request.blocking
        ):
            self.assembly.finish(tree_id)
        if self.ledger.evaluations[request.step] is not before:
            self._eval_turns.pop(request.step, None)

    def eval_result(self, step: int) -> EvalResult:
        evaluation = self.ledger.evaluations.get(step)
        if evaluation is None:
            return EvalResult(step=step, done=False, success=None, num_done=0, num_tasks=0)
        return EvalResult(
            step=step,
            done=evaluation.done,
            success=evaluation.success,
            num_done=len(evaluation.results),
            num_tasks=evaluation.num_tasks,
        )

    def _record_evaluation(self, held: Held, tree: TurnTree | None) -> None:
        success = None
        if tree is not None and tree.leaves():
            success = float(np.mean(success_of(tree)[[t.is_leaf for t in tree]]))
            self._eval_turns[held.eval_step] += len(tree)
        done = self.ledger.record(held, success)
        if done is not None:
            self._report_evaluation(done)

    def _report_evaluation(self, done: Evaluation) -> None:
        metrics = {"eval/failed": float(done.num_failed)}
        turns, finished = self._eval_turns.pop(done.step, 0), done.num_tasks - done.num_failed
        if finished:
            metrics["eval/turns_mean"] = turns / finished
        self.records.append((done.step, done.version, metrics))

    # --- the learner -------------------------------------------------------------------------------------------

    def publish(self, message: VersionPublished) -> None:
        """Actors can get a version, and where."""
        self.ledger.publish(message.version)
        self.version = max(self.version, message.version)
        self.weights_endpoint, self.announce_endpoint = message.weights_endpoint, message.announce_endpoint
        self.pool.advance(self.version)

    def sample(self, request: SampleRequest, now: float) -> Batch | None:
        """This rank's share of the batch of ``request.step``; None while there is not enough for one.

        The first rank to find enough makes the batch; the same question again gets the same answer.

        Raises:
            BadMessage: with ``staleness.exact_lag``, a batch of another size than the run's.
        """
        served = self._batches.get(request.step)
        if served is not None and served.version == request.version:
            return self._share(served, request)
        if self._line is not None:
            return self._sample_exact(request, now, self._line)
        self._look_after_batches(request.step)
        self.step, self.version = request.step, max(self.version, request.version)
        self.ledger.learner_at(request.version)
        self.pool.advance(self.version)
        enough = self._config.staleness.max_oversampling * request.num_trees
        if len(self.pool) < request.num_trees and self._since.produced < enough:
            return None
        beta = annealed_beta(request.step, start=self._config.buffer.weight_exponent, num_steps=self._beta_steps)
        metrics = self._flush(now)
        served = self._serve(request, self.pool.draw(request.num_trees, rng=self._rng, beta=beta), metrics)
        return self._share(served, request)

    def _sample_exact(self, request: SampleRequest, now: float, line: DelayLine) -> Batch | None:
        """The same where the line decides: the set whose turn it is, once all that is due is grown."""
        wanted = self._config.staleness.trees_per_batch
        if request.num_trees != wanted:
            raise BadMessage(
                f"the learner asks for {request.num_trees} trees, with staleness.exact_lag every batch has "
                f"staleness.trees_per_batch = {wanted}: start both on the same configuration"
            )
        if line.version is not None and request.version < line.version:
            return None  # asked by a learner that has been replaced since
        self._look_after_batches(request.step)
        self.step, self.version = request.step, max(self.version, request.version)
        self.ledger.learner_at(request.version)
        self._ask_line(request, line)
        if not line.ready:
            return None
        front, metrics = line.pop(), self._flush(now)
        if len(front.tree_ids) < wanted:
            log.warning(
                "batch %d has %d of %d trees: too few had a signal (staleness.max_oversampling), or memory had no room",
                request.step, len(front.tree_ids), wanted,
            )  # fmt: skip
        served = self._serve(request, self.pool.take(front.tree_ids), metrics)
        served.exact = front
        return self._share(served, request)

    def _ask_line(self, request: SampleRequest, line: DelayLine) -> None:
        """Tell the line where the learner stands; what a learner that starts again makes of no use goes."""
        before = line.version
        moved = request.version != before
        # In an undisturbed run there are none: the learner trained only when nothing was under lease.
        revoked = self.ledger.revoke_training() if moved else []
        for held in revoked:
            self.assembly.finish(held.tree_id)
        asked = line.ask(
            step=request.step,
            version=request.version,
            under_lease=self.ledger.num_training,
            memory_full=self._memory_full(),
        )
        self.pool.discard(asked.stale, "stale")
        self.pool.discard(asked.unfinished, "inexact")
        unfinished = len(asked.unfinished) + len(revoked)
        self._since.counts["dropped_inexact"] += unfinished
        if before is None:
            if request.step > 0 and line.lag > 0:
                log.warning(
                    "staleness.exact_lag = %d: this buffer starts at step %d without trees; the lag rises from 0 again",
                    line.lag, request.step,
                )  # fmt: skip
        elif asked.anew and (asked.stale or unfinished or line.greatest_lag > line.lag):
            log.warning(
                "staleness.exact_lag = %d: the learner starts again at step %d, version %d after %d; %d whole batches "
                "come first, up to %d versions old; dropped: %d trees over staleness.max_lag, %d of unfinished batches",
                line.lag, request.step, request.version, before, len(line), line.greatest_lag, len(asked.stale),
                unfinished,
            )  # fmt: skip

    def waiting_for(self, request: SampleRequest, now: float) -> str:
        """What keeps a batch from being served, for the log."""
        counts, left = self._since.counts, self.pool.left - self._left_before
        dropped = {name: count for name, count in counts.items() if count and name.startswith("dropped_")}
        dropped |= {f"dropped_{name}": count for name, count in left.items() if name in ("stale", "bytes")}
        ready = f"trees: {len(self.pool)} of {request.num_trees} ready"
        if self._line is not None:
            ready = self._line.describe()
        return (
            f"{ready}, {self.ledger.num_training} under lease, "
            f"{counts['no_signal_trees']} without signal"
            + "".join(f", {count} {name.replace('_', ' ')}" for name, count in dropped.items())
            + f"; {self.ledger.actors_alive(now)} actors alive; last turn {now - self._last_turn_s:.1f} s ago; "
            f"published version {self.ledger.published}, asked for at {request.version}"
        )

    def trained(self, message: Trained) -> None:
        """A rank has trained on its share of a batch; with the last rank's word the batch is confirmed."""
        self.version = max(self.version, message.version)
        self.ledger.trained(message.version)
        for served in self._batches.values():
            if served.batch_id == message.batch_id and not served.confirmed:
                served.trained.add(message.rank)
                served.priorities |= message.priorities
                if len(served.trained) == served.num_ranks:
                    self._confirm(served)
        self.pool.advance(self.version)

    def _confirm(self, served: _Served) -> None:
        if not served.confirmed:
            served.confirmed = True
            self.pool.confirm(served.tree_ids, served.priorities)
            self._offer_late(served.tree_ids)

    def finish(self) -> None:
        """The learner has done its steps."""
        self.finished = True

    def _look_after_batches(self, step: int) -> None:
        """Batches behind the one now asked for: a learner that starts over gives back what it never confirmed."""
        if any(served.step >= step for served in self._batches.values()):
            log.info("the learner starts again at step %d; unconfirmed batches go back", step)
            self._give_back(list(self._batches))
            return
        if self._line is not None:
            # Who asks for the next has trained on these, and grown older they would be of no use.
            for served in self._batches.values():
                self._confirm(served)
        # One step behind may still be confirmed: word of that can be overtaken.
        self._give_back([s for s in self._batches if s < step - 1])

    def _give_back(self, steps: list[int]) -> None:
        given = [served for step in steps if not (served := self._batches.pop(step)).confirmed]
        for served in given:
            self.pool.give_back(served.tree_ids)
            self._offer_late(served.tree_ids)
        if self._line is not None:
            self._line.give_back([served.exact for served in given if served.exact is not None])

    def _offer_late(self, tree_ids: Iterable[str]) -> None:
        """Partial trees that grew while the learner had them."""
        for tree_id in tree_ids:
            late = self._late.pop(tree_id, None)
            if late is not None:
                self._admit(late)
            elif tree_id in self.assembly and self.ledger.kind(tree_id) == "train":
                self._offer_partial(tree_id)
            else:
                self._partial_uses.pop(tree_id, None)

    def _serve(self, request: SampleRequest, drawn: list[Drawn], metrics: dict[str, float]) -> _Served:
        if self._config.buffer.ready == "partial":
            for each in drawn:
                self._partial_uses[each.tree.tree_id] = (each.uses, len(each.tree.leaves()))
        arrays = [TreeArrays.of(each.tree) for each in drawn]
        served = _Served(
            batch_id=self._next_batch,
            step=request.step,
            version=request.version,
            trees=tuple(_batch_tree(each) for each in drawn),
            num_leaves=sum(len(each.tree.leaves()) for each in drawn),
            num_action_tokens=sum(int(leaf_tokens(a).sum()) for a in arrays),
            num_turn_tokens=sum(int(a.num_action_tokens.sum()) for a in arrays),
            tree_tokens=tuple(_num_tokens(each.tree) for each in drawn),
            metrics=metrics,
            num_ranks=request.num_ranks,
        )
        self._next_batch += 1
        self._batches[request.step] = served
        self.ledger.consumed(request.version)
        return served

    def _share(self, served: _Served, request: SampleRequest) -> Batch:
        shares = split_by_tokens(served.tree_tokens, request.num_ranks)
        return Batch(
            batch_id=served.batch_id,
            step=served.step,
            num_trees=len(served.trees),
            num_leaves=served.num_leaves,
            num_action_tokens=served.num_action_tokens,
            num_turn_tokens=served.num_turn_tokens,
            trees=tuple(served.trees[i] for i in shares[request.rank]),
            metrics=served.metrics,
        )

    # --- numbers -----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all turns kept."""
        return self.pool.nbytes + self.assembly.nbytes

    @property
    def next_batch(self) -> int:
        """Number of the next batch to be made."""
        return self._next_batch

    def cursor(self, *, leaving: bool = False) -> Cursor:
        """Where the data stands now.

        Args:
            leaving: this buffer ends in good order.  A batch nobody has confirmed is then taken to have been given up,
                and its tasks to be unfinished; while it serves, and if it is killed, it takes them to be trained on.
        """
        unfinished = {*self.ledger.training_tasks(), *self.pool.unserved_tasks()}
        if leaving:
            unfinished |= {
                tree.task_index
                for served in self._batches.values()
                if not served.confirmed
                for tree in served.trees
                if tree.uses == 1
            }
        return Cursor(
            incarnation=self._incarnation,
            next_task=self.ledger.next_task,
            next_batch=self._next_batch,
            unfinished=tuple(sorted(unfinished)),
        )

    def count_bad_message(self) -> None:
        self._since.counts["bad_messages"] += 1

    def _memory_full(self) -> bool:
        """Near the limit, with enough for a batch: new trees would only push out older ones, or find no room."""
        near = self.nbytes >= NEARLY_FULL * self._config.buffer.max_bytes
        if self._line is not None:
            return near
        return near and len(self.pool) >= self._config.staleness.trees_per_batch

    def _num_waiting(self) -> int:
        """Trees that wait to be served and are not under lease; those that come back from the learner too."""
        waiting = len(self.pool) + self.pool.num_returning
        if self._config.buffer.ready == "partial":
            waiting -= sum(tree_id in self.ledger for tree_id in self.pool.ready_ids())
        return waiting

    def _flush(self, now: float) -> dict[str, float]:
        """The buffer's side of a step's metrics, counted since the batch before."""
        since, counts = self._since, self._since.counts
        left = self.pool.left - self._left_before
        metrics = since.means.flush()
        metrics |= {
            "train/trees": since.produced,
            "buffer/trees": len(self.pool),
            "buffer/outstanding": self.ledger.num_training,
            "buffer/bytes": self.nbytes,
            "buffer/dropped_stale": left["stale"],
            "buffer/retired_stale": left["retired"],
            "buffer/dropped_bytes": left["bytes"],
            "buffer/dropped_no_leaf": counts["dropped_no_leaf"],
            "buffer/dropped_one_leaf": counts["dropped_one_leaf"],
            "buffer/dropped_inexact": counts["dropped_inexact"],
            "buffer/dropped_surplus": counts["dropped_surplus"],
            "buffer/no_signal_trees": counts["no_signal_trees"],
            "buffer/failed_branches": counts["failed_branches"],
            "buffer/given_up": self.ledger.given_up - self._given_up_before,
            "buffer/parked_turns": self.assembly.num_parked(),
            "buffer/priority_mean": self.pool.mean_priority,
            "buffer/bad_messages": counts["bad_messages"],
            "buffer/turns_per_s": since.turns / max(now - since.began_s, 1e-9),
        }
        self._left_before = Counter(self.pool.left)
        self._given_up_before = self.ledger.given_up
        self._since = _Since(now)
        return {name: float(value) for name, value in metrics.items()}


def unusable(tree: TurnTree) -> str | None:
    """Why a pruned tree cannot be trained on; None if it can.  One leaf has nothing to be compared with."""
    leaves = len(tree.leaves())
    return None if leaves >= 2 else ("one_leaf" if leaves else "no_leaf")


def success_of(tree: TurnTree) -> np.ndarray:
    """float64[N]: 1 on successful leaves; where the environment does not say, a reward above 0 counts."""
    return np.array(
        [
            float(t.is_leaf and (t.success if t.success is not None else t.reward is not None and t.reward > 0))
            for t in tree
        ]
    )


def _num_tokens(tree: TurnTree) -> int:
    """Tokens of a tree in one pass."""
    return len(tree.prompt) + sum(len(t.observation) + len(t.action) for t in tree)


def _batch_tree(drawn: Drawn) -> BatchTree:
    tree = drawn.tree
    return BatchTree(
        tree_id=tree.tree_id,
        task_index=tree.task_index,
        prompt=tree.prompt,
        turns=tree.turns,
        failed_branches=tree.failed_branches,
        probability=drawn.probability,
        weight=drawn.weight,
        uses=drawn.uses,
    )
