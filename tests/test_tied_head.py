"""A tied output head stays one parameter with the embeddings, whatever Accelerate does to the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped,unused-ignore]
from torch import nn

from atpo_async.core.errors import SetupError
from learner.policy.accelerator import make_accelerator
from learner.policy.model import Policy, load_policy
from learner.training.trainer import Trainer
from tests.learner_support import make_config, make_model

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_accelerate_unties_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    config = make_config(make_model(tmp_path, tie=tied), learner={"accelerate_config": "sharded.yaml"})
    accelerator, policy = make_accelerator(config), load_policy(config)

    def unties(policy: Policy, optimizer: object) -> tuple[Policy, object]:
        # As a move to the meta device and a load back does: the same values, no longer the same parameter.
        head = policy.hf.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        return policy, optimizer

    monkeypatch.setattr(accelerator, "prepare", unties)
    if not tied:  # nothing was there to be lost
        Trainer(config, accelerator=accelerator, policy=policy)
        return
    with pytest.raises(SetupError, match=r"untied .*'sharded\.yaml'.* fsdp_cpu_ram_efficient_loading to false"):
        Trainer(config, accelerator=accelerator, policy=policy)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("accelerate*.yaml")), ids=lambda path: path.name)
def test_no_configuration_for_accelerate_unties_the_head(file: Path) -> None:
    # Left out it is on: accelerate's own default.
    assert yaml.safe_load(file.read_text())["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] is False
