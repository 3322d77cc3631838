"""Addresses as text, IPv6 too, and real sockets at the IPv6 loopback where the machine has one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from pathlib import Path

import pytest

from atpo_async.config import LinksConfig, build
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.links import addresses, ports
from atpo_async.links.addresses import (
    endpoint_of,
    from_here,
    is_ipv6,
    is_loopback,
    is_wildcard,
    seen_from,
    split,
)
from atpo_async.links.advertised import to_join
from atpo_async.links.announcements import Announcer, Listener
from atpo_async.links.keys import make_keys
from atpo_async.ops.role import parse_address
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.rundir import RunDir
from atpo_async.wire import messages as m
from buffer.service import BufferService
from tests.links_support import FAST, LEASE_REQUEST, Buffer, client, fast, server
from tests.waiting_support import LIMIT_S, until


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as tried:
        tried.bind(("::1", 0))
        return True
    return False


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")


@pytest.mark.parametrize(
    ("buffer", "said", "reached"),
    [
        ("tcp://[fd00::5]:7000", "tcp://[::]:7001", "tcp://[fd00::5]:7001"),
        ("tcp://[fd00::5]:7000", "tcp://0.0.0.0:7001", "tcp://[fd00::5]:7001"),
        ("tcp://[fd00::5]:7000", "tcp://*:7001", "tcp://[fd00::5]:7001"),
        ("tcp://[fd00::5]:7000", "tcp://[0:0:0:0:0:0:0:0]:7001", "tcp://[fd00::5]:7001"),
        ("tcp://10.0.0.5:7000", "tcp://0.0.0.0:7001", "tcp://10.0.0.5:7001"),
        ("tcp://10.0.0.5:7000", "tcp://[::]:7001", "tcp://10.0.0.5:7001"),
        ("tcp://gpu-7.example:7000", "tcp://[::]:7001", "tcp://gpu-7.example:7001"),
        ("tcp://[fe80::5%eth1]:7000", "tcp://[::]:7001", "tcp://[fe80::5%eth1]:7001"),
        # A zone is an interface of one's own machine: the learner's says nothing here.
        ("tcp://[fe80::5%eth1]:7000", "tcp://[fe80::5%2]:7001", "tcp://[fe80::5%eth1]:7001"),
        ("tcp://[::1]:7000", "tcp://[::1]:7001", "tcp://[::1]:7001"),
        ("tcp://10.0.0.5:7000", "tcp://10.0.0.6:7001", "tcp://10.0.0.6:7001"),
        ("tcp://[::]:7000", "tcp://[::]:7001", "tcp://[::1]:7001"),
        ("tcp://0.0.0.0:7000", "tcp://0.0.0.0:7001", "tcp://127.0.0.1:7001"),
    ],
)
def test_a_learner_that_listens_at_every_address_is_reached_where_the_buffer_was(
    buffer: str, said: str, reached: str
) -> None:
    assert seen_from(buffer, said) == reached


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("gpu-7:7000", "gpu-7", 7000),
        ("tcp://10.0.0.5:7000", "10.0.0.5", 7000),
        ("[::1]:7000", "::1", 7000),
        ("tcp://[fe80::1%eth0]:7000", "fe80::1%eth0", 7000),
    ],
)
def test_an_address_is_taken_apart_and_put_together_again(text: str, host: str, port: int) -> None:
    assert split(text) == (host, port)
    assert parse_address(text) == endpoint_of(host, port) == f"tcp://{text.removeprefix('tcp://')}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("::1:7000", r"an IPv6 address has to be in brackets: \[::1\]:7000|brackets"),
        ("[::1]", "expected HOST:PORT"),
        ("[gpu-7]:7000", "no IPv6 address in brackets"),
        ("[::1:7000", "brackets"),
        ("gpu-7", "expected HOST:PORT"),
        ("gpu-7:0", "port 0"),
        ("gpu-7:70000", "up to 65535"),
        (":7000", "expected HOST:PORT"),
    ],
)
def test_text_that_is_no_address_is_refused_with_the_form_of_one(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_address(text)


def test_hosts_are_loopback_wildcard_or_neither() -> None:
    assert [h for h in ("*", "0.0.0.0", "::", "127.0.0.1", "::1", "gpu-7") if is_wildcard(h)] == ["*", "0.0.0.0", "::"]
    local = ("127.0.0.1", "127.3.2.1", "::1", "::1%lo", "::ffff:127.0.0.1", "localhost")
    assert all(is_loopback(host) for host in local)
    assert not any(is_loopback(host) for host in ("10.0.0.5", "::", "fd00::5", "gpu-7", "::ffff:10.0.0.5", "*"))
    assert [from_here(host) for host in ("0.0.0.0", "*", "::", "fd00::5")] == [
        "127.0.0.1",
        "127.0.0.1",
        "::1",
        "fd00::5",
    ]


def test_of_a_name_with_addresses_of_both_kinds_ipv4_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "both": [(socket.AF_INET6, "fd00::5"), (socket.AF_INET, "10.0.0.5")],
        "six": [(socket.AF_INET6, "fd00::5")],
        "none": [],
    }
    monkeypatch.setattr(addresses, "_look_up", known.__getitem__)
    assert [is_ipv6(name) for name in ("both", "six", "none", "fd00::5", "10.0.0.5", "*")] == [
        *(False, True, False),
        *(True, False, False),
    ]
    assert [addresses.bindable(name) for name in ("both", "six", "::", "*")] == ["10.0.0.5", "fd00::5", "::", "0.0.0.0"]
    with pytest.raises(SetupError, match=r"links\.host = 'none' is no address"):
        addresses.bindable("none")


def test_an_endpoint_to_bind_has_brackets_around_ipv6_only() -> None:
    assert ports.to_bind(LinksConfig(host="::", weights_port=7001), "weights") == "tcp://[::]:7001"
    assert ports.to_bind(LinksConfig(), "actors") == "tcp://127.0.0.1:0"


@ipv6
async def test_sends_requests_and_announcements_go_over_ipv6() -> None:
    buffer = Buffer()
    async with (
        server(buffer, "tcp://[::1]:0") as s,
        client(s.endpoint) as c,
        Announcer("tcp://[::1]:0", settings=FAST) as announcer,
        Listener(announcer.endpoint, receives=m.Refused, settings=FAST) as listener,
    ):
        assert s.endpoint.startswith("tcp://[::1]:")
        assert isinstance(await c.request(LEASE_REQUEST, timeout_s=LIMIT_S), m.Leases)
        await until(lambda: listener.connected)
        heard = None
        while heard is None:
            await announcer.publish(m.Refused(reason="told"))
            heard = await listener.next(timeout_s=0.05)
        assert (type(heard), heard.reason) == (m.Refused, "told")


@ipv6
async def test_who_listens_at_every_ipv6_address_is_reached_by_both_kinds(tmp_path: Path) -> None:
    for name in ("server", "client"):
        make_keys(tmp_path / "keys", name)
    settings = fast(keys_dir=tmp_path / "keys")
    buffer = Buffer()
    async with server(buffer, "tcp://[::]:0", settings) as s:
        port = s.endpoint.rpartition(":")[2]
        assert s.endpoint == f"tcp://[::]:{port}"
        for host in ("127.0.0.1", "[::1]", "[::1%lo]" if sys.platform == "linux" else "[::1]"):
            async with client(f"tcp://{host}:{port}", settings) as c:
                assert isinstance(await c.request(LEASE_REQUEST, timeout_s=LIMIT_S), m.Leases)


@ipv6
async def test_a_buffer_at_an_ipv6_address_says_so_in_the_runs_folder(tmp_path: Path) -> None:
    config = build({"run": {"dir": str(tmp_path), "name": "r"}, "links": {"host": "::1"}})
    run = RunDir.create(config)
    ports.check(config.links)
    service = BufferService(
        config, run=run.run_id, endpoints=ports.all_to_bind(config.links), rundir=run, stopping=asyncio.Event()
    )
    async with service:
        run.listening.note(actors=service.actors.endpoint)
        found = run.listening.now()
        assert found.actors.startswith("tcp://[::1]:")
        async with client(parse_address(to_join(found.actors)[0])) as c:
            hello = m.ActorHello(
                protocol=m.PROTOCOL,
                run="",
                actor="actor-0",
                environment=config.environment.name,
                search_leaves=config.search.max_leaves,
            )
            assert isinstance(await c.request(hello, timeout_s=LIMIT_S), m.Welcome)
    assert found == Endpoints(actors=found.actors)


# --- endpoints that are refused ---------------------------------------------------------------------------------------


async def test_a_port_in_use_is_a_setup_error_that_names_it() -> None:
    async with server(Buffer()) as s:
        with pytest.raises(
            SetupError, match=rf"= {s.endpoint.rpartition(':')[2]} is in use on 127\.0\.0\.1 by process"
        ):
            await server(Buffer(), s.endpoint).__aenter__()


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://192.0.2.7:0", "tcp://[::]:0", "tcp://a.example:0", "tcp://eth0:0"],
)
async def test_binding_off_loopback_without_keys_is_refused_with_the_way_out(endpoint: str) -> None:
    for end in (server(Buffer(), endpoint), Announcer(endpoint, settings=FAST)):
        with pytest.raises(SetupError, match=r"without keys: it is not a loopback address; set links.keys_dir"):
            await end.__aenter__()


async def test_connecting_off_loopback_without_keys_is_refused() -> None:
    for end in (client("tcp://192.0.2.7:5555"), Listener("tcp://a.example:1", receives=m.Refused, settings=FAST)):
        with pytest.raises(SetupError, match="will not connect to"):
            await end.__aenter__()


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://127.0.0.1:99999"])
async def test_text_that_is_no_endpoint_is_a_setup_error(endpoint: str) -> None:
    for end in (server(Buffer(), endpoint), client(endpoint)):
        with pytest.raises(SetupError):
            await end.__aenter__()
