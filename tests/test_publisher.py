"""Weights out: every tensor, byte for byte, with a probe that a dropped one would fail."""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from atpo_async.config import LinksConfig, WeightsConfig
from atpo_async.core.errors import SetupError
from atpo_async.core.vocabulary import Precision
from atpo_async.links.announcements import Listener
from atpo_async.links.client import Client
from atpo_async.ops.disk import until_written
from atpo_async.run.scratch import MARK, Scratch
from atpo_async.wire.digests import digest_of, root_of
from atpo_async.wire.messages import (
    AnnouncementRequest,
    Chunk,
    ChunkRequest,
    LearnerToActor,
    ManifestRequest,
    Refused,
    VersionGone,
    WeightsAnnounced,
    WeightsManifest,
)
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from learner.weights import files
from learner.weights.probe import draw_probe
from learner.weights.publisher import Publisher
from learner.weights.staging import Stager
from learner.weights.store import WeightsStore
from tests.learner_support import make_config, make_model

LINKS = LinksConfig()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    config = make_config(make_model(tmp_path_factory.mktemp("model")))
    return Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightsStore]:
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(files, "SHARED_MEMORY", tmp_path / "memory")
    made = make_store(tmp_path)
    yield made
    made.close()


def make_store(folder: Path, **settings: object) -> WeightsStore:
    return WeightsStore(
        run="run", fallback=folder / "scratch",
        settings=WeightsConfig.model_validate({"chunk_bytes": 4096, **settings}),
    )  # fmt: skip


def add(
    store: WeightsStore, trainer: Trainer, version: int, *, precision: Precision = "float32", copied: bool = False
) -> WeightsAnnounced:
    probe = draw_probe(trainer, (2, 5), seed=(0,))
    staged = Stager(precision).stage(trainer.whole.tensors(), copied=copied)
    assert staged is not None
    return store.add(version, staged, probe_tokens=probe, probe_logprobs=trainer.whole.probe(probe))


def content(announced: WeightsAnnounced) -> bytes | None:
    path = Path(announced.shm_path or "")
    return path.read_bytes() if path.is_file() else None


def tensors_of(payload: bytes, manifest: WeightsManifest) -> dict[str, torch.Tensor]:
    return {
        s.name: torch.frombuffer(bytearray(payload[s.offset : s.offset + s.nbytes]), dtype=DTYPES[s.dtype]).reshape(
            s.shape
        )
        for s in manifest.tensors
    }


