"""An actor by hand: what it hears from the buffer, it hears before it loads an engine."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import NoReturn

import pytest

from actors import __main__ as entry
from actors import joining
from atpo_async.config import build
from atpo_async.core.errors import SetupError
from atpo_async.links.keys import make_keys
from atpo_async.ops.role import RoleContext
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.host import host_id
from atpo_async.wire import messages as m
from tests.links_support import server
from tests.waiting_support import LIMIT_S, until, within

NOTHING_LISTENS = "tcp://127.0.0.1:1"


class LoadedError(Exception):
    """An engine was loaded: as far as these tests go."""


@pytest.fixture(autouse=True)
def loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> NoReturn:
        raise LoadedError

    monkeypatch.setattr(entry, "model_folder", lambda path: tmp_path)
    monkeypatch.setattr(entry, "host_environments", load)
    monkeypatch.setattr(joining, "KNOCK_S", LIMIT_S)


def actor(endpoint: str, *, keys: Path | None = None, supervised: bool = False) -> RoleContext:
    links = {"heartbeat_s": 0.05, "keys_dir": None if keys is None else str(keys)}
    return RoleContext(
        config=build({"links": links}),
        run_id="",
        rundir=None,
        endpoints=Endpoints(actors=endpoint),
        name="actor-by-hand",
        index=0,
        stopping=asyncio.Event(),
        log=logging.getLogger("actor-by-hand"),
        supervised=supervised,
    )


class Buffer:
    """Answers every actor alike."""

    def __init__(self, answer: m.Welcome | m.Refused) -> None:
        self.answer = answer
        self.asked = 0
        self.hellos: list[m.ActorHello] = []

    def __call__(self, peer: str, message: object) -> m.Welcome | m.Refused:
        assert isinstance(message, m.ActorHello)
        self.asked += 1
        self.hellos.append(message)
        return self.answer


WELCOME = m.Welcome(run="r", weights_endpoint="", announce_endpoint="")


async def test_an_unknown_key_is_reported_before_an_engine_is_loaded_and_let_in_once_it_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = tmp_path / "head", tmp_path / "gpu-7"
    make_keys(ours, "server")
    make_keys(theirs, "client")
    (theirs / "server.key").write_bytes((ours / "server.key").read_bytes())
    settings = build({"links": {"heartbeat_s": 0.05, "keys_dir": str(ours)}}).links
    async with server(Buffer(WELCOME), settings=settings) as s:
        acting = asyncio.create_task(entry.act(actor(s.endpoint, keys=theirs)))
        await until(lambda: "loads no engine before it is let in" in caplog.text or acting.done())
        assert not acting.done()
        assert f"the buffer at {s.endpoint} does not let it in: it refused our key" in caplog.text
        (ours / "gpu-7.key").write_bytes((theirs / "client.key").read_bytes())
        with pytest.raises(LoadedError):
            await within(acting)


async def test_an_actor_that_waits_to_be_let_in_can_be_stopped(tmp_path: Path) -> None:
    make_keys(tmp_path, "server")
    settings = build({"links": {"heartbeat_s": 0.05, "keys_dir": str(tmp_path)}}).links
    async with server(Buffer(WELCOME), settings=settings) as s:
        context = actor(s.endpoint)
        acting = asyncio.create_task(entry.act(context))
        await until(lambda: s.refused_connections > 0)
        context.stopping.set()
        await within(acting)


async def test_why_the_buffer_refuses_an_actor_is_reported_before_an_engine_is_loaded() -> None:
    async with server(Buffer(m.Refused(reason="it grows other trees"))) as s:
        with pytest.raises(SetupError, match=r"refuses actor-by-hand: it grows other trees$"):
            await within(entry.act(actor(s.endpoint)))


async def test_an_actor_that_joins_a_socket_of_others_is_told_which_one_is_for_actors() -> None:
    reason = "message type 'actor_hello' is unknown here; expected one of sample_request, learner_hello"
    async with server(Buffer(m.Refused(reason=reason))) as s:
        with pytest.raises(
            SetupError, match=r"this is no socket for actors: --join takes the address that `atpo train`"
        ):
            await within(entry.act(actor(s.endpoint)))


async def test_an_actor_that_is_welcome_loads_its_engine_at_once(caplog: pytest.LogCaptureFixture) -> None:
    buffer = Buffer(WELCOME)
    async with server(buffer) as s:
        with pytest.raises(LoadedError):
            await within(entry.act(actor(s.endpoint)))
    assert buffer.asked == 1
    assert not [record for record in caplog.records if record.name == "actor-by-hand"]


async def test_a_buffer_that_is_not_there_yet_is_no_reason_to_wait_with_the_engine(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "KNOCK_S", 0.1)
    caplog.set_level(logging.INFO)
    with pytest.raises(LoadedError):
        await within(entry.act(actor(NOTHING_LISTENS)))
    assert "actor-by-hand" not in caplog.messages[-1], "the log's own name says who it is"
    assert "loads its engine meanwhile: the buffer at tcp://127.0.0.1:1 does not answer (not connected" in caplog.text


async def test_an_actor_that_its_run_has_started_loads_its_engine_without_asking(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(LoadedError):
        await within(entry.act(actor(NOTHING_LISTENS, supervised=True)))
    assert "meanwhile" not in caplog.text


async def test_an_actor_says_on_which_machine_it_runs() -> None:
    buffer = Buffer(WELCOME)
    async with server(buffer) as s:
        with pytest.raises(LoadedError):
            await within(entry.act(actor(s.endpoint)))
    assert (buffer.hellos[0].host, buffer.hellos[0].host_id) == (socket.gethostname(), host_id())
