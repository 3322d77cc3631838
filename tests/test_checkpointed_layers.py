"""Which layers compute their activations again: the same numbers, and as few layers as the largest pass needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atpo_async.config import Config, build
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.errors import SetupError
from learner.loss.correction import Temperings
from learner.memory.checkpointed_layers import checkpointed, layers_of
from learner.memory.fitting import Fit, Fitting
from learner.memory.made_up import made_up
from learner.memory.measuring import choose_layers, share_of_engines
from learner.packing.credited import CreditedTree
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.learner_support import in_double, make_batch, make_config, make_model

pytestmark = pytest.mark.usefixtures("small_heap")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def config_of(folder: Path, **learner: object) -> Config:
    return make_config(folder, learner={"lr": 1e-2, "packing": "flat", **learner})


def make_trainer(config: Config) -> Trainer:
    return Trainer(config, accelerator=make_accelerator(config), policy=in_double(load_policy(config)))


def test_layers_chosen_by_number_give_the_same_loss_and_gradient(folder: Path) -> None:
    def gradients(choose: Callable[[Trainer], None], **learner: object) -> list[Tensor]:
        trainer = make_trainer(config_of(folder, **learner))
        choose(trainer)
        trees = [CreditedTree.of(tree, credit_rule(trainer.config.credit)) for tree in make_batch().trees]
        part = trainer.planner.plan(trees, (), make_batch(), 3)
        loss = trainer.steps.loss(part.passes[0], Temperings()).loss.loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in trainer.policy.parameters() if p.grad is not None)]

    plain = gradients(lambda trainer: None)
    for count in (0, 1, 2):
        found = gradients(lambda trainer, n=count: trainer.fitting.checkpoint(n), gradient_checkpointing="auto")  # type: ignore[misc]
        for expected, got in zip(plain, found, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)


class FakeMeter:
    """A device where a pass takes ``boundary`` bytes a token and layer, and ``kept`` more where a layer is not computed
    twice; a pass that takes more than ``available`` runs out."""

    def __init__(self, hf: Any, *, boundary: float, kept: float, available: float) -> None:
        self._hf, self._boundary, self._kept, self._available = hf, boundary, kept, available
        self.ran: list[tuple[int, int]] = []

    def run(self, tokens: int) -> None:
        self.ran.append((tokens, checkpointed(self._hf)))
        if self._needed() > self._available:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    def _needed(self) -> float:
        tokens, twice = self.ran[-1]
        layers = len(layers_of(self._hf))
        return tokens * (layers * self._boundary + (layers - twice) * self._kept)

    def peak(self, run: Callable[[], None]) -> float:
        run()
        return self._needed()

    def available(self) -> float:
        return self._available


@pytest.mark.parametrize(
    ("available", "tokens", "twice"),
    [
        # 6 layers; 16,384 tokens take 6 * 16,384 with all computed twice, and 16,384 * 10 more for each that is not.
        (16384 * 100, 16384, 0),
        (16384 * 66, 16384, 0),
        (16384 * 65, 16384, 1),
        (16384 * 36, 16384, 3),
        (16384 * 6, 16384, 6),
        (16384 * 5, 8192, 6),
        (8192 * 16.5, 16384, 6),
        (4096 * 11, 4096, 6),
    ],
)
def test_as_few_layers_are_computed_twice_as_the_largest_pass_needs(
    tmp_path: Path, available: float, tokens: int, twice: int
) -> None:
    config = config_of(make_model(tmp_path, layers=6), gradient_checkpointing="auto")
    fitting = Fitting(config, hf=load_policy(config).hf, accelerator=make_accelerator(config), notify=lambda _: None)
    meter = FakeMeter(fitting.hf, boundary=1, kept=10, available=available)
    choose_layers(fitting, meter, meter.run, lambda value: value)
    assert fitting.now == Fit(micro_batch_tokens=tokens, checkpointed_layers=twice)
    # Nothing was tried again as it had failed before.
    assert len(set(meter.ran)) == len(meter.ran)


def test_ranks_compute_as_many_layers_twice_as_the_fullest_card_needs(tmp_path: Path) -> None:
    config = config_of(make_model(tmp_path, layers=6), gradient_checkpointing="auto")
    fitting = Fitting(config, hf=load_policy(config).hf, accelerator=make_accelerator(config))
    meter = FakeMeter(fitting.hf, boundary=1, kept=10, available=1e9)
    choose_layers(fitting, meter, meter.run, lambda value: max(value, 4))
    assert fitting.checkpointed_layers == 4


def test_a_device_that_has_no_room_for_the_smallest_pass_is_an_error(tmp_path: Path) -> None:
    config = config_of(make_model(tmp_path, layers=2), gradient_checkpointing="auto")
    fitting = Fitting(config, hf=load_policy(config).hf, accelerator=make_accelerator(config), notify=lambda _: None)
    meter = FakeMeter(fitting.hf, boundary=1, kept=10, available=50)
    with pytest.raises(SetupError, match="a path of 64 tokens does not fit"):
        choose_layers(fitting, meter, meter.run, lambda value: value)
    assert len(meter.ran) == 9


def test_what_engines_on_the_learners_gpu_may_take_is_set_aside() -> None:
    def share(rank: int = 0, **actor: Any) -> float:
        config = build(
            {
                "model": {"path": "m"},
                "learner": {"gpus": [0, 1], "num_processes": 2} if actor.pop("apart", False) else {},
                "actor": {"gpu_memory_utilization": 0.3, **actor},
            }
        )
        return share_of_engines(config, rank)

    assert share() == pytest.approx(0.3)
    assert share(count=2) == pytest.approx(0.6)
    assert share(device="cpu") == 0
    assert share(engine="transformers") == 0
    assert share(apart=True, gpus=[2, 3], count=2) == 0
    assert share(rank=1, tensor_parallel_size=2) == pytest.approx(0.3)


@pytest.mark.parametrize("layout", ["flat", "tree"])
@pytest.mark.parametrize(("tokens", "longest", "paths"), [(100, 40, 2), (30, 40, 1), (64, 1, 64)])
def test_a_made_up_pass_is_as_large_as_it_is_asked_to_be(layout: str, tokens: int, longest: int, paths: int) -> None:
    found = made_up(tokens, longest=longest, layout=layout)
    each = min(tokens, longest)
    assert found.tokens.size == found.num_targets == paths * each <= tokens
    assert found.tokens.shape == ((paths, each) if layout == "flat" else (1, paths * each))


@pytest.mark.parametrize("packing", ["flat", "tree"])
def test_warming_up_changes_no_weight_and_leaves_no_gradient(folder: Path, packing: str) -> None:
    trainer = make_trainer(config_of(folder, packing=packing, micro_batch_tokens=256))
    before = [p.clone() for p in trainer.policy.parameters()]
    trainer.warm_up()
    assert all(torch.equal(p, was) for p, was in zip(trainer.policy.parameters(), before, strict=True))
    assert all(p.grad is None for p in trainer.policy.parameters())


def test_auto_computes_no_layer_twice_on_a_cpu(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(config_of(folder, gradient_checkpointing="auto"))
    with caplog.at_level("INFO", "atpo.learner"):
        trainer.warm_up()
    assert trainer.fitting.checkpointed_layers == 0
    assert "computes no layer twice on a CPU" in caplog.text
