"""Weights out: every tensor, byte for byte, with a probe that a dropped one would fail."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from atpo_async.config import LinksConfig, WeightsConfig
from atpo_async.errors import SetupError
from atpo_async.links import Client, LinkSettings, Listener
from atpo_async.messages import (
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
from learner import publisher as publishing
from learner.model import load_policy, make_accelerator
from learner.publisher import Publisher, WeightsStore, probe_token_ids
from learner.step import Trainer
from tests.learner_support import VOCAB, make_config, make_model

LINKS = LinkSettings.from_config(LinksConfig())
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    config = make_config(make_model(tmp_path_factory.mktemp("model")))
    return Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightsStore]:
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(publishing, "SHARED_MEMORY", tmp_path / "memory")
    made = make_store(tmp_path)
    yield made
    made.close()


def make_store(folder: Path, precision: publishing.Precision = "float32", **settings: object) -> WeightsStore:
    return WeightsStore(
        run="run", fallback=folder / "scratch", precision=precision,
        settings=WeightsConfig.model_validate({"chunk_bytes": 4096, **settings}),
    )  # fmt: skip


def add(store: WeightsStore, trainer: Trainer, version: int) -> WeightsAnnounced:
    probe = probe_token_ids(VOCAB, 8, seed=0)
    return store.add(version, trainer.tensors(), probe_token_ids=probe, probe_logprobs=trainer.probe(probe))


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
        assert (await client.request(AnnouncementRequest(run="run"), timeout_s=10)).sha256 == announced.sha256
        manifest = await client.request(ManifestRequest(run="run", version=0), timeout_s=10)
        payload = b""
        for index in range(-(-manifest.total_bytes // manifest.chunk_bytes)):
            chunk = await client.request(ChunkRequest(run="run", version=0, index=index), timeout_s=10)
            assert isinstance(chunk, Chunk)
            payload += chunk.data.tobytes()
        assert hashlib.sha256(payload).hexdigest() == manifest.sha256 == announced.sha256
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
        assert (heard.version, heard.sha256) == (3, announcement.sha256)


def test_the_newest_two_versions_are_kept(store: WeightsStore, trainer: Trainer) -> None:
    paths = [Path(add(store, trainer, version).shm_path or "") for version in (4, 5, 9)]
    assert [p.exists() for p in paths] == [False, True, True]
    gone = store.answer(ManifestRequest(run="run", version=4))
    assert isinstance(gone, VersionGone)
    assert (gone.version, gone.newest) == (4, 9)
    assert isinstance(store.answer(ChunkRequest(run="run", version=5, index=0)), Chunk)
    newest = store.answer(AnnouncementRequest(run="run"))
    assert isinstance(newest, WeightsAnnounced)
    assert newest.version == 9


def test_the_probe_is_what_the_whole_model_says(trainer: Trainer) -> None:
    probe = probe_token_ids(VOCAB, 12, seed=1)
    assert probe.tolist() == probe_token_ids(VOCAB, 12, seed=1).tolist()
    assert (probe >= 0).all()
    assert (probe < VOCAB).all()
    tokens = torch.from_numpy(probe.astype(np.int64))
    with torch.no_grad():
        whole = trainer.policy.hf(input_ids=tokens[None]).logits[0].log_softmax(-1)
    expected = whole[:-1].gather(-1, tokens[1:, None])[:, 0].numpy()
    found = trainer.probe(probe)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_untrained_head_under_a_trained_body_fails_the_probe(trainer: Trainer) -> None:
    probe = probe_token_ids(VOCAB, 12, seed=1)
    before = trainer.probe(probe)
    head = trainer.policy.hf.lm_head.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.mul_(1.01)
    changed = trainer.probe(probe)
    with torch.no_grad():
        head.copy_(kept)
    assert np.abs(changed - before).max() > publishing.PROBE_TOLERANCE["float32"]


def test_an_engine_in_lower_precision_gets_its_own_bytes_and_tolerance(tmp_path: Path, trainer: Trainer) -> None:
    half = make_store(tmp_path, "bfloat16", shared_memory=False)
    announced = add(half, trainer, 0)
    assert announced.shm_path is None
    manifest = half.answer(ManifestRequest(run="run", version=0))
    assert isinstance(manifest, WeightsManifest)
    assert manifest.probe_tolerance == 0.15
    payload = b""
    for index in range(-(-manifest.total_bytes // 4096)):
        chunk = half.answer(ChunkRequest(run="run", version=0, index=index))
        assert isinstance(chunk, Chunk)
        payload += chunk.data.tobytes()
    found = tensors_of(payload, manifest)
    for name, tensor in trainer.tensors().items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16))
    assert all(spec.offset % 64 == 0 for spec in manifest.tensors)
    half.close()


def test_without_shared_memory_the_run_folder_serves(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "SHARED_MEMORY", tmp_path / "nowhere")
    store = make_store(tmp_path, probe_tolerance=0.5)
    announced = add(store, trainer, 0)
    assert announced.shm_path is not None
    assert Path(announced.shm_path).parent == (tmp_path / "scratch" / "weights").resolve()
    manifest = store.answer(ManifestRequest(run="run", version=0))
    assert isinstance(manifest, WeightsManifest)
    assert manifest.probe_tolerance == 0.5
    store.close()


def test_weights_that_fit_nowhere_are_an_error_and_leave_nothing_half_written(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, store: WeightsStore
) -> None:
    add(store, trainer, 0)

    def full(tensor: torch.Tensor, precision: str) -> memoryview:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing, "raw_bytes", full)
    with pytest.raises(SetupError, match=r"version 1 .* cannot be written .*No space left"):
        add(store, trainer, 1)
    assert store.newest == 0
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["v0.bin"]
