"""Keys on real sockets on loopback: who gets in, as whom, who does not, and what becomes of who no longer may."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from atpo_async.config import LinksConfig
from atpo_async.core.errors import PeerLost, SetupError
from atpo_async.links.announcements import Announcer, Listener
from atpo_async.links.frames import PING, SEND
from atpo_async.links.keys import FOLLOWERS, LEARNERS, WHOSE, load_public, make_keys
from atpo_async.links.server import sessions
from atpo_async.status.facts import LINKS, published_facts
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from tests.links_support import ANY_PORT, FAST, LEASE_REQUEST, Buffer, changed, client, closed, fast, server, session_of
from tests.raw_link_support import link_frame, raw_dealer
from tests.waiting_support import LIMIT_S, until, within


def keyed(folder: Path) -> LinksConfig:
    return fast(keys_dir=folder)


@pytest.fixture
def server_keys(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    make_keys(folder, "server")
    return folder


def client_keys(tmp_path: Path, server_keys: Path, name: str = "host-b", *, allowed_as: str = "") -> Path:
    """A folder as it lies on another host: its own pair and the server's public key."""
    folder = tmp_path / name
    make_keys(folder, "client")
    (folder / "server.key").write_bytes((server_keys / "server.key").read_bytes())
    if allowed_as:
        allow(server_keys, folder, allowed_as)
    return folder


def allow(server_keys: Path, theirs: Path, name: str) -> None:
    path = server_keys / f"{name}.key"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((theirs / "client.key").read_bytes())


class Notes:
    """A handler that notes who sent what."""

    def __init__(self) -> None:
        self.got: dict[str, list[int]] = {}

    def __call__(self, peer: str, message: Any) -> None:
        self.got.setdefault(peer, []).append(message.num_turns)


# --- who gets in ------------------------------------------------------------------------------------------------


async def test_the_right_key_gets_in_and_a_key_can_be_added_while_the_server_runs(
    tmp_path: Path, server_keys: Path
) -> None:
    buffer = Buffer()
    theirs = client_keys(tmp_path, server_keys)
    async with server(buffer, settings=keyed(server_keys)) as s, client(s.endpoint, keyed(theirs)) as c:
        await until(lambda: "refused our key" in c.trouble)
        allow(server_keys, theirs, "host-b")
        await c.send(closed(1))
        await c.drain(timeout_s=LIMIT_S)
        assert isinstance(await c.request(LEASE_REQUEST, timeout_s=LIMIT_S), m.Leases)
    assert buffer.got == [1]


