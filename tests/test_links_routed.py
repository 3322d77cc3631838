"""Links over more than one server: a client that goes past a silent one, and sends that are passed on to another."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from atpo_async.config import LinksConfig
from atpo_async.links.client import RoutedClient
from atpo_async.links.parcels import NoAnswer, Parcel
from atpo_async.links.server import Server
from atpo_async.links.way import Way
from atpo_async.wire import messages as m
from tests.links_support import ANY_PORT, FAST, LEASE_REQUEST, NO_LEASES, Buffer, client, closed, server
from tests.waiting_support import LIMIT_S, until, within

HELLO = m.ActorHello(protocol=m.PROTOCOL, run="r", actor="a", environment="e", search_leaves=4)


def hop(endpoint: str, server_key: str = "") -> m.Hop:
    return m.Hop(endpoint=endpoint, server_key=server_key)


# --- the way ----------------------------------------------------------------------------------------------------


def test_a_way_goes_from_server_to_server_and_begins_again_behind_the_last() -> None:
    way = Way("tcp://relay:1")
    assert not way.has_others
    way.learn([hop("tcp://other:2", "k" * 40), hop("tcp://head:3")])
    assert [each.endpoint for each in way.rest] == ["tcp://relay:1", "tcp://other:2", "tcp://head:3"]
    assert way.step() == hop("tcp://other:2", "k" * 40)
    assert [each.endpoint for each in way.rest] == ["tcp://other:2", "tcp://head:3"]
    # What the server in use says of the rest takes the place of what was known of it.
    way.learn([hop("tcp://head:4")])
    assert [way.step().endpoint, way.step().endpoint] == ["tcp://head:4", "tcp://relay:1"]


@pytest.mark.parametrize(
    "endpoint", ["", "nonsense", "tcp://head", "tcp://head:0", "tcp://0.0.0.0:7000", "tcp://[::]:7"]
)
def test_a_hop_that_is_none_is_left_out_of_the_way(endpoint: str) -> None:
    way = Way("tcp://relay:1")
    way.learn([hop(endpoint), hop("tcp://head:3", "too short"), hop("tcp://head:4")])
    assert [each.endpoint for each in way.rest] == ["tcp://relay:1", "tcp://head:4"]


def test_a_way_has_no_more_than_so_many_hops() -> None:
    way = Way("tcp://relay:1")
    way.learn([hop(f"tcp://relay:{port}") for port in range(2, 100)])
    assert len(way.rest) == 1 + 8


def test_a_server_that_a_relay_reaches_on_its_own_machine_is_on_that_machine() -> None:
    way = Way("tcp://site:7000")
    way.learn([hop("tcp://127.0.0.1:7100"), hop("tcp://head:7000")])
    assert [each.endpoint for each in way.rest] == ["tcp://site:7000", "tcp://site:7100", "tcp://head:7000"]


# --- going past -------------------------------------------------------------------------------------------------


class Host:
    """A server's handler: it greets, and notes what comes in which order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.got: list[Any] = []
        self.refuses = ""
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, peer: str, message: Any) -> Any:
        if isinstance(message, m.ActorHello):
            self.got.append(message.continues or "hello")
            if self.refuses:
                return m.Refused(reason=self.refuses)
            return m.Welcome(run="r", weights_endpoint=self.name, announce_endpoint="")
        await self.open.wait()
        if isinstance(message, m.LeaseRequest):
            self.got.append("lease")
            return NO_LEASES
        self.got.append(message.num_turns)
        return None


def routed(way: Way, settings: LinksConfig = FAST, identity: str = "actor-0") -> RoutedClient:
    return RoutedClient(way, peer="buffer", identity=identity, receives=m.BufferToActor, settings=settings)


def introduced(link: RoutedClient) -> list[str]:
    """The servers that welcomed this client, as it goes on."""
    welcomed = list[str]()

    def note(welcome: Any) -> None:
        welcomed.append(welcome.weights_endpoint)

    link.introduce_by(lambda: m.ActorHello(**{**_fields(HELLO), "continues": "me"}), note)
    return welcomed


