"""The numbers out of the output head, against a plain computation: values, gradients, chunks, precision, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks import head as head_benchmark
from learner.kernels import vocabulary
from learner.kernels.vocabulary import Scoring, Wanted
from learner.policy import head as policy_head
from learner.policy.head import FusedHead, is_matrix, scored
from learner.policy.model import Policy
from tests.kernels_support import dense, small_model

TOKENS, CHANNELS, VOCAB = 7, 6, 23
EVERYTHING = Wanted(entropy=True, min_p=0.1)


@pytest.fixture(params=[VOCAB * 100, VOCAB * 6, VOCAB * 2], ids=["one chunk", "chunks", "a token each"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(policy_head, "MAX_LOGITS", request.param)
    size: int = request.param
    return size


def made(dtype: torch.dtype = torch.float64, *, bias: bool = False) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(CHANNELS, VOCAB, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    hidden = torch.randn(TOKENS, CHANNELS, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return head, hidden, torch.tensor([0, VOCAB - 1, 3, 3, 11, 0, 5])


Numbers = Callable[[Any, Tensor, Tensor, Scoring], Tensor]


def with_gradients(numbers: Numbers, head: Any, hidden: Tensor, target: Tensor, scoring: Scoring) -> list[Tensor]:
    """The numbers, and the gradients of a sum in which each has a weight of its own."""
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    result = numbers(head, hidden, target, scoring)
    weights = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view(result.shape)
    return [result.detach(), *torch.autograd.grad((result * weights).sum(), inputs)]


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("scale", [1.0, 1 / 0.7])
@pytest.mark.parametrize("wanted", [Wanted(), Wanted(entropy=True), Wanted(min_p=0.1), EVERYTHING], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_every_number_and_gradient_is_that_of_whole_distributions(wanted: Wanted, scale: float, bias: bool) -> None:
    head, hidden, target = made(bias=bias)
    scoring = Scoring(scale=scale, wanted=wanted)
    expected = with_gradients(dense, head, hidden, target, scoring)
    for one, other in zip(with_gradients(scored, head, hidden, target, scoring), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, TOKENS])
def test_the_gradient_of_the_fused_head_is_its_derivative(chunk: int) -> None:
    head, hidden, target = made()
    scoring = Scoring(scale=1 / 0.7, wanted=Wanted(entropy=True))

    def numbers(hidden: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = FusedHead.apply(hidden, weight, target, scoring, chunk)[0]
        return found

    assert torch.autograd.gradcheck(numbers, (hidden, head.weight))


@pytest.mark.usefixtures("chunks")
def test_in_float32_the_log_prob_is_the_cross_entropy_also_where_the_target_is_nearly_certain() -> None:
    head, hidden, target = made(torch.float32)
    with torch.no_grad():
        # 0.9998 of the probability of the first two tokens' targets; the others are as they fall.
        head.weight[target[:2]] += 4 * hidden[:2] / hidden[:2].square().sum(-1, keepdim=True) * 4

    def cross_entropy(head: Any, hidden: Tensor, target: Tensor, scoring: Scoring) -> Tensor:
        return -nn.functional.cross_entropy(head(hidden), target, reduction="none")

    scoring = Scoring(scale=1.0, wanted=Wanted())
    expected = with_gradients(cross_entropy, head, hidden, target, scoring)
    for one, other in zip(with_gradients(scored, head, hidden, target, scoring), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("autocast", [True, False])
def test_of_logits_in_bfloat16_the_numbers_are_float32_and_gradients_have_their_tensors_dtype(autocast: bool) -> None:
    head, hidden, target = made(torch.float32)
    scoring = Scoring(scale=1.0, wanted=EVERYTHING)
    rounded = nn.Linear(CHANNELS, VOCAB, bias=False, dtype=torch.bfloat16)
    rounded.load_state_dict(head.state_dict())

    def widened(head: Any, hidden: Tensor, target: Tensor, scoring: Scoring) -> Tensor:
        return dense(lambda h: rounded(h.bfloat16()).float(), hidden, target, scoring)

    if not autocast:
        hidden = hidden.detach().bfloat16().requires_grad_()
    expected = with_gradients(widened, rounded, hidden, target, scoring)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = with_gradients(scored, head if autocast else rounded, hidden, target, scoring)
    assert [t.dtype for t in found] == [torch.float32, hidden.dtype, torch.float32 if autocast else torch.bfloat16]
    torch.testing.assert_close(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        # The gradient of the logits is rounded to eight bits, and so is the sum over tokens.
        torch.testing.assert_close(one.float(), other.float(), atol=0.05, rtol=0.02)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_tokens_there_is_a_gradient_of_zeros_for_every_weight(dtype: torch.dtype) -> None:
    head, hidden, _ = made(dtype)
    for run in (scored, fused):
        result = run(head, hidden[:0], torch.zeros(0, dtype=torch.int64), Scoring(scale=2.0, wanted=EVERYTHING))
        assert result.shape == (4, 0)
        head.weight.grad = None
        result.sum().backward()
        assert head.weight.grad is not None
        assert not head.weight.grad.any()


def fused(head: Any, hidden: Tensor, target: Tensor, scoring: Scoring) -> Tensor:
    parts = FusedHead.apply(hidden, head.weight, target, scoring, 3)
    return torch.cat(parts)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_a_target_outside_the_vocabulary_is_an_error(wrong: int) -> None:
    head, hidden, target = made()
    target[4] = wrong
    with pytest.raises(RuntimeError, match="out of bounds"):
        scored(head, hidden, target, Scoring(scale=1.0, wanted=Wanted()))


@pytest.mark.usefixtures("chunks")
def test_an_adapter_at_the_head_is_called_as_the_module_that_it_is() -> None:
    head, hidden, target = made(torch.float32)
    model = get_peft_model(nn.Sequential(head), LoraConfig(r=2, target_modules=["0"]))
    adapted = model.base_model.model[0]
    with torch.no_grad():
        for part in (adapted.lora_A["default"], adapted.lora_B["default"]):
            part.weight.copy_(torch.linspace(-1, 1, part.weight.numel()).view(part.weight.shape))
    assert is_matrix(head)
    assert not is_matrix(adapted)
    scoring = Scoring(scale=1.5, wanted=EVERYTHING)
    expected = with_gradients(dense, adapted, hidden, target, scoring)
    assert len(expected) == 4  # numbers, hidden states, A and B
    for one, other in zip(with_gradients(scored, adapted, hidden, target, scoring), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_head_with_a_hook_or_with_a_forward_of_its_own_is_no_plain_matrix() -> None:
    head, _, _ = made()
    handle = head.register_forward_hook(lambda *_: None)
    assert not is_matrix(head)
    handle.remove()
    assert is_matrix(head)
    head.forward = nn.Identity().forward  # type: ignore[method-assign]
    assert not is_matrix(head)


def test_between_the_passes_nothing_of_the_size_of_the_logits_is_kept_beyond_a_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy_head, "MAX_LOGITS", VOCAB * 4)
    head, hidden, target = made()
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = scored(head, hidden, target, Scoring(scale=1.0, wanted=EVERYTHING))
    # What it was given, three numbers a token, and the sums of exponentials.
    assert sorted(sizes)[-3:] == [2 * TOKENS, TOKENS * CHANNELS, VOCAB * CHANNELS]
    chunks: list[int] = []
    of_chunk = vocabulary.logit_gradient

    def gradient(logits: Tensor, *rest: Any, **named: Any) -> Tensor:
        chunks.append(logits.numel())
        return of_chunk(logits, *rest, **named)

    monkeypatch.setattr(policy_head, "logit_gradient", gradient)
    result.sum().backward()
    # Two tensors of this size at once, where nothing is compiled.
    assert chunks == [VOCAB * 2] * 3 + [VOCAB]


def test_what_is_compiled_on_cuda_is_one_graph_for_any_number_of_tokens_and_any_temperature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compilations: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        compilations.append(str(graph.graph))
        return graph.forward

    compiled = {
        function: torch.compile(function, fullgraph=True, backend=compiler)
        for function in (vocabulary._reductions, vocabulary._others_gradient)
    }
    monkeypatch.setattr(vocabulary, "_compiled", compiled.__getitem__)
    torch._dynamo.reset()
    try:
        head, hidden, target = made(torch.float32)
        for tokens in (7, 5, 6):
            for temperature in (0.7, 0.9):
                scoring = Scoring(scale=1 / temperature, wanted=EVERYTHING, compiled=True)
                plain = Scoring(scale=1 / temperature, wanted=EVERYTHING)
                inputs = head, hidden[:tokens], target[:tokens]
                for one, other in zip(
                    with_gradients(fused_whole, *inputs, scoring), with_gradients(dense, *inputs, plain), strict=True
                ):
                    torch.testing.assert_close(one, other)
        assert len(compilations) == 2
    finally:
        torch._dynamo.reset()


def fused_whole(head: Any, hidden: Tensor, target: Tensor, scoring: Scoring) -> Tensor:
    parts = FusedHead.apply(hidden, head.weight, target, scoring, 100)
    return torch.cat(parts)


def test_of_lp_regs_example_the_mass_of_kept_tokens_and_the_targets_place_among_them_are_right() -> None:
    """Lp-Reg (arXiv 2510.03222), kappa 0.02: its target for a token is the log-prob less the log of the mass."""
    distributions = torch.tensor(
        [[0.60, 0.30, 0.07, 0.02, 0.01], [0.90, 0.05, 0.03, 0.015, 0.005]], dtype=torch.float64
    )
    head = nn.Linear(2, 5, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(distributions.log().T)
    scoring = Scoring(scale=1.0, wanted=Wanted(min_p=0.02))
    logp, mass, top = scored(head, torch.eye(2, dtype=torch.float64), torch.tensor([3, 3]), scoring)
    assert mass.exp().tolist() == pytest.approx([0.99, 0.98], abs=1e-7)
    assert top.exp().tolist() == pytest.approx([0.60, 0.90], abs=1e-7)
    kept = logp >= math.log(0.02) + top
    assert kept.tolist() == [True, False]
    assert float((logp - mass)[0].detach()) == pytest.approx(-3.9019727, abs=1e-7)


def test_the_policy_gives_them_after_log_probs_and_entropies() -> None:
    policy = Policy(small_model("qwen3"), temperature=0.7)
    tokens = torch.arange(14).reshape(2, 7) * 5 % 31
    inputs = (tokens, torch.arange(14), tokens.reshape(-1).roll(-1))
    logp, entropy, mass, top = policy(*inputs, with_entropy=True, min_p=0.05)
    hidden = policy.hf.model(input_ids=tokens).last_hidden_state.reshape(14, -1)
    scoring = Scoring(scale=1 / 0.7, wanted=Wanted(entropy=True, min_p=0.05))
    expected = dense(policy.hf.lm_head, hidden, inputs[2], scoring)
    torch.testing.assert_close(torch.stack([logp, entropy, mass, top]), expected)
    torch.testing.assert_close(policy(*inputs, min_p=0.05), expected[[0, 2, 3]])
    torch.testing.assert_close(policy(*inputs, with_entropy=True), expected[:2])


def test_the_benchmark_of_the_head_runs_each_side(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--tokens", "9", "--vocab", "50", "--channels", "8", "--device", "cpu", "--repeats", "1", "--entropy"]
    assert head_benchmark.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[-3:]] == ["whole", "chunks", "fused"]


@pytest.mark.parametrize("in_place", [False, True])
def test_wide_products_are_added_up_whether_or_not_the_device_adds_them_in_place(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mm, addmm = torch.mm, torch.addmm

    def wide(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        return mm(left.to(dtype), right.to(dtype))

    def added(total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        if not in_place:
            raise RuntimeError("the input may not be the output")
        return out.copy_(addmm(total, left.to(dtype), right.to(dtype)))

    monkeypatch.setattr(policy_head, "_sums_apart", lambda factor: True)
    monkeypatch.setattr(torch, "mm", wide)
    monkeypatch.setattr(torch, "addmm", added)
    policy_head._adds_in_place.cache_clear()
    try:
        left, right = (torch.arange(16.0).reshape(4, 4).bfloat16() for _ in range(2))
        once = policy_head._summed(None, left, right)
        assert once.dtype == torch.float32
        twice = policy_head._summed(once.clone(), left, right)
        torch.testing.assert_close(twice, 2 * once)
        assert policy_head._adds_in_place(left.device) is in_place
    finally:
        policy_head._adds_in_place.cache_clear()
