"""Nothing leaves the buffer before the commit that holds it, however slow the disk is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from atpo_async.core.errors import WaitTimeout
from atpo_async.wire.messages import ActorReport, Batch, EvalQuery, EvalRequest, EvalResult, Leases, NotYet
from buffer.handlers import pending_answers
from buffer.journal.tables import Tables
from tests.buffer_peers_support import SOON_S, Peers, ask, configured, grown, hello, published, running, wants


class SlowDisk:
    """Commits wait until they are let through, one by one or all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slow = False
        self._through = threading.Semaphore(0)
        self._begun = threading.Semaphore(0)
        commit = Tables.commit

        def slowly(journal: Tables, group: Any) -> None:
            if self.slow:
                self._begun.release()
                assert self._through.acquire(timeout=SOON_S)
            commit(journal, group)

        monkeypatch.setattr(Tables, "commit", slowly)
        # No answer waits longer for a commit.
        monkeypatch.setattr(pending_answers, "SETTLE_WAIT_S", 0.02)

    async def begun(self) -> None:
        """A commit waits to be let through."""
        assert await asyncio.to_thread(self._begun.acquire, True, SOON_S)

    def let_one_through(self) -> None:
        self._through.release()

    def recover(self) -> None:
        self.slow = False
        self._through.release()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    made = SlowDisk(monkeypatch)
    yield made
    made.recover()


async def answer(peers: Peers, count: int = 3) -> Leases:
    found = await peers.actor.request(wants(count), timeout_s=SOON_S)
    assert isinstance(found, Leases)
    return found


async def granted(peers: Peers, count: int = 3) -> Leases:
    """The first answer that has leases."""
    async with asyncio.timeout(SOON_S):
        while not (found := await answer(peers, count)).leases:
            continue
        return found


async def test_no_lease_leaves_before_its_commit_however_often_it_is_asked_for(disk: SlowDisk) -> None:
    async with running() as peers:
        await peers.tell(published())
        disk.slow, before = True, peers.service.journal.commits
        for _ in range(5):
            found = await answer(peers)
            assert found.leases == ()
            assert found.closed_because == "the buffer's journal cannot be written: its disk is slow"
        assert peers.service.journal.commits == before
        disk.recover()
        found = await granted(peers)
        assert peers.service.journal.commits > before
        # Granted once, and not anew for every question.
        assert [(lease.task_index, lease.epoch) for lease in found.leases] == [(0, 0), (1, 0), (2, 0)]
        assert peers.service.state.ledger.num_training == 3


async def test_a_disk_slower_than_any_request_waits_still_gets_its_answers_out(disk: SlowDisk) -> None:
    """The next commit is under way by then, and takes as long: the answer does not wait for that one."""
    async with running() as peers:
        await peers.tell(published())
        (first,) = (await answer(peers, 1)).leases
        disk.slow = True
        assert (await answer(peers)).leases == ()
        await disk.begun()
        for message in grown(first):
            await peers.actor.send(message)
        disk.let_one_through()
        await disk.begun()
        assert [lease.task_index for lease in (await granted(peers)).leases] == [1, 2, 3]
        disk.recover()


async def test_an_actor_that_does_not_name_leases_that_are_not_out_yet_keeps_them(disk: SlowDisk) -> None:
    async with running() as peers:
        await peers.tell(published())
        disk.slow = True
        assert (await answer(peers)).leases == ()
        for _ in range(9):
            await peers.actor.send(ActorReport(run="r", actor="a", version=0, tree_ids=(), metrics={}))
        # Answered behind them.
        await peers.actor.request(hello(peers.config, protocol=99), timeout_s=SOON_S)
        disk.recover()
        assert [lease.epoch for lease in (await granted(peers)).leases] == [0, 0, 0]


async def test_leases_pending_for_an_actor_that_is_gone_are_not_given_to_its_successor_as_they_were(
    disk: SlowDisk,
) -> None:
    async with running() as peers:
        await peers.tell(published())
        disk.slow = True
        assert (await answer(peers)).leases == ()
        joining = asyncio.create_task(peers.actor.request(hello(peers.config), timeout_s=SOON_S))
        await disk.begun()
        disk.recover()
        await joining
        assert [(lease.task_index, lease.epoch) for lease in (await granted(peers)).leases] == [(0, 1), (1, 1), (2, 1)]


async def test_of_two_requests_of_one_actor_the_later_gets_the_pending_answer(disk: SlowDisk) -> None:
    async with running() as peers:
        await peers.tell(published())
        disk.slow = True
        assert (await answer(peers)).leases == ()
        peers.service._actor_handler._pending["a"].ask()  # by a request that is under way
        disk.recover()
        found = await granted(peers)
        assert len({lease.tree_id for lease in found.leases}) == 3
        assert peers.service._actor_handler._pending == {}


async def test_no_batch_leaves_before_its_commit_and_it_is_the_same_one_then(disk: SlowDisk) -> None:
    async with running() as peers:
        await peers.tell(published())
        for lease in (await granted(peers, 4)).leases:
            await peers.send(*grown(lease))
        disk.slow, before = True, peers.service.journal.commits
        for _ in range(3):
            found = await peers.learner.request(ask(), timeout_s=SOON_S)
            assert isinstance(found, NotYet)
            assert found.waiting_for == "the buffer's journal cannot be written: its disk is slow"
        assert peers.service.journal.commits == before
        disk.recover()
        async with asyncio.timeout(SOON_S):
            while not isinstance(found := await peers.learner.request(ask(), timeout_s=SOON_S), Batch):
                assert isinstance(found, NotYet)
        assert (found.batch_id, found.num_trees) == (1, 2)


async def test_no_result_of_an_evaluation_and_no_welcome_leave_before_their_commit(disk: SlowDisk) -> None:
    async with running() as peers:
        await peers.tell(EvalRequest(run="r", step=0, version=0, num_tasks=1, blocking=False), published())
        (lease,) = (await granted(peers, 1)).leases
        disk.slow = True
        for message in grown(lease, (1.0,)):
            await peers.actor.send(message)
        await disk.begun()
        before = peers.service.journal.commits
        asked = [
            asyncio.create_task(peers.learner.request(EvalQuery(run="r", step=0, wait_s=SOON_S), timeout_s=SOON_S)),
            asyncio.create_task(peers.actor.request(hello(peers.config), timeout_s=SOON_S)),
        ]
        # Both are at the buffer: what is asked after them is answered.
        await peers.learner.request(EvalQuery(run="r", step=9, wait_s=0.0), timeout_s=SOON_S)
        await peers.actor.request(hello(peers.config, protocol=99), timeout_s=SOON_S)
        assert not any(task.done() for task in asked)
        assert peers.service.journal.commits == before
        disk.recover()
        result, _ = await asyncio.gather(*asked)
        assert isinstance(result, EvalResult)
        assert result.success == 1.0


async def test_a_disk_on_which_the_first_commit_does_not_end_is_named(disk: SlowDisk) -> None:
    disk.slow = True
    config = configured(links={"deadline_s": 0.1, "give_up_s": 0.3})
    # Closing the journal waits for the commit that is under way.
    asyncio.get_running_loop().call_later(2.0, disk.recover)
    with pytest.raises(WaitTimeout, match=r"first commit to the journal in .* took over 0\.3 s \(links\.give_up_s\)"):
        async with running(config):
            raise AssertionError("a buffer whose number is not on disk serves nobody")
