"""Weight transports: the learner's real publisher at one end, an actor's real fetcher at the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.weights.fetcher import WeightsFetcher
from atpo_async.config import LinksConfig, WeightsConfig
from atpo_async.core.errors import ConfigError, SetupError, WeightsRejected
from atpo_async.links.announcements import Listener
from atpo_async.links.client import Client
from atpo_async.transports.base import OfferedVersion, Sender, SenderContext, TransportUnavailable
from atpo_async.transports.registry import make_transport
from atpo_async.wire.messages import LearnerToActor, WeightsAnnounced
from learner.weights import files
from learner.weights.publisher import Publisher
from learner.weights.staging import Staged
from learner.weights.store import WeightsStore

LINKS = LinksConfig()
ANYWHERE = "tcp://127.0.0.1:0"
TENSORS = {"a": torch.arange(3000, dtype=torch.float32), "b": torch.full((7, 5), 0.5)}

SHARED_FOLDER = """
import asyncio, shutil
from pathlib import Path

from atpo_async.transports.base import Receiver, Sender, TransportUnavailable


class SharedFolder:
    def __init__(self, folder):
        self.folder = Path(folder)

    def sender(self, context):
        return FolderSender(self.folder, context)

    def receiver(self, context):
        return FolderReceiver(self.folder, context)


class _Half:
    def __init__(self, folder, context):
        self.path = lambda version: folder / f"{context.run}-v{version}.bin"


class FolderSender(_Half, Sender):
    def offer(self, version):
        path = self.path(version.manifest.version)
        shutil.copyfile(version.path, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)  # receivers see it whole or not at all

    def withdraw(self, version):
        self.path(version).unlink(missing_ok=True)


class FolderReceiver(_Half, Receiver):
    async def fetch(self, wanted, target):
        try:
            await asyncio.to_thread(shutil.copyfile, self.path(wanted.manifest.version), target)
        except FileNotFoundError as exc:
            raise TransportUnavailable(f"{exc.filename} is not there") from exc
"""
"""A user's own transport: versions lie in a folder that all hosts see."""

FAULTY = """
import asyncio

from atpo_async.transports.base import Receiver, Sender


class Faulty:
    def __init__(self, fault):
        self.fault = fault

    def sender(self, context):
        return Half(self.fault) if self.fault == "no sender" else FaultySender(self.fault)

    def receiver(self, context):
        return PlainReceiver() if self.fault == "not async" else FaultyReceiver(self.fault)


class Half:
    def __init__(self, fault):
        self.fault = fault


class FaultySender(Half, Sender):
    def offer(self, version):
        if self.fault == "offer":
            raise RuntimeError("the store says no")

    def place(self, version):
        if self.fault == "place":
            raise RuntimeError("the store says no")


class FaultyReceiver(Half, Receiver):
    async def fetch(self, wanted, target):
        if self.fault == "fetch":
            raise RuntimeError("the store says no")
        if self.fault == "hangs":
            await asyncio.Event().wait()
        if self.fault == "half a file":
            target.write_bytes(b"half")
            raise ConnectionError("cut off")
        if self.fault == "links the learner's file":
            target.hardlink_to(wanted.announced.shm_path)
            raise ConnectionError("cut off")
        if self.fault == "other bytes":
            target.write_bytes(bytes(wanted.manifest.total_bytes))


class PlainReceiver(Receiver):
    def fetch(self, wanted, target): pass


def without_halves(): return object()
"""


