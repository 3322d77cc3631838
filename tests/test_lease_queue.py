"""Requests for leases that wait for admission: who is asked again, and when."""

from __future__ import annotations

import asyncio

from atpo_async.wire.messages import Lease, Leases, Welcome
from buffer.handlers.lease_queue import LEASE_WAIT_S, WAITING_AT_ONCE, LeaseQueue
from buffer.leases.admission import Admitted
from buffer.service import BufferService
from tests.actor_support import lease
from tests.buffer_peers_support import SOON_S, hello, published, running, wants
from tests.waiting_support import until


class Admission:
    """So many places for everyone, and actors that get none."""

    def __init__(self) -> None:
        self.places = 0
        self.limited: set[str] = set()
        self.finished = False
        self.asked: list[str] = []

    def __call__(self, actor: str, request: object) -> Admitted:
        self.asked.append(actor)
        found: tuple[Lease, ...] = ()
        if self.places and actor not in self.limited:
            self.places -= 1
            found = (lease(),)
        why = None if found else "closed"
        answer = Leases(leases=found, closed_because=why, retry_after_s=0.0, finished=self.finished)
        return Admitted(answer, only_here=actor in self.limited and self.places > 0)


async def waiting(queue: LeaseQueue, *actors: str) -> dict[str, asyncio.Task[Leases]]:
    tasks = {actor: asyncio.create_task(queue.answer(actor, wants(1, actor))) for actor in actors}
    await asyncio.sleep(0)  # each begins, and waits
    assert len(queue) == len(actors)
    return tasks


async def test_one_place_goes_to_the_first_in_the_queue_and_the_others_are_not_gone_through() -> None:
    admission = Admission()
    queue = LeaseQueue(admission)
    names = [f"a{i}" for i in range(500)]
    tasks = await waiting(queue, *names)
    admission.asked.clear()
    admission.places = 1
    queue.changed(freed="a7")
    got = await asyncio.wait_for(tasks["a0"], SOON_S)
    assert len(got.leases) == 1
    assert admission.asked == ["a0", "a1"]
    for task in tasks.values():
        task.cancel()


async def test_an_actor_that_alone_gets_none_holds_up_no_other_and_is_asked_again_after_its_own_tree() -> None:
    admission = Admission()
    admission.limited, admission.places = {"slow"}, 1
    queue = LeaseQueue(admission, most_wait_s=SOON_S)
    tasks = await waiting(queue, "slow")
    admission.places = 0
    tasks |= {"fast": asyncio.create_task(queue.answer("fast", wants(1, "fast")))}
    await asyncio.sleep(0)
    admission.places = 2
    admission.asked.clear()
    queue.changed(freed="other")
    assert len((await asyncio.wait_for(tasks["fast"], SOON_S)).leases) == 1
    assert admission.asked == ["fast"]
    admission.limited.clear()
    queue.changed(freed="slow")
    assert len((await asyncio.wait_for(tasks["slow"], SOON_S)).leases) == 1


async def test_any_other_change_has_everyone_asked_again() -> None:
    admission = Admission()
    admission.limited, admission.places = {"slow"}, 1
    queue = LeaseQueue(admission)
    tasks = await waiting(queue, "slow")
    admission.finished = True
    queue.changed()
    assert (await asyncio.wait_for(tasks["slow"], SOON_S)).finished


async def test_a_later_request_of_an_actor_takes_the_place_of_the_one_before() -> None:
    admission = Admission()
    queue = LeaseQueue(admission)
    first = (await waiting(queue, "a"))["a"]
    later = asyncio.create_task(queue.answer("a", wants(2, "a")))
    assert (await asyncio.wait_for(first, SOON_S)).leases == ()
    admission.places = 1
    queue.changed()
    assert len((await asyncio.wait_for(later, SOON_S)).leases) == 1
    assert len(queue) == 0


async def test_the_more_wait_the_longer_each_does() -> None:
    queue = LeaseQueue(Admission())
    assert queue.wait_s == LEASE_WAIT_S
    tasks = await waiting(queue, *(f"a{i}" for i in range(4 * WAITING_AT_ONCE)))
    assert queue.wait_s == 4 * LEASE_WAIT_S
    for task in tasks.values():
        task.cancel()


async def test_nothing_is_granted_any_more_to_the_former_name_of_an_actor_whose_request_waits() -> None:
    async with running() as peers:
        service, config = peers.service, peers.config
        await peers.tell(published())
        first = await peers.actor.request(hello(config), timeout_s=SOON_S)
        assert isinstance(first, Welcome)
        held = await peers.leases(config.staleness.max_trees_pending)
        queue = service._actor_handler._queue
        request = asyncio.create_task(peers.actor.request(wants(1), timeout_s=SOON_S))
        await until(lambda: len(queue) == 1)
        moved = await _asked(service, "relay-1/a", hello(config, continues="a", ticket=first.ticket))
        assert isinstance(moved, Welcome)
        service.state.returned("relay-1/a", [held[0].tree_id])
        service._changes.notify()
        answer = await request
        assert isinstance(answer, Leases)
        assert answer.leases == ()
        assert service.state.ledger.held_by("a") == []


async def test_nothing_is_granted_to_a_request_of_the_process_before() -> None:
    async with running() as peers:
        service, config = peers.service, peers.config
        await peers.tell(published())
        await peers.leases(config.staleness.max_trees_pending)
        queue = service._actor_handler._queue
        former = asyncio.create_task(_asked(service, "b", wants(1, "b")))
        await until(lambda: len(queue) == 1)
        await _asked(service, "b", hello(config, actor="b"))
        answer = await former
        assert isinstance(answer, Leases)
        assert (answer.leases, len(queue)) == ((), 0)


async def _asked(service: BufferService, peer: str, message: object) -> object:
    answer = service._actor_handler.handle(peer, message, ())
    assert answer is not None
    return await answer
