"""The command ``atpo relay`` with keys: who is let in by whom, and what a relay's key may do and may not."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from atpo_async.cli.main import main
from atpo_async.core.errors import SetupError
from atpo_async.links.client import Client
from atpo_async.wire import messages as m
from tests.buffer_peers_support import grown
from tests.relay_support import RUN, actor_at, head, relay_to
from tests.waiting_support import LIMIT_S, until, within


class Keys:
    """The folders of keys of three hosts, made as docs/relays.md says."""

    def __init__(self, folder: Path) -> None:
        self.head, self.relay, self.gpu = (folder / name for name in ("head", "relay-1", "gpu-7"))
        self._new("relay-1", "--relay", "--dir", str(self.head))
        shutil.move(self.head / "relay-1", self.relay)
        self._new("gpu-7", "--dir", str(self.relay))
        shutil.move(self.relay / "gpu-7", self.gpu)
        shutil.copyfile(self.relay / "gpu-7.key", self.head / "gpu-7.key")

    def _new(self, *words: str) -> None:
        assert main(["keys", "new", *words]) == 0


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys")


@contextlib.asynccontextmanager
async def command(*words: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """``atpo relay``, and the address that it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "atpo_async", "relay", *words, "--links.heartbeat_s", "0.1",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = (await within(process.stdout.readline())).decode()
        yield process, f"tcp://{line.rpartition(' ')[2].strip()}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def folder(path: Path) -> dict[str, Any]:
    return {"links": {"keys_dir": str(path)}}


async def test_actors_with_keys_join_a_relay_and_go_on_without_it_when_it_is_killed(tmp_path: Path, keys: Keys) -> None:
    async with (
        head(tmp_path / "top", **folder(keys.head)) as top,
        command("--join", top.endpoint.removeprefix("tcp://"), "--links.keys_dir", str(keys.relay)) as (process, where),
        actor_at(where, **folder(keys.gpu)) as far,
    ):
        assert far.known_as == "relay-1/gpu-7/actor-0"
        (lease,) = await far.leases(1)
        messages = grown(lease)
        await far.send(*messages[:2])
        assert await far.weights(0)
        process.kill()
        await far.send(*messages[2:])
        # The head has another server key than the relay, and lets the actor's own key in.
        assert far.known_as == "gpu-7/actor-0"
        assert len(top.service.state.pool) == 1
        await top.publish(1)
        assert await far.weights(1)
        assert not far.refusals


async def test_a_key_that_is_no_relays_may_not_speak_for_others(tmp_path: Path, keys: Keys) -> None:
    """As a relay it is refused; as an actor whose name has a slash it is refused too, whatever it sends."""
    shutil.move(keys.head / "relays" / "relay-1.key", keys.head / "relay-1.key")
    async with head(tmp_path / "top", **folder(keys.head)) as top:
        async with relay_to(top.endpoint, joined=False, **folder(keys.relay)) as site:
            with pytest.raises(ExceptionGroup) as caught:
                await within(site.serving)
            assert "the key 'relay-1' is no relay's" in str(caught.value.exceptions[0])
        link = Client(
            top.endpoint, peer="buffer", identity="gpu-8/actor-0", receives=m.BufferToActor,
            settings=site.relay.uplink.link.settings.model_copy(update={"keys_dir": _as_client(keys.relay)}),
        )  # fmt: skip
        refusals = list[str]()
        async with link:
            link.on_refused = lambda message, reason: refusals.append(reason)
            await link.send(m.LeaseReturned(run=RUN, actor="a", tree_ids=("t",)))
            await link.drain(timeout_s=LIMIT_S)
            answer = await link.request(m.LeaseRequest(run=RUN, actor="a", count=1, version=0), timeout_s=LIMIT_S)
        assert isinstance(answer, m.Refused)
        for reason in (answer.reason, *refusals):
            assert "speaks for another peer, which the key 'relay-1' may not" in reason
        assert refusals


def _as_client(folder: Path) -> Path:
    """The same keys as those of a host that only connects."""
    other = folder.with_name("as-client")
    shutil.copytree(folder, other)
    shutil.copyfile(folder / "upstream.key", other / "server.key")
    return other


async def test_a_relay_whose_key_is_unknown_says_so_and_is_let_in_once_its_key_is_there(
    tmp_path: Path, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    key = keys.head / "relays" / "relay-1.key"
    aside = key.rename(tmp_path / "aside")
    async with (
        head(tmp_path / "top", **folder(keys.head)) as top,
        relay_to(top.endpoint, joined=False, **folder(keys.relay)) as site,
    ):
        await until(lambda: "it refused our key" in site.relay.uplink.link.trouble)
        aside.rename(key)
        await within(site.relay.uplink.joined.wait())
        assert not site.relay.uplink.link.trouble


async def test_a_relays_key_is_no_actors(tmp_path: Path, keys: Keys) -> None:
    async with head(tmp_path / "top", **folder(keys.head)) as top:
        with pytest.raises(SetupError, match="the key 'relay-1' is a relay's: it passes on what others say"):
            async with actor_at(top.endpoint, **folder(_as_client(keys.relay))):
                pass


async def test_an_actor_whose_key_the_relay_does_not_know_is_refused_by_the_relay(tmp_path: Path, keys: Keys) -> None:
    async with head(tmp_path / "top", **folder(keys.head)) as top, relay_to(top.endpoint, **folder(keys.relay)) as site:
        (keys.relay / "gpu-7.key").unlink()
        await until(lambda: site.relay.actors._keys is not None and site.relay.actors._keys.look() in (True, False))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5), actor_at(site.endpoint, **folder(keys.gpu)):
                pass
        assert site.relay.actors.refused_connections > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--join", "nowhere"], "--join nowhere: neither a run folder nor an address"),
        (["--join", "head:7000", "--name", "a/b"], "--name 'a/b': a relay's name has up to 64 letters"),
        (["--join", "head:7000", "--dir", "none"], "--dir none is no folder; make it, or name another"),
        (["--join", "head:7000", "--links.keys_dir", "missing"], "links.keys_dir = 'missing' is no folder"),
        (["--join", "head:7000", "--links.host", "0.0.0.0"], "will not bind tcp://0.0.0.0:0 without keys"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["relay", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_command_names_the_key_that_a_relay_lacks(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["relay", "--join", "head:7000", "--links.keys_dir", str(keys.relay)]
    (keys.relay / "server.key_secret").unlink()
    assert main(words) == 2
    assert "has no server.key_secret; `atpo keys new --dir" in capsys.readouterr().err
    (keys.relay / "upstream.key").unlink()
    assert main(words) == 2
    assert "has no upstream.key, the public key of the server that this relay joins" in capsys.readouterr().err


def test_keys_of_relays_are_listed_as_such(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["keys", "list", "--dir", str(keys.head)]) == 0
    assert "relay-1: a relay" in capsys.readouterr().out
