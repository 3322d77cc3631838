"""Requests for leases at the front: answered in their order, and asked again without a storm."""

from __future__ import annotations

import asyncio

from atpo_async.wire.messages import Lease, LeaseRequest, Leases
from atpo_async.wire.records import TurnRecords
from buffer.front.leasing.queue import FrontQueue
from tests.waiting_support import until, within

NONE = Leases(leases=(), closed_because="closed", retry_after_s=0.0, finished=False)


def some(tree_id: str) -> Leases:
    lease = Lease(
        tree_id=tree_id, task_index=0, kind="train", epoch=0, lifetime_s=1.0, min_version=0, seed=0,
        committed=TurnRecords.of(()),
    )  # fmt: skip
    return Leases(leases=(lease,), closed_because=None, retry_after_s=0.0, finished=False)


def wants(actor: str) -> LeaseRequest:
    return LeaseRequest(run="r", actor=actor, count=1, version=0)


class Shards:
    """Decides as the front does: ``free`` trees are to be had, and actors in ``slow`` get none of them."""

    def __init__(self) -> None:
        self.free = 0
        self.slow: set[str] = set()
        self.asked: list[str] = []

    def ask(self, actor: str, request: LeaseRequest) -> Leases | asyncio.Future[Leases]:
        if not self.free:
            return NONE
        self.asked.append(actor)
        answer: asyncio.Future[Leases] = asyncio.get_running_loop().create_future()
        self.free -= actor not in self.slow
        answer.set_result(NONE if actor in self.slow else some(actor))
        return answer


async def test_requests_are_answered_in_their_order_as_trees_become_free() -> None:
    shards = Shards()
    queue = FrontQueue(shards.ask, most_wait_s=60.0)
    waiting = [asyncio.create_task(queue.answer(actor, wants(actor))) for actor in ("a", "b", "c")]
    await until(lambda: len(queue) == 3)
    shards.free = 2
    queue.changed()
    assert [each.leases[0].tree_id for each in await within(asyncio.gather(*waiting[:2]))] == ["a", "b"]
    last = await within(waiting[2])
    assert (last.leases, last.closed_because) == ((), "closed")
    queue.close()


async def test_an_actor_that_gets_none_holds_up_no_other_and_is_not_asked_for_at_every_change() -> None:
    shards = Shards()
    shards.slow.add("slow")
    queue = FrontQueue(shards.ask, most_wait_s=60.0)
    slow = asyncio.create_task(queue.answer("slow", wants("slow")))
    await until(lambda: len(queue) == 1)
    shards.free = 1
    for _ in range(20):
        queue.changed()
        await asyncio.sleep(0)
    assert shards.asked == ["slow"]
    assert (await within(queue.answer("fast", wants("fast")))).leases[0].tree_id == "fast"
    assert not (await within(slow)).leases
    queue.close()


async def test_a_later_request_of_an_actor_takes_the_place_of_the_former_and_one_that_leaves_is_answered() -> None:
    queue = FrontQueue(Shards().ask, most_wait_s=60.0)
    former = asyncio.create_task(queue.answer("a", wants("a")))
    await until(lambda: len(queue) == 1)
    later = asyncio.create_task(queue.answer("a", wants("a")))
    assert not (await within(former)).leases
    assert not later.done()
    queue.drop("a")
    assert not (await within(later)).leases
    assert len(queue) == 0
    queue.close()
