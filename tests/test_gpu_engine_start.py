"""How vLLM starts on a CUDA device: it tells its stages, and takes what an earlier start compiled from the cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from actors.engines.base import EngineSettings, Sampling
from actors.engines.vllm import stages
from actors.engines.vllm.engine import VllmEngine
from atpo_async.models.compiled import VLLM
from tests.engine_support import PROBE, save_model, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


async def stages_of_a_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr("actors.engines.vllm.engine._at_stage", told.append)
    engine = VllmEngine(
        EngineSettings(
            model=folder, device="cuda", dtype="bfloat16", max_model_len=256, max_num_seqs=8,
            gpu_memory_utilization=0.3,
        )
    )  # fmt: skip
    try:
        await engine.start()
        made = await engine.generate(PROBE, Sampling(max_tokens=4, stop_token_ids=()), request_id="r")
        assert len(made.token_ids) == 4
    finally:
        await engine.close()
    return told


async def test_a_start_tells_that_it_compiles_and_the_next_takes_it_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VLLM, str(tmp_path / "cache"))
    folder = save_model(tiny_model(0), tmp_path / "model")
    # Beside what counts, so that vLLM is given links: under the same name at both starts.
    (folder / "adapter_config.json").write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    first = await stages_of_a_start(folder, monkeypatch)
    in_turn = [stages.IMPORTING, stages.PROCESSES, stages.DEVICE, stages.WEIGHTS, stages.COMPILING]
    assert [stage for stage in dict.fromkeys(first) if stage in in_turn] == in_turn
    assert {stages.CACHE, stages.GRAPHS, stages.WARMING_UP} <= set(first)
    second = await stages_of_a_start(folder, monkeypatch)
    assert stages.COMPILED in second
