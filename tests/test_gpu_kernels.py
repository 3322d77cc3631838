"""The learner's kernels on a CUDA device: Liger-Kernel's in the model, and the compiled numbers of the head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learner.kernels.install import install
from learner.kernels.vocabulary import Scoring, Wanted
from learner.policy import head as policy_head
from learner.policy.accelerator import make_accelerator
from learner.policy.head import scored
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.kernels_support import VOCAB, dense, small_model
from tests.learner_support import make_batch, make_config, make_model

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
EVERYTHING = Wanted(entropy=True, min_p=0.02)


def logits_and_gradients(model: Any) -> list[Tensor]:
    """In float32: the logits of two rows, and every gradient of a weighted sum of their log-probs."""
    model.zero_grad()
    tokens = torch.arange(40, device=CUDA).reshape(2, 20) * 5 % VOCAB
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    logs = logits.log_softmax(-1)
    (logs[..., 3] * torch.linspace(-1, 2, 40, device=CUDA).view(2, 20)).sum().backward()
    return [logits.detach(), *(p.grad.float() for p in model.parameters() if p.grad is not None)]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest, as a share of the largest number of each tensor."""
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
def test_a_model_with_kernels_has_the_logits_and_gradients_that_it_had(family: str) -> None:
    pytest.importorskip("liger_kernel")
    plain = small_model(family, hidden_size=64, intermediate_size=96, head_dim=32).to(CUDA)
    fused = copy.deepcopy(plain)
    installed = install(fused, "liger", device=CUDA, dtypes=(torch.float32, torch.bfloat16))
    assert set(installed.counts) == {"RMSNorm", "rotary embedding", "SwiGLU"}
    assert all(installed.counts.values())
    exact = logits_and_gradients(plain)
    assert distance(logits_and_gradients(fused), exact) < 1e-4
    # In bfloat16 both are off; the kernels round no more often.
    usual = distance(logits_and_gradients(plain.bfloat16()), exact)
    assert distance(logits_and_gradients(fused.bfloat16()), exact) < 2 * usual + 0.01


@pytest.mark.parametrize("packing", ["tree", "flat"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_with_kernels_has_the_loss_and_the_gradient_norm_of_one_without(
    tmp_path: Path, packing: str, checkpointing: bool
) -> None:
    pytest.importorskip("liger_kernel")
    folder, found = make_model(tmp_path), []
    for kernels in ("none", "auto"):
        config = make_config(
            folder, objective={"kl_coef": 0.01, "entropy_coef": 0.01},
            learner={
                "kernels": kernels, "packing": packing, "gradient_checkpointing": checkpointing, "device": "cuda"
            },
        )  # fmt: skip
        trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
        assert trainer.kernels.name == ("none" if kernels == "none" else "liger")
        assert trainer.policy.compiled_head is (kernels == "auto")
        metrics = trainer.train(make_batch(), version=3).metrics
        found.append((metrics["train/loss"], metrics["grad_norm"]))
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-3)


def made(dtype: torch.dtype, *, tokens: int, vocabulary: int, channels: int = 64) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(channels, vocabulary, bias=False, dtype=dtype, device=CUDA)
    nn.init.normal_(head.weight, std=0.5)
    hidden = torch.randn(tokens, channels, dtype=dtype, device=CUDA, requires_grad=True)
    return head, hidden, torch.randint(0, vocabulary, (tokens,), device=CUDA)


def gradients(result: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 2, result.numel(), device=CUDA).view(result.shape)
    return torch.autograd.grad((result * weights).sum(), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [10, 1000])
def test_the_compiled_numbers_of_the_head_are_those_of_whole_distributions(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    head, hidden, target = made(dtype, tokens=37, vocabulary=5003)
    monkeypatch.setattr(policy_head, "logits_at_once", lambda device: chunk * 5003)
    scoring = Scoring(scale=1 / 0.7, wanted=EVERYTHING, compiled=True)
    result = scored(head, hidden, target, scoring)
    # Of the same rounded factors, exactly.
    exact_head, exact_hidden = copy.deepcopy(head).double(), hidden.detach().double().requires_grad_()
    expected = dense(exact_head, exact_hidden, target, scoring)
    # Logits are float32 whatever the factors are: steps of bfloat16 would be a hundred times as wide.
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=1e-4)
    allowed = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    exact = gradients(expected, exact_hidden, exact_head.weight)
    for one, other in zip(gradients(result, hidden, head.weight), exact, strict=True):
        assert float((one.double() - other).abs().max() / other.abs().max()) < allowed


def test_the_head_gives_what_the_librarys_fused_cross_entropy_gives() -> None:
    liger = pytest.importorskip("liger_kernel.ops")
    head, hidden, target = made(torch.float32, tokens=50, vocabulary=5003)
    ours = scored(head, hidden, target, Scoring(scale=1.0, wanted=Wanted(), compiled=True))
    function = liger.LigerFusedLinearCrossEntropyFunction
    theirs = -function.apply(hidden, head.weight, target, None, None, -100, 0.0, 0.0, "none")[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for one, other in zip(gradients(ours, hidden, head.weight), gradients(theirs, hidden, head.weight), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_the_heads_numbers_are_compiled_once_for_any_number_of_tokens() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    for tokens in (64, 37, 51, 90):
        head, hidden, target = made(torch.bfloat16, tokens=tokens, vocabulary=5003)
        result = scored(head, hidden, target, Scoring(scale=1 / 0.7, wanted=Wanted(), compiled=True))
        gradients(result, hidden, head.weight)
    assert counters["stats"]["unique_graphs"] == 2


def test_the_head_holds_a_chunk_of_logits_and_not_those_of_all_tokens() -> None:
    tokens, vocabulary, channels = 16384, 151_936, 256
    head, hidden, target = made(torch.bfloat16, tokens=tokens, vocabulary=vocabulary, channels=channels)
    scoring = Scoring(scale=1.0, wanted=Wanted(entropy=True), compiled=True)
    gradients(scored(head, hidden[:64], target[:64], scoring), hidden, head.weight)  # what compiling takes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(scored(head, hidden, target, scoring), hidden, head.weight)
    peak = torch.cuda.max_memory_allocated() - before
    # Logits in float32 and their gradient in half precision, of a chunk; and what has the weights' size.
    assert peak < 7 * policy_head.logits_at_once(CUDA) + 16 * vocabulary * channels
    assert peak < 2 * tokens * vocabulary
