"""Which addresses are told: by what a socket is bound to, how the buffer was reached, and which networks a host is on.

Run as a program, this file is one role on a host of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from atpo_async.config import Config, build
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.links import advertised, ports
from atpo_async.links.advertised import own_addresses, sentence, to_join, told, towards
from atpo_async.links.announcements import Announcer, Listener
from atpo_async.links.client import Client
from atpo_async.links.keys import make_keys
from atpo_async.links.server import Server
from atpo_async.ops.role import parse_address
from atpo_async.wire import messages as m
from scripts.namespaces import Host, Network, why_not

# --- pure -----------------------------------------------------------------------------------------------------------

HERE = "10.0.0.9"
"""This machine, where it speaks to 10.0.0.5, gpu-7 or its own name."""


@pytest.fixture
def on_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken_from = {
        "10.0.0.5": HERE, "gpu-7": HERE, HERE: HERE, "here": HERE, "debian": "127.0.0.1", "fd00::5": "fd00::9",
        "fe80::5%eth1": "fe80::9%eth1",
    }  # fmt: skip
    names = {"gpu-7": {"10.0.0.5"}, "here": {"fd00::9", HERE}, "debian": {"127.0.1.1"}}
    monkeypatch.setattr(advertised, "towards", spoken_from.get)
    monkeypatch.setattr(advertised, "resolved", lambda host: names.get(host, {host}))


@pytest.mark.usefixtures("on_the_network")
@pytest.mark.parametrize(
    ("bound", "buffer", "advertise", "expected"),
    [
        # On the buffer's machine: where the buffer was reached, or its one address.
        ("tcp://0.0.0.0:7", "tcp://127.0.0.1:1", None, "tcp://0.0.0.0:7"),
        ("tcp://[::]:7", f"tcp://{HERE}:1", None, "tcp://[::]:7"),
        ("tcp://[::]:7", "tcp://here:1", None, "tcp://[::]:7"),
        ("tcp://[::]:7", "tcp://debian:1", None, "tcp://[::]:7"),
        (f"tcp://{HERE}:7", f"tcp://{HERE}:1", None, f"tcp://{HERE}:7"),
        ("tcp://127.0.0.1:7", "tcp://127.0.0.1:1", None, "tcp://127.0.0.1:7"),
        # Behind the NAT that the buffer is behind as well.
        (f"tcp://{HERE}:7", f"tcp://{HERE}:1", "a.example", "tcp://0.0.0.0:7"),
        ("tcp://[fd00::9]:7", "tcp://[::1]:1", "a.example", "tcp://[::]:7"),
        # On another machine.
        ("tcp://0.0.0.0:7", "tcp://10.0.0.5:1", None, f"tcp://{HERE}:7"),
        ("tcp://0.0.0.0:7", "tcp://gpu-7:1", None, f"tcp://{HERE}:7"),
        ("tcp://[::]:7", "tcp://[fd00::5]:1", None, "tcp://[fd00::9]:7"),
        ("tcp://[::]:7", "tcp://[fe80::5%eth1]:1", None, "tcp://[fe80::9%eth1]:7"),
        ("tcp://10.1.1.1:7", "tcp://10.0.0.5:1", None, "tcp://10.1.1.1:7"),
        ("tcp://[::]:7", "tcp://10.0.0.5:1", "fd00::77", "tcp://[fd00::77]:7"),
        ("tcp://127.0.0.1:7", "tcp://10.0.0.5:1", "tunnel.example", "tcp://tunnel.example:7"),
        # Not known yet.
        ("tcp://0.0.0.0:7", "", None, "tcp://0.0.0.0:7"),
        ("tcp://0.0.0.0:7", "tcp://192.0.2.7:1", None, "tcp://0.0.0.0:7"),
    ],
)
def test_a_learner_says_where_those_reach_it_that_reach_the_buffer(
    bound: str, buffer: str, advertise: str | None, expected: str
) -> None:
    assert told(bound, buffer=buffer, advertise=advertise) == expected


@pytest.mark.usefixtures("on_the_network")
def test_a_learner_that_only_its_own_machine_reaches_is_refused_where_the_buffer_is_on_another() -> None:
    with pytest.raises(SetupError, match=r"links\.host = '::1': .* the buffer at tcp://10\.0\.0\.5:1 is on another"):
        told("tcp://[::1]:7", buffer="tcp://10.0.0.5:1", advertise=None)


def test_this_machine_speaks_to_itself_from_itself_and_a_mapped_address_is_one_of_ipv4() -> None:
    assert towards("127.0.0.1") == towards("::ffff:127.0.0.1") == "127.0.0.1"
    assert [towards(host) for host in ("", "*", "::", "no.such.host.invalid", "é" * 99)] == [None] * 5


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two networks, one of them of IPv6 alone, a network for its containers, and one that is down."""
    addresses = {
        "docker0": ["172.17.0.1"],
        "eth0": ["fe80::9%eth0", "10.0.0.9"],
        "eth1": ["fd00::9", "fe80::8%eth1"],
        "eth2": ["10.2.2.2"],
        "lo": ["127.0.0.1", "::1"],
    }

    def listed() -> dict[str, list[SimpleNamespace]]:
        kinds = {True: socket.AF_INET6, False: socket.AF_INET}
        return {
            name: [SimpleNamespace(family=kinds[":" in each], address=each) for each in found]
            for name, found in addresses.items()
        }

    monkeypatch.setattr(psutil, "net_if_addrs", listed)
    monkeypatch.setattr(
        psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=name != "eth2") for name in listed()}
    )
    outside = {"192.0.2.1": "10.0.0.9"}
    monkeypatch.setattr(advertised, "towards", outside.get)


