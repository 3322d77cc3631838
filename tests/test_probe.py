"""The probe: sampled by the learner's policy, reproduced by an engine, judged by what that engine was off by before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from actors.engines.probe import BOUNDS, MULTIPLE, Probe, check_probe_fits, noise, scale_of, sequences_of
from atpo_async.config import build
from atpo_async.core.errors import ProbeMismatch, WeightsRejected
from atpo_async.wire.messages import WeightsManifest
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from learner.weights.probe import draw_probe, is_drawn_at, probe_shape
from tests.learner_support import VOCAB, make_config, make_model

LOGPROBS = -np.random.default_rng(0).exponential(1.0, 256).astype(np.float32)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    config = make_config(make_model(tmp_path_factory.mktemp("model")))
    return Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))


def manifest(version: int = 1, *, logprobs: np.ndarray = LOGPROBS, tolerance: float | None = None) -> WeightsManifest:
    return WeightsManifest(
        run="r", version=version, total_bytes=0, chunk_bytes=4096, tensors=(),
        probe_token_ids=np.zeros(len(logprobs) + 8, np.int32), probe_logprobs=logprobs, probe_tolerance=tolerance,
        probe_sequences=8,
    )  # fmt: skip


def off_by(nats: float, *, seed: int = 0) -> np.ndarray:
    """The engine's log-probs with normal noise of ``nats`` on the logits."""
    drawn = np.random.default_rng(seed).normal(size=len(LOGPROBS))
    off = scale_of(LOGPROBS) * nats * drawn / np.sqrt(np.mean(drawn**2))
    return np.asarray(LOGPROBS + off, dtype=np.float32)


# --- the learner's part


def test_the_probe_is_sampled_by_the_policy_from_its_seed_alone(trainer: Trainer) -> None:
    drawn = draw_probe(trainer, (6, 9), seed=(3, 4))
    assert drawn.dtype == np.int32
    assert drawn.shape == (6, 9)
    torch.manual_seed(99)
    assert (draw_probe(trainer, (6, 9), seed=(3, 4)) == drawn).all()
    assert (draw_probe(trainer, (6, 9), seed=(3, 5)) != drawn).any()


def test_what_the_policy_samples_has_the_policys_frequencies(trainer: Trainer) -> None:
    tokens = draw_probe(trainer, (4000, 2), seed=(1,))
    begin = int(np.bincount(tokens[:, 0]).argmax())
    with torch.no_grad():
        p = trainer.policy.hf(input_ids=torch.tensor([[begin]])).logits[0, -1].softmax(-1).double().numpy()
    seen = np.bincount(tokens[tokens[:, 0] == begin, 1], minlength=VOCAB)
    expected = p * seen.sum()
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    # 30 degrees of freedom: above 70 with a probability of 4e-5, and the seed is fixed.
    assert chi_square < 70


def test_a_model_that_has_a_token_to_begin_with_begins_with_it(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.policy.hf.config, "bos_token_id", 7)
    assert (draw_probe(trainer, (3, 4), seed=(0,))[:, 0] == 7).all()


