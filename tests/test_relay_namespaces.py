"""A relay over network namespaces: a head, a site behind a cable of limited rate, and an actor's host."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from atpo_async.cli.main import main
from scripts.namespaces import Host, Network, Process, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

DEADLINE_S = 60.0
PORT = 7000

HEAD = """
import asyncio, sys
from pathlib import Path
from atpo_async.run.endpoints import Endpoints
from tests import relay_support

relay_support.LOOPBACK = Endpoints(actors="tcp://0.0.0.0:7000", learner="tcp://0.0.0.0:7001")
relay_support.ANYWHERE = "tcp://0.0.0.0:0"

async def main():
    async with relay_support.head(Path("head"), links={"host": "0.0.0.0", "keys_dir": "keys"}) as top:
        print("ready", flush=True)
        while not (pool := top.service.state.pool) or not len(pool):
            await asyncio.sleep(0.02)
        await top.publish(1)
        print("trees:", len(pool), "moves:", top.service._actor_handler.relayed.moves, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""
ACTOR = """
import asyncio, sys
from pathlib import Path
from tests.buffer_peers_support import grown
from tests.relay_support import actor_at

async def main():
    async with actor_at("tcp://relay:7000", links={"keys_dir": "keys"}) as far:
        (lease,) = await far.leases(1)
        messages = grown(lease)
        await far.send(*messages[:2])
        print("version 0:", len(await far.weights(0)), far.known_as, far.client.endpoint, flush=True)
        while not Path("go-on").exists():
            await asyncio.sleep(0.02)
        await far.send(*messages[2:])
        print("version 1:", len(await far.weights(1)), far.known_as, far.client.endpoint, far.refusals, flush=True)

asyncio.run(main())
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host, Host]]:
    with Network() as network:
        head, relay, gpu = (network.host(name, tmp_path / name) for name in ("head", "relay", "gpu-7"))
        network.cable(head, relay).limit(rate_mbit=20)
        network.cable(relay, gpu)
        network.cable(head, gpu)
        yield head, relay, gpu


def said(process: Process, what: str) -> str:
    """The line of a process that begins so, as soon as it is there."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.popen.poll() in (None, 0):
        for line in process.said().splitlines():
            if line.startswith(what):
                return line
        time.sleep(0.02)
    raise AssertionError(f"no {what!r} came: {process.said()}")


@pytest.mark.slow
def test_an_actor_goes_past_a_relay_that_is_killed_over_another_cable(hosts: tuple[Host, Host, Host]) -> None:
    head, relay, gpu = hosts
    for where, name, words, to in ((head, "relay-1", ["--relay"], relay), (relay, "gpu-7", [], gpu)):
        assert main(["keys", "new", name, *words, "--dir", str(where.folder / "keys")]) == 0
        (where.folder / "keys" / name).rename(to.folder / "keys")
    (head.folder / "keys" / "gpu-7.key").write_bytes((relay.folder / "keys" / "gpu-7.key").read_bytes())
    running = [head.start_program(sys.executable, "-c", HEAD)]
    try:
        said(running[0], "ready")
        listen = ("--links.host", "0.0.0.0", "--links.actors_port", PORT, "--links.keys_dir", "keys")
        running.append(relay.start("relay", "--join", f"head:{PORT}", *listen, "--links.heartbeat_s", 0.1))
        running.append(gpu.start_program(sys.executable, "-c", ACTOR))
        top, between, actor = running
        size, name, weights = said(actor, "version 0: ").split()[2:]
        assert int(size) > 80_000
        assert (name, weights.startswith("tcp://relay:")) == ("relay-1/gpu-7/actor-0", True)
        between.kill()
        (gpu.folder / "go-on").touch()
        same_size, name, weights, refusals = said(actor, "version 1: ").split()[2:]
        assert (same_size, name, refusals) == (size, "gpu-7/actor-0", "[]")
        assert weights.startswith("tcp://head:")
        assert said(top, "trees: ") == "trees: 1 moves: 1"
    finally:
        for process in running:
            process.end()
