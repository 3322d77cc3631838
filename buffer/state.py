"""The buffer's decisions in one place: every message has a method, none waits.  Pure: clock and randomness come in.

The service brings messages and carries answers; this says what they are.  Seconds are monotonic.

Decisions are taken in memory at once and kept by whoever calls ``collect``: what they lead to may leave the process
only after that.  ``restore`` puts a state back as it was at its last ``collect``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np

from atpo_async import wire
from atpo_async.config import Config
from atpo_async.credit import TreeArrays, branch_prob, credit_as, leaf_tokens
from atpo_async.errors import BadMessage, SetupError
from atpo_async.messages import (
    Batch,
    BatchTree,
    Checkpointed,
    EvalRequest,
    EvalResult,
    Exhausted,
    Lease,
    Leases,
    SampleRequest,
    Trained,
    TreeClosed,
    TreeOpened,
    VersionPublished,
)
from atpo_async.records import TurnRecords, unpack
from atpo_async.tree import ROOT, Turn
from buffer import kept
from buffer.assembly import Assembly, Frames, Growing, TreeMessage
from buffer.delay_line import Admission, DelayLine, TreeSet
from buffer.index import (
    MemoryStore,
    Place,
    Rows,
    Store,
    StoredTurns,
    TreeEntry,
    TurnEntry,
    entry_of,
    places_of,
)
from buffer.ledger import Again, Evaluation, Held, Ledger
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


@dataclass(slots=True)
class _Drawn:
    """One tree of a batch that was given to the learner."""

    tree_id: str
    task_index: int
    probability: float
    weight: float
    uses: int
    """This time included."""
    turn_ids: tuple[int, ...] | None
    """Those served, of a tree that still grew; None for all."""


@dataclass(slots=True)
class _Served:
    """One batch that was given to the learner, kept until a checkpoint of the learner holds it."""

    batch_id: int
    step: int
    version: int
    drawn: tuple[_Drawn, ...]
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
        return [each.tree_id for each in self.drawn]


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a batch: what it says, and where its records lie."""

    head: Batch
    """Without trees."""
    drawn: tuple[_Drawn, ...]
    trees: tuple[TreeEntry, ...]

    @property
    def places(self) -> list[Place]:
        """Of each tree its prompt, then its turns."""
        return [place for tree in self.trees for place in (*places_of(tree.prompt), *places_of(tree.rows))]

    def batch(self, records: Sequence[bytes | memoryview]) -> Batch:
        """The message, with the records that lie at ``places``."""
        trees, at = [], 0
        for drawn, tree in zip(self.drawn, self.trees, strict=True):
            opened: TreeOpened = wire.decode(unpack(records[at]), TreeOpened)
            turns = records[at + 1 : at + 1 + len(tree)]
            at += 1 + len(tree)
            trees.append(
                BatchTree(
                    tree_id=drawn.tree_id,
                    task_index=drawn.task_index,
                    prompt=opened.prompt,
                    turns=TurnRecords.raw(turns, len(tree)),
                    failed_branches=tree.failed_branches,
                    probability=drawn.probability,
                    weight=drawn.weight,
                    uses=drawn.uses,
                )
            )
        return msgspec.structs.replace(self.head, trees=tuple(trees))


