"""What must hold on a CUDA device as on the CPU.  Skipped, with the reason, where there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.engines.base import EngineSettings, Sampling
from actors.engines.transformers.engine import TransformersEngine
from learner.packing.attention import to_device, tree_attention_forward, ways
from learner.packing.rows import TreeLayout
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.policy.packing_check import layout_for
from learner.training.trainer import Trainer
from tests.engine_support import largest_error, save_model, tiny_model, weights_file
from tests.learner_support import VOCAB, make_batch, make_config, make_model

pytestmark = pytest.mark.gpu

CUDA_TOLERANCE = 1e-3
"""Nats: float32 matrix products on a GPU sum in another order, and may use TF32."""


def begin_anew() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # it holds a process to one device


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    begin_anew()
    yield
    begin_anew()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_over_packed_trees_is_the_dense_mask_with_its_gradients(dtype: torch.dtype) -> None:
    # Three rows whose last blocks are ragged; each a prompt, a fork of forks, and a tree of its own behind them.
    exits = np.full((3, 700), 700)
    exits[:, :600] = 600
    exits[:, 150:400] = 400
    exits[:, 300:390] = 390
    exits[1, 390:400] = 400
    layout = TreeLayout(position_ids=np.zeros_like(exits), exit=exits)
    device = torch.device("cuda")
    assert ways(device)[0] == "flex"
    found = []
    for way in ("flex", "dense"):
        torch.manual_seed(0)
        query, key, value = (
            torch.randn(3, heads, 700, 64, dtype=dtype, device=device, requires_grad=True) for heads in (4, 2, 2)
        )
        out, _ = tree_attention_forward(
            torch.nn.Module(), query, key, value, None, scaling=0.1, tree_layout=to_device(layout, device, way=way)
        )
        out.backward(torch.randn_like(out))
        grads = [t.grad for t in (query, key, value) if t.grad is not None]
        assert len(grads) == 3
        found.append([out.detach(), *grads])
    # In bfloat16 sums of a hundred terms differ by a few units of the last of eight bits.
    tolerance = CUDA_TOLERANCE if dtype == torch.float32 else 0.1
    for flex, dense in zip(*found, strict=True):
        assert float((flex - dense).abs().max()) < tolerance * max(1.0, float(dense.abs().max()))


def test_a_packed_policy_gives_the_log_probs_of_flat_rows_on_the_gpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Heads wide enough for FlexAttention; narrower ones take the dense mask.
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=128, initializer_range=0.2,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    config = make_config(tmp_path, learner={"device": "cuda", "packing": "tree"})
    policy = load_policy(config)
    policy.to("cuda")
    assert layout_for(policy, config) == ("tree", "packed trees get the log-probs of flat rows")


def test_the_learner_multiplies_float32_numbers_in_float32(tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        make_accelerator(make_config(tmp_path, learner={"device": "cuda"}))
        a, b = (torch.randn(256, 256, device="cuda") for _ in range(2))
        exact = a.double() @ b.double()
        # TF32 keeps 10 bits: sums of 256 products would be off by more than 1e-3.
        assert float((a @ b - exact).abs().max()) < 2e-4
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_training_step_gives_the_loss_it_gives_on_the_cpu(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    losses = []
    for device in ("cpu", "cuda"):
        begin_anew()
        config = make_config(folder, learner={"device": device})
        trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
        assert next(trainer.policy.parameters()).device.type == device
        losses.append(trainer.train(make_batch(), version=3).metrics["train/loss"])
    assert losses[1] == pytest.approx(losses[0], abs=CUDA_TOLERANCE)


async def test_an_engine_on_the_gpu_keeps_each_span_to_its_own_weights(tmp_path: Path) -> None:
    models = {version: tiny_model(version) for version in range(2)}
    engine = TransformersEngine(
        EngineSettings(
            model=save_model(models[0], tmp_path / "model"), device="cuda", max_num_seqs=4, max_model_len=256
        )
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