def _fields(message: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__}


async def test_a_client_goes_past_a_server_that_died_and_sends_there_what_was_not_acknowledged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    relay, head = Host("relay"), Host("head")
    async with server(head) as far:
        near = server(relay)
        await near.__aenter__()
        way = Way(near.endpoint)
        async with routed(way) as link:
            await link.send(closed(0))
            await link.drain(timeout_s=LIMIT_S)
            welcomed = introduced(link)
            way.learn([hop(far.endpoint)])
            relay.open.clear()
            for number in (1, 2):
                await link.send(closed(number))
            asked = asyncio.create_task(link.request(LEASE_REQUEST, timeout_s=LIMIT_S))
            await until(lambda: near.peers["actor-0"].queued == 2)
            await near.close()
            await link.drain(timeout_s=LIMIT_S)
            assert (await asked).leases == ()
            assert link.num_moves == 1
            assert link.stats.resent >= 2
    assert welcomed == ["head"]
    # Nothing comes before the greeting.
    assert head.got[0] == "me"
    assert [number for number in head.got if isinstance(number, int)] == [1, 2]
    assert f"actor-0 goes past {near.endpoint}" in caplog.text


async def test_a_client_comes_back_to_the_first_server_behind_the_last() -> None:
    relay = Host("relay")
    async with server(relay) as near:
        way = Way(near.endpoint)
        async with routed(way) as link:
            await link.request(HELLO, timeout_s=LIMIT_S)
            welcomed = introduced(link)
            way.learn([hop("tcp://127.0.0.1:1")])
            link._go_past()
            await until(lambda: welcomed == ["relay"])
            await link.send(closed(1))
            await link.drain(timeout_s=LIMIT_S)
    assert relay.got == ["hello", "me", 1]


async def test_a_server_that_turns_a_client_away_is_gone_past_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    relay, strict, head = Host("relay"), Host("strict"), Host("head")
    strict.refuses = "not with this ticket"
    async with server(relay) as near, server(strict) as middle, server(head) as far:
        way = Way(near.endpoint)
        async with routed(way) as link:
            await link.request(HELLO, timeout_s=LIMIT_S)
            welcomed = introduced(link)
            way.learn([hop(middle.endpoint), hop(far.endpoint)])
            link._go_past()
            await link.send(closed(1))
            await link.drain(timeout_s=LIMIT_S)
    assert welcomed == ["head"]
    assert strict.got == ["me"]
    assert head.got == ["me", 1]
    assert f"actor-0 is turned away by {middle.endpoint}: not with this ticket" in caplog.text


async def test_a_client_with_one_server_greets_nobody_and_waits_for_it() -> None:
    head = Host("head")
    first = server(head)
    async with first:
        port = first.endpoint
        async with routed(Way(port)) as link:
            introduced(link)
            await link.send(closed(1))
            await link.drain(timeout_s=LIMIT_S)
            await first.close()
            async with server(head, endpoint=port):
                await link.send(closed(2))
                await link.drain(timeout_s=LIMIT_S)
    assert head.got == [1, 2]


async def test_a_muted_client_pings_nobody_and_goes_past_nobody() -> None:
    async with server(Buffer()) as near:
        way = Way(near.endpoint)
        async with routed(way) as link:
            await link.send(closed(1))
            await link.drain(timeout_s=LIMIT_S)
            way.learn([hop("tcp://127.0.0.1:1")])
            link.is_muted = lambda: True
            silences = [0.0]
            await until(lambda: _grown(silences, near.peers["actor-0"].silent_s) >= 10 * FAST.heartbeat_s)
            assert link.num_moves == 0
            link.is_muted = lambda: False
            await until(lambda: near.peers["actor-0"].silent_s < FAST.heartbeat_s)


def _grown(silences: list[float], now: float) -> float:
    silences[0] = max(silences[0], now)
    return silences[0]


