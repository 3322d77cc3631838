"""What one peer can cost a server: replies that it does not read, and names that it makes up."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import zmq
import zmq.asyncio

from atpo_async.core.errors import PeerLost
from atpo_async.links.client import Client
from atpo_async.links.frames import LINK, PING, REPLY, REQUEST
from atpo_async.links.pump import BURST, Pump
from atpo_async.links.server import Server, descriptors, sessions
from atpo_async.links.server.handling import BadMessages
from atpo_async.links.server.outbox import ALL_PEERS, Outbox
from atpo_async.links.server.sessions import Session, SessionTable, Work, admission
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from tests.links_support import ANY_PORT, LEASE_REQUEST, Buffer, client, closed, fast, server, session_of
from tests.raw_link_support import link_frame, raw_dealer
from tests.waiting_support import LIMIT_S, until

# --- bytes on their way -----------------------------------------------------------------------------------------


@dataclass
class Tracker:
    done: bool = False


def test_one_peer_has_no_more_on_its_way_than_its_bound_but_for_a_single_message() -> None:
    outbox = Outbox(100)
    assert outbox.has_space(b"a", 250)
    first = Tracker()
    outbox.add(b"a", [first], 250)
    assert not outbox.has_space(b"a", 1)
    assert outbox.has_space(b"b", 60)
    outbox.add(b"b", [Tracker()], 60)
    assert outbox.has_space(b"b", 40)
    assert not outbox.has_space(b"b", 41)
    first.done = True
    assert outbox.has_space(b"a", 100)
    assert (outbox.unsent(b"a"), outbox.unsent(b"b"), outbox.unsent_bytes, outbox.most_unsent_bytes) == (0, 60, 60, 310)


def test_all_peers_together_are_bounded_and_a_peer_with_nothing_unsent_is_the_last_to_wait() -> None:
    outbox = Outbox(100)
    trackers = [Tracker() for _ in range(2 * ALL_PEERS)]
    for i in range(ALL_PEERS):
        outbox.add(b"%d" % i, [trackers[i]], 90)
    assert outbox.has_space(b"0", 10)
    outbox.add(b"more", [trackers[ALL_PEERS]], 40)
    assert outbox.unsent_bytes == ALL_PEERS * 100
    assert not outbox.has_space(b"1", 5)
    for i in range(ALL_PEERS + 1, 2 * ALL_PEERS):
        assert outbox.has_space(b"%d" % i, 100)
        outbox.add(b"%d" % i, [trackers[i]], 100)
    assert outbox.has_space(b"new", 100)
    assert not outbox.has_space(b"new", 101)
    for tracker in trackers:
        tracker.done = True
    assert outbox.has_space(b"1", 100)
    assert outbox.look() == 0


def test_what_is_sent_is_counted_off_in_the_order_in_which_it_left() -> None:
    outbox = Outbox(100)
    first, second = Tracker(), Tracker()
    outbox.add(b"a", [first, second], 30)
    outbox.add(b"a", [Tracker(done=True)], 20)
    first.done = True
    assert outbox.unsent(b"a") == 50
    second.done = True
    assert outbox.look() == 0


CHUNK = m.ChunkRequest(run="r", version=0, index=0)


class Weights:
    """Answers with a chunk, and counts how often it was asked."""

    def __init__(self, nbytes: int) -> None:
        self.asked = 0
        self._chunk = m.Chunk(version=0, index=0, data=np.zeros(nbytes, np.uint8))

    async def __call__(self, peer: str, message: Any) -> Any:
        self.asked += 1
        return self._chunk


def weights_server(handler: Any, **changes: Any) -> Server:
    settings = fast(heartbeat_s=60.0, **changes)
    return Server(ANY_PORT, name="learner", receives=m.ActorToLearner, handler=handler, settings=settings)


def actor(endpoint: str, name: str = "good", **changes: Any) -> Client:
    settings = fast(heartbeat_s=60.0, **changes)
    return Client(endpoint, peer="learner", identity=name, receives=m.LearnerToActor, settings=settings)


async def test_peers_that_ask_for_chunks_and_never_read_cost_a_bounded_number_of_bytes() -> None:
    """Each asks for 900 MB, under a new name for its life with every request."""
    weights = Weights(900_000)
    async with weights_server(weights, window=64) as s, AsyncExitStack() as stack:
        strangers = [await stack.enter_async_context(raw_dealer(s.endpoint, b"s%d" % i, rcvhwm=1)) for i in range(3)]
        frames = codec.encode(CHUNK)
        for number in range(1000):
            for stranger in strangers:
                await stranger.send_multipart([link_frame(REQUEST, session=number // 10, a=number), *frames])
        c = await stack.enter_async_context(actor(s.endpoint))
        for _ in range(20):
            reply = await c.request(CHUNK, timeout_s=LIMIT_S)
            assert reply.data.nbytes == 900_000
        limit = s.settings.max_message_bytes
        counters = s.counters
        assert counters["most_unsent_bytes"] <= 2 * ALL_PEERS * limit
        assert all(peer["unsent_bytes"] <= limit for peer in s.link_status()["peers"])
        assert counters["kept_reply_bytes"] <= ALL_PEERS * limit
        # Of 3,000 what would only have waited was never made, but for those that were let in, in each life of a peer,
        # before its first reply told how large they are.
        assert weights.asked < 2000


async def test_a_peer_that_reads_late_gets_all_its_replies_without_asking_again() -> None:
    weights = Weights(200_000)
    async with weights_server(weights, window=64) as s, raw_dealer(s.endpoint, rcvhwm=1) as stranger:
        # The first reply tells how large they are: no more are made at once than there is space for.
        await stranger.send_multipart([link_frame(REQUEST, a=0), *codec.encode(CHUNK)])
        first = await asyncio.wait_for(stranger.recv_multipart(), LIMIT_S)
        found = [LINK.unpack(first[0])[3]]
        for number in range(1, 60):
            await stranger.send_multipart([link_frame(REQUEST, a=number), *codec.encode(CHUNK)])
        await until(lambda: s.counters["unsent_bytes"] > 0 or weights.asked == 60)
        while len(found) < 60:
            reply = await asyncio.wait_for(stranger.recv_multipart(), LIMIT_S)
            _, kind, _, number, _ = LINK.unpack(reply[0])
            assert kind == REPLY
            found.append(number)
        assert found == list(range(60))
        await until(lambda: s.counters["unsent_bytes"] == 0)
    assert weights.asked == 60


async def test_an_honest_actor_with_chunks_in_flight_is_served_beside_one_that_never_reads() -> None:
    weights = Weights(200_000)
    async with (
        weights_server(weights, window=64) as s,
        raw_dealer(s.endpoint, rcvhwm=1) as stranger,
        actor(s.endpoint) as c,
    ):
        for number in range(64):
            await stranger.send_multipart([link_frame(REQUEST, a=number), *codec.encode(CHUNK)])
        for _ in range(25):
            replies = await asyncio.gather(*(c.request(CHUNK, timeout_s=LIMIT_S) for _ in range(4)))
            assert [reply.data.nbytes for reply in replies] == [200_000] * 4
        held = {p["peer"]: len(p["requests"]) for p in s.link_status()["peers"]}
        assert held["good"] == 0


async def test_replies_that_had_to_wait_are_counted() -> None:
    release = asyncio.Event()

    async def handler(peer: str, message: Any) -> Any:
        await release.wait()
        return m.Chunk(version=0, index=0, data=np.zeros(900_000, np.uint8))

    async with weights_server(handler, window=64) as s, raw_dealer(s.endpoint, rcvhwm=1) as stranger:
        for number in range(16):  # all at once, before it is known how large a reply is
            await stranger.send_multipart([link_frame(REQUEST, a=number), *codec.encode(CHUNK)])
        await until(lambda: s.peers.get("stranger") is not None and s.peers["stranger"].requests == 16)
        release.set()
        await until(lambda: s.counters["held_back"] > 0)
        assert s.counters["most_unsent_bytes"] <= s.settings.max_message_bytes


async def test_a_ping_that_claims_more_open_requests_than_there_can_be_is_not_answered_at_length() -> None:
    async with server(Buffer()) as s, raw_dealer(s.endpoint) as stranger:
        await stranger.send_multipart([link_frame(PING), bytes(8 << 15)])
        await until(lambda: s.bad_messages == 1)


async def test_a_connection_that_leads_to_itself_is_no_server_and_is_made_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """TCP connects a port to itself where both are the same and nobody listens."""
    context = zmq.asyncio.Context()
    try:
        mirror = context.socket(zmq.DEALER)
        mirror.bind("tcp://127.0.0.1:0")
        async with client(mirror.get_string(zmq.LAST_ENDPOINT), fast(heartbeat_s=0.02)) as c:
            await c.send(closed(1))
            while c.stats.resent < 2:
                await mirror.send_multipart(await asyncio.wait_for(mirror.recv_multipart(), LIMIT_S))
            assert c.stats.acked == 0
        assert "that is no server's; dropped" in caplog.text
    finally:
        context.destroy(linger=0)


# --- names ------------------------------------------------------------------------------------------------------


def session(number: int, *, owner: str = "", silent_s: float = 0.0, useful: bool = False) -> Session:
    name = f"{owner}/{number}" if owner else str(number)
    return Session(b"%d" % number, owner, name, number, 100.0 - silent_s, useful=useful)


@pytest.fixture
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_PEERS", 4)
    monkeypatch.setattr(sessions, "MAX_PEERS_OF_A_KEY", 2)


@pytest.mark.usefixtures("small_table")
def test_a_peer_that_sent_nothing_of_use_makes_way_first_then_the_one_silent_the_longest() -> None:
    alive = [session(i, useful=True) for i in range(3)]

    def victim(*others: Session, owner: str = "") -> tuple[str | None, str]:
        found, full = admission([*alive, *others], owner, now=100.0, heartbeat_s=2.0)
        return (None if found is None else found.name), full

    assert victim() == (None, "")
    assert victim(session(8), session(9)) == ("8", "")
    assert victim(session(8, useful=True, silent_s=9.0)) == (None, "the table of peers is full: 4, all of them alive")
    assert victim(session(8, useful=True, silent_s=11.0), session(9, useful=True, silent_s=30.0)) == ("9", "")
    busy = session(8, silent_s=30.0)
    busy.sends.handled = 1  # and not settled
    assert victim(busy)[0] is None


@pytest.mark.usefixtures("small_table")
def test_with_keys_a_full_key_evicts_only_its_own_peers() -> None:
    greedy = [session(i, owner="b") for i in range(2)]
    assert admission([*greedy, session(7, owner="c")], "b", now=100.0, heartbeat_s=2.0) == (greedy[0], "")
    assert admission([*greedy, session(7, owner="c")], "c", now=100.0, heartbeat_s=2.0) == (None, "")
    alive = [session(i, owner="b", useful=True) for i in range(2)]
    assert admission(alive, "b", now=100.0, heartbeat_s=2.0) == (
        None,
        "the table of peers is full: 2 of the key 'b', all of them alive",
    )


async def test_a_life_that_is_replaced_before_its_request_has_begun_is_kept_by_nothing() -> None:
    gone: list[Session] = []
    table = SessionTable("s", fast(), answer=lambda *frame: True, on_gone=gone.append, bad=BadMessages("s"))

    async def serve(session: Session) -> None:
        raise AssertionError(f"{session.name} has gone")

    def left() -> int:
        return sum(isinstance(each, Session) and each.nonce == 1 for each in gc.get_objects())

    gc.collect()
    gc.freeze()  # of what was there before, nothing is counted
    gc.disable()  # in a process with many objects it finds rings late
    try:
        first = table.of(b"a", "", 1)
        assert first is not None
        task = asyncio.create_task(serve(first))
        first.requests.work[7] = Work("LeaseRequest", 0.0, task=task)
        assert table.of(b"a", "", 2) is not None
        assert gone == [first]
        await asyncio.wait([task])
        assert task.cancelled()
        assert left() == 1
        del first, task, gone[:]
        await asyncio.sleep(0)
        assert left() == 0
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.usefixtures("small_table")
async def test_invented_names_do_not_keep_a_newcomer_out() -> None:
    buffer = Buffer()
    async with server(buffer) as s, AsyncExitStack() as stack:
        for i in range(4):
            stranger = await stack.enter_async_context(raw_dealer(s.endpoint, b"name-%d" % i))
            await stranger.send_multipart([link_frame(PING), b""])
        await until(lambda: len(s.peers) == 4)
        async with client(s.endpoint) as c:
            assert isinstance(await c.request(LEASE_REQUEST, timeout_s=LIMIT_S), m.Leases)
            assert "actor-0" in s.peers
        assert len(s.peers) == 4
        assert s.counters["refused_peers"] == 1


@pytest.mark.usefixtures("small_table")
async def test_a_refused_peer_hears_why_and_is_let_in_when_a_place_is_free(caplog: pytest.LogCaptureFixture) -> None:
    buffer = Buffer()
    async with server(buffer) as s, AsyncExitStack() as stack:
        others = [await stack.enter_async_context(client(s.endpoint, identity=f"other-{i}")) for i in range(4)]
        for other in others:
            await other.request(LEASE_REQUEST, timeout_s=LIMIT_S)
        async with client(s.endpoint, identity="late") as late:
            await late.send(closed(1))
            waiting = asyncio.create_task(late.request(LEASE_REQUEST, timeout_s=LIMIT_S))
            await until(lambda: "full" in late.trouble)
            with pytest.raises(PeerLost, match=r"it takes no further clients: the table of peers is full: 4, all of"):
                await late.request(LEASE_REQUEST, timeout_s=0.0)
            assert "late" not in s.peers
            await others[0].close()
            assert isinstance(await waiting, m.Leases)
            await late.drain(timeout_s=LIMIT_S)
            assert late.trouble == ""
            assert {"late", "other-1", "other-2", "other-3"} == set(s.peers)
    assert buffer.got == [1]
    assert "buffer refuses late: the table of peers is full: 4" in caplog.text


# --- a server that is behind ---------------------------------------------------------------------------------------


class Backlog:
    """A socket with so many messages, and for ever a pipe for its descriptor."""

    closed = False

    def __init__(self, number: int) -> None:
        self.number = number
        self._ends = os.pipe()

    def getsockopt(self, option: int) -> int:
        return self._ends[0]

    def recv(self, flags: int, copy: bool) -> zmq.Frame:
        if not self.number:
            raise zmq.Again
        self.number -= 1
        return zmq.Frame(b"m")

    def close(self, linger: int) -> None:
        for end in self._ends:
            os.close(end)


async def test_a_socket_counts_as_behind_until_nothing_is_left_in_it() -> None:
    socket = Backlog(2 * BURST + 1)
    pump = Pump(cast(Any, socket), lambda frames, user: None)
    try:
        began = time.monotonic()
        assert pump.emptied_at >= began
        await asyncio.sleep(0)
        assert socket.number == BURST + 1
        behind = pump.emptied_at
        await asyncio.sleep(0)
        assert pump.emptied_at == behind < time.monotonic()
        await asyncio.sleep(0)
        assert socket.number == 0
        assert pump.emptied_at > behind
    finally:
        pump.close()


async def test_a_client_is_not_silent_while_its_server_is_behind_with_what_has_come() -> None:
    async with server(Buffer()) as s, client(s.endpoint) as c:
        await c.send(closed(1))
        await c.drain(timeout_s=LIMIT_S)
        assert s._pump is not None
        session_of(s, "actor-0").heard_at = 50.0
        s._pump._behind_since = 40.0
        assert dict(s.silences()) == {"actor-0": 0.0}
        s._pump._behind_since = 60.0
        assert dict(s.silences()) == {"actor-0": 10.0}


# --- open files ----------------------------------------------------------------------------------------------------


def test_the_limit_of_open_files_is_raised_or_says_for_how_many_clients_there_is_space(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "atpo.links")
    limits = [1024, 100_000]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: limits.__setitem__(slice(0, 2), list(new)))
    assert descriptors.raise_limit(4096) == 4096
    assert limits == [4096 + descriptors.OTHERS, 100_000]
    limits[:] = [1024, 1024]
    assert descriptors.raise_limit(4096) == 1024 - descriptors.OTHERS
    assert "at most 768 clients may connect: this process may open 1024 files (ulimit -n)" in caplog.text


def test_a_client_for_which_no_file_may_be_opened_is_refused_with_that_reason() -> None:
    there = [session(i, useful=True) for i in range(3)]
    found = admission(there, "", now=100.0, heartbeat_s=1.0, most=3)
    assert found == (
        None,
        "the table of peers is full: 3, for which the server may open files (ulimit -n), all of them alive",
    )
    assert admission(there, "", now=100.0, heartbeat_s=1.0, most=4) == (None, "")
