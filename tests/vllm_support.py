"""What a vLLM engine must do on any device, to within a tolerance: the tests of the CPU's and of CUDA's call these."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest
from transformers import Qwen3ForCausalLM

from actors.engines.base import Sampling, WeightsFile
from actors.engines.vllm.engine import VllmEngine
from atpo_async.core.errors import ProbeMismatch
from tests.engine_support import PROBE, largest_error, reference_logprobs, sampled, weights_file

PROMPT = [7, 30, 41, 9, 200, 13]
LAYERS = [
    "model.layers.0.self_attn.qkv_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.norm.weight",
]
"""Tensors as vLLM names them."""


def to_length(count: int, **changes: object) -> Sampling:
    return Sampling(max_tokens=count, stop_token_ids=(), **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine of eight places, and what it is held to."""

    held: VllmEngine
    models: Mapping[int, Qwen3ForCausalLM]
    """By version; neighbours differ."""
    tolerance: float
    """Nats, of a single token."""
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def next_version(self) -> int:
        return self.held.stats().version + 1

    def weights(self, path: Path, version: int, *, probe: np.ndarray | None = None) -> WeightsFile:
        """With a tolerance for ``PROBE``; with ``probe``, as the learner draws it, the engine's own measure judges."""
        tolerance = self.tolerance if probe is None else None
        return weights_file(
            self.models[version], path, version=version, dtype=self.dtype, tolerance=tolerance,
            probe=PROBE if probe is None else probe,
        )  # fmt: skip

    async def is_right(self, prompt: list[int], *, tokens: int, request_id: str) -> None:
        made = await self.held.generate(prompt, to_length(tokens), request_id=request_id)
        assert largest_error(made, prompt, dict(self.models)) < self.tolerance


async def check_log_probs(engine: Engine, *, temperature: float) -> None:
    """Requests of several lengths at once have the log-probs of the model."""
    found = await asyncio.gather(
        *(
            engine.held.generate([*PROMPT, i], to_length(10 + i, temperature=temperature), request_id=str(i))
            for i in range(12)
        )
    )
    for i, generation in enumerate(found):
        assert len(generation.token_ids) == 10 + i
        assert generation.stop_reason == "length"
        assert [span.version for span in generation.spans] == [engine.held.stats().version]
        error = largest_error(generation, [*PROMPT, i], dict(engine.models), temperature=temperature)
        assert error < engine.tolerance


async def check_swap_in_mid_request(engine: Engine, folder: Path) -> None:
    """Two swaps while seven requests run and four wait: each span is under its own weights."""
    held, start = engine.held, engine.held.stats().version
    # As many as may run at once: the probe needs a place of its own.
    long = [asyncio.create_task(held.generate([*PROMPT, i], to_length(300), request_id=f"long{i}")) for i in range(7)]
    for version in (start + 1, start + 2):
        # All running requests get a token in each step: the long ones have some hundred to go when this one ends,
        # however late a busy machine says so.
        await held.generate(PROMPT, to_length(10), request_id="short")
        waiting = [
            asyncio.create_task(held.generate([*PROMPT, i], to_length(1), request_id=f"wait{i}")) for i in range(4)
        ]
        report = await held.swap(engine.weights(folder / str(version), version))
        await asyncio.gather(*waiting)
        assert report.version == version
        assert report.in_flight >= 7, report
        assert report.probe_error < engine.tolerance
    for i, generation in enumerate(await asyncio.gather(*long)):
        assert [span.version for span in generation.spans] == [start, start + 1, start + 2]
        assert largest_error(generation, [*PROMPT, i], dict(engine.models)) < engine.tolerance
    expected = reference_logprobs(engine.models[start + 2], PROBE)
    assert np.abs(await held.score(PROBE) - expected).max() < engine.tolerance
    assert held.stats().version == start + 2


async def check_layer_left_out(engine: Engine, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that leaves a tensor out is refused naming it, and the whole weights are taken up afterwards."""
    version = engine.next_version
    whole = engine.weights(folder / "weights", version)
    parts = [name.replace("qkv", part) for part in "qkv"] if "qkv" in name else [name]
    kept = tuple(spec for spec in whole.manifest.tensors if spec.name not in parts)
    monkeypatch.setattr("actors.engines.vllm.engine.check_weights", lambda *args, **kwargs: None)
    with pytest.raises(ProbeMismatch, match=f"version {version}: vLLM did not take up {re.escape(name)}"):
        await engine.held.swap(
            WeightsFile(path=whole.path, manifest=msgspec.structs.replace(whole.manifest, tensors=kept))
        )
    await engine.held.swap(whole)
    await engine.is_right(PROMPT, tokens=5, request_id="whole")


async def check_probe_of_many_sequences(engine: Engine, folder: Path) -> None:
    """With every place taken, the probe as the learner draws it passes by the engine's own measure."""
    long = [
        asyncio.create_task(engine.held.generate([*PROMPT, i], to_length(100), request_id=f"long{i}"))
        for i in range(12)
    ]
    await engine.held.generate(PROMPT, to_length(1), request_id="short")
    version = engine.next_version
    probe = sampled(engine.models[version], sequences=11, length=20)
    report = await engine.held.swap(engine.weights(folder / "weights", version, probe=probe))
    assert report.probe_error < engine.tolerance
    for i, generation in enumerate(await asyncio.gather(*long)):
        assert largest_error(generation, [*PROMPT, i], dict(engine.models)) < engine.tolerance
