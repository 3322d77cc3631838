"""Serves batches to the learner: when one is complete, which trees are in it, and what happens to them afterwards.

The learner requests batches by step.  The same request gets the same answer until a checkpoint of the learner covers
the batch; a learner that falls back requests an earlier step, and the batches that it has lost become ready again.
Pure: clock and randomness are passed in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np

from atpo_async.config import Config
from atpo_async.core.credit import leaf_tokens
from atpo_async.core.errors import BadMessage
from atpo_async.wire.messages import Batch, Checkpointed, Exhausted, SampleRequest, Trained
from buffer.batches.delay_line import DelayLine
from buffer.batches.served import Batches, ServedBatch, ServedRow, ServedTree, Share
from buffer.batches.shares import split_by_tokens
from buffer.counters import RunCounters, left_out
from buffer.journal.entries import BatchEntry, RunEntry
from buffer.leases.ledger import Ledger
from buffer.pool.outcomes import Drawn
from buffer.pool.weights import annealed_beta
from buffer.trees.lifecycle import TreeLifecycle

log = logging.getLogger("atpo.buffer")


class BatchServer:
    """Serves the batches of one run.

    Args:
        config: the run's.
        ledger: of the run.
        trees: the trees.
        batches: those that no checkpoint covers yet; changed here only.
        counters: what is counted.
        delay_line: decides what is served where the lag is to be exact.
        flush: the buffer's side of a step's metrics, at so many seconds; counting begins anew.
    """

    def __init__(
        self,
        config: Config,
        *,
        ledger: Ledger,
        trees: TreeLifecycle,
        batches: Batches,
        counters: RunCounters,
        delay_line: DelayLine | None,
        flush: Callable[[float], dict[str, float]],
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._trees = trees
        self._batches = batches
        self._counters = counters
        self._delay_line = delay_line
        self._flush = flush
        self._beta_steps = config.buffer.weight_exponent_steps or config.run.steps
        self.step = 0
        """The step of the last request."""
        self.saved_step = 0
        """Batches below are in a checkpoint of the learner, as it reported."""
        self.anew = True
        """No earlier buffer of this run has left any state."""
        self.mirrored = False
        """A follower's copy of the journal took its place once: it may lack the last batches of the one before."""

    # --- requests---------------------------------------------------------------------------------------------

    def draw(self, request: SampleRequest, now: float, rng: np.random.Generator) -> Share | Exhausted | None:
        """This rank's share of the batch of ``request.step``; None while there is not enough for one.

        The first request that finds enough makes the batch; the same request again gets the same answer.

        Raises:
            BadMessage: with ``staleness.exact_lag``, a batch of another size than the run's; or the learner has trained
                on batches that a promoted copy of the journal does not know.
        """
        served = self._batches.by_step.get(request.step)
        if served is not None and served.version == request.version:
            return self._share(served, request)
        if self._delay_line is not None:
            return self._sample_exact(request, now, self._delay_line, rng)
        self._check_known(request.step)
        self._look_after_batches(request.step)
        self._heard(request)
        self._trees.advance()
        enough = self._config.staleness.max_oversampling * request.num_trees
        if len(self._trees.pool) < request.num_trees and self._counters.since.produced < enough:
            if not self._is_drained() and not self._is_in_vain(enough):
                return None
            if self._is_drained() and not len(self._trees.pool):
                done = self._counters.describe_tasks(self._ledger.tasks.given_up)
                return Exhausted(reason=f"all run.max_tasks = {self._config.run.max_tasks} tasks are done: {done}")
        beta = annealed_beta(request.step, start=self._config.buffer.weight_exponent, num_steps=self._beta_steps)
        metrics = self._flush(now)
        drawn = self._trees.pool.draw(request.num_trees, rng=rng, beta=beta)
        rows = self._rows_beside(drawn, request, rng)
        return self._share(self._serve(request, drawn, metrics, rows=rows), request)

    def _rows_beside(
        self, drawn: list[Drawn], request: SampleRequest, rng: np.random.Generator
    ) -> tuple[ServedRow, ...]:
        """Rows to imitate that go with these trees; they are older, with an exact lag too."""
        return self._trees.imitation.draw(
            step=request.step,
            num_leaves=sum(each.tree.num_leaves for each in drawn),
            tree_ids={each.tree.tree_id for each in drawn},
            rng=rng,
        )

    def _is_in_vain(self, enough: float) -> bool:
        """Whether ``enough`` trees were of no use, most of them failed: the learner, which would wait as long as any
        come, gets an empty batch that counts them, and stops the run after several of those."""
        counts = self._counters.since.counts
        failed = counts["dropped_no_leaf"] + counts["dropped_one_leaf"]
        return not len(self._trees.pool) and self._counters.since.produced + failed >= enough

    def _is_drained(self) -> bool:
        """Whether no further tree will come: ``run.max_tasks`` are leased, none is under way or with the learner."""
        return self._ledger.tasks.all_leased and not self._ledger.num_training and not self._trees.pool.num_out

    def _sample_exact(
        self, request: SampleRequest, now: float, delay_line: DelayLine, rng: np.random.Generator
    ) -> Share | None:
        """The same where the delay line decides: the set whose turn it is, once all that is due is grown."""
        wanted = self._config.staleness.trees_per_batch
        if request.num_trees != wanted:
            raise BadMessage(
                f"the learner asks for {request.num_trees} trees, with staleness.exact_lag every batch has "
                f"staleness.trees_per_batch = {wanted}: start both on the same configuration"
            )
        if delay_line.version is not None and request.version < delay_line.version:
            return None  # requested by a learner that has been replaced since
        self._check_known(request.step)
        self._look_after_batches(request.step)
        self._heard(request)
        self._ask_line(request, delay_line)
        if not delay_line.ready:
            return None
        front, metrics = delay_line.pop(), self._flush(now)
        if len(front.tree_ids) < wanted:
            log.warning(
                "batch %d has %d of %d trees: too few had a signal (staleness.max_oversampling), or memory was full",
                request.step, len(front.tree_ids), wanted,
            )  # fmt: skip
        drawn = self._trees.pool.take(front.tree_ids)
        served = self._serve(request, drawn, metrics, rows=self._rows_beside(drawn, request, rng))
        served.exact = front
        return self._share(served, request)

    def _heard(self, request: SampleRequest) -> None:
        self.step = self._trees.step = request.step
        self._trees.heard(request.version)
        self._ledger.progress.waits_at(request.version)

    def _ask_line(self, request: SampleRequest, delay_line: DelayLine) -> None:
        """Pass the learner's position to the delay line; drop trees that a restarted learner cannot use any more."""
        before = delay_line.version
        moved = request.version != before
        # In an undisturbed run there are none: the learner trained only when nothing was under lease.
        revoked = self._ledger.revoke_training() if moved else []
        for held in revoked:
            self._trees.forget_growing(held.tree_id)
        asked = delay_line.ask(
            step=request.step,
            version=request.version,
            under_lease=self._ledger.num_training,
            memory_full=self._trees.memory_full,
        )
        self._trees.discard(asked.stale, "stale")
        self._trees.discard(asked.unfinished, "inexact")
        unfinished = len(asked.unfinished) + len(revoked)
        self._counters.count("dropped_inexact", unfinished)
        if before is None:
            if request.step > 0 and delay_line.lag > 0:
                log.warning(
                    "staleness.exact_lag = %d: this buffer starts at step %d without trees; the lag rises from 0 again",
                    delay_line.lag, request.step,
                )  # fmt: skip
        elif asked.anew and (asked.stale or unfinished or delay_line.greatest_lag > delay_line.lag):
            log.warning(
                "staleness.exact_lag = %d: the learner starts again at step %d, version %d after %d; %d whole batches "
                "come first, up to %d versions old; dropped: %d trees over staleness.max_lag, %d of unfinished batches",
                delay_line.lag, request.step, request.version, before, len(delay_line), delay_line.greatest_lag,
                len(asked.stale), unfinished,
            )  # fmt: skip

    def _serve(
        self,
        request: SampleRequest,
        drawn: list[Drawn],
        metrics: dict[str, float],
        batch_id: int | None = None,
        rows: tuple[ServedRow, ...] = (),
    ) -> ServedBatch:
        partial = self._config.buffer.ready == "partial"
        self._trees.served(drawn)
        served = ServedBatch(
            batch_id=self._batches.next_id if batch_id is None else batch_id,
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
            rows=rows,
        )
        self._batches.put(served)
        self._ledger.progress.consumed(request.version)
        return served

    def _share(self, served: ServedBatch, request: SampleRequest) -> Share:
        trees = [self._trees.registry.as_served(each) for each in served.drawn]
        arrays = [tree.arrays() for tree in trees]
        paths = [self._trees.registry.row_as_served(each) for each in served.rows]
        if request.num_ranks != served.num_ranks:
            raise BadMessage(
                f"batch {served.batch_id} was shared among {served.num_ranks} ranks, rank {request.rank} counts "
                f"{request.num_ranks}; all ranks must be of one start"
            )
        # Rows are shared out as trees are: a rank's trees and rows have about as many tokens as another's.
        own = split_by_tokens([tree.num_tokens for tree in (*trees, *paths)], served.num_ranks)[request.rank]
        own_rows = [i - len(trees) for i in own if i >= len(trees)]
        own = [i for i in own if i < len(trees)]
        others = left_out(served.metrics)
        head = Batch(
            batch_id=served.batch_id,
            step=served.step,
            num_trees=len(trees),
            num_leaves=sum(tree.num_leaves for tree in trees),
            num_action_tokens=sum(int(leaf_tokens(a).sum()) for a in arrays),
            num_turn_tokens=sum(int(a.num_action_tokens.sum()) for a in arrays),
            trees=(),
            metrics=served.metrics,
            checkpoint_wanted=self._trees.checkpoint_wanted,
            left_out_leaves=others.count,
            left_out_rewards=others.total,
            left_out_squares=others.squares,
            num_rows=len(paths),
            num_row_tokens=sum(int(path.rows["num_action_tokens"].sum(dtype=np.int64)) for path in paths),
        )
        return Share(
            head,
            tuple(served.drawn[i] for i in own),
            tuple(trees[i] for i in own),
            tuple(served.rows[i] for i in own_rows),
            tuple(paths[i] for i in own_rows),
        )

    # --- confirmations----------------------------------------------------------------------------------

    def trained(self, message: Trained) -> None:
        """A rank has trained on its share of a batch; the last rank's message confirms the batch."""
        self._trees.heard(message.version)
        self._ledger.progress.trained(message.version)
        served = self._batches.trained(message.batch_id, message.rank, message.priorities)
        if served is not None:
            self._confirm(served)
        self._trees.advance()

    def _confirm(self, served: ServedBatch) -> None:
        if self._batches.confirm(served):
            self._counters.count_task("trained", sum(each.uses == 1 for each in served.drawn))
            self._trees.imitation.confirm(served.row_keys, step=served.step)
            self._trees.confirm(served.tree_ids, served.priorities, step=served.step)

    def checkpointed(self, message: Checkpointed) -> None:
        """The learner never falls back behind ``message.step`` any more: trees used up in batches below are dropped.

        Raises:
            BadMessage: that step is past the batches that a promoted copy of the journal knows.
        """
        self._check_known(message.step)
        self.saved_step = message.step
        for step in [step for step in self._batches.by_step if step < message.step]:
            self._confirm(self._batches.by_step[step])
            self._batches.remove(step)
        self._trees.checkpointed(message.step)

    @property
    def known_step(self) -> int:
        """The first step of whose batch nothing is known: a learner may be there at most."""
        step = self.saved_step
        while step in self._batches.by_step:
            step += 1
        return step

    def _check_known(self, step: int) -> None:
        """Raises BadMessage where the learner is ahead of a promoted copy: it would be served trees of batches that it
        has trained on."""
        if self.mirrored and step > self.known_step:
            raise BadMessage(
                f"the learner is at step {step}, and this journal, a follower's copy that took a lost one's place, "
                f"knows the batches up to step {self.known_step}: start the learner from a checkpoint of step "
                f"{self.known_step} or earlier (put later ones aside), or it would train twice on what came between"
            )

    def _look_after_batches(self, step: int) -> None:
        """The batch of ``step`` is requested: those before it were trained on, those from it on are not, or are undone.

        A restarted learner requests the step of its checkpoint: what it learned after that is lost.
        """
        if self.anew and step > 0 and not self._batches.by_step:
            log.warning(
                "the learner is at step %d and the journal is empty: what it held of this run is gone, its tasks "
                "begin at 0 again", step,
            )  # fmt: skip
        elif step < self.saved_step:
            log.warning(
                "the learner starts again at step %d, though it had reported a checkpoint of step %d: the trees of the "
                "steps between are gone, their tasks are not trained on again", step, self.saved_step,
            )  # fmt: skip
            self.saved_step = step
        self.anew = False
        later = sorted((s for s in self._batches.by_step if s >= step), reverse=True)
        if later:
            log.info("the learner starts again at step %d; the %d batches from there on go back", step, len(later))
            served = [self._batches.by_step[s] for s in later]
            for each in served:
                self._undo(each)
            if self._delay_line is not None:
                self._delay_line.give_back([each.exact for each in reversed(served) if each.exact is not None])
        # The confirmation of the one just before may still be on its way.
        last = step if self._delay_line is not None else step - 1
        for before in [s for s in self._batches.by_step if s < last]:
            self._confirm(self._batches.by_step[before])

    def _undo(self, served: ServedBatch) -> None:
        """Undo a batch that the learner has not trained on, or whose updates it has lost."""
        self._batches.remove(served.step)
        if not served.confirmed:
            self._trees.imitation.give_back(served.row_keys)
            self._trees.give_back(served.tree_ids)
            return
        self._trees.imitation.undo_use(served.row_keys)
        for each in served.drawn:
            self._counters.count_task("trained", -int(each.uses == 1))
            self._trees.undo_use(each)

    # --- snapshot ----------------------------------------------------------------------------------------------

    def snapshot(self, run: RunEntry) -> None:
        """Write what ``restore`` reads."""
        run.next_batch, run.step, run.saved_step = self._batches.next_id, self.step, self.saved_step

    def restore(self, run: RunEntry, batches: Iterable[BatchEntry]) -> None:
        """As an earlier process left it; after the trees, which those batches take."""
        self._batches.next_id, self.step, self.saved_step = run.next_batch, run.step, run.saved_step
        self._trees.step = run.step
        self.anew = False
        for entry in batches:
            served = self._batches.restore(entry)
            if not served.confirmed:
                self._trees.pool.take(served.tree_ids)
                self._trees.registry.imitation.take(served.row_keys)