@pytest.fixture(autouse=True)
def users_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules outside the four packages, and shared memory of this test alone."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "shared_folder_of_this_test.py").write_text(SHARED_FOLDER)
    (folder / "faulty_of_this_test.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(folder))
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(files, "SHARED_MEMORY", tmp_path / "memory")
    yield
    for name in [name for name in sys.modules if name.endswith("of_this_test")]:
        del sys.modules[name]


def settings_of(transport: str = "auto", options: dict[str, object] | None = None, **more: object) -> WeightsConfig:
    fields = {"transport": transport, "transport_options": options or {}, "chunk_bytes": 4096, "poll_s": 0.01}
    return WeightsConfig.model_validate({**fields, **more})


class Ends:
    """A learner's publisher and an actor's fetcher, each with the transport of its own configuration."""

    def __init__(self, publisher: Publisher, fetcher: WeightsFetcher) -> None:
        self.publisher = publisher
        self.fetcher = fetcher

    def publish(self, version: int) -> WeightsAnnounced:
        probe = np.zeros((1, 3), dtype=np.int32)
        return self.publisher.store.add(
            version, Staged(TENSORS, "float32"), probe_tokens=probe, probe_logprobs=np.zeros(2, dtype=np.float32)
        )

    async def pass_on(self, version: int) -> bytes | None:
        """The bytes that the engine would be given; None where the version is gone."""
        weights = await self.fetcher.fetch(self.publish(version))
        if weights is None:
            return None
        payload = await asyncio.to_thread(weights.path.read_bytes)
        self.fetcher.release(weights)
        return payload


@contextlib.asynccontextmanager
async def ends(tmp_path: Path, learners: WeightsConfig, actors: WeightsConfig | None = None) -> AsyncIterator[Ends]:
    store = WeightsStore(run="run", fallback=tmp_path / "scratch", settings=learners)
    async with (
        Publisher(store, weights_endpoint=ANYWHERE, announce_endpoint=ANYWHERE, settings=LINKS) as publisher,
        Client(
            publisher.weights_endpoint, peer="learner", identity="actor", receives=LearnerToActor, settings=LINKS
        ) as client,
        Listener(publisher.announce_endpoint, receives=LearnerToActor, settings=LINKS) as listener,
    ):
        fetcher = WeightsFetcher(run="run", client=client, listener=listener, settings=actors or learners)
        try:
            yield Ends(publisher, fetcher)
        finally:
            fetcher.close()


EXPECTED = TENSORS["a"].numpy().tobytes(), TENSORS["b"].numpy().tobytes()


def is_whole(payload: bytes | None) -> bool:
    return payload is not None and payload.startswith(EXPECTED[0]) and payload.endswith(EXPECTED[1])


async def test_on_one_host_the_file_is_taken_and_no_chunk_is_asked_for(tmp_path: Path) -> None:
    async with ends(tmp_path, settings_of()) as both:
        assert is_whole(await both.pass_on(0))
        assert both.fetcher.take_counts() == {"weights/fetched/file": 1.0}


@pytest.mark.parametrize("transport", ["auto", "chunks"])
async def test_without_shared_memory_chunks_are_pulled(tmp_path: Path, transport: str) -> None:
    async with ends(tmp_path, settings_of(transport, shared_memory=False)) as both:
        assert is_whole(await both.pass_on(0))


async def test_an_actor_of_another_configuration_is_served_as_well(tmp_path: Path) -> None:
    async with ends(tmp_path, settings_of("auto"), settings_of("chunks")) as both:
        assert is_whole(await both.pass_on(0))
    async with ends(tmp_path, settings_of("file"), settings_of("auto")) as both:
        assert is_whole(await both.pass_on(0))


async def test_a_learner_that_serves_no_chunks_says_so_by_the_setting(tmp_path: Path) -> None:
    async with ends(tmp_path, settings_of("file"), settings_of("chunks")) as both:
        with pytest.raises(WeightsRejected, match=r"chunk \d+ is refused .* \(weights\.transport = 'file'\); give"):
            await both.pass_on(0)


async def test_a_file_that_the_actor_cannot_reach_is_refused_by_name_where_nothing_else_is_configured(
    tmp_path: Path,
) -> None:
    async with ends(tmp_path, settings_of("chunks"), settings_of("file")) as both:
        with pytest.raises(TransportUnavailable, match="the learner offers no file"):
            await both.pass_on(0)


# --- a user's own


def folder_settings(tmp_path: Path) -> WeightsConfig:
    return settings_of("shared_folder_of_this_test:SharedFolder", {"folder": str(tmp_path / "share")})


async def test_a_users_transport_carries_versions_and_drops_those_that_are_withdrawn(tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    async with ends(tmp_path, folder_settings(tmp_path)) as both:
        for version in (0, 1, 2):
            assert is_whole(await both.pass_on(version))
        assert sorted(path.name for path in share.iterdir()) == ["run-v1.bin", "run-v2.bin"]
        name = "shared_folder_of_this_test:SharedFolder"
        assert both.fetcher.take_counts() == {f"weights/fetched/{name}": 3.0, "weights/fetched_for_host": 3.0}
        assert not any(counter.startswith("differences/") for counter in both.publisher.counters)
        assert both.fetcher.take_counts() == {}


async def test_a_version_that_a_users_transport_cannot_bring_comes_in_chunks_and_that_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    share = tmp_path / "share"
    share.mkdir()
    async with ends(tmp_path, folder_settings(tmp_path)) as both:
        announced = both.publish(0)
        (share / "run-v0.bin").unlink()
        assert await both.fetcher.fetch(announced) is not None
        counts = both.fetcher.take_counts()
        assert counts["weights/fetched/chunks"] == 1.0
        assert counts["weights/fetch_failed/shared_folder_of_this_test:SharedFolder"] == 1.0
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("did not bring version 0:" in line and "run-v0.bin is not there" in line for line in said)


@pytest.mark.parametrize("fault", ["fetch", "hangs", "half a file", "no file", "links the learner's file"])
async def test_whatever_fails_in_a_users_receiver_costs_the_version_its_transport_and_not_the_run(
    tmp_path: Path, fault: str
) -> None:
    settings = settings_of("faulty_of_this_test:Faulty", {"fault": fault}, fetch_timeout_s=0.5)
    # The learner's own file has a place in the announcement, for the fault that links it.
    async with ends(tmp_path, settings_of(), settings) as both:
        announced = both.publish(0)
        weights = await both.fetcher.fetch(announced)
        assert weights is not None
        for path in (weights.path, announced.shm_path):
            assert is_whole(await asyncio.to_thread(Path(str(path)).read_bytes))


@pytest.mark.parametrize("fault", ["offer", "place"])
async def test_whatever_fails_in_a_users_sender_leaves_chunks_to_actors(tmp_path: Path, fault: str) -> None:
    settings = settings_of("faulty_of_this_test:Faulty", {"fault": fault})
    async with ends(tmp_path, settings, settings_of()) as both:
        assert is_whole(await both.pass_on(0))
        assert both.publisher.counters["send_failed/faulty_of_this_test:Faulty"] >= 1.0


async def test_bytes_that_a_users_transport_alters_are_rejected(tmp_path: Path) -> None:
    settings = settings_of("faulty_of_this_test:Faulty", {"fault": "other bytes"})
    async with ends(tmp_path, settings) as both:
        with pytest.raises(WeightsRejected, match=r"version 0: tensor a is not what .* it was not applied"):
            await both.pass_on(0)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("faulty_of_this_test:Faulty", {}, "missing a required argument: 'fault'"),
        ("faulty_of_this_test:without_halves", {}, "object is not a weight transport: it lacks sender, receiver"),
        ("faulty_of_this_test:Faulty", {"fault": "not async"}, r"PlainReceiver\.fetch must be async"),
        ("faulty_of_this_test:Faulty", {"fault": "no sender"}, r"sender\(\) returned Half, which is no subclass of"),
    ],
)
async def test_what_is_no_transport_is_refused_before_a_version_is_written(
    tmp_path: Path, name: str, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        async with ends(tmp_path, settings_of(name, options)):
            pass


def test_the_example_of_a_transport_is_no_longer_than_the_page_promises() -> None:
    lines = [line for line in textwrap.dedent(SHARED_FOLDER).splitlines() if line.strip()]
    assert len(lines) <= 30
    assert make_transport(WeightsConfig()) is not None


class NeverReady:
    """A transport whose sender cannot be made, or has an offer that nothing would await."""

    def __init__(self, *, fails: bool) -> None:
        self._fails = fails

    def sender(self, context: SenderContext) -> Sender:
        if self._fails:
            raise OSError("no route to the store")

        class Later(Sender):
            async def offer(self, version: OfferedVersion) -> None: ...  # type: ignore[override]

        return Later()

    def receiver(self, context: object) -> None: ...


@pytest.mark.parametrize(
    ("fails", "error", "said"),
    [
        (True, SetupError, r"its sender\(\) failed: OSError: no route to the store"),
        (False, ConfigError, r"Later\.offer must not be async"),
    ],
)
def test_a_sender_that_cannot_be_made_or_is_async_is_refused_with_its_field(
    fails: bool, error: type[Exception], said: str
) -> None:
    transport = make_transport(settings_of(f"{__name__}:NeverReady", {"fails": fails}))
    with pytest.raises(error, match=f"^weights.transport = '{__name__}:NeverReady': {said}"):
        transport.sender(SenderContext(run="r", settings=WeightsConfig()))
