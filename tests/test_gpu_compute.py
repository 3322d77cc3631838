"""The learner's compute on CUDA: FlashAttention over packed trees, passes in bfloat16, compiled layers, few graphs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner.packing.attention import FLASH_CAPABILITY, to_device, tree_attention_forward, ways
from learner.packing.rows import TreeLayout
from tests import trained_support
from tests.learner_support import VOCAB, make_batch
from tests.trained_support import VERSION

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
trainer_of = partial(trained_support.trainer_of, device="cuda")
trained = partial(trained_support.trained, device="cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads are wide enough for every kernel."""
    torch.manual_seed(0)
    found = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, max_position_embeddings=512, initializer_range=0.1,
        )
    ).save_pretrained(found)  # fmt: skip
    (found / "tokenizer_config.json").write_text("{}")
    return found


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def needs_flash() -> None:
    if torch.cuda.get_device_capability() < FLASH_CAPABILITY:
        pytest.skip("PyTorch's FlashAttention needs an Ampere GPU or a newer one")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [64, 128])
def test_attention_by_runs_is_the_dense_mask_with_its_gradients(dtype: torch.dtype, channels: int) -> None:
    needs_flash()
    # Two rows: a prompt, a fork of forks, a tree of its own behind them; the second one's last places are padding.
    exits = np.full((2, 700), 700)
    exits[:, :600] = 600
    exits[:, 150:400] = 400
    exits[:, 300:390] = 390
    filled = np.array([700, 600])
    exits[1, 600:] = np.arange(601, 701)
    layout = TreeLayout(position_ids=np.zeros_like(exits), exit=exits, filled=filled)
    real = (torch.arange(700) < torch.from_numpy(filled)[:, None]).to(CUDA)
    assert ways(CUDA, dtype)[0] == "varlen"
    found = {}
    for way, precision in (("varlen", dtype), ("dense", dtype), ("dense", torch.float32)):
        torch.manual_seed(0)
        tensors = [torch.randn(2, heads, 700, channels, device=CUDA).to(dtype).to(precision) for heads in (4, 2, 2)]
        query, key, value = (tensor.requires_grad_() for tensor in tensors)
        out, _ = tree_attention_forward(
            torch.nn.Module(), query, key, value, None, scaling=0.1,
            tree_layout=to_device(layout, CUDA, way=way),  # type: ignore[arg-type]
        )  # fmt: skip
        out = out[real]
        out.backward(torch.randn(out.shape, device=CUDA).to(dtype).to(precision))
        found[way, precision] = [out.detach().float(), *(t.grad.float() for t in tensors if t.grad is not None)]
    exact = found["dense", torch.float32]
    for one, usual, expected in zip(found["varlen", dtype], found["dense", dtype], exact, strict=True):
        assert relative(one, expected) < max(2 * relative(usual, expected), 0.01)


def test_a_policy_in_half_precision_takes_attention_by_runs(folder: Path) -> None:
    needs_flash()
    trainer = trainer_of(folder, mixed_precision="bf16", packing="tree", compile="off")
    assert trainer.planner.way == "varlen"
    assert trainer.half is not None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packing", ["tree", "flat"])
def test_compiled_layers_in_bfloat16_are_as_near_to_float32_as_others(
    folder: Path, packing: str, checkpointing: bool
) -> None:
    exact_loss, exact, _ = trained(folder, packing=packing, compile="off", kernels="none")
    settings: dict[str, object] = {"packing": packing, "mixed_precision": "bf16"}
    loss, gradient, _ = trained(folder, compile="off", kernels="none", **settings)
    compiled_loss, compiled, trainer = trained(folder, compile="on", gradient_checkpointing=checkpointing, **settings)
    assert trainer.compiled == "2 of them (Qwen3DecoderLayer)"
    assert abs(compiled_loss - exact_loss) < max(2 * abs(loss - exact_loss), 0.02)
    assert relative(compiled, exact) < max(2 * relative(gradient, exact), 0.03)


@pytest.mark.parametrize(
    ("settings", "graphs"),
    [
        ({"mixed_precision": "bf16", "minibatches": 2, "gradient_checkpointing": True, "compile": "on"}, 8),
        ({"mixed_precision": "no", "compile": "off"}, 8),
        ({"mixed_precision": "no", "compile": "on"}, 24),
    ],
    ids=str,
)
def test_batches_of_random_trees_compile_a_few_graphs_and_no_more_after_the_first(
    folder: Path, settings: dict[str, object], graphs: int
) -> None:
    trainer = trainer_of(folder, **settings)
    trainer.warm_up()
    found = []
    for step in range(12):
        batch = make_batch(seed=step, step=step, num_trees=2 + step % 4)
        found.append(trainer.train(batch, version=VERSION).metrics["pack/compilations"])
    assert found[-1] <= graphs
    assert found[-1] == found[len(found) // 2]
