"""The buffer's decisions: one method for each message, none of which waits.  Pure: clock and randomness are passed in.

Seconds are monotonic.  ``trees.lifecycle`` decides about trees, ``batches.server`` about batches; the leases of the
actors are decided here.  Decisions are taken in memory at once; ``journal.persistence`` hands the changes to the
journal, and answers are sent after its commit (``handlers``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from msgspec import UNSET

from atpo_async.config import Config
from atpo_async.core.mixture import TaskLabels
from atpo_async.core.naming.shards import WHOLE, Shard
from atpo_async.core.tree import Turn
from atpo_async.wire.messages import (
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
from buffer.batches.delay_line import Admission, DelayLine
from buffer.batches.parts import PartServer
from buffer.batches.served import Batches, Share
from buffer.batches.server import BatchServer
from buffer.counters import RunCounters
from buffer.journal.entries import RunEntry
from buffer.leases.admission import Admitted
from buffer.leases.evaluations import MetricsRecord
from buffer.leases.ledger import Ledger
from buffer.leases.table import HeldLease
from buffer.trees.assembly import Frames, TreeMessage
from buffer.trees.index import MemoryStore, Store, StoredTurns
from buffer.trees.lifecycle import TreeLifecycle

log = logging.getLogger("atpo.buffer")

SILENT_INTERVALS = 3
"""An actor that missed this many reports and heartbeats has lost its leases."""
SILENT_LEAST_S = 5.0
"""… but not sooner: an engine's start or a swap may hold it up that long."""
RETRY_S = 0.02
"""How long an actor pauses before it requests leases again; short, as the answer itself waits."""


