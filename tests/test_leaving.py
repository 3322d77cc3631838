"""An actor that is asked to end: it finishes its turns under way, hands its leases back, and others go on at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator

import pytest

from actors.__main__ import leave_s_of
from actors.actor import Actor
from atpo_async.config import build
from atpo_async.core.tree import Turn
from atpo_async.links.client import Client
from atpo_async.ops import role
from atpo_async.ops.role import RoleContext
from atpo_async.run.endpoints import Endpoints
from atpo_async.status.reporter import Reporter
from atpo_async.wire.messages import BufferToActor, LeaseReturned, TreeClosed, TreeOpened
from tests.actor_support import CountingEnvironment, ScriptedEngine
from tests.buffer_peers_support import SOON_S, Peers, leaf, opened, published, running, wants
from tests.test_actor import FakeBuffer, FakeWeights, config_of, leases
from tests.waiting_support import until


class Leaving:
    """An actor in the middle of its turns, and the event that asks it to end."""

    def __init__(self, *, turns: int, leave_s: float = 30.0, min_version: int = 0) -> None:
        self.engine = ScriptedEngine()
        self.engine.hold = asyncio.Event()
        self.stopping = asyncio.Event()
        self.buffer = FakeBuffer(*leases(2, min_version=min_version), ends=False)
        self.actor = Actor(
            run="r", name="actor-0", config=config_of(), engine=self.engine,
            environment=CountingEnvironment(turns=turns), buffer=self.buffer,  # type: ignore[arg-type]
            weights=FakeWeights(0), stopping=self.stopping, leave_s=leave_s,  # type: ignore[arg-type]
        )  # fmt: skip
        self.work = asyncio.create_task(self.actor.work())

    def answer(self) -> None:
        """The engine answers every request."""
        assert self.engine.hold is not None
        self.engine.hold.set()

    async def returned(self) -> set[str]:
        await asyncio.wait_for(self.work, SOON_S)
        (returned,) = self.buffer.of(LeaseReturned)
        assert returned.reason == ""
        assert self.buffer.sent[-1] is returned
        return set(returned.tree_ids)


async def asked_in_mid_turn(**options: float) -> Leaving:
    made = Leaving(turns=int(options.pop("turns", 4)), **options)  # type: ignore[arg-type]
    await made.buffer.until(lambda: len(made.buffer.of(TreeOpened)) == 2)
    await until(lambda: len(made.engine.contexts) == 4)  # two chains of two trees each
    made.stopping.set()
    await asyncio.sleep(0)
    return made


async def test_turns_under_way_are_finished_and_sent_and_no_other_is_begun() -> None:
    made = await asked_in_mid_turn()
    made.answer()
    assert await made.returned() == {"t0", "t1"}
    assert sorted((turn.tree_id, turn.turn_id) for turn in made.buffer.of(Turn)) == [
        ("t0", 1), ("t0", 2), ("t1", 1), ("t1", 2),
    ]  # fmt: skip
    assert len(made.engine.contexts) == 4
    assert not made.buffer.of(TreeClosed)


async def test_turns_that_take_longer_than_the_notice_are_lost_and_the_leases_go_back_all_the_same() -> None:
    made = await asked_in_mid_turn(leave_s=0.01)
    assert await made.returned() == {"t0", "t1"}
    assert not made.buffer.of(Turn)


async def test_a_tree_that_ends_with_its_turn_under_way_is_closed_and_not_handed_back() -> None:
    made = await asked_in_mid_turn(turns=1)
    made.answer()
    assert await made.returned() == set()
    assert {closed.tree_id for closed in made.buffer.of(TreeClosed)} == {"t0", "t1"}


async def test_a_tree_that_still_waits_for_its_weights_is_handed_back_at_once() -> None:
    made = Leaving(turns=4, min_version=99)
    await made.buffer.until_asked(1)
    await until(lambda: len(made.actor._growing) == 2)
    made.stopping.set()
    assert await made.returned() == {"t0", "t1"}
    assert not made.buffer.of(TreeOpened)


# --- the buffer ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def other(peers: Peers) -> AsyncIterator[Client]:
    settings = peers.config.links
    async with Client(
        peers.service.actors.endpoint, peer="buffer", identity="b", receives=BufferToActor, settings=settings
    ) as link:
        yield link


async def test_another_actor_goes_on_at_once_from_the_turns_that_are_committed() -> None:
    async with running() as peers, other(peers) as link:
        await peers.tell(published())
        first, second = await peers.leases(2)
        await peers.send(opened(first), leaf(first, 1, 1.0))
        # Of the second it does not know: the answer may not have reached it.
        await peers.send(LeaseReturned(run="r", actor="a", tree_ids=(first.tree_id,)))
        assert not peers.service.state.ledger.actors.is_there("a", peers.service._clock())
        answer = await link.request(wants(2, "b"), timeout_s=SOON_S)
        assert {each.tree_id: len(each.committed) for each in answer.leases} == {first.tree_id: 1, second.tree_id: 0}
        assert {each.epoch for each in answer.leases} == {1}


async def test_a_request_that_waits_still_when_its_actor_leaves_takes_no_lease() -> None:
    async with running() as peers, other(peers) as link:
        waiting = asyncio.create_task(peers.actor.request(wants(2), timeout_s=SOON_S))
        await until(lambda: len(peers.service._actor_handler._queue) == 1)
        await peers.send(LeaseReturned(run="r", actor="a", tree_ids=()))
        await peers.tell(published())
        assert (await waiting).leases == ()
        assert len((await link.request(wants(4, "b"), timeout_s=SOON_S)).leases) == 4


# --- the process ---------------------------------------------------------------------------------------------------


def context(*, supervised: bool = False, **actor: float) -> RoleContext:
    return RoleContext(
        config=build({"actor": actor, "supervisor": {"stop_grace_s": 6.0}}), run_id="", rundir=None,
        endpoints=Endpoints(), name="actor-by-hand", index=0, stopping=asyncio.Event(), log=logging.getLogger("a"),
        supervised=supervised,
    )  # fmt: skip


def test_a_supervised_actor_leaves_within_the_grace_that_its_supervisor_gives() -> None:
    assert leave_s_of(context(leave_s=60.0)) == 60.0
    assert leave_s_of(context(leave_s=60.0, supervised=True)) == 2.0
    assert leave_s_of(context(leave_s=0.5, supervised=True)) == 0.5


@pytest.mark.parametrize(("left", "code"), [(True, 0), (False, 128 + signal.SIGTERM)])
async def test_a_role_that_has_handed_over_all_that_it_had_exits_with_0(left: bool, code: int) -> None:
    made = context()

    async def main(ctx: RoleContext) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(ctx.stopping.wait(), SOON_S)
        ctx.left = left

    reporter = Reporter("actor-by-hand", folder=None, log=made.log)
    try:
        assert await role._serve(main, made, reporter) == code
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
