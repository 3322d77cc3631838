"""Weights on a CUDA device: copied aside by a stream of their own, and straight into vLLM's parameters."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch

from actors.engines.base import EngineSettings
from actors.engines.vllm.engine import VllmEngine
from atpo_async.core.errors import ProbeMismatch
from learner.weights.staging import Staged, Stager
from tests.engine_support import PROBE, reference_logprobs, save_model, tiny_model, weights_file

pytestmark = pytest.mark.gpu

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

MODELS = [tiny_model(seed) for seed in range(2)]


def bytes_of(staged: Staged) -> bytes:
    return b"".join(bytes(data) for _, data in staged.parts())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_are_copied_as_they_were_when_they_were_staged(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.weights.staging.CAST_ELEMENTS", 1000)  # several parts of each tensor
    source = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(61, 67, generator=source) for i in range(5)}
    there = {name: tensor.cuda() for name, tensor in tensors.items()} | {"odd": torch.ones(7, 5).cuda().t()}
    there["tied"] = there["w0"]
    expected = bytes_of(Staged({name: tensor.cpu() for name, tensor in there.items() if name != "tied"}, precision))  # type: ignore[arg-type]
    stager = Stager(precision)  # type: ignore[arg-type]
    for _ in range(2):  # the second time in the same memory
        staged = stager.stage(there, copied=False)
        assert staged is not None
        staged.until_read()  # as before an optimizer step
        kept = {name: tensor.clone() for name, tensor in there.items()}
        for tensor in there.values():
            tensor.add_(1.0)
        assert bytes_of(staged) == expected
        staged.release()
        for name, tensor in there.items():
            tensor.copy_(kept[name])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    folder = save_model(MODELS[0], tmp_path_factory.mktemp("model"))
    engine = VllmEngine(
        EngineSettings(
            model=folder, device="cuda", dtype="bfloat16", max_model_len=256, max_num_seqs=8,
            gpu_memory_utilization=0.3,
        )
    )  # fmt: skip
    await engine.start()
    yield engine
    await engine.close()


@pytest.mark.vllm
@pytest.mark.slow
@needs_vllm
@pytest.mark.asyncio(loop_scope="module")
async def test_log_probs_after_a_direct_load_are_those_after_a_layer_wise_reload(
    engine: VllmEngine, tmp_path: Path
) -> None:
    async def after(version: int) -> np.ndarray:
        weights = weights_file(
            MODELS[version % 2], tmp_path / f"v{version}.bin", version=version, tolerance=None, dtype="bfloat16"
        )
        report = await engine.swap(weights)
        assert report.read_s > 0
        return await engine.score(PROBE)

    # The first version is loaded by vLLM's reload, and shows which parameters are as in a file; later ones are copied.
    first = [await after(version) for version in (1, 2)]
    later = [await after(version) for version in (3, 4)]
    assert np.abs(first[0] - first[1]).max() > 0.1
    for reloaded, copied, model in zip(first, later, (MODELS[1], MODELS[0]), strict=True):
        assert np.abs(reloaded - copied).max() < 1e-6
        assert np.abs(copied - reference_logprobs(model, PROBE)).max() < 0.2  # in bfloat16


@pytest.mark.vllm
@pytest.mark.slow
@needs_vllm
@pytest.mark.asyncio(loop_scope="module")
async def test_a_tensor_of_other_weights_fails_the_probe_after_a_direct_load(
    engine: VllmEngine, tmp_path: Path
) -> None:
    version = engine.stats().version + 1
    model = MODELS[version % 2]
    mixed = {**model.state_dict(), "model.norm.weight": model.state_dict()["model.norm.weight"] * 2}
    wrong = weights_file(model, tmp_path / "wrong", version=version, tolerance=None, dtype="bfloat16", tensors=mixed)
    with pytest.raises(ProbeMismatch, match="nats off the learner's probe"):
        await engine.swap(wrong)
    await engine.swap(weights_file(model, tmp_path / "whole", version=version, tolerance=None, dtype="bfloat16"))
