"""What the buffer knows of its actors: where they run."""

from __future__ import annotations

from typing import Any

from atpo_async.run.host import as_name
from atpo_async.wire.messages import ActorReport
from buffer.leases.presence import FORGOTTEN_S, ActorPresence, Host
from tests.buffer_peers_support import hello, running


async def test_the_buffer_keeps_where_an_actor_runs_as_its_hello_or_a_report_says() -> None:
    async with running() as peers:
        presence = peers.service.state.ledger.actors
        await peers.actor.request(hello(peers.config, host="far", host_id="boot:far"), timeout_s=20.0)
        assert presence.host_of("a") == Host("far", "boot:far")
        fields: dict[str, Any] = {"run": "r", "actor": "a", "version": 0, "tree_ids": (), "metrics": {}}
        await peers.send(ActorReport(**fields))
        assert presence.host_of("a") == Host("far", "boot:far")
        await peers.send(ActorReport(**fields, host="near", host_id="boot:near"))
        assert presence.host_of("a") == Host("near", "boot:near")


def test_the_machine_of_an_actor_is_forgotten_with_the_actor() -> None:
    presence = ActorPresence(5.0)
    presence.heard("a", 0.0)
    presence.lives_on("a", Host("far", "boot:far"))
    presence.forget_long_gone(FORGOTTEN_S + 1.0, [])
    assert (len(presence), presence.host_of("a")) == (0, Host())


def test_a_machines_name_fits_a_message() -> None:
    assert as_name("gpu-7") == "gpu-7"
    assert as_name("two\nlines") == ""
    assert len(as_name("é" * 150).encode()) == 200
