"""Many calls between two loops wake the other one once, and leave it time for everything else."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter

import pytest

from actors.hosting.mailbox import MOST_AT_ONCE, Mailbox, MailboxLoop, Pace

MANY = 10 * MOST_AT_ONCE + 3


class Turns:
    """Counts the turns of the loop that runs it."""

    def __init__(self) -> None:
        self.now = 0
        self._counting = asyncio.create_task(self._count())

    async def _count(self) -> None:
        while True:
            self.now += 1
            await asyncio.sleep(0)

    async def end(self) -> None:
        self._counting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._counting


async def test_calls_of_another_thread_come_in_order_few_in_a_turn_and_after_one_wake_up() -> None:
    loop = asyncio.get_running_loop()
    wakes: list[object] = []
    turns, done = Turns(), asyncio.Event()
    seen: list[int] = []
    in_turn: Counter[int] = Counter()

    def call(number: int) -> None:
        seen.append(number)
        in_turn[turns.now] += 1
        if number == MANY - 1:
            done.set()

    mailbox = Mailbox(loop, wakes.append)

    def put_all() -> None:
        for number in range(MANY):
            mailbox.put(call, number)

    thread = threading.Thread(target=put_all)
    thread.start()
    thread.join()
    (open_it,) = wakes
    assert callable(open_it)
    open_it()
    await done.wait()
    await turns.end()
    assert seen == list(range(MANY))
    assert max(in_turn.values()) <= MOST_AT_ONCE
    assert len(wakes) == 1


async def test_a_call_that_fails_costs_no_other_its_turn() -> None:
    seen: list[int] = []
    opened: list[object] = []
    mailbox = Mailbox(asyncio.get_running_loop(), opened.append)
    mailbox.put(lambda: 1 / 0)
    done = asyncio.Event()
    mailbox.put(seen.append, 1)
    mailbox.put(done.set)
    (open_it,) = opened
    assert callable(open_it)
    with pytest.raises(ZeroDivisionError):
        open_it()
    await done.wait()
    assert seen == [1]


def test_a_loop_with_a_mailbox_runs_what_threads_hand_to_it_and_not_what_was_cancelled() -> None:
    loop = MailboxLoop()
    seen: list[str] = []
    kept = loop.call_soon_threadsafe(seen.append, "kept")
    loop.call_soon_threadsafe(seen.append, "cancelled").cancel()
    assert not kept.cancelled()
    assert loop.run_until_complete(asyncio.wait_for(_in_a_thread(), 60.0)) == "answer"
    assert seen == ["kept"]
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.call_soon_threadsafe(seen.append, "late")


async def _in_a_thread() -> str:
    return await asyncio.to_thread(lambda: "answer")


async def test_of_many_tasks_that_begin_together_few_pass_in_one_turn_in_order() -> None:
    pace, turns = Pace(), Turns()
    order: list[int] = []
    in_turn: Counter[int] = Counter()

    async def one(number: int) -> None:
        await pace.passed()
        order.append(number)
        in_turn[turns.now] += 1

    async with asyncio.TaskGroup() as tasks:
        for number in range(MANY):
            tasks.create_task(one(number))
    await turns.end()
    assert order == list(range(MANY))
    assert max(in_turn.values()) <= 2 * MOST_AT_ONCE, "those that were let in, and those that found space"
    assert len(in_turn) >= MANY // (2 * MOST_AT_ONCE)


async def test_a_task_that_is_cancelled_while_it_waits_takes_no_place() -> None:
    pace = Pace()
    passing = [asyncio.create_task(pace.passed()) for _ in range(MANY)]
    await asyncio.sleep(0)
    for task in passing[MOST_AT_ONCE : MOST_AT_ONCE + 5]:
        task.cancel()
    found = await asyncio.gather(*passing, return_exceptions=True)
    assert [isinstance(error, asyncio.CancelledError) for error in found].count(True) == 5
    await asyncio.wait_for(pace.passed(), 60.0)
