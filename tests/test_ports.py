"""Roles bind their ports themselves, say where they are, and are followed where they go."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from atpo_async.config import LinksConfig
from atpo_async.core.errors import SetupError
from atpo_async.links import ports
from atpo_async.links.addresses import port_of
from atpo_async.links.announcements import Announcer
from atpo_async.run.endpoints import Endpoints, EndpointsFile
from atpo_async.run.files import write_atomic
from atpo_async.wire import messages as m
from tests.links_support import FAST, LEASE_REQUEST, Buffer, client, closed, server
from tests.waiting_support import LIMIT_S, until

SOMEWHERE = Endpoints("tcp://a:1", "tcp://a:2", "tcp://a:3", "tcp://a:4")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which this process listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def listening(tmp_path: Path) -> EndpointsFile:
    return EndpointsFile(tmp_path, write_atomic)


# --- the configured ports ---------------------------------------------------------------------------------------


def test_a_configured_port_in_use_is_named_with_its_setting_and_who_holds_it(taken: int) -> None:
    with pytest.raises(
        SetupError, match=rf"^links\.learner_port = {taken} is in use on 127\.0\.0\.1 by process {os.getpid()} \(\S+"
    ):
        ports.check(LinksConfig(learner_port=taken))


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(SetupError, match=r"links\.host = '192\.0\.2\.1' is no address of this machine"):
        ports.check(LinksConfig(host="192.0.2.1"))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EACCES, "needs privileges; choose one above 1023"),
        (errno.EAFNOSUPPORT, "of a kind that this machine does not have"),
        (errno.EIO, "cannot be bound on here: Input/output error"),
    ],
)
def test_every_other_failure_to_bind_names_the_setting_or_the_host(number: int, text: str) -> None:
    error = ports.refused(number, host="here", port=7, setting="links.weights_port")
    assert text in str(error)
    assert "links." in str(error)


async def test_the_role_itself_says_so_where_the_port_was_taken_since_it_was_looked_at(taken: int) -> None:
    endpoint = f"tcp://127.0.0.1:{taken}"
    text = rf"^links\.\w+_port = {taken} is in use on 127\.0\.0\.1 by process {os.getpid()} "
    for end in (
        server(Buffer(), endpoint, setting="links.actors_port"),
        Announcer(endpoint, settings=FAST, setting="links.announce_port"),
    ):
        with pytest.raises(SetupError, match=text):
            await end.__aenter__()


# --- port 0 ---------------------------------------------------------------------------------------------------------


async def test_a_role_that_comes_back_takes_its_former_port_again() -> None:
    async with server(Buffer()) as first:
        port = port_of(first.endpoint)
    async with server(Buffer(), former_port=port) as again:
        assert port_of(again.endpoint) == port


async def test_where_the_former_port_is_taken_another_is_and_it_is_said_who_has_it(
    taken: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with server(Buffer(), former_port=taken) as s, client(s.endpoint) as c:
        assert port_of(s.endpoint) not in (0, taken)
        assert isinstance(await c.request(LEASE_REQUEST, timeout_s=LIMIT_S), m.Leases)
    assert f"port {taken}, where buffer was until now, is in use by process {os.getpid()} (" in caplog.text


async def test_a_configured_port_goes_before_the_former_one(taken: int) -> None:
    async with server(Buffer()) as first:
        port = port_of(first.endpoint)
    async with server(Buffer(), f"tcp://127.0.0.1:{port}", former_port=taken) as s:
        assert port_of(s.endpoint) == port


# --- who listens where ----------------------------------------------------------------------------------------------


def test_what_roles_note_is_added_and_a_new_life_of_the_run_begins_with_nothing(listening: EndpointsFile) -> None:
    assert listening.now() == listening.former() == Endpoints()
    assert not listening.there
    listening.note(actors="tcp://a:1", learner="tcp://a:2")
    listening.note(weights="tcp://a:3", announce="tcp://a:4")
    assert listening.now() == listening.former() == SOMEWHERE
    listening.forget()
    assert (listening.now(), listening.former(), listening.there) == (Endpoints(), SOMEWHERE, True)
    listening.note(actors="tcp://b:9")
    assert listening.now() == Endpoints(actors="tcp://b:9")
    assert listening.former() == Endpoints("tcp://b:9", "tcp://a:2", "tcp://a:3", "tcp://a:4")
    listening.forget()
    listening.forget()
    assert listening.former() == Endpoints("tcp://b:9", "tcp://a:2", "tcp://a:3", "tcp://a:4")


def test_a_damaged_file_is_named_with_the_way_out(listening: EndpointsFile) -> None:
    listening.path.write_text('{"actors": 1, "others": 2}')
    with pytest.raises(SetupError, match=r"endpoints\.json is damaged.*start the run again with `atpo train`"):
        listening.now()


async def test_a_client_finds_a_server_whose_endpoint_is_known_only_later(listening: EndpointsFile) -> None:
    buffer = Buffer()
    async with client("", locate=lambda: listening.now().actors) as c:
        await c.send(closed(1))
        assert not c.endpoint
        assert "buffer, which has not said where it is" in c._peer()
        async with server(buffer) as s:
            listening.note(actors=s.endpoint)
            await c.drain(timeout_s=LIMIT_S)
            assert c.endpoint == s.endpoint
    assert buffer.got == [1]


async def test_a_client_follows_a_server_to_another_port_with_all_that_was_not_acknowledged(
    listening: EndpointsFile,
) -> None:
    before, after = Buffer(), Buffer()
    async with client("", locate=lambda: listening.now().actors) as c:
        async with server(before) as s:
            listening.note(actors=s.endpoint)
            await c.send(closed(1))
            await c.drain(timeout_s=LIMIT_S)
            before.open.clear()
            await c.send(closed(2))
        old = c.endpoint
        await until(lambda: not c.connected)
        await c.send(closed(3))
        with socket.create_server(("127.0.0.1", port_of(old))):  # somebody else has the port by now
            async with server(after, former_port=port_of(old)) as s:
                listening.note(actors=s.endpoint)
                await c.drain(timeout_s=LIMIT_S)
                assert c.endpoint == s.endpoint != old
    assert (before.got, after.got) == ([1], [2, 3])


async def test_a_client_stays_where_it_is_while_the_endpoints_file_cannot_be_read(listening: EndpointsFile) -> None:
    buffer = Buffer()
    async with server(buffer) as s, client(s.endpoint, locate=lambda: "") as c:
        await c.send(closed(1))
        await c.drain(timeout_s=LIMIT_S)
    assert buffer.got == [1]
