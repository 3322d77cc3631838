"""A pass asks the GPU for no number between its forward and its backward: it would wait until all before is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from learner.loss.correction import Temperings
from learner.loss.units import num_units, units
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.learner_support import make_batch, make_config, make_model

WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.item")


class Watched(TorchDispatchMode):
    """Notes the operators that bring a number from the device, or have a result whose size only the device knows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        by_truth = name.startswith("aten.index.") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name.startswith(WAITING) or by_truth:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"correction": {"level": "prefix"}},
        {"correction": {"level": "sequence"}, "objective": {"ratio_level": "token", "kl_coef": 0.1}},
        {
            "objective": {"surrogate": "cispo", "entropy_coef": 0.1},
            "correction": {"action": "icepop", "level": "token"},
        },
    ],
    ids=str,
)
def test_a_pass_waits_for_no_number_of_the_device(
    folder: Path, sections: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Flat rows, for attention over packed trees by parts is the CPU's.  Of those transformers asks, before the first
    # layer, whether they hold several sequences; of packed trees it does not.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    config = make_config(folder, learner={"packing": "flat"}, **sections)
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
    part = trainer.planner.plan(_trees(trainer), (), make_batch(), 3)
    # What is proven once, that a surrogate's results are finite, is looked at in the first pass.
    trainer.steps.attempt(part.passes, Temperings(), lambda: False)
    with Watched() as watched:
        trainer.steps.attempt(part.passes, Temperings(), lambda: False)
    assert not watched.found


def _trees(trainer: Trainer) -> list[Any]:
    from learner.packing.credited import CreditedTree

    return [CreditedTree.of(tree, trainer._credit) for tree in make_batch().trees]


def test_the_watch_sees_what_waits() -> None:
    values = torch.tensor([1.0, 2.0])
    with Watched() as watched:
        float(values.sum())
        values[values > 1]
    assert len(watched.found) >= 2


@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
def test_known_counts_are_the_counts(folder: Path, level: Any) -> None:
    config = make_config(folder, learner={"packing": "flat"})
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
    for item in trainer.planner.plan(_trees(trainer), (), make_batch(), 3).passes:
        known = num_units(units(level, item.turn, item.row))
        assert known == num_units(units(level, item.turn.clone(), item.row.clone()))
        assert known > 0
