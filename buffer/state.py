"""The buffer's decisions in one place: every message has a method, none waits.  Pure: clock and randomness come in.

The service brings messages and carries answers; this says what they are.  Seconds are monotonic.

Decisions are taken in memory at once and kept by ``buffer.keeping``: what they lead to may leave the process only after
that.  What has no underscore here is also read and written there.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from atpo_async.config import Config
from atpo_async.credit import TreeArrays, branch_prob, credit_as, leaf_tokens
from atpo_async.errors import BadMessage
from atpo_async.messages import (
    Batch,
    Checkpointed,
    EvalRequest,
    EvalResult,
    Exhausted,
    Lease,
    Leases,
    SampleRequest,
    Trained,
    VersionPublished,
)
from atpo_async.tree import Turn
from buffer import kept
from buffer.assembly import Assembly, Frames, TreeMessage
from buffer.batches import Served, ServedTree, Share, Since
from buffer.delay_line import Admission, DelayLine
from buffer.index import (
    MemoryStore,
    Store,
    StoredTurns,
    TreeEntry,
)
from buffer.ledger import Evaluation, Held, Ledger
from buffer.replay import Drawn, Gone, ReplayPool, annealed_beta, split_by_tokens, tree_priority

log = logging.getLogger("atpo.buffer")

SILENT_INTERVALS = 3
"""An actor that missed this many reports and heartbeats has lost its leases."""
SILENT_LEAST_S = 5.0
"""… but not sooner: an engine's start or a swap may hold it up that long."""
NEARLY_FULL = 0.9
"""Share of buffer.max_bytes from which no new tree is admitted while a batch is ready."""
SPENT_SHARE = 0.5
"""Of buffer.max_bytes, on top of it: trees that are only kept until a checkpoint of the learner holds them."""
RETRY_S = 0.02
"""When to ask again for leases; the answer itself waits, so this need not be long."""


