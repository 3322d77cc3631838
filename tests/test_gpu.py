"""What must hold on a CUDA device as on the CPU.  Skipped, with the reason, where there is none."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from actors.engine import Sampling
from actors.transformers_engine import TransformersEngine
from learner.model import load_policy, make_accelerator
from learner.step import Trainer
from tests.engine_support import largest_error, save_model, tiny_model, weights_file
from tests.learner_support import make_batch, make_config, make_model

pytestmark = pytest.mark.gpu

CUDA_TOLERANCE = 1e-3
"""Nats: float32 matrix products on a GPU sum in another order, and may use TF32."""


def test_a_training_step_gives_the_loss_it_gives_on_the_cpu(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    losses = []
    for device in ("cpu", "cuda"):
        config = make_config(folder, learner={"device": device})
        trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
        losses.append(trainer.train(make_batch(), version=3).metrics["train/loss"])
    assert losses[1] == pytest.approx(losses[0], abs=CUDA_TOLERANCE)


async def test_an_engine_on_the_gpu_keeps_each_span_to_its_own_weights(tmp_path: Path) -> None:
    models = {version: tiny_model(version) for version in range(2)}
    engine = TransformersEngine(
        save_model(models[0], tmp_path / "model"), device="cuda", max_batch=4, max_model_len=256
    )
    await engine.start()
    try:
        prompt = [7, 30, 41, 9]
        made, _ = await asyncio.gather(
            engine.generate(prompt, Sampling(max_tokens=120, stop_token_ids=()), request_id="long"),
            engine.swap(weights_file(models[1], tmp_path / "v1.bin", version=1)),
        )
        assert largest_error(made, prompt, models) < CUDA_TOLERANCE
    finally:
        await engine.close()
