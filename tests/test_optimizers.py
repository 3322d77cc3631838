"""The kinds of ``learner.optimizer``: the same steps with their moments elsewhere or in fewer bits, and checkpoints."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from atpo_async.config import LearnerConfig, load
from atpo_async.core.errors import SetupError
from learner.checkpoints import checkpoint, optimizer_state
from learner.checkpoints.checkpoint import Progress
from learner.memory import offloaded_adamw
from learner.memory.offloaded_adamw import OffloadedAdamW
from learner.memory.out_of_memory import ways_out
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.policy.optimizer import groups_settings, make_optimizer, set_rate
from learner.training.trainer import Trainer
from tests.learner_support import make_batch, make_config, make_model

CPU = torch.device("cpu")
SETTINGS = LearnerConfig(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, *, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_rate(optimizer, 1e-2 / (1 + number))
        optimizer.step()


def offloaded(model: nn.Module) -> OffloadedAdamW:
    return OffloadedAdamW(
        model.parameters(), lr=SETTINGS.lr, betas=SETTINGS.betas, eps=SETTINGS.eps, weight_decay=SETTINGS.weight_decay
    )


@pytest.mark.parametrize("piece", [1, 8, 1 << 25])
def test_pieces_of_any_size_give_the_numbers_of_adamw(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(offloaded_adamw, "PIECE", piece)
    one, other = small_model(), small_model()
    plain, mine = make_optimizer(one, SETTINGS, device=CPU), offloaded(other)
    steps(one, plain, count=3)
    steps(other, mine, count=3)
    for expected, found in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(expected, found, rtol=1e-6, atol=0)
        for name, value in plain.state[expected].items():
            # On a CPU the end of a piece may be computed without vector instructions, which round otherwise.
            torch.testing.assert_close(value, mine.state[found][name], rtol=1e-6, atol=0, msg=name)


def test_parameters_without_a_gradient_are_left_as_they_are() -> None:
    model = small_model()
    optimizer = offloaded(model)
    frozen, trained = next(model.parameters()), list(model.parameters())[1:]
    before = frozen.clone()
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(frozen, before)
    assert frozen not in optimizer.state


@pytest.mark.parametrize("turned", [False, True], ids=["adamw to offload", "offload to adamw"])
def test_adamw_and_offload_go_on_from_one_anothers_checkpoints(turned: bool) -> None:
    one, other = small_model(), small_model()
    plain, mine = make_optimizer(other if turned else one, SETTINGS, device=CPU), offloaded(one if turned else other)
    former, latter = (mine, plain) if turned else (plain, mine)
    steps(one, former, count=2)
    other.load_state_dict(one.state_dict())
    optimizer_state.load_into(latter, {k: v.clone() for k, v in optimizer_state.tensors_of(former).items()})
    steps(one, former, count=2, first=2)
    steps(other, latter, count=2, first=2)
    for expected, found in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_states_of_another_policy_are_refused() -> None:
    model = small_model()
    optimizer = make_optimizer(model, SETTINGS, device=CPU)
    steps(model, optimizer, count=1)
    tensors = optimizer_state.tensors_of(optimizer)
    narrower = make_optimizer(nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 4)), SETTINGS, device=CPU)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 2 has shape \[5, 11\], not \[4, 11\]"):
        optimizer_state.load_into(narrower, tensors)
    shorter = make_optimizer(nn.Linear(7, 11), SETTINGS, device=CPU)
    with pytest.raises(ValueError, match=r"moments of parameter 2, the policy has 2"):
        optimizer_state.load_into(shorter, tensors)


def test_moments_in_eight_bits_are_taken_up_in_full_precision_and_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 2, bias=False)
    optimizer = make_optimizer(model, SETTINGS, device=CPU)
    table = torch.linspace(-1, 1, 256)
    parts = {"codes": torch.arange(8, dtype=torch.uint8).view(2, 4), "scale": torch.tensor([2.0, 3.0]), "qmap": table}
    state = {f"0.{name}.{part}": value for name in ("exp_avg", "exp_avg_sq") for part, value in parts.items()}
    with caplog.at_level(logging.WARNING, "atpo.learner"):
        optimizer_state.load_into(optimizer, {**state, "0.step": torch.tensor(4.0)})
    found = optimizer.state[model.weight]
    assert torch.equal(found["exp_avg"], torch.stack([table[:4] * 2, table[4:8] * 3]))
    assert found["step"] == 4
    assert "2 moments of the checkpoint are those of 8 bits" in caplog.text


@pytest.mark.parametrize(
    ("odd", "said"),
    [({"0.exp_avg": None}, "of parameter 0 it has exp_avg_sq, step, not exp_avg, exp_avg_sq, step"),
     ({"0.exp_avg": None, "0.exp_avg.codes": torch.zeros(2, 4, dtype=torch.uint8)}, "scale"),
     ({"0.exp_avg": None, "0.exp_avg.codes": torch.full((2, 4), 9, dtype=torch.uint8),
       "0.exp_avg.scale": torch.ones(1), "0.exp_avg.qmap": torch.zeros(5)}, r"a table of \[5\] values"),
     ({"-1.exp_avg": torch.zeros(2, 4)}, "moments of parameter -1, the policy has 1")],
)  # fmt: skip
def test_states_without_all_of_a_moment_are_refused(odd: dict[str, torch.Tensor | None], said: str) -> None:
    optimizer = make_optimizer(nn.Linear(4, 2, bias=False), SETTINGS, device=CPU)
    whole: dict[str, torch.Tensor | None] = {
        "0.step": torch.tensor(4.0), "0.exp_avg": torch.zeros(2, 4), "0.exp_avg_sq": torch.zeros(2, 4)
    }  # fmt: skip
    tensors = {name: tensor for name, tensor in (whole | odd).items() if tensor is not None}
    with pytest.raises((ValueError, KeyError), match=said):
        optimizer_state.load_into(optimizer, tensors)


def test_eight_bits_without_torchao_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    settings = SETTINGS.model_copy(update={"optimizer": "adamw8bit"})
    with pytest.raises(SetupError, match=r"needs torchao.*pip install 'atpo-async\[gpu\]', or use --learner.optimizer"):
        make_optimizer(small_model(), settings, device=CPU)


def test_offload_with_shards_is_refused_with_the_way_out_and_is_adamw_on_a_cpu(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = SETTINGS.model_copy(update={"optimizer": "offload"})
    with pytest.raises(SetupError, match="fsdp_offload_params: true"):
        make_optimizer(small_model(), settings, device=CPU, sharded=True)
    with caplog.at_level(logging.INFO, "atpo.learner"):
        assert type(make_optimizer(small_model(), settings, device=CPU)) is torch.optim.AdamW
    assert "on a CPU all memory is the host's" in caplog.text


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("rank", [0, 8])
def test_out_of_memory_shards_are_not_told_to_use_an_optimizer_that_they_are_refused(optimizer: str, rank: int) -> None:
    words = {"learner.optimizer": optimizer, "learner.lora.rank": str(rank), "learner.mixed_precision": "bf16"}
    assert "--learner.optimizer offload" in ways_out(load((), words), of_a_pass=False)
    said = ways_out(load((), words | {"learner.accelerate_config": "fsdp.yaml"}), of_a_pass=False)
    assert "offload" not in said
    assert "over more GPUs (learner.num_processes)" in said


def test_a_run_goes_on_with_offload_where_it_trained_with_adamw(folder: Path, tmp_path: Path) -> None:
    def trainer(optimizer: str) -> Trainer:
        config = make_config(folder, learner={"lr": 1e-3, "optimizer": optimizer})
        return Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))

    first, second = trainer("adamw"), trainer("offload")
    first.train(make_batch(), version=3)
    checkpoint.load(checkpoint.save(tmp_path, first, Progress(step=1, version=4), keep=1), second)
    for each in (first, second):
        each.train(make_batch(step=1), version=4)
    for expected, found in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_the_settings_of_a_group_are_numbers_whatever_the_optimizer_keeps_them_in() -> None:
    optimizer = make_optimizer(small_model(), SETTINGS, device=CPU)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    kept = optimizer.param_groups[0]["lr"]
    set_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is kept
    assert groups_settings(optimizer)[0]["lr"] == 0.25