class BufferState:
    """Leases, assembly and replay of one run.

    Args:
        config: the run's.
        run: run id.
        store: where records go; memory where None.
        incarnation: how often this run's buffer was started; counted on from what is kept.
        rng: draws the batches.
        now: seconds.
    """

    def __init__(
        self,
        config: Config,
        *,
        run: str,
        rng: np.random.Generator,
        now: float,
        store: Store | None = None,
        incarnation: int = 0,
    ) -> None:
        buffer, staleness = config.buffer, config.staleness
        self._config = config
        self.run = run
        self.rng = rng
        self.store: Store = store if store is not None else MemoryStore()
        self.incarnation = incarnation
        self.next_batch = 1
        """Number of the next batch to be made."""
        self._beta_steps = buffer.weight_exponent_steps or config.run.steps
        interval_s = max(config.actor.report_every_s, config.links.heartbeat_s)
        self.ledger = Ledger(
            staleness=staleness,
            lifetime_s=buffer.lease_lifetime_s,
            silent_s=max(SILENT_INTERVALS * interval_s, SILENT_LEAST_S),
            max_reissues=buffer.max_reissues,
            seed=config.run.seed,
            prefix=f"b{incarnation}",
            max_tasks=config.run.max_tasks,
        )
        self.assembly = Assembly(self.store, find=self.find)
        self.pool = ReplayPool(
            max_uses=staleness.max_uses,
            max_lag=staleness.max_lag,
            exponent=buffer.priority_exponent,
            freshness=buffer.freshness,
            weights_over=buffer.weights_over,
        )
        self.line: DelayLine | None = None
        """Decides what is grown and served where the lag is to be exact."""
        if staleness.exact_lag is not None:
            self.line = DelayLine(
                lag=staleness.exact_lag,
                max_lag=staleness.max_lag,
                trees_per_set=staleness.trees_per_batch,
                max_oversampling=staleness.max_oversampling,
                num_steps=config.run.steps,
            )
        self.batches: dict[int, Served] = {}
        """Step -> batch; those that no checkpoint holds yet."""
        self.spent: dict[str, tuple[TreeEntry, kept.KeptPlace, int]] = {}
        """Trees used up since the learner's last checkpoint, as the pool had them, and the step that used them up."""
        self.spent_nbytes = 0
        self.since = Since(now)
        self._last_turn_s = now
        self._left_before: Counter[str] = Counter()
        self.given_up_before = 0
        self.partial_uses: dict[str, tuple[int, int]] = {}
        self.late: dict[str, TreeEntry] = {}
        self.eval_turns: Counter[int] = Counter()
        self.names: dict[int, str] = {}
        """Number -> id of every tree that has a lease or records."""
        self.changed: set[str] = set()
        self.changed_batches: set[int] = set()
        self.progress = 0
        """Turns that came and trees that ended, for whoever waits: it stands still only when nothing comes."""
        self.step = 0
        """The step last asked for."""
        self.version = 0
        """The learner's version, as last heard."""
        self.weights_endpoint = ""
        self.announce_endpoint = ""
        self.finished = False
        self.saved_step = 0
        """Batches below are in a checkpoint of the learner, by its own word."""
        self.tasks: Counter[str] = Counter()
        """What became of training tasks: ``trained`` on at least once, ``no_signal``, ``failed`` (too few leaves),
        ``retired`` (too old before their last use)."""
        self.anew = True
        """Nothing was found that an earlier buffer of this run kept."""
        self.gauges: Callable[[], dict[str, float]] = dict
        """More of the buffer's side of a step's metrics; of the journal, where there is one."""
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
            produced=self.since.produced,
            memory_full=self._memory_full(),
            exact=self._admission(engine_version),
        )
        leases = []
        for held in granted.leases:
            self.names[held.number] = held.tree_id
            self.assembly.expect(
                held.tree_id, number=held.number, task_index=held.task_index, kind=held.kind, epoch=held.epoch
            )
            leases.append(self._lease_message(held))
        return Leases(
            leases=tuple(leases),
            closed_because=granted.closed_because,
            retry_after_s=RETRY_S,
            finished=False,
            weights_endpoint=self.weights_endpoint,
            announce_endpoint=self.announce_endpoint,
        )

    def _admission(self, engine_version: int | None) -> Admission | None:
        if self.line is None:
            return None
        return self.line.admit(
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
            # Read when they are sent.
            committed=StoredTurns(self.assembly.tree(held.tree_id).rows, self.store),  # type: ignore[arg-type]
        )

    def take(self, message: TreeMessage, now: float, frames: Frames | None = None) -> bool:
        """A turn, opening or closing.  True if a tree came to its end, or a partial one can be served.

        Args:
            message: decoded.
            now: seconds.
            frames: as the message came; encoded again where None.

        Raises:
            BadMessage: not under a lease that is known, or impossible.
            Conflict: its key is there with other bytes.
        """
        if not self.assembly.add(message, frames):
            return False
        if isinstance(message, Turn):
            self.progress += 1
            self.since.turns += 1
            self._last_turn_s = now
            if not self.assembly.is_closed(message.tree_id) and self._config.buffer.ready == "complete":
                return False
        tree_id = message.tree_id
        if self.assembly.is_complete(tree_id):
            self._end(tree_id)
            return True
        if self._config.buffer.ready == "partial" and self.ledger.kind(tree_id) == "train":
            return self._offer_partial(tree_id)
        return False

    def report(self, actor: str, tree_ids: Iterable[str], now: float) -> bool:
        """Heartbeat: ``actor`` works on these.  True if it holds others that it does not know of: they are free."""
        unknown = self.ledger.renew(actor, tree_ids, now)
        for held in unknown:
            log.info("actor %s does not know of its lease of tree %s; another may have it", actor, held.tree_id)
            self.ledger.reissue(held.tree_id, lost=False)
        return bool(unknown)

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
        leaves = self.assembly.tree(held.tree_id).num_leaves
        if leaves >= (1 if held.kind == "eval" else 2):
            self._end(held.tree_id)
        elif not self.ledger.reissue(held.tree_id, lost=True):
            log.warning("task %d given up: tree %s lost %d holders", held.task_index, held.tree_id, held.lost)
            self._forget(self.assembly.finish(held.tree_id))
            if held.kind == "eval":
                self._record_evaluation(held, None)
            else:
                self.ledger.settled(held.task_index)

    def _end(self, tree_id: str) -> None:
        """Nothing more will come of this tree."""
        self.progress += 1
        held = self.ledger.end(tree_id)
        whole = self.assembly.finish(tree_id)
        tree = whole.pruned()
        if held is None or held.kind == "eval":
            self._forget(whole)
            if held is not None:
                self._record_evaluation(held, tree)
            return
        # Here and not when the closing comes: a tree may be closed under more than one lease, but ends once.
        self.since.counts["failed_branches"] += whole.failed_branches
        reason = unusable(tree)
        if reason is not None:
            self.since.counts[f"dropped_{reason}"] += 1
            self.tasks["failed"] += 1
            self.ledger.settled(tree.task_index)
            self._forget(whole)
            return
        if len(tree) < len(whole):
            self.store.release(whole.rows[~np.isin(whole.rows["turn_id"], tree.rows["turn_id"])])
        arrays = tree.arrays()
        if self.line is None:
            self._count_tree(tree, arrays)
            self._admit(tree, self._priority(arrays))
        else:
            self._admit_exact(tree, arrays, self.line)

    def _forget(self, tree: TreeEntry) -> None:
        """Its records are needed no more, unless somebody else has the tree still."""
        tree_id = tree.tree_id
        if tree_id in self.assembly or tree_id in self.late or tree_id in self.pool or tree_id in self.spent:
            return
        self.changed.add(tree_id)
        self.names.pop(tree.number, None)
        self.store.release(tree.prompt, gone=True)
        self.store.release(tree.rows, gone=True)

    def _count_tree(self, tree: TreeEntry, arrays: TreeArrays) -> None:
        """The policy's own sampled reward and success: under branch probabilities, trees without signal too."""
        since = self.since
        since.produced += 1
        share = branch_prob(arrays)
        since.mean("train/reward", float(share @ arrays.reward))
        since.mean("train/success", float(share @ tree.success))
        since.mean("train/leaves_mean", float(tree.num_leaves))
        since.mean("train/turns_mean", float(len(tree)))

    def _admit(self, tree: TreeEntry, priority: float) -> None:
        """Into the pool, unless nothing can be learnt from it."""
        if priority == 0:
            self.since.counts["no_signal_trees"] += 1
            self.tasks["no_signal"] += 1
            self.partial_uses.pop(tree.tree_id, None)
            self.ledger.settled(tree.task_index)
            self._forget(tree)
            return
        if self.pool.is_out(tree.tree_id):
            self.late[tree.tree_id] = tree
            self.changed.add(tree.tree_id)
            return
        uses, leaves = self.partial_uses.pop(tree.tree_id, (0, 0))
        if uses and tree.num_leaves <= leaves and tree.tree_id not in self.pool:
            place = kept.KeptPlace(priority=priority, uses=uses, limit=uses, entered=0)
            had_it = [step for step, served in self.batches.items() if tree.tree_id in served.tree_ids]
            if had_it:
                self._spend(tree, place, max(had_it))
            else:
                self._forget(tree)
            return
        self.pool.add(tree, priority=priority, uses=uses)
        self._make_room()

    def _make_room(self) -> None:
        self.pool.advance(self.version)
        rest = self._config.buffer.max_bytes - self.assembly.nbytes - self._spent_over
        self.pool.shrink(max(rest, 0), self._config.buffer.max_trees)
        self._see_off()

    def _see_off(self, *, confirmed: int = -1) -> None:
        """Trees that left the pool: kept for a learner that falls back, leased again, or forgotten.

        Args:
            confirmed: step of the batch whose confirmation used some of them up.
        """
        while self.pool.gone:
            gone, self.pool.gone = self.pool.gone, []
            for each in gone:
                self._left_the_pool(each, confirmed)

    def _left_the_pool(self, gone: Gone, confirmed: int) -> None:
        tree = gone.tree
        tree_id = tree.tree_id
        if tree_id in self.assembly or tree_id in self.late:
            return  # it still grows, or comes back with what grew meanwhile
        if gone.cause == "used":
            self.ledger.settled(tree.task_index)
            place = kept.KeptPlace(priority=gone.priority, uses=gone.uses, limit=gone.uses, entered=0)
            self._spend(tree, place, confirmed)
            return
        if gone.uses == 0:
            self._lease_again(tree.task_index)
        else:
            self.tasks["retired"] += gone.cause == "retired"
            self.ledger.settled(tree.task_index)
        self.partial_uses.pop(tree_id, None)
        self._forget(tree)

    def _lease_again(self, task: int, *, in_vain: bool = True) -> None:
        if not self.ledger.lease_again(task, in_vain=in_vain):
            log.warning("task %d given up: its trees came too late, or found no room, too often", task)

    def _spend(self, tree: TreeEntry, place: kept.KeptPlace, step: int) -> None:
        """Used up by the batch of ``step``; but a learner that falls back behind it trains on it again."""
        self.spent[tree.tree_id] = (tree, place, step)
        self.spent_nbytes += tree.nbytes
        self.changed.add(tree.tree_id)

    def _admit_exact(self, tree: TreeEntry, arrays: TreeArrays, line: DelayLine) -> None:
        """Into the sets under way, if the version that grows them sampled every token."""
        priority = self._priority(arrays)
        versions = tree.versions
        taken = self.pool.nbytes + self.assembly.nbytes + self._spent_over
        room = taken + tree.nbytes <= self._config.buffer.max_bytes
        fate = line.place(tree.tree_id, versions, signal=priority > 0, room=room)
        if fate == "kept":
            self._count_tree(tree, arrays)
            self.pool.add(tree, priority=priority)
            self._see_off()
            return
        if fate == "inexact":
            self.since.counts["dropped_inexact"] += 1
            log.warning(
                "tree %s is dropped, versions %s sampled it: %s", tree.tree_id, sorted(versions), line.describe()
            )  # fmt: skip
        else:
            self._count_tree(tree, arrays)
        match fate:
            case "no_room":
                # This one and not the oldest, as otherwise: the oldest is of a batch that is whole.
                self.pool.left["bytes"] += 1
            case "no_signal":
                self.since.counts["no_signal_trees"] += 1
            case "surplus":
                self.since.counts["dropped_surplus"] += 1
        if fate == "no_signal":
            self.tasks["no_signal"] += 1
            self.ledger.settled(tree.task_index)
        else:
            self._lease_again(tree.task_index, in_vain=fate == "inexact")
        self._forget(tree)

    def _priority(self, arrays: TreeArrays) -> float:
        # Without turn ratios, which the learner alone has: a tree trace counts as child_mean here.
        advantages = credit_as(arrays, self._config.credit).advantages
        return tree_priority(advantages, max_share=self._config.buffer.priority_max_share)

    def _offer_partial(self, tree_id: str) -> bool:
        """Serve a tree that still grows: with enough leaves, and again with as many new ones after it was served."""
        if self.pool.is_out(tree_id):
            return False
        uses, leaves = self.partial_uses.get(tree_id, (0, 0))
        least = leaves + self._config.buffer.partial_min_leaves
        if self.assembly.num_leaves(tree_id) < least:
            return False
        tree = self.assembly.tree(tree_id).pruned()
        if tree.num_leaves < least:
            return False
        priority = self._priority(tree.arrays())
        if priority == 0:
            return False
        self.pool.add(tree, priority=priority, uses=uses)
        self.pool.advance(self.version)
        self._see_off()
        return True

    def find(self, tree_id: str) -> TreeEntry | None:
        """A tree that is still kept after its end."""
        late = self.late.get(tree_id)
        if late is not None:
            return late
        if tree_id in self.spent:
            return self.spent[tree_id][0]
        return self.pool.find(tree_id)

    # --- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, request: EvalRequest) -> None:
        """Begin an evaluation, unless it is the one under way."""
        before = self.ledger.evaluations.get(request.step)
        for tree_id in self.ledger.evaluate(
            step=request.step, version=request.version, num_tasks=request.num_tasks, blocking=request.blocking
        ):
            self._forget(self.assembly.finish(tree_id))
        if self.ledger.evaluations[request.step] is not before:
            self.eval_turns.pop(request.step, None)

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

    def _record_evaluation(self, held: Held, tree: TreeEntry | None) -> None:
        success = None
        if tree is not None and tree.num_leaves:
            success = float(np.mean(tree.success[tree.is_leaf]))
            self.eval_turns[held.eval_step] += len(tree)
        done = self.ledger.record(held, success)
        if done is not None:
            self._report_evaluation(done)

    def _report_evaluation(self, done: Evaluation) -> None:
        metrics = {"eval/failed": float(done.num_failed)}
        turns, finished = self.eval_turns.pop(done.step, 0), done.num_tasks - done.num_failed
        if finished:
            metrics["eval/turns_mean"] = turns / finished
        self.records.append((done.step, done.version, metrics))

    # --- the learner -------------------------------------------------------------------------------------------

    def publish(self, message: VersionPublished) -> None:
        """Actors can get a version, and where."""
        self.ledger.publish(message.version)
        self.version = max(self.version, message.version)
        self.weights_endpoint, self.announce_endpoint = message.weights_endpoint, message.announce_endpoint
        self.advance()

    def advance(self) -> None:
        self.pool.advance(self.version)
        self._see_off()

    def sample(self, request: SampleRequest, now: float) -> Batch | Exhausted | None:
        """``draw``, read at once."""
        share = self.draw(request, now)
        if not isinstance(share, Share):
            return share
        return share.batch([self.store.read(place) for place in share.places])

    def draw(self, request: SampleRequest, now: float) -> Share | Exhausted | None:
        """This rank's share of the batch of ``request.step``; None while there is not enough for one.

        The first rank to find enough makes the batch; the same question again gets the same answer.

        Raises:
            BadMessage: with ``staleness.exact_lag``, a batch of another size than the run's.
        """
        served = self.batches.get(request.step)
        if served is not None and served.version == request.version:
            return self._share(served, request)
        if self.line is not None:
            return self._sample_exact(request, now, self.line)
        self._look_after_batches(request.step)
        self.step, self.version = request.step, max(self.version, request.version)
        self.ledger.learner_at(request.version)
        self.advance()
        enough = self._config.staleness.max_oversampling * request.num_trees
        if len(self.pool) < request.num_trees and self.since.produced < enough:
            if not self._is_drained():
                return None
            if not len(self.pool):
                return Exhausted(
                    reason=f"all run.max_tasks = {self._config.run.max_tasks} tasks are done: {self._account()}"
                )
        beta = annealed_beta(request.step, start=self._config.buffer.weight_exponent, num_steps=self._beta_steps)
        metrics = self._flush(now)
        served = self._serve(request, self.pool.draw(request.num_trees, rng=self.rng, beta=beta), metrics)
        return self._share(served, request)

    def _account(self) -> str:
        """What became of the tasks so far."""
        tasks = self.tasks
        retired = f" ({tasks['retired']} of them fewer times than meant, too old by then)" if tasks["retired"] else ""
        return (
            f"{tasks['trained']} trained on{retired}, {tasks['no_signal']} without signal, {tasks['failed']} failed, "
            f"{self.ledger.given_up} given up"
        )

    def _is_drained(self) -> bool:
        """Whether no further tree will come: ``run.max_tasks`` are leased, none is under way or with the learner."""
        return self.ledger.all_leased and not self.ledger.num_training and not self.pool.num_out

    def _sample_exact(self, request: SampleRequest, now: float, line: DelayLine) -> Share | None:
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

    @property
    def checkpoint_wanted(self) -> bool:
        """Whether trees that only a checkpoint of the learner sets free take much of the room."""
        return self.spent_nbytes > self._config.buffer.max_bytes * SPENT_SHARE

    @property
    def _spent_over(self) -> int:
        """Bytes by which trees kept for a checkpoint cut into the room of the others.

        Up to ``SPENT_SHARE`` they come on top: they must not push out those that lead to the checkpoint.
        """
        return max(self.spent_nbytes - int(self._config.buffer.max_bytes * SPENT_SHARE), 0)

    def _ask_line(self, request: SampleRequest, line: DelayLine) -> None:
        """Tell the line where the learner stands; what a learner that starts again makes of no use goes."""
        before = line.version
        moved = request.version != before
        # In an undisturbed run there are none: the learner trained only when nothing was under lease.
        revoked = self.ledger.revoke_training() if moved else []
        for held in revoked:
            self._forget(self.assembly.finish(held.tree_id))
        asked = line.ask(
            step=request.step,
            version=request.version,
            under_lease=self.ledger.num_training,
            memory_full=self._memory_full(),
        )
        self.pool.discard(asked.stale, "stale")
        self.pool.discard(asked.unfinished, "inexact")
        self._see_off()
        unfinished = len(asked.unfinished) + len(revoked)
        self.since.counts["dropped_inexact"] += unfinished
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
        counts, left = self.since.counts, self.pool.left - self._left_before
        dropped = {name: count for name, count in counts.items() if count and name.startswith("dropped_")}
        dropped |= {f"dropped_{name}": count for name, count in left.items() if name in ("stale", "bytes")}
        ready = f"trees: {len(self.pool)} of {request.num_trees} ready"
        if self.line is not None:
            ready = self.line.describe()
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
        for served in self.batches.values():
            if served.batch_id == message.batch_id and not served.confirmed:
                self.changed_batches.add(served.step)
                served.trained.add(message.rank)
                served.priorities |= message.priorities
                if len(served.trained) == served.num_ranks:
                    self._confirm(served)
        self.advance()

    def _confirm(self, served: Served) -> None:
        if not served.confirmed:
            served.confirmed = True
            self.tasks["trained"] += sum(each.uses == 1 for each in served.drawn)
            self.changed_batches.add(served.step)
            self.pool.confirm(served.tree_ids, served.priorities)
            self._see_off(confirmed=served.step)
            self._offer_late(served.tree_ids)

    def checkpointed(self, message: Checkpointed) -> None:
        """The learner never falls back behind ``message.step`` any more: what was used up in batches below goes."""
        self.saved_step = message.step
        for step in [step for step in self.batches if step < message.step]:
            self._confirm(self.batches[step])
            del self.batches[step]
            self.changed_batches.add(step)
        for tree_id in [tree_id for tree_id, (_, _, step) in self.spent.items() if step < message.step]:
            tree, _, _ = self.spent.pop(tree_id)
            self.spent_nbytes -= tree.nbytes
            self._forget(tree)

    def finish(self) -> None:
        """The learner has done its steps."""
        self.finished = True

    def _look_after_batches(self, step: int) -> None:
        """The batch of ``step`` is asked for: those before it were trained on, those from it on were not, or no longer.

        A learner that starts again asks at the step of its checkpoint: what it learned after that is lost with it.
        """
        if self.anew and step > 0 and not self.batches:
            log.warning(
                "the learner is at step %d and the journal is empty: what was kept of this run is gone, its tasks "
                "begin at 0 again", step,
            )  # fmt: skip
        elif step < self.saved_step:
            log.warning(
                "the learner starts again at step %d, though it had reported a checkpoint of step %d: the trees of the "
                "steps between are gone, their tasks are not trained on again", step, self.saved_step,
            )  # fmt: skip
            self.saved_step = step
        self.anew = False
        later = sorted((s for s in self.batches if s >= step), reverse=True)
        if later:
            log.info("the learner starts again at step %d; the %d batches from there on go back", step, len(later))
            served = [self.batches[s] for s in later]
            for each in served:
                self._undo(each)
            if self.line is not None:
                self.line.give_back([each.exact for each in reversed(served) if each.exact is not None])
        # Of the one just before, word may still be on its way.
        last = step if self.line is not None else step - 1
        for before in [s for s in self.batches if s < last]:
            self._confirm(self.batches[before])

    def _undo(self, served: Served) -> None:
        """The learner has not trained on this batch, or has lost what it learned from it."""
        del self.batches[served.step]
        self.changed_batches.add(served.step)
        if not served.confirmed:
            self.pool.give_back(served.tree_ids)
            self._see_off()
            self._offer_late(served.tree_ids)
            return
        for each in served.drawn:
            before = each.uses - 1
            tree_id = each.tree_id
            self.tasks["trained"] -= before == 0
            if tree_id in self.spent:
                tree, place, _ = self.spent.pop(tree_id)
                self.spent_nbytes -= tree.nbytes
                self.pool.add(tree, priority=place.priority, uses=before, limit=max(place.limit, each.uses))
                self.pool.left["used"] -= 1
            elif tree_id in self.assembly:
                self.partial_uses[tree_id] = (before, 0)
                self.changed.add(tree_id)
                if tree_id in self.pool:
                    self.pool.undo_use(tree_id, before)
                else:
                    self._offer_partial(tree_id)
            elif tree_id in self.pool:
                self.pool.undo_use(tree_id, before)
            elif before == 0:
                self._lease_again(each.task_index, in_vain=False)
        self._see_off()

    def _offer_late(self, tree_ids: Iterable[str]) -> None:
        """Partial trees that grew while the learner had them."""
        for tree_id in tree_ids:
            late = self.late.pop(tree_id, None)
            if late is not None:
                self.changed.add(tree_id)
                self._admit(late, self._priority(late.arrays()))
            elif tree_id in self.assembly and self.ledger.kind(tree_id) == "train":
                self._offer_partial(tree_id)
            else:
                self.partial_uses.pop(tree_id, None)

    def _serve(self, request: SampleRequest, drawn: list[Drawn], metrics: dict[str, float]) -> Served:
        partial = self._config.buffer.ready == "partial"
        if partial:
            for each in drawn:
                self.partial_uses[each.tree.tree_id] = (each.uses, each.tree.num_leaves)
                self.changed.add(each.tree.tree_id)
        served = Served(
            batch_id=self.next_batch,
            step=request.step,
            version=request.version,
            drawn=tuple(
                ServedTree(
                    each.tree.tree_id,
                    each.tree.task_index,
                    each.probability,
                    each.weight,
                    each.uses,
                    tuple(each.tree.rows["turn_id"].tolist()) if partial else None,
                )
                for each in drawn
            ),
            metrics=metrics,
            num_ranks=request.num_ranks,
        )
        self.next_batch += 1
        self.batches[request.step] = served
        self.changed_batches.add(request.step)
        self.ledger.consumed(request.version)
        return served

    def _tree_of(self, drawn: ServedTree) -> TreeEntry:
        """A tree of a batch, as it was served."""
        tree = self.pool.find(drawn.tree_id)
        if tree is None and drawn.tree_id in self.spent:
            tree = self.spent[drawn.tree_id][0]
        if tree is None:
            raise BadMessage(f"tree {drawn.tree_id} of that batch is gone: it was trained on, ask for the next step")
        if drawn.turn_ids is None or len(drawn.turn_ids) == len(tree):
            return tree
        return replace(tree, rows=tree.rows[np.isin(tree.rows["turn_id"], drawn.turn_ids)])

    def _share(self, served: Served, request: SampleRequest) -> Share:
        trees = [self._tree_of(each) for each in served.drawn]
        arrays = [tree.arrays() for tree in trees]
        if request.num_ranks != served.num_ranks:
            raise BadMessage(
                f"batch {served.batch_id} was shared among {served.num_ranks} ranks, rank {request.rank} counts "
                f"{request.num_ranks}; all ranks must be of one start"
            )
        own = split_by_tokens([tree.num_tokens for tree in trees], served.num_ranks)[request.rank]
        head = Batch(
            batch_id=served.batch_id,
            step=served.step,
            num_trees=len(trees),
            num_leaves=sum(tree.num_leaves for tree in trees),
            num_action_tokens=sum(int(leaf_tokens(a).sum()) for a in arrays),
            num_turn_tokens=sum(int(a.num_action_tokens.sum()) for a in arrays),
            trees=(),
            metrics=served.metrics,
            checkpoint_wanted=self.checkpoint_wanted,
        )
        return Share(head, tuple(served.drawn[i] for i in own), tuple(trees[i] for i in own))

    # --- numbers -----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all turns kept."""
        return self.pool.nbytes + self.assembly.nbytes + self.spent_nbytes

    def count_bad_message(self) -> None:
        self.since.counts["bad_messages"] += 1

    def _memory_full(self) -> bool:
        """Near the limit, with enough for a batch: new trees would only push out older ones, or find no room."""
        most = self._config.buffer.max_trees
        taken = self.pool.nbytes + self.assembly.nbytes + self._spent_over
        near = taken >= NEARLY_FULL * self._config.buffer.max_bytes
        near = near or (most is not None and len(self.pool) >= most)
        if self.line is not None:
            return near
        return near and len(self.pool) >= self._config.staleness.trees_per_batch

    def _num_waiting(self) -> int:
        """Trees that wait to be served and are not under lease; those that come back from the learner too."""
        waiting = len(self.pool) + self.pool.num_returning
        if self._config.buffer.ready == "partial":
            waiting -= sum(t in self.pool and not self.pool.is_out(t) for t in self.ledger.training_trees())
        return waiting

    def _flush(self, now: float) -> dict[str, float]:
        """The buffer's side of a step's metrics, counted since the batch before."""
        since, counts = self.since, self.since.counts
        left = self.pool.left - self._left_before
        metrics = {name: total / number for name, (total, number) in since.means.items()}
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
            "buffer/given_up": self.ledger.given_up - self.given_up_before,
            "buffer/parked_turns": self.assembly.num_parked(),
            "buffer/priority_mean": self.pool.mean_priority,
            "buffer/bad_messages": counts["bad_messages"],
            "buffer/turns_per_s": since.turns / max(now - since.began_s, 1e-9),
            **{f"tasks/{name}": self.tasks[name] for name in ("trained", "no_signal", "failed", "retired")},
            "tasks/given_up": self.ledger.given_up,
            **self.gauges(),
        }
        self._left_before = Counter(self.pool.left)
        self.given_up_before = self.ledger.given_up
        self.since = Since(now)
        return {name: float(value) for name, value in metrics.items()}


def unusable(tree: TreeEntry) -> str | None:
    """Why a pruned tree cannot be trained on; None if it can.  One leaf has nothing to be compared with."""
    leaves = tree.num_leaves
    return None if leaves >= 2 else ("one_leaf" if leaves else "no_leaf")