class BufferState:
    """Leases, assembly and replay of one run.

    Args:
        config: the run's.
        run: run id.
        store: where records go; memory where None.
        incarnation: how often this run's buffer was started; counted on from what the journal has.
        rng: draws the batches.
        now: seconds.
        shard: which part of the run's buffer this is.
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
        shard: Shard = WHOLE,
    ) -> None:
        buffer, staleness = config.buffer, config.staleness
        several = config.environments
        labels = TaskLabels([each.label for each in several], [each.weight for each in several], config.run.seed)
        self._config = config
        self.run = run
        self.shard = shard
        self.rng = rng
        self.store: Store = store if store is not None else MemoryStore()
        self.incarnation = incarnation
        self.promotions = 0
        """How often a follower's copy of the journal took its place."""
        interval_s = max(config.actor.report_every_s, config.links.heartbeat_s)
        self.ledger = Ledger(
            staleness=staleness,
            lifetime_s=buffer.lease_lifetime_s,
            silent_s=max(SILENT_INTERVALS * interval_s, SILENT_LEAST_S),
            max_reissues=buffer.max_reissues,
            seed=config.run.seed,
            prefix=f"{shard.prefix}b{incarnation}",
            max_tasks=config.run.max_tasks,
            labels=labels,
            alone=config.actor.count == 1,
            shard=shard,
        )
        self.delay_line: DelayLine | None = None
        """Decides which trees are grown and served where the lag is to be exact."""
        if staleness.exact_lag is not None:
            self.delay_line = DelayLine(
                lag=staleness.exact_lag,
                max_lag=staleness.max_lag,
                trees_per_set=staleness.trees_per_batch,
                max_oversampling=staleness.max_oversampling,
                num_steps=config.run.steps,
            )
        self.counters = RunCounters(now, labels)
        self.batches = Batches()
        self.trees = TreeLifecycle(
            config,
            store=self.store,
            ledger=self.ledger,
            counters=self.counters,
            batches=self.batches,
            delay_line=self.delay_line,
        )
        self.batch_server = (BatchServer if shard == WHOLE else PartServer)(
            config,
            ledger=self.ledger,
            trees=self.trees,
            batches=self.batches,
            counters=self.counters,
            delay_line=self.delay_line,
            flush=self._flush,
        )
        self.assembly, self.pool = self.trees.assembly, self.trees.pool
        self.last_turn_s: float | None = None
        self.weights_endpoint = ""
        self.announce_endpoint = ""
        self.finished = False
        self.gauges: Callable[[], dict[str, float]] = dict
        """Further metrics of the buffer for a step: the journal's, where there is one."""

    # --- queries--------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The step of the learner's last request."""
        return self.batch_server.step

    @property
    def version(self) -> int:
        """The learner's version, as last reported."""
        return self.trees.version

    @property
    def nbytes(self) -> int:
        """Bytes of all turns held."""
        return self.trees.registry.nbytes

    @property
    def checkpoint_wanted(self) -> bool:
        """Whether trees that only a checkpoint of the learner frees take much of the space."""
        return self.trees.checkpoint_wanted

    def drain_records(self) -> list[MetricsRecord]:
        """Of the evaluations that were done since the last call, for the run's metrics file."""
        return self.ledger.evaluations.drain_records()

    def sizes(self) -> dict[str, int]:
        """Name -> number of trees, leases, tasks and the like, for the log."""
        return {
            "growing trees": len(self.assembly),
            "ready trees": len(self.pool),
            "trees with the learner": self.pool.num_out,
            "trees kept for a checkpoint": len(self.trees.registry.spent),
            "leases": len(self.ledger),
            "batches": len(self.batches.by_step),
            "tasks to lease again": len(self.ledger.tasks.retries),
        }

    # --- snapshot ----------------------------------------------------------------------------------------------

    def snapshot(self, run: RunEntry) -> None:
        """Write what ``restore`` reads; every part has its own."""
        run.incarnation = self.incarnation
        run.weights_endpoint, run.announce_endpoint = self.weights_endpoint, self.announce_endpoint
        run.promotions = self.promotions or UNSET

    def restore(self, run: RunEntry | None) -> None:
        """Become the next incarnation of an earlier buffer; None where there was none."""
        if run is not None:
            self.incarnation = run.incarnation
            self.weights_endpoint, self.announce_endpoint = run.weights_endpoint, run.announce_endpoint
            self.promotions = run.promotions or 0
        self.incarnation += 1
        life = f"{f'p{self.promotions}' if self.promotions else ''}b{self.incarnation}"
        self.ledger.prefix = self.shard.prefix + life
        self.batch_server.mirrored = bool(self.promotions)

    # --- actors ------------------------------------------------------------------------------------------------

    def hello(self, actor: str, now: float) -> None:
        """A new process of this name: leases of the previous one are lost at once."""
        self.ledger.hello(actor, now)
        for held in self.ledger.held_by(actor):
            self._lost(held)

    def lease(self, actor: str, count: int, now: float, *, engine_version: int | None = None) -> Leases:
        """Up to ``count`` trees to grow, for an actor whose engine has ``engine_version``."""
        return self.admit(actor, count, now, engine_version=engine_version).leases

    def admit(self, actor: str, count: int, now: float, *, engine_version: int | None = None) -> Admitted:
        """``lease``, with what it says about other actors."""
        if self.finished:
            over = Leases(leases=(), closed_because="the run is over", retry_after_s=RETRY_S, finished=True)
            return Admitted(over, only_here=False)
        exact = self._admission(engine_version)
        granted = self.ledger.grant(
            actor,
            count,
            now=now,
            ready=self.trees.num_waiting,
            produced=self.counters.since.produced,
            memory_full=self.trees.memory_full,
            exact=exact,
            engine_version=engine_version,
            steps_left=max(self._config.run.steps - self.step, 0),
        )
        leases = Leases(
            leases=tuple(self._begun(held) for held in granted.leases),
            closed_because=granted.closed_because,
            retry_after_s=RETRY_S,
            finished=False,
            weights_endpoint=self.weights_endpoint,
            announce_endpoint=self.announce_endpoint,
        )
        other_version = exact is not None and engine_version is not None and engine_version > exact.version
        return Admitted(leases, only_here=granted.only_here or other_version)

    def _begun(self, held: HeldLease) -> Lease:
        self.trees.registry.expect(held.tree_id, held.number)
        self.assembly.expect(
            held.tree_id, number=held.number, task_index=held.task_index, kind=held.kind, epoch=held.epoch
        )
        return self._lease_message(held)

    def _admission(self, engine_version: int | None) -> Admission | None:
        if self.delay_line is None:
            return None
        return self.delay_line.admit(
            under_lease=self.ledger.num_training,
            published=self.ledger.progress.published,
            engine_version=engine_version,
            memory_full=self.trees.memory_full,
        )

    def _lease_message(self, held: HeldLease) -> Lease:
        return Lease(
            tree_id=held.tree_id,
            task_index=held.task_index,
            kind=held.kind,
            epoch=held.epoch,
            lifetime_s=self._config.buffer.lease_lifetime_s,
            min_version=held.min_version,
            seed=held.seed,
            # The turns are read when the answer is sent.
            committed=StoredTurns(self.assembly.tree(held.tree_id).rows, self.store),  # type: ignore[arg-type]
        )

    def take(self, message: TreeMessage, now: float, frames: Frames | None = None) -> bool:
        """A turn, opening or closing.  True if a tree came to its end, or a partial one can be served.

        Args:
            message: decoded.
            now: seconds.
            frames: as the message came; encoded again where None.

        Raises:
            BadMessage: not under a known lease, or impossible.
            Conflict: its key is there with other bytes.
        """
        if not self.assembly.add(message, frames):
            return False
        if isinstance(message, Turn):
            trains = self.ledger.kind(message.tree_id) == "train"
            self.counters.count_turn(len(message.action) if trains else 0)
            self.last_turn_s = now
            self.ledger.turn(message.tree_id, now=now, lag=max(self.version - message.spans[0].version, 0))
            if not self.assembly.is_closed(message.tree_id) and self._config.buffer.ready == "complete":
                return False
        tree_id = message.tree_id
        if self.assembly.is_complete(tree_id):
            self.trees.end(tree_id)
            return True
        if self._config.buffer.ready == "partial" and self.ledger.kind(tree_id) == "train":
            return self.trees.offer_partial(tree_id)
        return False

    def report(self, actor: str, tree_ids: Iterable[str], now: float) -> bool:
        """Heartbeat: ``actor`` works on these.  True if it holds others that it does not know of: they are free."""
        unknown = self.ledger.renew(actor, tree_ids, now)
        for held in unknown:
            log.info("actor %s does not know of its lease of tree %s; another may have it", actor, held.tree_id)
            growing = self.assembly.growing(held.tree_id)
            if not held.refused and growing is not None and growing.closed is not None:
                held.refused = "it was closed, and not all of its turns came"
            self._free(held)
        return bool(unknown)

    def returned(self, actor: str, tree_ids: Iterable[str] | None, reason: str = "") -> bool:
        """``actor`` returns leases; others go on from the turns that are there.

        Args:
            actor: their holder.
            tree_ids: whose leases; None for all that it holds.
            reason: why the buffer refused a message of theirs; empty where the actor returns them in good order.
        """
        held = self.ledger.held_by(actor, None if tree_ids is None else tuple(tree_ids))
        for each in held:
            each.refused = reason or each.refused
            self._free(each)
        return bool(held)

    def has(self, actor: str, lease: Lease) -> bool:
        """Whether ``actor`` still has this lease."""
        held = self.ledger.held(lease.tree_id)
        return held is not None and (held.holder, held.waiting, held.epoch) == (actor, False, lease.epoch)

    def refused(self, actor: str, message: TreeMessage, reason: str) -> None:
        """A message of a tree was refused for its content: the tree cannot be finished under the lease of ``actor``."""
        held = self.ledger.held(message.tree_id)
        if held is not None and (held.holder, held.waiting, held.epoch) == (actor, False, message.lease_epoch):
            held.refused = reason

    def _free(self, held: HeldLease) -> None:
        """Free a lease that its holder does not have any more.  A tree that was refused for its content counts as lost:
        with the same task it would be refused again, for ever."""
        if not held.refused:
            self.ledger.reissue(held.tree_id, lost=False)
            return
        self.counters.count("refused_trees")
        log.warning("tree %s, task %d, was refused: %s", held.tree_id, held.task_index, held.refused)
        self._lost(held)

    def tick(self, now: float) -> bool:
        """Expire leases.  True if any was lost."""
        lapsed = self.ledger.lapsed(now)
        for held in lapsed:
            log.warning("lease of tree %s lapsed, %s held it", held.tree_id, held.holder)
            self._lost(held)
        return bool(lapsed)

    def withdraw(self, tree_ids: Sequence[str]) -> None:
        """Training trees that are not needed, of which no message was taken: as though they had never been leased.
        ``tree_ids`` are those leased last, in their order."""
        self.ledger.withdraw(tree_ids)
        for tree_id in tree_ids:
            self.trees.forget_growing(tree_id)

    def _lost(self, held: HeldLease) -> None:
        """A holder is gone: a finished tree is used, an unfinished one (every group) is reissued, up to a limit."""
        leaves = self.assembly.tree(held.tree_id).num_leaves
        if not self._config.team.on and leaves >= (1 if held.kind == "eval" else 2):
            self.trees.end(held.tree_id)
        elif not self.ledger.reissue(held.tree_id, lost=True):
            why = f", the last as it was refused: {held.refused}" if held.refused else ""
            log.warning("task %d given up: tree %s lost %d holders%s", held.task_index, held.tree_id, held.lost, why)
            self.trees.forget_growing(held.tree_id)
            if held.kind == "eval":
                self.ledger.evaluations.record(held.eval_step, held.task_index, None)
            else:
                self.ledger.tasks.settled(held.task_index)

    # --- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, request: EvalRequest) -> None:
        """Begin an evaluation, unless it is the one under way."""
        replaced = self.ledger.evaluate(
            step=request.step, version=request.version, num_tasks=request.num_tasks, blocking=request.blocking
        )
        for tree_id in replaced:
            self.trees.forget_growing(tree_id)

    def eval_result(self, step: int) -> EvalResult:
        return self.ledger.evaluations.result(step)

    # --- the learner -------------------------------------------------------------------------------------------

    def publish(self, message: VersionPublished) -> None:
        """Actors can fetch a version, at these endpoints."""
        self.ledger.progress.publish(message.version)
        self.weights_endpoint, self.announce_endpoint = message.weights_endpoint, message.announce_endpoint
        self.trees.heard(message.version)
        self.trees.advance()

    def sample(self, request: SampleRequest, now: float) -> Batch | Exhausted | None:
        """``draw``, read at once."""
        share = self.draw(request, now)
        if not isinstance(share, Share):
            return share
        return share.batch([self.store.read(place) for place in share.places])

    def draw(self, request: SampleRequest, now: float) -> Share | Exhausted | None:
        """This rank's share of the batch of ``request.step``; None while there is not enough for one.

        Raises:
            BadMessage: with ``staleness.exact_lag``, a batch of another size than the run's.
        """
        drawn = self.batch_server.draw(request, now, self.rng)
        self.ledger.limits.pace.taken(self.ledger.progress.next_version, now)
        return drawn

    def trained(self, message: Trained) -> None:
        """A rank has trained on its share of a batch."""
        self.batch_server.trained(message)

    def checkpointed(self, message: Checkpointed) -> None:
        """The learner never falls back behind ``message.step`` any more."""
        self.batch_server.checkpointed(message)

    def finish(self) -> None:
        """The learner has done its steps."""
        self.finished = True

    def waiting_for(self, request: SampleRequest, now: float) -> str:
        """Why no batch can be served yet, for the log."""
        ready = f"trees: {len(self.pool)} of {request.num_trees} ready"
        if self.delay_line is not None:
            ready = self.delay_line.describe()
        last = "no turn yet" if self.last_turn_s is None else f"last turn {now - self.last_turn_s:.1f} s ago"
        return (
            f"{ready}, {self.ledger.num_training} under lease, "
            f"{self.counters.describe_drops(self.pool)}; "
            f"{self.ledger.actors.num_alive(now)} actors alive; {last}; "
            f"published version {self.ledger.progress.published}, asked for at {request.version}"
        )

    # --- metrics--------------------------------------------------------------------------------------------

    def count_bad_message(self) -> None:
        self.counters.count("bad_messages")

    def _flush(self, now: float) -> dict[str, float]:
        return self.counters.flush(
            now,
            ledger=self.ledger,
            pool=self.pool,
            nbytes=self.nbytes,
            num_parked=self.assembly.num_parked(),
            more={**self.trees.imitation.flush(), **self.gauges()},
        )
