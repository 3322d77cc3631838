"""Memory on CUDA: moments on the host or in 8 bits, layers chosen by what was measured, a real out-of-memory error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from atpo_async.config import LearnerConfig
from atpo_async.wire.messages import Batch
from learner.checkpoints import checkpoint, optimizer_state
from learner.checkpoints.checkpoint import Progress
from learner.memory import offloaded_adamw
from learner.memory.checkpointed_layers import enable, layers_of
from learner.memory.fitting import Fitting
from learner.memory.measuring import CudaMeter, choose_layers
from learner.memory.offloaded_adamw import OffloadedAdamW
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.policy.optimizer import make_optimizer, state_bytes
from learner.training.passes import Part
from learner.training.trainer import Trainer
from tests.learner_support import make_batch, make_config, make_model

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def own_accelerator() -> Any:
    """Accelerate keeps the precision of a process's first use: each test has its own."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def make_trainer(folder: Path, **learner: object) -> Trainer:
    config = make_config(folder, learner={"lr": 1e-2, "device": "cuda", **learner})
    return Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))


def wide_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 7)).to(CUDA)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, *, count: int) -> None:
    for number in range(count):
        generator = torch.Generator(CUDA).manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, device=CUDA)
        optimizer.step()


@pytest.mark.parametrize("piece", [10_000, 1 << 25])
def test_moments_on_the_host_give_the_weights_of_adamw(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(offloaded_adamw, "PIECE", piece)
    settings = LearnerConfig(lr=1e-2, weight_decay=0.1)
    one, other = wide_model(), wide_model()
    plain = make_optimizer(one, settings, device=CUDA)
    mine = make_optimizer(other, settings.model_copy(update={"optimizer": "offload"}), device=CUDA)
    assert isinstance(mine, OffloadedAdamW)
    steps(one, plain, count=4)
    steps(other, mine, count=4)
    for expected, found in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        for name in offloaded_adamw.MOMENTS:
            moment = mine.state[found][name]
            assert moment.is_pinned()
            torch.testing.assert_close(moment, plain.state[expected][name].cpu(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "offload"])
def test_moments_take_what_is_set_aside_for_them(kind: str) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("torchao")
    model = wide_model()
    optimizer = make_optimizer(model, LearnerConfig(optimizer=kind), device=CUDA)
    steps(model, optimizer, count=0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    expected = state_bytes(optimizer, kind)
    before = torch.cuda.memory_allocated()
    optimizer.step()
    taken = torch.cuda.memory_allocated() - before
    if kind == "offload":  # buffers are there only in a step
        assert taken < 1e5 < expected
    else:
        assert expected * 0.98 <= taken <= expected * 1.05


@pytest.mark.parametrize("kind", ["adamw8bit", "offload"])
@pytest.mark.parametrize("mixed", ["bf16", "fp16"])
def test_a_run_goes_on_from_its_checkpoint_with_the_same_moments(tmp_path: Path, kind: str, mixed: str) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("torchao")
    folder = make_model(tmp_path / "model", hidden_size=256)
    first = make_trainer(folder, optimizer=kind, mixed_precision=mixed)
    for step in range(8):  # fp16's first updates may be left out, until the scale fits
        first.train(make_batch(step=step), version=3)
    assert first.history.updates > 0
    path = checkpoint.save(tmp_path / "checkpoints", first, Progress(step=8, version=8), keep=1)
    second = make_trainer(folder, optimizer=kind, mixed_precision=mixed)
    checkpoint.load(path, second)
    before, after = (optimizer_state.tensors_of(each.optimizer) for each in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.cpu(), after[name].cpu()) for name, tensor in before.items())
    assert any(name.endswith("codes") for name in after) == (kind == "adamw8bit")


def test_a_real_out_of_memory_error_leaves_nothing_on_the_device_and_the_step_is_taken(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(tmp_path), packing="flat")
    trainer.warm_up()
    before = torch.cuda.memory_allocated()
    inner, errors = trainer.policy.logprobs, list[int]()

    def logprobs(tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = inner(tokens, *args, **kwargs)
        if tokens.numel() > 200:
            errors.append(tokens.numel())
            torch.empty(1 << 46, dtype=torch.uint8, device=CUDA)
        return found

    trainer.policy.logprobs = logprobs  # type: ignore[method-assign]
    at_planning: list[int] = []
    plan_again = trainer.planner.plan_again

    def watched(part: Part, batch: Batch, version: int) -> None:
        at_planning.append(torch.cuda.memory_allocated())
        plan_again(part, batch, version)

    trainer.planner.plan_again = watched  # type: ignore[method-assign]
    report = trainer.train(make_batch(), version=3)
    assert errors
    assert report.metrics["train/updates"] == 1
    assert report.metrics["pack/micro_batch_tokens"] <= 200
    # Only the batch's own tensors are there besides.
    assert at_planning[0] - before < 1e6


def test_layers_are_chosen_by_what_passes_take_on_the_device(tmp_path: Path) -> None:
    folder = make_model(tmp_path, hidden_size=256, layers=8)
    config = make_config(folder, learner={"device": "cuda", "gradient_checkpointing": "auto"})
    policy = load_policy(config).to(CUDA)
    enable(policy.hf, count=0)
    fitting = Fitting(config, hf=policy.hf, accelerator=make_accelerator(config))
    meter = CudaMeter(CUDA, set_aside=0.0, engines=0.0)
    assert 0 < meter.available() < torch.cuda.get_device_properties(CUDA).total_memory

    def run(tokens: int) -> None:
        places = torch.arange(tokens, device=CUDA)
        row = torch.zeros((1, tokens), dtype=torch.int64, device=CUDA)
        policy(row, places, torch.zeros_like(places)).sum().backward()

    run(64)

    def peak(count: int) -> float:
        fitting.checkpoint(count)
        return meter.peak(lambda: run(fitting.micro_batch_tokens))

    none, half, every = (peak(count) for count in (0, 4, 8))
    assert every < half < none

    class Available:
        def __init__(self, available: float) -> None:
            self.peak: Callable[[Callable[[], None]], float] = meter.peak
            self.available = lambda: available

    # A layer that is computed twice while others are not is reckoned as if it took memory of its own: one too many.
    for available, allowed in ((half * 1.02, (4, 5)), (none * 1.05, (0, 1)), (every * 1.001, (7, 8))):
        choose_layers(fitting, Available(available), run, lambda value: value)
        chosen = fitting.checkpointed_layers
        assert chosen in allowed, (available, chosen)
        assert peak(chosen) <= available * 1.05
        fitting.checkpoint(0)
    assert len(layers_of(policy.hf)) == 8