@pytest.mark.usefixtures("interfaces")
def test_the_addresses_to_join_at_are_those_of_this_machine_that_others_reach() -> None:
    assert own_addresses(ipv6=False) == ("10.0.0.9", "172.17.0.1")
    assert own_addresses(ipv6=True) == ("10.0.0.9", "fd00::9", "172.17.0.1")
    assert sentence("tcp://[::]:70") == "10.0.0.9:70 (or [fd00::9]:70 or 172.17.0.1:70)"
    assert sentence("tcp://0.0.0.0:70", advertise="fd00::77") == "[fd00::77]:70"
    assert sentence("tcp://[::1]:70", advertise="a.example") == "[::1]:70"
    assert to_join("tcp://gpu-7:70") == ("gpu-7:70",)


def test_a_machine_without_a_network_is_joined_from_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advertised, "own_addresses", lambda ipv6: ())
    assert (to_join("tcp://[::]:70"), to_join("tcp://0.0.0.0:70")) == (("[::1]:70",), ("127.0.0.1:70",))


def test_what_is_advertised_is_a_host_and_no_endpoint() -> None:
    for value, host in (("gpu-7.example", "gpu-7.example"), ("[fd00::5]", "fd00::5"), ("10.0.0.5", "10.0.0.5")):
        assert build({"links": {"advertise": value}}).links.advertise == host
    for value in ("tcp://a", "a:7000", "[fd00::5]:7000", "0.0.0.0", "::", "", "a b", "*"):
        with pytest.raises(ConfigError, match=r"links\.advertise: must be a name or an address"):
            build({"links": {"advertise": value}})


# --- over networks --------------------------------------------------------------------------------------------------

WAIT_S = 30.0


def config_of(keys: str, **links: Any) -> Config:
    return build({"links": {"host": "::", "keys_dir": keys, **links}})


async def the_buffer(keys: str) -> None:
    """A buffer at every address of its host; says its ports."""
    from buffer.service import BufferService

    config = config_of(keys)
    service = BufferService(
        config, run="r", endpoints=ports.all_to_bind(config.links), rundir=None, stopping=asyncio.Event()
    )
    async with service:
        say(*(service.actors.endpoint.rpartition(":")[2], service.learner.endpoint.rpartition(":")[2]))
        await service.serve()


async def the_learner(keys: str, buffer: str) -> None:
    """A publisher at every address of its host, that reports to the buffer at HOST:PORT; says what it reported."""
    config = config_of(keys)
    links = config.links

    async def answer(peer: str, message: Any) -> m.Refused:
        return m.Refused(reason="reached")

    async with (
        Server(
            ports.to_bind(links, "weights"), name="learner", receives=m.ActorToLearner, handler=answer, settings=links
        ) as weights,
        Announcer(ports.to_bind(links, "announce"), settings=links) as announcer,
        Client(
            parse_address(buffer), peer="buffer", identity="learner", receives=m.BufferToLearner, settings=links
        ) as link,
    ):
        where = [told(bound.endpoint, buffer=link.endpoint, advertise=None) for bound in (weights, announcer)]
        await link.send(m.VersionPublished(run="r", version=0, weights_endpoint=where[0], announce_endpoint=where[1]))
        await link.drain(timeout_s=WAIT_S)
        say(where[0])
        while True:
            await announcer.publish(m.Refused(reason="announced"))
            await asyncio.sleep(0.02)


