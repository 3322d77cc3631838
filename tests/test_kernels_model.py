"""Liger-Kernel's operations in transformers models, run on a CPU by Triton's interpreter (make test-kernels).

Loss and gradients are those of the model as it was.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from atpo_async.core.errors import SetupError
from learner.kernels import kinds
from learner.kernels.install import install
from learner.kernels.liger import Functions
from learner.policy.accelerator import make_accelerator
from learner.policy.model import Policy, load_policy
from learner.training.trainer import Trainer
from tests.kernels_support import VOCAB, let_triton_interpret, small_model
from tests.learner_support import flat_gradient, make_batch, make_config, make_model

pytestmark = pytest.mark.kernels

CPU = torch.device("cpu")
FLOAT32 = (torch.float32,)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    let_triton_interpret(monkeypatch)


def loss_and_gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    tokens = torch.arange(14).reshape(2, 7) * 5 % VOCAB
    logs = Policy(model)(tokens, torch.arange(14), tokens.reshape(-1).roll(-1))
    loss = (logs * torch.linspace(-1, 2, 14)).sum()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=2e-5, rtol=2e-4), name


@pytest.mark.parametrize(("family", "norms"), [("qwen3", 9), ("qwen2", 5), ("llama", 5), ("mistral", 5)])
def test_a_model_with_kernels_has_the_loss_and_every_gradient_that_it_had(family: str, norms: int) -> None:
    model = small_model(family)
    names = list(model.state_dict())
    expected = loss_and_gradients(model)
    installed = install(model, "liger", device=CPU, dtypes=FLOAT32)
    assert installed.counts == {"RMSNorm": norms, "rotary embedding": 2, "SwiGLU": 2}
    assert installed.reason == f"liger: RMSNorm ({norms} modules), rotary embedding (2 modules), SwiGLU (2 modules)"
    assert_equal(loss_and_gradients(model), expected)
    assert list(model.state_dict()) == names
    # Another model of the family is as it was.
    assert not any(kinds.is_replaced(module) for module in small_model(family).modules())


def test_gemma_keeps_its_activation_and_norms_that_add_one_to_their_weights_get_a_kernel_that_does() -> None:
    model = small_model("gemma2", query_pre_attn_scalar=8, attn_logit_softcapping=None, final_logit_softcapping=None)
    expected = loss_and_gradients(model)
    installed = install(model, "liger", device=CPU, dtypes=FLOAT32)
    assert installed.counts == {"RMSNorm": 9, "rotary embedding": 2, "SwiGLU": 0}
    assert installed.reason.endswith("; left out: no SwiGLU of its form")
    assert_equal(loss_and_gradients(model), expected)


def test_copies_and_adapters_and_checkpointed_layers_compute_the_same(tmp_path: Path) -> None:
    plain = small_model("qwen3")
    fused = copy.deepcopy(plain)
    install(fused, "liger", device=CPU, dtypes=FLOAT32)
    fused = copy.deepcopy(fused)
    assert sum(kinds.is_replaced(module) for module in fused.modules()) == 13
    for model in (plain, fused):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["gate_proj", "down_proj", "q_proj"]), model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.constant_(parameter, 0.1)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    expected = loss_and_gradients(plain)
    assert sum("lora_" in name for name in expected) == 12
    assert_equal(loss_and_gradients(fused), expected)


@pytest.mark.parametrize(("packing", "checkpointing"), [("tree", True), ("flat", False)])
def test_a_training_step_has_the_loss_and_the_gradient_of_one_without_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, checkpointing: bool
) -> None:
    folder = make_model(tmp_path)
    found = []
    for kernels in ("none", "liger"):
        config = make_config(
            folder, learner={"kernels": kernels, "packing": packing, "gradient_checkpointing": checkpointing},
            objective={"kl_coef": 0.01, "entropy_coef": 0.01},
        )  # fmt: skip
        trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
        gradients: list[Tensor] = []
        monkeypatch.setattr(
            trainer.optimizer, "step", lambda into=gradients, of=trainer: into.append(flat_gradient(of.policy))
        )
        report = trainer.train(make_batch(num_trees=1), version=3)
        found.append((torch.tensor(report.metrics["train/loss"]), gradients[0]))
        assert trainer.kernels.name == kernels
        assert trainer.layout == packing
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_layers_that_are_compiled_are_left_to_the_compiler() -> None:
    model = small_model("qwen3")
    installed = install(model, "liger", device=CPU, dtypes=FLOAT32, compiled=list(model.model.layers))
    assert installed.counts == {"RMSNorm": 1, "rotary embedding": 0, "SwiGLU": 0}
    assert installed.reason == "liger: RMSNorm (1 module); 12 modules left to the compiler of their layers"
    assert kinds.is_replaced(model.model.norm)


def test_a_norm_that_is_not_what_its_name_says_is_refused_by_name_and_left_out_by_auto(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class CentredRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            centred = x - x.mean(-1, keepdim=True)
            return self.weight * centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)

    model = small_model("llama")
    model.model.norm = CentredRMSNorm()
    with pytest.raises(SetupError, match=r"RMSNorm is not .* \(CentredRMSNorm: its result in float32 differs by"):
        install(copy.deepcopy(model), "liger", device=CPU, dtypes=FLOAT32)
    monkeypatch.setattr("learner.kernels.install._is_cuda", lambda device: True)
    with caplog.at_level("WARNING", logger="atpo.learner"):
        installed = install(model, "auto", device=CPU, dtypes=FLOAT32)
    assert installed.counts["RMSNorm"] == 4
    assert "CentredRMSNorm" in caplog.text
    assert "CentredRMSNorm" in installed.reason


@pytest.mark.parametrize("kind", ["RMSNorm", "rotary embedding", "SwiGLU"])
@pytest.mark.parametrize("wrong", ["result", "gradient", "raises"])
def test_a_wrong_kernel_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, kind: str, wrong: str) -> None:
    class Wrong(torch.autograd.Function):
        """Twice the input, forward or backward."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * (2 if wrong == "result" else 1)

        @staticmethod
        def backward(ctx: Any, given: Tensor) -> Tensor:
            return given * (2 if wrong == "gradient" else 1)

    method = {"RMSNorm": "norm", "rotary embedding": "rotary", "SwiGLU": "silu_product"}[kind]
    right = getattr(Functions, method)

    def broken(*arguments: Any) -> Any:
        if wrong == "raises":
            raise RuntimeError("no such kernel")
        found = right(*arguments)
        return tuple(Wrong.apply(x) for x in found) if isinstance(found, tuple) else Wrong.apply(found)

    monkeypatch.setattr(Functions, method, broken)
    said = "it raises RuntimeError: no such kernel" if wrong == "raises" else f"its {wrong} in float32 differs by"
    with pytest.raises(SetupError, match=f"liger-kernel's {kind} is not what this model computes .*{said}"):
        install(small_model("qwen3"), "liger", device=CPU, dtypes=FLOAT32)