async def test_what_is_pulled_over_the_wire_is_the_state_dict(store: WeightsStore, trainer: Trainer) -> None:
    async with (
        Publisher(
            store, weights_endpoint="tcp://127.0.0.1:0", announce_endpoint="tcp://127.0.0.1:0", settings=LINKS
        ) as publisher,
        Client(
            publisher.weights_endpoint, peer="learner", identity="actor", receives=LearnerToActor, settings=LINKS
        ) as client,
    ):
        early = await client.request(AnnouncementRequest(run="run"), timeout_s=10)
        assert isinstance(early, Refused)
        announced = add(store, trainer, 0)
        assert (await client.request(AnnouncementRequest(run="run"), timeout_s=10)).digest == announced.digest
        manifest = await client.request(ManifestRequest(run="run", version=0), timeout_s=10)
        payload = b""
        for index in range(-(-manifest.total_bytes // manifest.chunk_bytes)):
            chunk = await client.request(ChunkRequest(run="run", version=0, index=index), timeout_s=10)
            assert isinstance(chunk, Chunk)
            payload += chunk.data.tobytes()
        assert root_of(manifest.tensors, manifest.total_bytes) == announced.digest
        assert all(digest_of(payload[s.offset : s.offset + s.nbytes]) == s.digest for s in manifest.tensors)
        assert content(announced) == payload
        expected = trainer.policy.hf.state_dict()
        found = tensors_of(payload, manifest)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert "lm_head.weight" in found  # tied: engines that keep a copy of their own need it by name
        beyond = await client.request(ChunkRequest(run="run", version=0, index=9999), timeout_s=10)
        assert isinstance(beyond, Refused)
        assert "9999" in beyond.reason
        stranger = await client.request(ManifestRequest(run="other", version=0), timeout_s=10)
        assert isinstance(stranger, Refused)
    assert content(announced) is None


def test_tied_tensors_are_one_in_the_payload_under_both_names(store: WeightsStore, trainer: Trainer) -> None:
    payload = content(add(store, trainer, 0))
    manifest = store.answer(ManifestRequest(run="run", version=0))
    assert isinstance(manifest, WeightsManifest)
    by_name = {spec.name: spec for spec in manifest.tensors}
    head, embeddings = by_name["lm_head.weight"], by_name["model.embed_tokens.weight"]
    assert (head.offset, head.digest) == (embeddings.offset, embeddings.digest)
    assert len(payload or b"") == manifest.total_bytes < sum(spec.nbytes for spec in manifest.tensors)


async def test_an_announcement_reaches_listeners(store: WeightsStore, trainer: Trainer) -> None:
    async with (
        Publisher(
            store, weights_endpoint="tcp://127.0.0.1:0", announce_endpoint="tcp://127.0.0.1:0", settings=LINKS
        ) as publisher,
        Listener(publisher.announce_endpoint, receives=LearnerToActor, settings=LINKS) as listener,
    ):
        announcement = add(store, trainer, 3)
        heard = None
        for _ in range(200):  # PUB drops what it says before a listener has joined
            await publisher.announce(announcement)
            heard = await listener.next(timeout_s=0.05)
            if heard is not None:
                break
        assert isinstance(heard, WeightsAnnounced)
        assert (heard.version, heard.digest) == (3, announcement.digest)


def test_only_the_newest_two_versions_stay_available(store: WeightsStore, trainer: Trainer) -> None:
    paths = [Path(add(store, trainer, version).shm_path or "") for version in (4, 5, 9)]
    assert [p.exists() for p in paths] == [False, True, True]
    gone = store.answer(ManifestRequest(run="run", version=4))
    assert isinstance(gone, VersionGone)
    assert (gone.version, gone.newest) == (4, 9)
    assert isinstance(store.answer(ChunkRequest(run="run", version=5, index=0)), Chunk)
    newest = store.answer(AnnouncementRequest(run="run"))
    assert isinstance(newest, WeightsAnnounced)
    assert newest.version == 9


@pytest.mark.parametrize("copied", [False, True])
def test_an_engine_in_lower_precision_gets_its_own_bytes_and_tolerance(
    tmp_path: Path, trainer: Trainer, copied: bool
) -> None:
    half = make_store(tmp_path, shared_memory=False)
    announced = add(half, trainer, 0, precision="bfloat16", copied=copied)
    assert announced.shm_path is None
    manifest = half.answer(ManifestRequest(run="run", version=0))
    assert isinstance(manifest, WeightsManifest)
    assert manifest.probe_tolerance is None
    assert (manifest.probe_sequences, len(manifest.probe_token_ids), len(manifest.probe_logprobs)) == (2, 10, 8)
    payload = b""
    for index in range(-(-manifest.total_bytes // 4096)):
        chunk = half.answer(ChunkRequest(run="run", version=0, index=index))
        assert isinstance(chunk, Chunk)
        payload += chunk.data.tobytes()
    found = tensors_of(payload, manifest)
    for name, tensor in trainer.whole.tensors().items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16))
    assert all(spec.offset % 64 == 0 for spec in manifest.tensors)
    half.close()


def test_without_shared_memory_the_run_folder_serves(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SHARED_MEMORY", tmp_path / "nowhere")
    store = make_store(tmp_path, probe_tolerance=0.5)
    announced = add(store, trainer, 0)
    assert announced.shm_path is not None
    assert Path(announced.shm_path).parent == (tmp_path / "scratch" / "weights").resolve()
    manifest = store.answer(ManifestRequest(run="run", version=0))
    assert isinstance(manifest, WeightsManifest)
    assert manifest.probe_tolerance == 0.5
    store.close()


def fill(monkeypatch: pytest.MonkeyPatch, times: int, error: int = errno.ENOSPC) -> None:
    """The next ``times`` tries to write fail."""
    plain, left = files.write_part, times

    def full(file: BinaryIO, gap: int, data: memoryview) -> None:
        nonlocal left
        if left > 0:
            left -= 1
            raise OSError(error, os.strerror(error))
        plain(file, gap, data)

    monkeypatch.setattr(files, "write_part", full)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
def test_weights_that_fit_nowhere_are_an_error_and_leave_nothing_half_written(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, store: WeightsStore, error: int
) -> None:
    add(store, trainer, 0)
    fill(monkeypatch, 2, error)
    with pytest.raises(SetupError, match=rf"version 1 .* cannot be written .*{os.strerror(error)}"):
        add(store, trainer, 1)
    assert store.newest == 0
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and p.name != MARK] == ["v0.bin"]


def test_full_shared_memory_sends_a_version_to_the_disk_and_is_tried_again_with_the_next(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, store: WeightsStore
) -> None:
    fill(monkeypatch, 1)
    announced = add(store, trainer, 0)
    assert Path(announced.shm_path or "").parent == (tmp_path / "scratch" / "weights").resolve()
    assert isinstance(store.answer(ChunkRequest(run="run", version=0, index=0)), Chunk)
    assert Path(add(store, trainer, 1).shm_path or "").parent == (tmp_path / "memory" / "atpo-run").resolve()


def test_a_version_that_fits_nowhere_waits_for_space_and_logs_one_line_a_folder(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, store: WeightsStore, caplog: pytest.LogCaptureFixture
) -> None:
    fill(monkeypatch, 8)
    write = functools.partial(add, store, trainer, 0)
    log, pauses = logging.getLogger("atpo.learner"), list[float]()
    announced = until_written("version 0 of the weights", write, log=log, sleep=pauses.append, clock=lambda: 0.0)
    assert content(announced) is not None
    assert len(pauses) == 4
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 2
    assert "does not go into" in said[0]
    assert said[1].startswith("version 0 of the weights cannot be written: No space left")


def test_versions_are_served_though_their_files_are_removed_and_the_next_one_makes_the_folder_anew(
    tmp_path: Path, trainer: Trainer, store: WeightsStore
) -> None:
    announced = add(store, trainer, 0)
    payload = content(announced)
    shutil.rmtree(tmp_path / "memory" / "atpo-run")
    manifest = store.answer(ManifestRequest(run="run", version=0))
    assert isinstance(manifest, WeightsManifest)
    pulled = b""
    for index in range(-(-manifest.total_bytes // manifest.chunk_bytes)):
        chunk = store.answer(ChunkRequest(run="run", version=0, index=index))
        assert isinstance(chunk, Chunk)
        pulled += chunk.data.tobytes()
    assert pulled == payload
    assert content(add(store, trainer, 1)) is not None


def test_a_folder_that_is_removed_while_a_version_is_written_is_made_anew(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, store: WeightsStore
) -> None:
    plain = files.write_part
    folder = tmp_path / "memory" / "atpo-run"
    removed: list[Path] = []

    def removing(file: BinaryIO, gap: int, data: memoryview) -> None:
        if not removed:
            removed.append(folder)
            shutil.rmtree(folder)
        plain(file, gap, data)

    monkeypatch.setattr(files, "write_part", removing)
    announced = add(store, trainer, 0)
    assert removed
    assert Path(announced.shm_path or "").parent == folder.resolve()
    assert content(announced) is not None


def test_a_new_run_removes_what_a_killed_one_left_in_shared_memory_and_nothing_of_one_that_lives(
    tmp_path: Path, trainer: Trainer, store: WeightsStore
) -> None:
    memory = tmp_path / "memory"
    living = Scratch(memory, "atpo-living", exactly=True)
    dead = Scratch(memory, "atpo-dead", exactly=True)
    dead._unlock()  # as the kernel does when its process ends
    (dead.path / "v7.bin").write_bytes(b"weights")
    (memory / "atpo-journal-x").mkdir()
    add(store, trainer, 0)
    other = WeightsStore(run="other", fallback=tmp_path, settings=WeightsConfig())
    assert {p.name for p in memory.iterdir()} == {"atpo-living", "atpo-run", "atpo-journal-x"}
    other.close()
    living.remove()
