"""The numbers of a shard that its front decides with.  Pure."""

from __future__ import annotations

from buffer.front.messages import EvaluationState, ShardState
from buffer.leases.evaluations import Evaluation
from buffer.state import BufferState


def state_of(state: BufferState, *, changes: int, failing: str | None, turns_endpoint: str, now: float) -> ShardState:
    """A shard as it is at ``now``."""
    ledger, trees, counters = state.ledger, state.trees, state.counters
    tasks, progress, since = ledger.tasks, ledger.progress, counters.since
    published = progress.published
    blocking = ledger.evaluations.blocking(published)
    return ShardState(
        changes=changes,
        incarnation=state.incarnation,
        turns_endpoint=turns_endpoint,
        ready=len(state.pool),
        waiting=trees.num_waiting,
        under_lease=ledger.num_training,
        out=state.pool.num_out,
        produced=since.produced,
        fruitless=since.counts["dropped_no_leaf"] + since.counts["dropped_one_leaf"],
        memory_full=trees.memory_full,
        lost=ledger.num_waiting("train"),
        to_evaluate=ledger.num_waiting("eval") + ledger.evaluations.num_to_lease(published),
        blocked_by=None if blocking is None else blocking.as_reason(),
        next_task=tasks.next_task,
        retries=len(tasks.retries),
        all_leased=tasks.all_leased,
        leased_before=ledger.next_number > 1,
        published=published,
        next_version=progress.next_version,
        version=state.version,
        step=state.step,
        saved_step=state.batch_server.saved_step,
        next_batch=state.batches.next_id,
        highest=state.pool.highest_priority,
        checkpoint_wanted=state.checkpoint_wanted,
        finished=state.finished,
        failing=failing,
        weights_endpoint=state.weights_endpoint,
        announce_endpoint=state.announce_endpoint,
        nbytes=state.nbytes,
        progress=counters.progress,
        given_up=tasks.given_up,
        tasks=dict(counters.tasks),
        drops=counters.describe_drops(state.pool),
        last_turn_s=None if state.last_turn_s is None else now - state.last_turn_s,
        evaluations=tuple(_evaluation(each) for each in ledger.evaluations),
    )


def _evaluation(each: Evaluation) -> EvaluationState:
    return EvaluationState(
        step=each.step, version=each.version, num_tasks=each.num_tasks, num_done=len(each.results), done=each.done
    )
