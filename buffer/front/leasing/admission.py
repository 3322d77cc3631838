"""Which shards a request for leases goes to, and for how many; what each is told about the others.

The sum over the shards is never underestimated: leases that a shard is being asked for, and those that it granted since
it was heard last, count as trees under lease.
"""

from __future__ import annotations

from atpo_async.config import StalenessConfig
from atpo_async.wire.messages import LeaseRequest
from buffer.front.messages import Grant
from buffer.front.shards import ShardLink, Shards
from buffer.leases.admission import LagRule, LearnerProgress


class FrontAdmission:
    """Admission over all shards.

    Args:
        staleness: the run's.
        shards: as they are known.
        max_tasks: no training task from this one on; None for no end.
    """

    def __init__(self, staleness: StalenessConfig, shards: Shards, *, max_tasks: int | None) -> None:
        self._staleness = staleness
        self._shards = shards
        self._max_tasks = max_tasks
        self._progress = LearnerProgress()
        self._rule = LagRule(staleness, self._progress)

    def grant(self, link: ShardLink, request: LeaseRequest) -> Grant:
        """The question for a shard, with what the others have."""
        others = [each for each in self._shards if each is not link and each.state is not None]
        states = [each.state for each in others if each.state is not None]
        return Grant(
            request=request,
            under_lease=sum(s.under_lease for s in states) + sum(each.asking + each.granted for each in others),
            ready=sum(s.waiting for s in states),
            produced=sum(s.produced for s in states),
            blocked_by=next((s.blocked_by for s in states if s.blocked_by is not None), None),
        )

    def plan(self, count: int) -> tuple[dict[int, int], str | None]:
        """How many leases to ask of which shard; where none, why.

        What was lost and what is to be evaluated comes first; then new training trees, from the shard whose next task
        is the first.
        """
        if missing := self._not_heard():
            return {}, missing
        plan: dict[int, int] = {}
        left = count
        usable = [link for link in self._shards if link.alive and link.state is not None and link.state.failing is None]
        for link in usable:
            assert link.state is not None
            lost = 0 if self._blocked_by() else link.state.lost
            waiting = max(0, lost + link.state.to_evaluate - link.asking)
            if part := min(left, waiting):
                plan[link.index] = part
                left -= part
        if not usable and (failing := self._failing()):
            return {}, failing
        why = self._why_closed() if left else None
        if left and why is None:
            why = self._begin(usable, plan, left)
        return plan, why or self._failing()

    def _failing(self) -> str | None:
        """Why a shard commits nothing; None where all do."""
        why = next((s.failing for s in self._shards.states if s.failing is not None), None)
        return None if why is None else f"the buffer's journal cannot be written: {why}"

    def _begin(self, usable: list[ShardLink], plan: dict[int, int], left: int) -> str | None:
        """Add up to ``left`` new training trees; why there are not as many."""
        pending = (
            self._shards.total("under_lease")
            + self._shards.total("waiting")
            + sum(link.asking + link.granted for link in self._shards)
        )
        left = min(left, max(self._staleness.max_trees_pending - pending, 1))
        open_ = {
            link.index: link.state.next_task + len(self._shards) * (link.asking + link.granted - link.state.retries)
            for link in usable
            if link.state is not None and not link.state.all_leased and not link.state.memory_full
        }
        if not open_:
            return f"the shards that are there have no further task: {len(usable)} of {len(self._shards)} answer"
        for _ in range(left):
            first = min(open_, key=lambda index: (open_[index], index))
            plan[first] = plan.get(first, 0) + 1
            open_[first] += len(self._shards)
        return None

    def _not_heard(self) -> str | None:
        # The trees of a shard that was never heard are not known, and admission counts them.
        never = next((link.name for link in self._shards if link.state is None), None)
        return None if never is None else f"{never}, a shard of the buffer, has not answered yet"

    def _blocked_by(self) -> str | None:
        return next((s.blocked_by for s in self._shards.states if s.blocked_by is not None), None)

    def _why_closed(self) -> str | None:
        """Why no new training tree may begin now; None if one may."""
        states, shards = self._shards.states, self._shards
        if (blocked := self._blocked_by()) is not None:
            return blocked
        self._progress.published = max((s.published for s in states if s.published is not None), default=None)
        self._progress.next_version = max((s.next_version for s in states), default=0)
        if self._progress.published is not None and all(s.all_leased for s in states):
            return f"all run.max_tasks = {self._max_tasks} tasks are leased or done"
        return self._rule.why_closed(
            under_lease=shards.total("under_lease") + sum(link.asking + link.granted for link in shards),
            ready=shards.total("waiting"),
            produced=shards.total("produced"),
            memory_full=all(s.memory_full for s in states),
        )