@dataclass(slots=True)
class _Since:
    """Counted since the last batch."""

    began_s: float
    produced: int = 0
    """Training trees that came to their end with a usable tree."""
    turns: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> (sum, number)."""

    def mean(self, name: str, value: float) -> None:
        total, number = self.means.get(name, (0.0, 0.0))
        self.means[name] = (total + value, number + 1.0)


class BufferState:
    """Leases, assembly and replay of one run.

    Args:
        config: the run's.
        run: run id.
        store: where records go; memory where None.
        incarnation: how often this run's buffer was started; ``restore`` counts on from what is kept.
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
        self._run = run
        self.rng = rng
        self._store: Store = store if store is not None else MemoryStore()
        self.incarnation = incarnation
        self._next_batch = 1
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
        self.assembly = Assembly(self._store, find=self._find)
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
        self._batches: dict[int, _Served] = {}
        """Step -> batch; those that no checkpoint holds yet."""
        self._spent: dict[str, tuple[TreeEntry, kept.KeptPlace, int]] = {}
        """Trees used up since the learner's last checkpoint, as the pool had them, and the step that used them up."""
        self._spent_nbytes = 0
        self._since = _Since(now)
        self._last_turn_s = now
        self._left_before: Counter[str] = Counter()
        self._given_up_before = 0
        self._partial_uses: dict[str, tuple[int, int]] = {}
        self._late: dict[str, TreeEntry] = {}
        self._eval_turns: Counter[int] = Counter()
        self._names: dict[int, str] = {}
        """Number -> id of every tree that has a lease or records."""
        self._changed: set[str] = set()
        self._changed_batches: set[int] = set()
        self._kept: dict[bytes, bytes] = {}
        """Of the keys that are written whole: what was written last."""
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
            self._names[held.number] = held.tree_id
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
            # Read when they are sent.
            committed=StoredTurns(self.assembly.tree(held.tree_id).rows, self._store),  # type: ignore[arg-type]
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
            self._since.turns += 1
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
        self._since.counts["failed_branches"] += whole.failed_branches
        reason = unusable(tree)
        if reason is not None:
            self._since.counts[f"dropped_{reason}"] += 1
            self.ledger.settled(tree.task_index)
            self._forget(whole)
            return
        if len(tree) < len(whole):
            self._store.release(whole.rows[~np.isin(whole.rows["turn_id"], tree.rows["turn_id"])])
        arrays = tree.arrays()
        if self._line is None:
            self._count_tree(tree, arrays)
            self._admit(tree, self._priority(arrays))
        else:
            self._admit_exact(tree, arrays, self._line)

    def _forget(self, tree: TreeEntry) -> None:
        """Its records are needed no more, unless somebody else has the tree still."""
        tree_id = tree.tree_id
        if tree_id in self.assembly or tree_id in self._late or tree_id in self.pool or tree_id in self._spent:
            return
        self._changed.add(tree_id)
        self._names.pop(tree.number, None)
        self._store.release(tree.prompt, gone=True)
        self._store.release(tree.rows, gone=True)

    def _count_tree(self, tree: TreeEntry, arrays: TreeArrays) -> None:
        """The policy's own sampled reward and success: under branch probabilities, trees without signal too."""
        since = self._since
        since.produced += 1
        share = branch_prob(arrays)
        since.mean("train/reward", float(share @ arrays.reward))
        since.mean("train/success", float(share @ tree.success))
        since.mean("train/leaves_mean", float(tree.num_leaves))
        since.mean("train/turns_mean", float(len(tree)))

    def _admit(self, tree: TreeEntry, priority: float) -> None:
        """Into the pool, unless nothing can be learnt from it."""
        if priority == 0:
            self._since.counts["no_signal_trees"] += 1
            self._partial_uses.pop(tree.tree_id, None)
            self.ledger.settled(tree.task_index)
            self._forget(tree)
            return
        if self.pool.is_out(tree.tree_id):
            self._late[tree.tree_id] = tree
            self._changed.add(tree.tree_id)
            return
        uses, leaves = self._partial_uses.pop(tree.tree_id, (0, 0))
        if uses and tree.num_leaves <= leaves and tree.tree_id not in self.pool:
            self._spend(tree, kept.KeptPlace(priority=priority, uses=uses, limit=uses, entered=0))
            return
        self.pool.add(tree, priority=priority, uses=uses)
        self._make_room()

    def _make_room(self) -> None:
        self.pool.advance(self.version)
        rest = self._config.buffer.max_bytes - self.assembly.nbytes - self._spent_over
        self.pool.shrink(max(rest, 0), self._config.buffer.max_trees)
        self._see_off()

    def _see_off(self) -> None:
        """Trees that left the pool: kept for a learner that falls back, leased again, or forgotten."""
        while self.pool.gone:
            gone, self.pool.gone = self.pool.gone, []
            for each in gone:
                self._left_the_pool(each)

    def _left_the_pool(self, gone: Gone) -> None:
        tree = gone.tree
        tree_id = tree.tree_id
        if tree_id in self.assembly or tree_id in self._late:
            return  # it still grows, or comes back with what grew meanwhile
        if gone.cause == "used":
            self.ledger.settled(tree.task_index)
            self._spend(
                tree, kept.KeptPlace(priority=gone.priority, uses=gone.uses, limit=gone.uses, entered=0)
            )  # fmt: skip
            return
        if gone.uses == 0:
            self._lease_again(tree.task_index)
        else:
            self.ledger.settled(tree.task_index)
        self._partial_uses.pop(tree_id, None)
        self._forget(tree)

    def _lease_again(self, task: int, *, in_vain: bool = True) -> None:
        if not self.ledger.lease_again(task, in_vain=in_vain):
            log.warning("task %d given up: its trees came too late, or found no room, too often", task)

    def _spend(self, tree: TreeEntry, place: kept.KeptPlace) -> None:
        """Used up; but a learner that falls back behind its last batch trains on it again."""
        steps = [step for step, served in self._batches.items() if tree.tree_id in served.tree_ids]
        if not steps:
            self._forget(tree)
            return
        self._spent[tree.tree_id] = (tree, place, max(steps))
        self._spent_nbytes += tree.nbytes
        self._changed.add(tree.tree_id)

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
            self._since.counts["dropped_inexact"] += 1
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
                self._since.counts["no_signal_trees"] += 1
            case "surplus":
                self._since.counts["dropped_surplus"] += 1
        if fate == "no_signal":
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
        uses, leaves = self._partial_uses.get(tree_id, (0, 0))
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

    def _find(self, tree_id: str) -> TreeEntry | None:
        """A tree that is still kept after its end."""
        late = self._late.get(tree_id)
        if late is not None:
            return late
        if tree_id in self._spent:
            return self._spent[tree_id][0]
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

    def _record_evaluation(self, held: Held, tree: TreeEntry | None) -> None:
        success = None
        if tree is not None and tree.num_leaves:
            success = float(np.mean(tree.success[tree.is_leaf]))
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
        self._advance()

    def _advance(self) -> None:
        self.pool.advance(self.version)
        self._see_off()

    def sample(self, request: SampleRequest, now: float) -> Batch | Exhausted | None:
        """``draw``, read at once."""
        share = self.draw(request, now)
        if not isinstance(share, Share):
            return share
        return share.batch([self._store.read(place) for place in share.places])

    def draw(self, request: SampleRequest, now: float) -> Share | Exhausted | None:
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
        self._advance()
        enough = self._config.staleness.max_oversampling * request.num_trees
        if len(self.pool) < request.num_trees and self._since.produced < enough:
            if not self._is_drained():
                return None
            if not len(self.pool):
                return Exhausted(
                    reason=f"all run.max_tasks = {self._config.run.max_tasks} tasks are done, "
                    f"{self.ledger.given_up} of them given up"
                )
        beta = annealed_beta(request.step, start=self._config.buffer.weight_exponent, num_steps=self._beta_steps)
        metrics = self._flush(now)
        served = self._serve(request, self.pool.draw(request.num_trees, rng=self.rng, beta=beta), metrics)
        return self._share(served, request)

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
        return self._spent_nbytes > self._config.buffer.max_bytes * SPENT_SHARE

    @property
    def _spent_over(self) -> int:
        """Bytes by which trees kept for a checkpoint cut into the room of the others.

        Up to ``SPENT_SHARE`` they come on top: they must not push out those that lead to the checkpoint.
        """
        return max(self._spent_nbytes - int(self._config.buffer.max_bytes * SPENT_SHARE), 0)

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
                self._changed_batches.add(served.step)
                served.trained.add(message.rank)
                served.priorities |= message.priorities
                if len(served.trained) == served.num_ranks:
                    self._confirm(served)
        self._advance()

    def _confirm(self, served: _Served) -> None:
        if not served.confirmed:
            served.confirmed = True
            self._changed_batches.add(served.step)
            self.pool.confirm(served.tree_ids, served.priorities)
            self._see_off()
            self._offer_late(served.tree_ids)

    def checkpointed(self, message: Checkpointed) -> None:
        """The learner never falls back behind ``message.step`` any more: what was used up in batches below goes."""
        for step in [step for step in self._batches if step < message.step]:
            self._confirm(self._batches[step])
            del self._batches[step]
            self._changed_batches.add(step)
        for tree_id in [tree_id for tree_id, (_, _, step) in self._spent.items() if step < message.step]:
            tree, _, _ = self._spent.pop(tree_id)
            self._spent_nbytes -= tree.nbytes
            self._forget(tree)

    def finish(self) -> None:
        """The learner has done its steps."""
        self.finished = True

    def _look_after_batches(self, step: int) -> None:
        """The batch of ``step`` is asked for: those before it were trained on, those from it on were not, or no longer.

        A learner that starts again asks at the step of its checkpoint: what it learned after that is lost with it.
        """
        later = sorted((s for s in self._batches if s >= step), reverse=True)
        if later:
            log.info("the learner starts again at step %d; the %d batches from there on go back", step, len(later))
            served = [self._batches[s] for s in later]
            for each in served:
                self._undo(each)
            if self._line is not None:
                self._line.give_back([each.exact for each in reversed(served) if each.exact is not None])
        # Of the one just before, word may still be on its way.
        last = step if self._line is not None else step - 1
        for before in [s for s in self._batches if s < last]:
            self._confirm(self._batches[before])

    def _undo(self, served: _Served) -> None:
        """The learner has not trained on this batch, or has lost what it learned from it."""
        del self._batches[served.step]
        self._changed_batches.add(served.step)
        if not served.confirmed:
            self.pool.give_back(served.tree_ids)
            self._see_off()
            self._offer_late(served.tree_ids)
            return
        for each in served.drawn:
            before = each.uses - 1
            tree_id = each.tree_id
            if tree_id in self._spent:
                tree, place, _ = self._spent.pop(tree_id)
                self._spent_nbytes -= tree.nbytes
                self.pool.add(tree, priority=place.priority, uses=before, limit=max(place.limit, each.uses))
                self.pool.left["used"] -= 1
            elif tree_id in self.assembly:
                self._partial_uses[tree_id] = (before, 0)
                self._changed.add(tree_id)
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
            late = self._late.pop(tree_id, None)
            if late is not None:
                self._changed.add(tree_id)
                self._admit(late, self._priority(late.arrays()))
            elif tree_id in self.assembly and self.ledger.kind(tree_id) == "train":
                self._offer_partial(tree_id)
            else:
                self._partial_uses.pop(tree_id, None)

    def _serve(self, request: SampleRequest, drawn: list[Drawn], metrics: dict[str, float]) -> _Served:
        partial = self._config.buffer.ready == "partial"
        if partial:
            for each in drawn:
                self._partial_uses[each.tree.tree_id] = (each.uses, each.tree.num_leaves)
                self._changed.add(each.tree.tree_id)
        served = _Served(
            batch_id=self._next_batch,
            step=request.step,
            version=request.version,
            drawn=tuple(
                _Drawn(
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
        self._next_batch += 1
        self._batches[request.step] = served
        self._changed_batches.add(request.step)
        self.ledger.consumed(request.version)
        return served

    def _tree_of(self, drawn: _Drawn) -> TreeEntry:
        """A tree of a batch, as it was served."""
        tree = self.pool.find(drawn.tree_id)
        if tree is None and drawn.tree_id in self._spent:
            tree = self._spent[drawn.tree_id][0]
        if tree is None:
            raise BadMessage(f"tree {drawn.tree_id} of that batch is gone: it was trained on, ask for the next step")
        if drawn.turn_ids is None or len(drawn.turn_ids) == len(tree):
            return tree
        return replace(tree, rows=tree.rows[np.isin(tree.rows["turn_id"], drawn.turn_ids)])

    def _share(self, served: _Served, request: SampleRequest) -> Share:
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

    # --- keeping -----------------------------------------------------------------------------------------------

    def collect(self, put: Callable[[bytes, bytes | None], None]) -> None:
        """Hand over what has changed since the last time: (key, value), None where there is nothing any more."""
        changed = self._changed | self.ledger.changed | self.assembly.changed | self.pool.changed
        for names in (self._changed, self.ledger.changed, self.assembly.changed, self.pool.changed):
            names.clear()
        for tree_id in changed:
            tree = self._kept_tree(tree_id)
            put(kept.TREE + tree_id.encode(), None if tree is None else kept.dump(tree))
        for step in self._changed_batches:
            served = self._batches.get(step)
            put(kept.BATCH + b"%020d" % step, None if served is None else kept.dump(_kept_batch(served)))
        self._changed_batches.clear()
        for key, value in self._kept_whole().items():
            data = kept.dump(value)
            if self._kept.get(key) != data:
                self._kept[key] = data
                put(key, data)

    def _kept_tree(self, tree_id: str) -> kept.KeptTree | None:
        held, growing = self.ledger.held(tree_id), self.assembly.growing(tree_id)
        tree = self._find(tree_id)
        if held is None and growing is None and tree is None:
            return None
        place = spent_at = None
        if tree_id in self.pool:
            priority, uses, limit, entered = self.pool.kept(tree_id)
            place = kept.KeptPlace(priority=priority, uses=uses, limit=limit, entered=entered)
        elif tree_id in self._spent:
            _, place, spent_at = self._spent[tree_id]
        owner = growing or tree or held
        assert owner is not None
        return kept.KeptTree(
            number=owner.number,
            task_index=owner.task_index,
            kind="train" if held is None else held.kind,
            failed_branches=0 if tree is None else tree.failed_branches,
            attempts=self.ledger.attempts(owner.task_index),
            lease=None if held is None else _kept_lease(held),
            growing=growing is not None,
            epoch=0 if growing is None else growing.epoch,
            closed=None if growing is None or growing.closed is None else _kept_closed(growing.closed),
            partial=self._partial_uses.get(tree_id),
            late=tree_id in self._late,
            pool=place,
            spent_at=spent_at,
        )

    def _kept_whole(self) -> dict[bytes, object]:
        ledger, since, line = self.ledger, self._since, self._line
        found: dict[bytes, object] = {
            kept.REST: kept.KeptRest(
                incarnation=self.incarnation,
                next_task=ledger.next_task,
                next_number=ledger.next_number,
                next_batch=self._next_batch,
                again=tuple(kept.KeptAgain(task_index=t, attempts=n) for t, n in ledger.again),
                given_up=ledger.given_up,
                published=ledger.published,
                next_version=ledger.next_version,
                step=self.step,
                version=self.version,
                weights_endpoint=self.weights_endpoint,
                announce_endpoint=self.announce_endpoint,
                finished=self.finished,
                highest_priority=self.pool.highest,
            ),
            kept.SINCE: kept.KeptSince(
                produced=since.produced, turns=since.turns, counts=dict(since.counts), means=since.means
            ),
            kept.EVALUATIONS: tuple(
                kept.KeptEvaluation(
                    step=e.step,
                    version=e.version,
                    num_tasks=e.num_tasks,
                    blocking=e.blocking,
                    next_task=e.next_task,
                    results=e.results,
                    turns=self._eval_turns[e.step],
                )
                for e in ledger.evaluations.values()
            ),
        }
        if line is not None:
            found[kept.LINE] = line.kept()
        return found

    def restore(self, rows: Rows, state: Mapping[bytes, bytes], now: float) -> dict[str, int]:
        """Put back what an earlier buffer of this run kept, as the next incarnation.  Before anything else.

        Args:
            rows: ROW[R], by tree, then by turn.
            state: what ``collect`` handed over.
            now: seconds.

        Returns:
            Name -> number, of what is there.

        Raises:
            SetupError: the journal contradicts itself.
        """
        rest = kept.read(state, kept.REST, kept.KeptRest)
        if rest is None:
            self.incarnation += 1
            self.ledger.prefix = f"b{self.incarnation}"
            self._store.release(rows, gone=True)
            return {}
        self._restore_rest(rest, state)
        owned = np.zeros(len(rows), dtype=bool)
        pooled: list[tuple[kept.KeptTree, TreeEntry]] = []
        for key in state:
            if not key.startswith(kept.TREE):
                continue
            tree = kept.read(state, key, kept.KeptTree)
            assert tree is not None
            at = slice(*np.searchsorted(rows["tree"], [tree.number, tree.number + 1]).tolist())
            entry = self._restore_tree(key.removeprefix(kept.TREE).decode(), tree, rows[at], now)
            # Turns of failed branches went when their tree was done, their chunk may have stayed.
            owned[at] = entry is None or np.isin(rows["turn_id"][at], [ROOT, *entry.rows["turn_id"].tolist()])
            if entry is not None:
                pooled.append((tree, entry))
        for tree, entry in sorted(pooled, key=lambda each: 0 if each[0].pool is None else each[0].pool.entered):
            place = tree.pool
            assert place is not None
            self.pool.add(
                entry, priority=place.priority, uses=place.uses, limit=place.limit, entered=place.entered
            )  # fmt: skip
        self.pool.highest = rest.highest_priority
        for key in sorted(key for key in state if key.startswith(kept.BATCH)):
            batch = kept.read(state, key, kept.KeptBatch)
            assert batch is not None
            self._restore_batch(batch)
        # After the batches: what a learner has is not dropped for its age.
        self._advance()
        # Records of trees that are gone, in chunks that others keep.
        self._store.release(rows[~owned], gone=True)
        return {
            "turns": int(np.count_nonzero(owned)),
            "growing trees": len(self.assembly),
            "ready trees": len(self.pool),
            "trees with the learner": self.pool.num_out,
            "trees kept for a checkpoint": len(self._spent),
            "leases": len(self.ledger),
            "batches": len(self._batches),
            "tasks to lease again": len(self.ledger.again),
        }

    def _restore_rest(self, rest: kept.KeptRest, state: Mapping[bytes, bytes]) -> None:
        ledger = self.ledger
        self.incarnation = rest.incarnation + 1
        ledger.prefix = f"b{self.incarnation}"
        ledger.next_task, ledger.next_number = rest.next_task, rest.next_number
        ledger.again.extend(Again(each.task_index, each.attempts) for each in rest.again)
        ledger.given_up = self._given_up_before = rest.given_up
        ledger.published, ledger.next_version = rest.published, rest.next_version
        self._next_batch, self.step, self.version = rest.next_batch, rest.step, rest.version
        self.weights_endpoint, self.announce_endpoint = rest.weights_endpoint, rest.announce_endpoint
        # A run that had ended and is started again goes on: its learner says anew when it is over.
        self.finished = False
        since = kept.read(state, kept.SINCE, kept.KeptSince)
        if since is not None:
            self._since.produced, self._since.turns = since.produced, since.turns
            self._since.counts, self._since.means = Counter(since.counts), dict(since.means)
        for each in kept.read(state, kept.EVALUATIONS, tuple[kept.KeptEvaluation, ...]) or ():
            ledger.evaluations[each.step] = Evaluation(
                each.step, each.version, each.num_tasks, each.blocking, each.next_task, dict(each.results)
            )
            self._eval_turns[each.step] = each.turns
        line = kept.read(state, kept.LINE, kept.KeptLine)
        if self._line is not None and line is not None:
            self._line.restore(line)

    def _restore_tree(self, tree_id: str, tree: kept.KeptTree, rows: Rows, now: float) -> TreeEntry | None:
        """One tree; what of it belongs into the pool."""
        self._names[tree.number] = tree_id
        self.ledger.restore_attempts(tree.task_index, tree.attempts)
        if tree.lease is not None:
            lease = tree.lease
            held = Held(
                tree_id, tree.number, tree.task_index, tree.kind, lease.seed, lease.epoch, lease.holder, 0.0,
                lease.min_version, lost=lease.lost, waiting=lease.waiting, eval_step=lease.eval_step,
            )  # fmt: skip
            self.ledger.restore(held, now=now)
        if tree.partial is not None:
            self._partial_uses[tree_id] = tree.partial
        prompt, turns = rows[rows["turn_id"] == ROOT], rows[rows["turn_id"] != ROOT]
        if tree.growing:
            growing = Growing(tree_id, tree.number, tree.task_index, tree.kind, tree.epoch)
            growing.prompt = entry_of(prompt[0]) if len(prompt) else None
            growing.turns = {int(row["turn_id"]): entry_of(row) for row in turns}
            if (closed := tree.closed) is not None:
                growing.closed = TreeClosed(
                    run=self._run, tree_id=tree_id, lease_epoch=closed.lease_epoch, num_turns=closed.num_turns,
                    failed_branches=closed.failed_branches, failures=closed.failures,
                )  # fmt: skip
            self.assembly.restore(growing)
            if tree.pool is None:
                return None
            return self.assembly.tree(tree_id).pruned()
        entry = TreeEntry(tree_id, tree.number, tree.task_index, prompt, turns, tree.failed_branches).pruned()
        if not len(turns) or not len(prompt):
            raise SetupError(f"the journal is damaged: tree {tree_id} is there without its turns; move it away")
        if tree.late:
            self._late[tree_id] = entry
        if tree.spent_at is not None and tree.pool is not None:
            self._spent[tree_id] = (entry, tree.pool, tree.spent_at)
            self._spent_nbytes += entry.nbytes
            return None
        return entry if tree.pool is not None else None

    def _restore_batch(self, batch: kept.KeptBatch) -> None:
        self._batches[batch.step] = _Served(
            batch_id=batch.batch_id,
            step=batch.step,
            version=batch.version,
            drawn=tuple(
                _Drawn(d.tree_id, d.task_index, d.probability, d.weight, d.uses, d.turn_ids) for d in batch.drawn
            ),
            metrics=batch.metrics,
            num_ranks=batch.num_ranks,
            exact=None if batch.exact is None else TreeSet(batch.exact.version, batch.exact.tree_ids),
            trained=set(batch.trained),
            priorities=dict(batch.priorities),
            confirmed=batch.confirmed,
        )
        if not batch.confirmed:
            self.pool.take([each.tree_id for each in batch.drawn])

    # --- moving records ----------------------------------------------------------------------------------------

    def live(self, rows: Rows) -> Rows:
        """Those of ROW[R] whose record is still there and needed."""
        return rows[[self._is_current(row) for row in rows]] if len(rows) else rows

    def relocate(self, rows: Rows, records: Sequence[bytes]) -> int:
        """Put these records into the store once more and let the old ones go; those that are not needed any more are
        left out.  Returns how many were moved."""
        moved: dict[int, dict[int, TurnEntry]] = {}
        current = [self._is_current(row) for row in rows]
        for row, record, is_current in zip(rows, records, current, strict=True):
            if is_current:
                there = self._store.add(record)
                entry = entry_of(row)._replace(chunk=there.chunk, offset=there.offset)
                self._store.note(entry)
                moved.setdefault(entry.tree, {})[entry.turn_id] = entry
        for number, entries in moved.items():
            tree_id = self._names[number]
            growing = self.assembly.growing(tree_id)
            if growing is not None:
                growing.prompt = entries.get(ROOT, growing.prompt)
                growing.turns |= {turn_id: entry for turn_id, entry in entries.items() if turn_id != ROOT}
            if (ready := self.pool.find(tree_id)) is not None:
                self.pool.replace(ready.moved(entries))
            if tree_id in self._late:
                self._late[tree_id] = self._late[tree_id].moved(entries)
            if tree_id in self._spent:
                tree, place, step = self._spent[tree_id]
                self._spent[tree_id] = (tree.moved(entries), place, step)
        self._store.release(rows[current])
        return sum(current)

    def _is_current(self, row: np.void) -> bool:
        """Whether a tree still has this record where the row says."""
        tree_id = self._names.get(int(row["tree"]))
        if tree_id is None:
            return False
        turn_id, place = int(row["turn_id"]), (int(row["chunk"]), int(row["offset"]))
        growing = self.assembly.growing(tree_id)
        if growing is not None:
            entry = growing.prompt if turn_id == ROOT else growing.turns.get(turn_id)
            return entry is not None and (entry.chunk, entry.offset) == place
        tree = self._find(tree_id)
        if tree is None:
            return False
        rows = tree.prompt if turn_id == ROOT else tree.rows[tree.rows["turn_id"] == turn_id]
        return bool(len(rows)) and (int(rows[0]["chunk"]), int(rows[0]["offset"])) == place

    # --- numbers -----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all turns kept."""
        return self.pool.nbytes + self.assembly.nbytes + self._spent_nbytes

    @property
    def next_batch(self) -> int:
        """Number of the next batch to be made."""
        return self._next_batch

    def count_bad_message(self) -> None:
        self._since.counts["bad_messages"] += 1

    def _memory_full(self) -> bool:
        """Near the limit, with enough for a batch: new trees would only push out older ones, or find no room."""
        most = self._config.buffer.max_trees
        taken = self.pool.nbytes + self.assembly.nbytes + self._spent_over
        near = taken >= NEARLY_FULL * self._config.buffer.max_bytes
        near = near or (most is not None and len(self.pool) >= most)
        if self._line is not None:
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
        since, counts = self._since, self._since.counts
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


def unusable(tree: TreeEntry) -> str | None:
    """Why a pruned tree cannot be trained on; None if it can.  One leaf has nothing to be compared with."""
    leaves = tree.num_leaves
    return None if leaves >= 2 else ("one_leaf" if leaves else "no_leaf")


def _kept_lease(held: Held) -> kept.KeptLease:
    return kept.KeptLease(
        holder=held.holder, seed=held.seed, epoch=held.epoch, min_version=held.min_version, lost=held.lost,
        waiting=held.waiting, eval_step=held.eval_step,
    )  # fmt: skip


def _kept_closed(closed: TreeClosed) -> kept.KeptClosed:
    return kept.KeptClosed(
        lease_epoch=closed.lease_epoch, num_turns=closed.num_turns, failed_branches=closed.failed_branches,
        failures=closed.failures,
    )  # fmt: skip


def _kept_batch(served: _Served) -> kept.KeptBatch:
    exact = served.exact
    return kept.KeptBatch(
        batch_id=served.batch_id,
        step=served.step,
        version=served.version,
        num_ranks=served.num_ranks,
        metrics=served.metrics,
        drawn=tuple(
            kept.KeptDrawn(
                tree_id=d.tree_id, task_index=d.task_index, probability=d.probability, weight=d.weight, uses=d.uses,
                turn_ids=d.turn_ids,
            )
            for d in served.drawn
        ),
        trained=tuple(sorted(served.trained)),
        priorities=served.priorities,
        confirmed=served.confirmed,
        exact=None if exact is None else kept.KeptSet(version=exact.version, tree_ids=exact.tree_ids),
    )  # fmt: skip