def test_the_log_probs_of_the_probe_are_what_the_whole_model_says(trainer: Trainer) -> None:
    drawn = draw_probe(trainer, (3, 6), seed=(0,))
    tokens = torch.from_numpy(drawn.astype(np.int64))
    with torch.no_grad():
        whole = trainer.policy.hf(input_ids=tokens).logits.log_softmax(-1)
    expected = whole[:, :-1].gather(-1, tokens[:, 1:, None]).reshape(-1).numpy()
    found = trainer.whole.probe(drawn)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_sharded_policy_samples_and_scores_inside_its_wrapper_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 on one rank of gloo: elsewhere than in the wrapper's forward a parameter is a shard."""
    config = make_config(make_model(tmp_path))
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
    drawn = draw_probe(trainer, (3, 6), seed=(0,))
    expected = trainer.whole.probe(drawn)
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in trainer.policy.hf.model.layers:
            fully_shard(layer, mesh=mesh)
        trainer.whole.model = fully_shard(trainer.policy, mesh=mesh)
        monkeypatch.setattr(trainer.whole, "sharded", True)
        assert (draw_probe(trainer, (3, 6), seed=(0,)) == drawn).all()
        np.testing.assert_allclose(trainer.whole.probe(drawn), expected, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_the_probe_leaves_space_in_the_context_for_one_token() -> None:
    """An engine asked for the log-probs of a prompt also generates one token."""
    assert probe_shape(build({"model": {"max_context_tokens": 100}})) == (32, 33)
    short = build({"model": {"max_context_tokens": 8}, "search": {"max_action_tokens": 4}})
    assert probe_shape(short) == (32, 7)
    assert probe_shape(build({"weights": {"probe_tokens": 32}})) == (32, 2)
    assert probe_shape(build({"weights": {"probe_tokens": 3}})) == (3, 2)


def test_the_probe_is_drawn_ever_more_rarely() -> None:
    assert [n for n in range(1, 1000) if is_drawn_at(n)] == [1, 8, 64, 512]


# --- the engine's part


@pytest.fixture
def probe() -> Probe:
    return Probe(device="cpu", dtype="bfloat16")


def test_the_error_is_the_noise_on_the_logits_however_sure_the_policy_is(probe: Probe) -> None:
    assert probe.judge(manifest(), off_by(0.02)) == pytest.approx(0.02, rel=1e-3)
    source = np.random.default_rng(0)
    for sharpness in (0.1, 1.0, 3.0):
        logits = sharpness * source.normal(size=(20_000, 50))
        noisy = logits + 0.01 * source.normal(size=logits.shape)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        tokens = (p.cumsum(1) > source.uniform(size=(len(p), 1))).argmax(1)
        rows = np.arange(len(p))
        off = noisy - np.log(np.exp(noisy).sum(1, keepdims=True))
        assert noise(off[rows, tokens], np.log(p)[rows, tokens]) == pytest.approx(0.01, rel=0.25)


def test_the_first_reading_is_held_to_the_devices_bound_and_later_ones_to_the_first(probe: Probe) -> None:
    unit = np.sqrt(np.mean(scale_of(LOGPROBS) ** 2))
    assert probe.tolerance(manifest(logprobs=LOGPROBS / 4)) < 0.5
    assert probe.tolerance(manifest()) == pytest.approx(min(0.5, 0.3 * np.std(LOGPROBS) / unit), rel=1e-6)
    probe.judge(manifest(), off_by(0.02))
    assert probe.tolerance(manifest()) == pytest.approx(MULTIPLE * 0.02, rel=1e-3)
    probe.judge(manifest(2), off_by(0.06, seed=1))
    with pytest.raises(ProbeMismatch, match=r"version 3: the engine \(bfloat16 on cpu\) is 0.17 nats off .*0.16, 0.04"):
        probe.judge(manifest(3), off_by(0.17, seed=2))


def test_what_was_refused_is_no_measure_for_what_follows(probe: Probe) -> None:
    probe.judge(manifest(), off_by(0.02))
    for version in range(2, 20):
        with pytest.raises(ProbeMismatch):
            probe.judge(manifest(version), off_by(0.09, seed=version))


def test_the_measure_follows_a_policy_that_changes_slowly(probe: Probe) -> None:
    for version in range(200):
        probe.judge(manifest(version), off_by(0.01 * 1.01**version, seed=version))
    assert probe.tolerance(manifest()) > 0.15


@pytest.mark.parametrize(("device", "dtype"), list(BOUNDS))
def test_weights_of_another_model_are_refused_at_the_first_load(device: str, dtype: str) -> None:
    other = np.random.default_rng(5).permutation(LOGPROBS)
    with pytest.raises(ProbeMismatch, match="its first version"):
        Probe(device=device, dtype=dtype).judge(manifest(), other)


def test_the_attention_of_a_hopper_gpu_passes_in_float32_and_that_of_a_cpu_does_not() -> None:
    Probe(device="cuda:1", dtype="float32").judge(manifest(), off_by(0.0093))
    with pytest.raises(ProbeMismatch, match=r"tolerance 0.001"):
        Probe(device="cpu", dtype="float32").judge(manifest(), off_by(0.0093))


@pytest.mark.parametrize(
    ("dtype", "readings"),
    # Seen on an H100: the demo in float32 (attention in TF32), a policy of 0.6 billion parameters in bfloat16.
    [("float32", (0.0093, 0.006, 0.012, 0.0075, 0.0118, 0.0061)), ("bfloat16", (0.016, 0.019, 0.017, 0.0185, 0.016))],
)
def test_what_was_read_on_a_hopper_gpu_passes_at_every_version_and_a_fault_does_not(
    dtype: str, readings: tuple[float, ...]
) -> None:
    probe = Probe(device="cuda", dtype=dtype)
    for version, reading in enumerate((*readings, *reversed(readings))):
        probe.judge(manifest(version), off_by(reading, seed=version))
    with pytest.raises(ProbeMismatch, match=rf"the engine \({dtype} on cuda\) is 0\.09"):
        probe.judge(manifest(99), off_by(0.09))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:3"])
def test_there_is_a_bound_for_every_device_and_precision_that_an_engine_may_have(device: str, dtype: str) -> None:
    assert 0 < Probe(device=device, dtype=dtype).tolerance(manifest()) < 0.6


def test_a_log_prob_that_is_no_number_fails_at_any_tolerance(probe: Probe) -> None:
    with pytest.raises(ProbeMismatch, match="is nan nats off"):
        probe.judge(manifest(tolerance=1e9), np.full(len(LOGPROBS), np.nan, np.float32))


def test_a_tolerance_of_the_configuration_stands_in_for_the_measure(probe: Probe) -> None:
    probe.judge(manifest(tolerance=2.0), off_by(1.9))
    with pytest.raises(ProbeMismatch, match=r"set --weights\.probe_tolerance"):
        probe.judge(manifest(tolerance=0.001), off_by(0.002))


@pytest.mark.parametrize("changed", [{"probe_sequences": 3}, {"probe_sequences": 0}, {"probe_sequences": 264}])
def test_a_probe_that_cannot_be_scored_is_refused(changed: dict[str, Any]) -> None:
    check_probe_fits(manifest(), max_model_len=64)
    assert sequences_of(manifest()).shape == (8, 33)
    with pytest.raises(WeightsRejected, match=r"version 1: a probe of \d+ sequences"):
        check_probe_fits(msgspec.structs.replace(manifest(), **changed), max_model_len=64)
    with pytest.raises(WeightsRejected, match="it needs 2 to 32 tokens"):
        check_probe_fits(manifest(), max_model_len=33)
