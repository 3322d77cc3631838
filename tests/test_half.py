"""Passes in bfloat16 over float32 weights: the loss and gradient of float32, weights cast once, sums in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from learner.packing.attention import tree_attention_forward
from learner.policy import half
from learner.policy.accelerator import make_accelerator
from learner.policy.half import HalfPolicy
from learner.policy.model import Policy, load_policy
from learner.training.trainer import Trainer
from tests.learner_support import flat_gradient, make_batch, make_config, make_model

VERSION = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def forget_precision() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer_of(folder: Path, mixed_precision: str, **sections: dict[str, object]) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)  # it holds a process to one precision
    learner = {"mixed_precision": mixed_precision, **sections.pop("learner", {})}
    config = make_config(folder, learner=learner, **sections)
    return Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))


def trained(folder: Path, mixed_precision: str, **learner: object) -> tuple[float, torch.Tensor, Trainer]:
    """Loss and gradient of a batch, which changes no weight."""
    trainer = trainer_of(folder, mixed_precision, learner={"max_grad_norm": 1e9, **learner})
    found: list[torch.Tensor] = []
    optimizer: Any = trainer.optimizer
    optimizer.step = lambda: found.append(flat_gradient(trainer.policy).clone())
    report = trainer.train(make_batch(), version=VERSION)
    assert report.fault is None
    return report.metrics["train/loss"], found[0], trainer


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradient_are_those_of_float32_as_nearly_as_autocast_has_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    exact_loss, exact, _ = trained(folder, "no")
    loss, gradient, trainer = trained(folder, "bf16", gradient_checkpointing=checkpointing)
    assert trainer.half is not None
    assert trainer.layout == "tree", trainer.layout_reason
    monkeypatch.setattr("learner.training.trainer.is_for", lambda *_: False)
    autocast_loss, autocast, other = trained(folder, "bf16")
    assert other.half is None
    assert gradient.dtype == torch.float32
    assert abs(loss - exact_loss) < max(2 * abs(autocast_loss - exact_loss), 0.02)
    assert relative(gradient, exact) < max(2 * relative(autocast, exact), 0.03)


def test_gradients_of_many_passes_are_summed_in_float32(folder: Path) -> None:
    _, one, _ = trained(folder, "bf16")
    _, many, trainer = trained(folder, "bf16", micro_batch_tokens=64, packing="flat")
    assert relative(many, one) < 0.03
    assert trainer.half is not None
    # The copy holds none: each left as soon as it was there.
    assert all(parameter.grad is None for parameter in trainer.half.policy.parameters())


def test_weights_stay_float32_and_their_copy_follows_them(folder: Path) -> None:
    trainer = trainer_of(folder, "bf16", learner={"minibatches": 2, "lr": 1e-2}, staleness={"trees_per_batch": 4})
    assert trainer.half is not None
    for step in range(2):
        trainer.train(make_batch(step=step), version=VERSION)
    assert trainer.history.updates == 4
    assert {p.dtype for p in trainer.policy.parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(0.5)  # as a checkpoint that is loaded
    trainer.train(make_batch(step=2), version=VERSION)
    trainer.half(tokens=torch.zeros(1, 2, dtype=torch.int64), predictor=torch.tensor([0]), target=torch.tensor([0]))
    own, copied = dict(trainer.policy.named_parameters()), dict(trainer.half.policy.named_parameters())
    assert own.keys() == copied.keys()
    for name, parameter in own.items():
        assert torch.equal(copied[name], parameter.to(torch.bfloat16)), name


def test_a_copy_is_cast_once_for_all_passes_of_a_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(folder, "bf16", learner={"micro_batch_tokens": 64, "packing": "flat"})
    copies, copy = [], torch._foreach_copy_

    def counted(*arguments: Any) -> None:
        copies.append(1)
        copy(*arguments)

    passes = []
    assert trainer.half is not None
    trainer.half.policy.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    trainer.train(make_batch(), version=VERSION)
    assert len(passes) > 2
    assert len(copies) == 1


def test_what_is_tied_stays_tied_and_what_is_frozen_or_in_half_precision_is_as_it_was(folder: Path) -> None:
    policy = load_policy(make_config(folder))
    frozen = policy.hf.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    shared = policy.hf.model.layers[1].mlp.up_proj
    shared.weight = torch.nn.Parameter(shared.weight.to(torch.bfloat16), requires_grad=False)
    made = HalfPolicy(policy, trains=True).policy
    assert made.hf.lm_head.weight is made.hf.model.embed_tokens.weight
    assert not made.hf.model.layers[0].mlp.up_proj.weight.requires_grad
    assert made.hf.model.layers[1].mlp.up_proj.weight is shared.weight
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert frozen.dtype == torch.float32


def test_positions_and_log_probs_are_in_float32_and_all_between_in_half_precision(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = HalfPolicy(load_policy(make_config(folder)), trains=True)
    tables: list[Any] = []
    layers: list[Any] = []
    attended: list[Any] = []
    made.policy.hf.model.rotary_emb.register_forward_hook(lambda _m, _a, out: tables.extend(t.dtype for t in out))
    for layer in made.policy.hf.model.layers:
        layer.register_forward_hook(lambda _m, _a, out: layers.append(out.dtype))

    def watched(module: Any, query: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        out = tree_attention_forward(module, query, *arguments, **named)
        attended.append((query.dtype, out[0].dtype))
        return out

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "atpo_tree", watched)
    tokens = torch.arange(8)[None]
    logp = made(tokens=tokens, predictor=torch.arange(7), target=torch.arange(1, 8))
    assert logp.dtype == torch.float32
    assert set(tables) == {torch.float32}
    assert set(layers) == {torch.bfloat16}
    assert set(attended) == {(torch.float32, torch.bfloat16)}


def test_the_policy_and_its_reference_are_the_same_to_the_last_bit_at_the_start(folder: Path) -> None:
    trainer = trainer_of(folder, "bf16", objective={"kl_coef": 0.1}, learner={"lr": 1e-2})
    assert trainer.train(make_batch(), version=VERSION).metrics["loss/kl_reference"] == 0.0
    assert trainer.train(make_batch(step=1), version=VERSION).metrics["loss/kl_reference"] > 0.0


def test_adapters_are_switched_off_in_the_copy_too_for_the_reference(folder: Path) -> None:
    lora = {"lora": {"rank": 4}, "lr": 1e-2}
    trainer = trainer_of(folder, "bf16", objective={"kl_coef": 0.1}, learner=lora)
    assert trainer.train(make_batch(), version=VERSION).metrics["loss/kl_reference"] == 0.0
    assert trainer.train(make_batch(step=1), version=VERSION).metrics["loss/kl_reference"] > 0.0


def test_the_probe_is_of_the_float32_weights(folder: Path) -> None:
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    one, other = (trainer_of(folder, mixed).whole.probe(tokens) for mixed in ("no", "bf16"))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("mixed_precision", ["no", "fp16"])
def test_other_precisions_have_no_copy(folder: Path, mixed_precision: str) -> None:
    config = make_config(folder)
    object.__setattr__(config.learner, "mixed_precision", mixed_precision)
    policy = load_policy(config)
    assert not half.is_for(config, policy, False)
    object.__setattr__(config.learner, "mixed_precision", "bf16")
    assert half.is_for(config, policy, False)
    assert not half.is_for(config, policy, True)
    assert not half.is_for(config, policy.double(), False)


def test_ranks_sum_their_gradients_in_a_few_messages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy: Policy = load_policy(make_config(folder))
    made = HalfPolicy(policy, trains=True)
    first, *others = policy.parameters()
    torch.manual_seed(0)
    for parameter in others:
        parameter.grad = torch.randn_like(parameter)
    expected = [2 * p.grad for p in others if p.grad is not None]
    sizes: list[int] = []

    def reduced(flat: torch.Tensor) -> None:
        sizes.append(flat.numel())
        flat *= 2

    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    monkeypatch.setattr(half, "REDUCED_AT_ONCE", 1000)
    made.sum_over_ranks()
    assert first.grad is not None
    assert not first.grad.any()
    assert all(torch.equal(p.grad, e) for p, e in zip(others, expected, strict=True) if p.grad is not None)
    assert sum(sizes) == sum(p.numel() for p in policy.parameters())
    assert 1 < len(sizes) < len(expected)
    assert max(sizes) <= 1000 or max(sizes) == max(p.numel() for p in policy.parameters())
