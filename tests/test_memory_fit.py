"""A step that runs out of memory is trained in smaller passes: no weight changes twice, and what fitted is kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from atpo_async.config import Config
from atpo_async.core.errors import OutOfMemory, SetupError
from learner.memory.checkpointed_layers import checkpointed, layers_of
from learner.memory.fitting import Failed, Fit, Fitting, smaller
from learner.memory.kept import KeptFit
from learner.memory.out_of_memory import is_out_of_memory
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.learner_support import in_double, make_batch, make_config, make_model

pytestmark = pytest.mark.usefixtures("small_heap")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


class InBackward(torch.autograd.Function):
    """Runs out of memory on the way back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class SmallDevice:
    """A device on which passes above ``limit`` padded tokens run out of memory, while it is set."""

    def __init__(self, trainer: Trainer, limit: float, *, backward: bool = False) -> None:
        self.limit, self.errors, self.sizes = limit, 0, list[int]()
        inner = trainer.policy.logprobs

        def logprobs(tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.sizes.append(tokens.numel())
            if tokens.numel() <= self.limit:
                return inner(tokens, *args, **kwargs)
            self.errors += 1
            if backward and torch.is_grad_enabled():
                result: Tensor = InBackward.apply(inner(tokens, *args, **kwargs))
                return result
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79 GiB")

        trainer.policy.logprobs = logprobs  # type: ignore[method-assign]


def make_trainer(config: Config, file: Path | None = None) -> Trainer:
    policy = in_double(load_policy(config))
    return Trainer(config, accelerator=make_accelerator(config), policy=policy, memory_file=file)


def assert_same_weights(one: Trainer, other: Trainer) -> None:
    for expected, found in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def config_of(folder: Path, **learner: object) -> Config:
    return make_config(folder, learner={"lr": 1e-2, "packing": "flat", **learner})


@pytest.mark.parametrize("packing", ["flat", "tree"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_step_that_runs_out_of_memory_ends_as_one_with_small_passes_from_the_start(
    folder: Path, packing: str, backward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(config_of(folder, packing=packing))
    batch = make_batch(num_trees=4 if packing == "flat" else 8)
    device = SmallDevice(trainer, 200, backward=backward)
    report = trainer.train(batch, version=3)
    assert device.errors >= 1
    now = int(report.metrics["pack/micro_batch_tokens"])
    assert now < 16384
    small = make_trainer(config_of(folder, packing=packing, micro_batch_tokens=now))
    expected = small.train(batch, version=3)
    assert_same_weights(small, trainer)
    assert report.metrics == pytest.approx(expected.metrics, abs=1e-9)
    assert report.metrics["train/updates"] == 1
    told = [record.message for record in caplog.records if record.name == "atpo.notice"]
    assert len(told) == device.errors
    assert "ran out of the memory of the CPU: passes hold at most" in told[0]
    assert "it was 16384 (learner.micro_batch_tokens = 16384" in told[0]
    # And once it fits, it fits from the first pass on.
    trainer.train(batch, version=3)
    assert device.errors == len(told)


@pytest.mark.parametrize(("minibatches", "epochs", "prox"), [(2, 2, "auto"), (1, 3, "auto"), (1, 2, "interpolate")])
def test_after_the_first_steps_of_a_batch_only_the_present_one_is_begun_anew(
    folder: Path, minibatches: int, epochs: int, prox: str
) -> None:
    settings = {"minibatches": minibatches, "epochs": epochs}

    def trainer_of(**learner: object) -> Trainer:
        config = make_config(
            folder,
            learner={"lr": 1e-2, "packing": "flat", "max_grad_spike": None, **settings, **learner},
            correction={"prox": prox},
        )
        return make_trainer(config)

    trainer, small = trainer_of(), trainer_of(micro_batch_tokens=128)
    device = SmallDevice(trainer, float("inf"))
    taken, step = list[int](), trainer.optimizer.step

    def count_and_shrink() -> None:
        step()
        taken.append(1)
        if len(taken) == minibatches * epochs - 1:
            device.limit = 128

    trainer.optimizer.step = count_and_shrink
    trainer.train(make_batch(), version=3)
    small.train(make_batch(), version=3)
    assert device.errors >= 1
    assert len(taken) == minibatches * epochs == small.history.updates
    assert_same_weights(small, trainer)


def test_the_measurement_before_the_first_step_may_run_out_of_memory_too(folder: Path) -> None:
    settings: dict[str, Any] = {"credit": {"value_mode": "tree_trace"}, "objective": {"kl_coef": 0.1}}
    trainer = make_trainer(make_config(folder, learner={"lr": 1e-2, "packing": "flat"}, **settings))
    device = SmallDevice(trainer, 100)
    report = trainer.train(make_batch(), version=3)
    assert device.errors >= 1
    small = make_trainer(
        make_config(folder, learner={"lr": 1e-2, "packing": "flat", "micro_batch_tokens": 100}, **settings)
    )
    expected = small.train(make_batch(), version=3)
    assert_same_weights(small, trainer)
    assert report.priorities == pytest.approx(expected.priorities)


def test_a_path_that_does_not_fit_alone_is_an_error_with_its_tokens_and_three_settings(folder: Path) -> None:
    trainer = make_trainer(config_of(folder))
    before = [p.clone() for p in trainer.policy.parameters()]
    device = SmallDevice(trainer, 3)
    with pytest.raises(SetupError) as caught:
        trainer.train(make_batch(), version=3)
    (tokens,) = {device.sizes[-1]}
    assert f"a path of {tokens} tokens does not fit into the memory of the CPU, alone in its pass" in str(caught.value)
    assert "--learner.gradient_checkpointing true" in str(caught.value)
    assert str(caught.value).count(", ") >= 2
    # Each attempt is at most half of the one before: the same is never tried again and again.
    assert device.errors <= 8
    assert all(torch.equal(p, was) for p, was in zip(trainer.policy.parameters(), before, strict=True))


def test_what_fitted_is_kept_over_a_restart_until_a_setting_changes_by_hand(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    first = make_trainer(config_of(folder), file)
    SmallDevice(first, 200)
    first.train(make_batch(), version=3)
    kept = first.fitting.micro_batch_tokens
    assert kept < 16384

    again = make_trainer(config_of(folder), file)
    device = SmallDevice(again, 200)
    report = again.train(make_batch(), version=3)
    assert (device.errors, report.metrics["pack/micro_batch_tokens"]) == (0, kept)
    # The learning rate has no bearing on memory; the micro-batch, and whatever else saves memory, has.
    assert make_trainer(config_of(folder, lr=1.0), file).fitting.micro_batch_tokens == kept
    assert make_trainer(config_of(folder, micro_batch_tokens=8192), file).fitting.micro_batch_tokens == 8192
    assert make_trainer(config_of(folder, gradient_checkpointing=True), file).fitting.micro_batch_tokens == 16384


@pytest.mark.parametrize(
    "changed",
    [{"micro_batch_tokens": -5}, {"micro_batch_tokens": 0}, {"micro_batch_tokens": True}, {"micro_batch_tokens": 1e400},
     {"micro_batch_tokens": "7"}, {"checkpointed_layers": -1}, {"learned_with": ["device"]}, {"learned_with": None},
     "[" * 100_000, "{"],
)  # fmt: skip
def test_a_damaged_file_of_what_fitted_is_told_and_left_aside(
    changed: dict[str, object] | str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = KeptFit(tmp_path / "memory.json", Config(), device="the CPU")
    kept.write(micro_batch_tokens=100, checkpointed_layers=1)
    assert kept.read() == {"micro_batch_tokens": 100, "checkpointed_layers": 1}
    file = tmp_path / "memory.json"
    text = changed if isinstance(changed, str) else json.dumps(json.loads(file.read_text()) | changed)
    file.write_text(text)
    assert kept.read() == {}
    assert f"{file} is damaged" in caplog.text


def test_auto_computes_more_layers_twice_before_passes_become_smaller(folder: Path) -> None:
    trainer = make_trainer(config_of(folder, gradient_checkpointing="auto"))
    layers = len(layers_of(trainer.policy.hf))
    assert checkpointed(trainer.policy.hf) == 0
    seen: list[tuple[int, int]] = []
    SmallDevice(trainer, 200)
    inner = trainer.fitting.make_smaller

    def watched(failed: Failed, said: str) -> None:
        inner(failed, said)
        seen.append((trainer.fitting.checkpointed_layers, trainer.fitting.micro_batch_tokens))

    trainer.fitting.make_smaller = watched  # type: ignore[method-assign]
    report = trainer.train(make_batch(), version=3)
    assert seen[:2] == [(1, 16384), (layers, 16384)]
    assert all(count == layers for count, _ in seen[1:])
    assert report.metrics["pack/checkpointed_layers"] == layers == 2
    plain = make_trainer(config_of(folder))
    plain.train(make_batch(), version=3)
    assert_same_weights(plain, trainer)


@pytest.mark.parametrize(
    ("now", "failed", "layers", "then"),
    [
        # (tokens, layers) now; (tokens, longest path) that failed; layers to choose from.
        ((16384, 0), (16000, 900), 0, (8000, 0)),
        ((16384, 0), (3000, 900), 0, (1500, 0)),
        ((8192, 0), (9000, 9000), 0, None),
        ((1000, 0), (1000, 900), 0, (900, 0)),
        ((900, 0), (900, 900), 0, None),
        ((16384, 0), (16000, 900), 36, (16384, 18)),
        ((16384, 18), (16000, 900), 36, (16384, 27)),
        ((16384, 35), (16000, 900), 36, (16384, 36)),
        ((16384, 36), (16000, 900), 36, (8000, 36)),
    ],
)
def test_what_is_tried_next(
    now: tuple[int, int], failed: tuple[int, int], layers: int, then: tuple[int, int] | None
) -> None:
    found = smaller(
        Fit(micro_batch_tokens=now[0], checkpointed_layers=now[1]),
        Failed(tokens=failed[0], longest_path=failed[1]),
        layers=layers,
    )
    assert (found and (found.micro_batch_tokens, found.checkpointed_layers)) == then


def test_one_of_several_ranks_keeps_what_fits_and_all_start_again(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, num_processes=2)
    hf = load_policy(config).hf
    told: list[str] = []
    ranks: Any = SimpleNamespace(num_processes=2, device=torch.device("cpu"), distributed_type="MULTI_CPU")

    def fitting() -> Fitting:
        return Fitting(config, hf=hf, accelerator=ranks, file=tmp_path / "memory.json", notify=told.append)

    with pytest.raises(OutOfMemory, match="all ranks start again with it, from the last checkpoint"):
        fitting().make_smaller(Failed(tokens=4000, longest_path=100), "CUDA out of memory")
    assert json.loads((tmp_path / "memory.json").read_text())["micro_batch_tokens"] == 2000
    assert fitting().micro_batch_tokens == 2000


def test_memory_that_runs_out_in_the_optimizers_step_is_no_matter_of_passes(folder: Path) -> None:
    trainer = make_trainer(config_of(folder))
    calls = list[int]()

    def step() -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30.00 GiB.")

    trainer.optimizer.step = step
    with pytest.raises(
        SetupError, match=r"the optimizer's step ran out of the memory of the CPU: .*30.00 GiB.*offload"
    ):
        trainer.train(make_batch(), version=3)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "it_is"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory."), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error: Exception, it_is: bool) -> None:
    assert is_out_of_memory(error) is it_is


def test_another_error_of_a_pass_is_not_tried_again(folder: Path) -> None:
    trainer = make_trainer(config_of(folder))
    calls = list[int]()

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        raise RuntimeError("an illegal memory access was encountered")

    trainer.policy.logprobs = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trainer.train(make_batch(), version=3)
    assert len(calls) == 1