async def test_an_unknown_key_is_refused_counted_and_told_why(
    tmp_path: Path, server_keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = Buffer()
    theirs = client_keys(tmp_path, server_keys)
    async with server(buffer, settings=keyed(server_keys)) as s, client(s.endpoint, keyed(theirs)) as c:
        await c.send(closed(1))
        await until(lambda: bool(c.trouble))
        with pytest.raises(PeerLost, match="it refused our key"):
            await c.request(LEASE_REQUEST, timeout_s=0.02)
        assert not s.peers
        assert s.link_status()["refused_connections"]["unknown key"] == s.refused_connections >= 1
        public = load_public(theirs / "client.key").decode()
        assert f"refused 127.0.0.1 (1 times): unknown key, its public key {public} is not in" in caplog.text
    assert buffer.got == []


async def test_repeated_refusals_are_logged_ever_more_sparsely(
    tmp_path: Path, server_keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "atpo.links")
    theirs = client_keys(tmp_path, server_keys)
    eager = changed(keyed(theirs), heartbeat_s=0.002)
    async with server(Buffer(), settings=keyed(server_keys)) as s, client(s.endpoint, eager):
        await until(lambda: s.refused_connections >= 30)
    lines = [record.message for record in caplog.records if "unknown key" in record.message]
    assert [line.partition("(")[2].partition(")")[0] for line in lines] == ["1 times", "10 times"]


async def test_a_plain_peer_is_refused_and_counted(server_keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    buffer = Buffer()
    async with server(buffer, settings=keyed(server_keys)) as s, client(s.endpoint) as c:
        await until(lambda: bool(c.trouble))
        with pytest.raises(PeerLost, match="both ends need keys or neither"):
            await c.request(LEASE_REQUEST, timeout_s=0.02)
        await until(lambda: s.link_status()["refused_connections"].get("speaks without a key", 0) >= 1)
        assert not s.peers
        assert "refused a connection (1 times): speaks without a key" in caplog.text
    assert buffer.got == []


async def test_a_peer_with_a_password_is_refused_and_counted(server_keys: Path) -> None:
    async with (
        server(Buffer(), settings=keyed(server_keys)) as s,
        raw_dealer(s.endpoint, plain_username=b"admin", plain_password=b"admin") as stranger,
    ):
        await stranger.send_multipart([link_frame(SEND), *codec.encode(closed(1))])
        await until(lambda: s.refused_connections >= 1)
        assert not s.peers


async def test_a_peer_that_has_another_servers_key_is_refused_and_counted(tmp_path: Path, server_keys: Path) -> None:
    theirs = client_keys(tmp_path, server_keys, allowed_as="host-b")
    make_keys(tmp_path / "other", "server")
    (theirs / "server.key").write_bytes((tmp_path / "other" / "server.key").read_bytes())
    async with server(Buffer(), settings=keyed(server_keys)) as s, client(s.endpoint, keyed(theirs)) as c:
        await until(lambda: s.link_status()["refused_connections"].get("has another server's key", 0) >= 1)
        assert not c.connected
        assert not s.peers


async def test_a_client_with_the_servers_own_key_is_refused(tmp_path: Path, server_keys: Path) -> None:
    theirs = tmp_path / "thief"
    theirs.mkdir()
    for kind in ("key", "key_secret"):
        (theirs / f"client.{kind}").write_bytes((server_keys / f"server.{kind}").read_bytes())
        (theirs / f"client.{kind}").chmod(0o600)
    (theirs / "server.key").write_bytes((server_keys / "server.key").read_bytes())
    async with server(Buffer(), settings=keyed(server_keys)) as s, client(s.endpoint, keyed(theirs)):
        await until(lambda: s.refused_connections >= 1)
        assert not s.peers


async def test_with_keys_a_server_may_bind_every_interface(tmp_path: Path, server_keys: Path) -> None:
    buffer = Buffer()
    theirs = client_keys(tmp_path, server_keys, allowed_as="host-b")
    async with server(buffer, "tcp://0.0.0.0:0", settings=keyed(server_keys)) as s:
        endpoint = s.endpoint.replace("0.0.0.0", "127.0.0.1")
        async with client(endpoint, keyed(theirs)) as c:
            await c.send(closed(1))
            await c.drain(timeout_s=LIMIT_S)
    assert buffer.got == [1]


async def test_a_secret_key_that_others_can_read_is_refused(server_keys: Path) -> None:
    (server_keys / "server.key_secret").chmod(0o640)
    with pytest.raises(SetupError, match=r"mode 0640; others must not read it: chmod 600"):
        await server(Buffer(), settings=keyed(server_keys)).__aenter__()


async def test_missing_keys_are_a_setup_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SetupError, match=r"no CURVE secret key at .*server\.key_secret"):
        await server(Buffer(), settings=keyed(empty)).__aenter__()
    with pytest.raises(SetupError, match=r"no CURVE secret key at .*client\.key_secret"):
        await client("tcp://127.0.0.1:5555", keyed(empty)).__aenter__()
    make_keys(empty, "client")
    with pytest.raises(SetupError, match=r"no CURVE public key at .*server\.key"):
        await client("tcp://127.0.0.1:5555", keyed(empty)).__aenter__()


@pytest.mark.parametrize("right", [LEARNERS, FOLLOWERS])
@pytest.mark.parametrize("own", [True, False])
async def test_only_keys_with_its_right_get_to_a_learners_or_a_followers_socket(
    tmp_path: Path, server_keys: Path, own: bool, right: str
) -> None:
    actors = client_keys(tmp_path, server_keys, "gpu-7", allowed_as="gpu-7")
    learner = client_keys(tmp_path, server_keys, "big", allowed_as="client" if own else f"{right}/big")
    buffer = Buffer()
    async with (
        server(buffer, settings=keyed(server_keys), only=right) as s,
        client(s.endpoint, keyed(learner), "learner") as good,
        client(s.endpoint, keyed(actors), "learner") as bad,
    ):
        await good.send(closed(1))
        await good.drain(timeout_s=LIMIT_S)
        await until(lambda: "refused our key" in bad.trouble)
        assert set(s.peers) == {"client/learner" if own else "big/learner"}
        assert set(s.link_status()["refused_connections"]) == {f"is no {WHOSE[right]} key"}


# --- as whom ----------------------------------------------------------------------------------------------------


async def test_a_peer_is_who_its_key_says_and_two_keys_may_use_one_name(tmp_path: Path, server_keys: Path) -> None:
    notes = Notes()
    b, c = (client_keys(tmp_path, server_keys, name, allowed_as=name) for name in ("host-b", "host-c"))
    async with (
        server(notes, settings=keyed(server_keys)) as s,
        client(s.endpoint, keyed(b)) as from_b,
        client(s.endpoint, keyed(c)) as from_c,
        client(s.endpoint, keyed(c), "actor-1") as also_from_c,
        client(s.endpoint, keyed(c), "host-b/actor-0") as liar,
    ):
        for i in range(50):
            for number, link in enumerate((from_b, from_c, also_from_c, liar)):
                await within(link.send(closed(1000 * number + i)))
        for link in (from_b, from_c, also_from_c, liar):
            await link.drain(timeout_s=LIMIT_S)
        assert set(s.peers) == {"host-b/actor-0", "host-c/actor-0", "host-c/actor-1", "host-c/host-b/actor-0"}
        assert s.bad_messages == 0
    assert {peer: numbers[0] for peer, numbers in notes.got.items()} == {
        "host-b/actor-0": 0,
        "host-c/actor-0": 1000,
        "host-c/actor-1": 2000,
        "host-c/host-b/actor-0": 3000,
    }
    assert all(numbers == list(range(numbers[0], numbers[0] + 50)) for numbers in notes.got.values())


async def test_a_new_process_of_the_same_key_and_name_takes_over(tmp_path: Path, server_keys: Path) -> None:
    theirs = client_keys(tmp_path, server_keys, allowed_as="host-b")
    async with server(Buffer(), settings=keyed(server_keys)) as s, client(s.endpoint, keyed(theirs)) as old:
        await old.send(closed(1))
        await old.drain(timeout_s=LIMIT_S)
        async with client(s.endpoint, keyed(theirs)) as new:
            await new.send(closed(2))
            await new.drain(timeout_s=LIMIT_S)
            with pytest.raises(PeerLost, match="another process has taken that name"):
                await old.request(LEASE_REQUEST, timeout_s=LIMIT_S)


async def test_another_key_that_claims_a_peers_very_routing_id_and_session_gets_nothing_of_it(
    tmp_path: Path, server_keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stronger than what can be: nobody but the victim and the server knows that routing id."""
    notes = Notes()
    b, c = (client_keys(tmp_path, server_keys, name, allowed_as=name) for name in ("host-b", "host-c"))
    async with server(notes, settings=keyed(server_keys)) as s, client(s.endpoint, keyed(b)) as victim:
        for i in range(3):
            await victim.send(closed(i))
        await victim.drain(timeout_s=LIMIT_S)
        session = session_of(s, "host-b/actor-0")
        async with raw_dealer(s.endpoint, session.routing_id, keys=c, reconnect_ivl=-1) as thief:
            next_one = link_frame(SEND, session.nonce, 3, 3)
            await thief.send_multipart([next_one, *codec.encode(closed(666))])
            await until(lambda: s.bad_messages > 0)
        assert "from host-c/actor-0: claims the routing id of host-b/actor-0" in caplog.text
        for i in range(3, 20):
            await within(victim.send(closed(i)))
        await victim.drain(timeout_s=LIMIT_S)
        assert session_of(s, "host-b/actor-0") is session
        assert victim.stats.acked == 20
    assert notes.got == {"host-b/actor-0": list(range(20))}


async def test_another_key_cannot_have_a_peers_session_replaced(tmp_path: Path, server_keys: Path) -> None:
    notes = Notes()
    b, c = (client_keys(tmp_path, server_keys, name, allowed_as=name) for name in ("host-b", "host-c"))
    async with server(notes, settings=keyed(server_keys)) as s, client(s.endpoint, keyed(b)) as victim:
        await victim.send(closed(0))
        await victim.drain(timeout_s=LIMIT_S)
        nonce = session_of(s, "host-b/actor-0").nonce
        async with raw_dealer(s.endpoint, b"actor-0", keys=c) as thief:
            # A life of its own under the victim's number, replaced by its next one.
            for session in (nonce, nonce ^ 1, nonce):
                await thief.send_multipart([link_frame(PING, session), b""])
            await until(lambda: s.sessions.was_replaced("host-c", nonce))
        # As after a long silence: the victim has to be taken up anew.
        s.sessions.forget(session_of(s, "host-b/actor-0"))
        await victim.send(closed(1))
        await victim.drain(timeout_s=LIMIT_S)
        # The handler has no reply to it; that it is told so will do.
        assert isinstance(await victim.request(closed(2), timeout_s=LIMIT_S), m.Refused)
    assert notes.got == {"host-b/actor-0": [0, 1, 2]}


async def test_one_key_cannot_use_up_the_table_of_peers(
    tmp_path: Path, server_keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_PEERS_OF_A_KEY", 3)
    b, c = (client_keys(tmp_path, server_keys, name, allowed_as=name) for name in ("host-b", "host-c"))
    buffer = Buffer()
    async with server(buffer, settings=keyed(server_keys)) as s, client(s.endpoint, keyed(b)) as good:

        def heard(count: int) -> bool:
            return len(s.peers) + s.sessions.refused >= count

        for i in range(5):
            async with raw_dealer(s.endpoint, b"name-%d" % i, keys=c) as stranger:
                await stranger.send_multipart([link_frame(PING), b""])
                await until(partial(heard, i + 1))
        await until(lambda: s.sessions.refused == 2)
        # The older ones, of which nothing of use came, made way; those of another key had no part in it.
        assert {name for name in s.peers if name.startswith("host-c/")} == {f"host-c/name-{i}" for i in (2, 3, 4)}
        await good.send(closed(1))
        await good.drain(timeout_s=LIMIT_S)
    assert buffer.got == [1]


# --- who no longer may ------------------------------------------------------------------------------------------


async def test_a_key_that_is_taken_away_is_out_at_once_and_back_when_it_is_back(
    tmp_path: Path, server_keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = Buffer()
    theirs = client_keys(tmp_path, server_keys, allowed_as="host-b")
    async with server(buffer, settings=keyed(server_keys)) as s, client(s.endpoint, keyed(theirs)) as c:
        await c.send(closed(0))
        await c.drain(timeout_s=LIMIT_S)
        (server_keys / "host-b.key").unlink()
        await until(lambda: not s.peers)
        assert "buffer shuts out host-b/actor-0: its key was taken away" in caplog.text
        await c.send(closed(1))
        await until(lambda: "refused our key" in c.trouble)
        assert not c.connected
        assert buffer.got == [0]
        allow(server_keys, theirs, "host-b")
        await c.send(closed(2))
        await c.drain(timeout_s=LIMIT_S)
    assert buffer.got == [0, 1, 2]


async def test_what_comes_over_a_connection_whose_key_was_taken_away_is_dropped_and_counted(
    tmp_path: Path, server_keys: Path
) -> None:
    notes = Notes()
    theirs = client_keys(tmp_path, server_keys, allowed_as="host-b")
    async with (
        server(notes, settings=keyed(server_keys)) as s,
        raw_dealer(s.endpoint, b"actor-0", keys=theirs) as stubborn,
    ):
        await stubborn.send_multipart([link_frame(SEND, 7, 0, 0), *codec.encode(closed(0))])
        await until(lambda: notes.got == {"host-b/actor-0": [0]})
        (server_keys / "host-b.key").unlink()
        await until(lambda: not s.peers)
        for seq in (1, 2):
            await stubborn.send_multipart([link_frame(SEND, 7, seq, 0), *codec.encode(closed(seq))])
        await stubborn.send_multipart([b"rubbish"])
        await until(lambda: s.link_status()["refused_connections"].get("its key was taken away") == 3)
        assert not s.peers
    assert notes.got == {"host-b/actor-0": [0]}


async def test_a_request_under_way_is_cancelled_with_its_key(tmp_path: Path, server_keys: Path) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def handler(peer: str, message: Any) -> Any:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    theirs = client_keys(tmp_path, server_keys, allowed_as="host-b")
    async with server(handler, settings=keyed(server_keys)) as s, client(s.endpoint, keyed(theirs)) as c:
        asking = asyncio.create_task(c.request(LEASE_REQUEST, timeout_s=LIMIT_S))
        await within(begun.wait())
        (server_keys / "host-b.key").unlink()
        await within(cancelled.wait())
        asking.cancel()


async def test_a_new_key_in_a_files_place_is_that_peer_and_the_old_one_is_out(
    tmp_path: Path, server_keys: Path
) -> None:
    notes = Notes()
    first = client_keys(tmp_path, server_keys, "first", allowed_as="host-b")
    second = client_keys(tmp_path, server_keys, "second")
    async with server(notes, settings=keyed(server_keys)) as s, client(s.endpoint, keyed(first)) as old:
        await old.send(closed(0))
        await old.drain(timeout_s=LIMIT_S)
        (server_keys / "new").write_bytes((second / "client.key").read_bytes())
        (server_keys / "new").rename(server_keys / "host-b.key")
        async with client(s.endpoint, keyed(second)) as new:
            await new.send(closed(1))
            await new.drain(timeout_s=LIMIT_S)
            # By its name or by its key, whichever the server comes to first.
            await until(lambda: old._failure is not None or "key" in old.trouble)
            with contextlib.suppress(PeerLost):
                await old.send(closed(2))
            await new.send(closed(3))
            await new.drain(timeout_s=LIMIT_S)
    assert notes.got == {"host-b/actor-0": [0, 1, 3]}


# --- announcements and status -----------------------------------------------------------------------------------


def announced(version: int) -> m.WeightsAnnounced:
    return m.WeightsAnnounced(run="r", version=version, total_bytes=1, digest="", host_id="h", shm_path=None)


async def test_announcements_follow_the_same_rule_for_keys(tmp_path: Path, server_keys: Path) -> None:
    theirs = client_keys(tmp_path, server_keys)
    async with (
        Announcer(ANY_PORT, settings=keyed(server_keys)) as announcer,
        Listener(announcer.endpoint, receives=m.WeightsAnnounced, settings=keyed(theirs)) as listener,
    ):
        await until(lambda: announcer.refused_connections >= 1)
        await announcer.publish(announced(1))
        assert await listener.next(timeout_s=0.1) is None
        assert announcer.link_status()["refused_connections"] == {"unknown key": announcer.refused_connections}
        assert "refused our key" in listener.link_status()["trouble"]
        allow(server_keys, theirs, "host-b")
        async with asyncio.timeout(LIMIT_S):
            while (heard := await listener.next(timeout_s=0.02)) is None:
                await announcer.publish(announced(1))
        assert heard.version == 1


async def test_the_status_of_both_ends_is_json_and_names_the_key(tmp_path: Path, server_keys: Path) -> None:
    buffer = Buffer()
    buffer.open.clear()
    theirs = client_keys(tmp_path, server_keys, allowed_as="host-b")
    async with server(buffer, settings=keyed(server_keys)) as s, client(s.endpoint, keyed(theirs)) as c:
        await c.send(closed(0))
        asking = asyncio.create_task(c.request(LEASE_REQUEST, timeout_s=LIMIT_S))
        await until(lambda: buffer.requests == 1 and bool(s.link_status()["peers"][0]["handling"]))
        there, here = json.loads(json.dumps(s.link_status())), json.loads(json.dumps(c.link_status()))
        assert (there["name"], there["keys"], there["window"]) == ("buffer", True, FAST.window)
        (peer,) = there["peers"]
        assert (peer["peer"], peer["queued"], peer["handling"]["what"]) == ("host-b/actor-0", 1, "TreeClosed")
        assert [request["what"] for request in peer["requests"]] == ["LeaseRequest"]
        assert (here["peer"], here["connected"], here["unacked"], here["trouble"]) == ("buffer", True, 1, "")
        assert [request["what"] for request in here["requests"]] == ["LeaseRequest"]
        assert [wait["what"] for wait in here["waits"]] == ["LeaseRequest waits for its reply"]
        # A role's own status has them.
        ends = {f"{LINKS}{end.title}": end for end in (s, c)}
        assert {published_facts()[name]["kind"] for name in ends} == {"server", "client"}
        buffer.open.set()
        await within(asking)
    assert not ends.keys() & published_facts().keys()