async def test_clients_of_one_process_may_share_a_context() -> None:
    buffer = Buffer()
    async with server(buffer) as s, routed(Way(s.endpoint)) as first:
        second = RoutedClient(
            Way(s.endpoint), peer="buffer", identity="actor-1", receives=m.BufferToActor, settings=FAST, beside=first
        )
        async with second:
            await second.send(closed(1))
            await second.drain(timeout_s=LIMIT_S)
        await first.send(closed(2))
        await first.drain(timeout_s=LIMIT_S)
    assert buffer.got == [1, 2]


# --- passing on -------------------------------------------------------------------------------------------------


class Passing:
    """A handler that passes everything on to a place that says when it has arrived."""

    def __init__(self) -> None:
        self.parcels: list[Parcel] = []
        self.answers = 0

    def __call__(self, peer: str, message: Any) -> Any:
        if isinstance(message, m.LeaseRequest):
            return self._answer()
        self.parcels.append(Parcel())
        return self.parcels[-1]

    async def _answer(self) -> Any:
        self.answers += 1
        if self.answers < 3:
            raise NoAnswer
        return NO_LEASES


async def test_what_is_passed_on_is_acknowledged_in_order_and_only_once_it_has_arrived() -> None:
    passing = Passing()
    async with server(passing) as s, client(s.endpoint) as c:
        for number in range(3):
            await c.send(closed(number))
        await until(lambda: len(passing.parcels) == 3)
        passing.parcels[1].arrive()
        passing.parcels[2].arrive()
        # A ping's answer acknowledges what there is to acknowledge: nothing while the first one is on its way.
        handled = s.link_status()["peers"][0]
        assert (handled["handled"], handled["unsettled"]) == (3, 3)
        assert c.stats.acked == 0
        passing.parcels[0].arrive()
        await c.drain(timeout_s=LIMIT_S)
        assert c.stats.acked == 3


async def test_a_refusal_of_the_other_server_reaches_the_sender_by_its_message() -> None:
    passing = Passing()
    refused = list[tuple[int, str]]()
    async with server(passing) as s, client(s.endpoint) as c:
        c.on_refused = lambda message, reason: refused.append((message.num_turns, reason))
        for number in range(3):
            await c.send(closed(number))
        await until(lambda: len(passing.parcels) == 3)
        passing.parcels[1].arrive("no such tree")
        passing.parcels[0].arrive()
        passing.parcels[2].arrive()
        await c.drain(timeout_s=LIMIT_S)
        assert (c.stats.acked, c.stats.refused) == (2, 1)
    assert refused == [(1, "no such tree")]


async def test_a_request_without_an_answer_is_asked_again_until_there_is_one() -> None:
    passing = Passing()
    async with server(passing) as s, client(s.endpoint) as c:
        assert (await within(c.request(LEASE_REQUEST, timeout_s=LIMIT_S))).retry_after_s == 1.0
    assert passing.answers == 3


class Chain:
    """A server whose handler passes sends on over a client of its own, as a relay does."""

    def __init__(self, upstream: RoutedClient) -> None:
        self._upstream = upstream

    async def __call__(self, peer: str, message: Any, frames: Any) -> Parcel:
        parcel = Parcel()
        await self._upstream.pass_on(parcel, frames)
        return parcel


async def test_a_chain_of_links_acknowledges_from_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    buffer = Buffer()
    buffer.open.clear()
    async with server(buffer) as far, routed(Way(far.endpoint), identity="passed-on") as up:
        near = Server(
            ANY_PORT, name="relay", receives=m.ActorToBuffer, handler=Chain(up), settings=FAST, with_frames=True
        )
        async with near, client(near.endpoint) as c:
            sending = [asyncio.create_task(c.send(closed(number))) for number in range(20)]
            await until(lambda: up.stats.unacked == FAST.window)
            assert c.stats.acked == 0
            buffer.open.set()
            await within(asyncio.gather(*sending))
            await c.drain(timeout_s=LIMIT_S)
    assert buffer.got == list(range(20))
    assert not caplog.records