async def the_actor(keys: str, buffer: str) -> None:
    """Joins at HOST:PORT, is answered by the learner and hears its announcements; says where the weights were."""
    from actors.joining import reachable

    config = config_of(keys)
    links = config.links
    async with Client(
        parse_address(buffer), peer="buffer", identity="actor", receives=m.BufferToActor, settings=links
    ) as link:
        hello = m.ActorHello(
            protocol=m.PROTOCOL, run="", actor="actor", environment=config.task_name,
            search_leaves=config.search.max_leaves,
        )  # fmt: skip
        welcome = await link.request(hello, timeout_s=WAIT_S)
    assert isinstance(welcome, m.Welcome), welcome
    there = reachable(welcome, link.endpoint)
    async with (
        Client(
            there.weights_endpoint, peer="learner", identity="actor", receives=m.LearnerToActor, settings=links
        ) as weights,
        Listener(there.announce_endpoint, receives=m.LearnerToActor, settings=links) as listener,
    ):
        answered = await weights.request(m.ManifestRequest(run="r", version=0), timeout_s=WAIT_S)
        heard = await listener.next(timeout_s=WAIT_S)
    assert (answered.reason, heard.reason) == ("reached", "announced")
    say(there.weights_endpoint)


def say(*words: str) -> None:
    print(*words, flush=True)


class Roles:
    """Roles on hosts, ended at the end."""

    def __init__(self, keys: Path) -> None:
        self._keys = keys
        self._running = contextlib.ExitStack()

    def __enter__(self) -> Roles:
        return self

    def __exit__(self, *args: object) -> None:
        self._running.close()

    def start(self, host: Host, role: str, *words: str) -> list[str]:
        """The words that it says first."""
        command = host.inside(sys.executable, __file__, role, self._keys, *words)
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        self._running.callback(process.communicate)
        self._running.callback(process.kill)
        assert process.stdout is not None
        said = process.stdout.readline().split()
        if not said:
            raise AssertionError(f"{role} on {host.name}: {process.communicate()[1][-2000:]}")
        return said


@pytest.fixture
def roles(tmp_path: Path) -> Iterator[Roles]:
    for name in ("server", "client"):
        make_keys(tmp_path / "keys", name)
    with Roles(tmp_path / "keys") as started:
        yield started


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_actors_that_reach_the_buffer_over_two_networks_reach_the_learner_over_the_same_two(roles: Roles) -> None:
    """One network has IPv4, the other IPv6 alone, and a third only link-local addresses."""
    with Network() as network:
        head, four, six, near = (network.host(name) for name in ("head", "four", "six", "near"))
        network.cable(head, four)
        network.cable(head, six, subnet="fd00:77::/64")
        local = network.cable(head, near, subnet="fe80::/64")
        actors_port, learner_port = roles.start(head, "buffer")
        (there,) = roles.start(head, "learner", f"127.0.0.1:{learner_port}")
        port = there.rpartition(":")[2]
        assert there == f"tcp://[::]:{port}"
        device = interface_of(near, local.addresses[near])
        reached = {
            four: f"tcp://{four_of(head)}:{port}",
            six: f"tcp://[fd00:77::1]:{port}",
            near: f"tcp://[fe80::1%{device}]:{port}",
        }
        for actor, endpoint in reached.items():
            join = endpoint.removeprefix("tcp://").replace(f":{port}", f":{actors_port}")
            assert roles.start(actor, "actor", join) == [endpoint]


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_learner_on_another_host_says_the_address_that_the_buffers_network_has_of_it(roles: Roles) -> None:
    with Network() as network:
        head, trainer, actor, elsewhere = (network.host(name) for name in ("head", "trainer", "actor", "elsewhere"))
        network.cable(trainer, elsewhere)  # its first address is not the one that counts
        switch = network.switch()
        for host in (head, trainer, actor):
            network.cable(host, switch, subnet="fd00:78::/64")
        actors_port, learner_port = roles.start(head, "buffer")
        (there,) = roles.start(trainer, "learner", f"head:{learner_port}")
        assert there.startswith("tcp://[fd00:78::2]:")
        assert roles.start(actor, "actor", f"[fd00:78::1]:{actors_port}") == [there]


def four_of(host: Host) -> str:
    return next(address for address in host.addresses if ":" not in address)


def interface_of(host: Host, address: str) -> str:
    """The device on a host that has an address."""
    shown = subprocess.run(host.inside("ip", "-o", "addr"), capture_output=True, text=True, check=True).stdout
    return next(line.split()[1] for line in shown.splitlines() if f" {address}/" in line)


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    mains: dict[str, Callable[..., Coroutine[Any, Any, None]]]
    mains = {"buffer": the_buffer, "learner": the_learner, "actor": the_actor}
    asyncio.run(mains[role](*arguments))
