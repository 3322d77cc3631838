"""Checkpoints: a resumed run goes on bit for bit, and the last good one survives whatever happens while writing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from atpo_async.core.errors import SetupError
from atpo_async.models import policy
from learner.checkpoints import checkpoint
from learner.checkpoints.checkpoint import Progress
from learner.loss.guards import GradNorms, SkipCount
from learner.policy.accelerator import make_accelerator
from learner.policy.export import export_model, precision
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.learner_support import make_batch, make_config, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def make_trainer(folder: Path, **learner: object) -> Trainer:
    settings = {"warmup_steps": 4, "schedule": "cosine", "minibatches": 2, **learner}
    config = make_config(folder, learner=settings, run={"steps": 10})
    return Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.whole.tensors().items()}


def test_a_resumed_run_takes_the_very_next_step(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(folder)
    for i in range(2):
        trainer.train(make_batch(seed=i, step=i), version=3)
    path = checkpoint.save(tmp_path, trainer, Progress(step=2, version=7), keep=2)
    draws = random.random(), np.random.random(), torch.rand(3)
    report = trainer.train(make_batch(seed=9, step=2), version=3)

    resumed = make_trainer(folder)
    assert checkpoint.load(path, resumed) == Progress(step=2, version=7)
    assert resumed.history.updates == 4
    again = random.random(), np.random.random(), torch.rand(3)
    assert again[:2] == draws[:2]
    assert torch.equal(again[2], draws[2])
    same = resumed.train(make_batch(seed=9, step=2), version=3)
    assert same.metrics == report.metrics
    expected = weights(trainer)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


def test_rates_betas_and_decay_are_those_of_the_configuration_now(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(folder, lr=1e-3, weight_decay=0.0)
    trainer.train(make_batch(), version=3)
    path = checkpoint.save(tmp_path, trainer, Progress(step=1, version=1), keep=1)
    resumed = make_trainer(folder, lr=5e-4, weight_decay=0.1, betas=(0.8, 0.9))
    checkpoint.load(path, resumed)
    (group,) = resumed.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.1, (0.8, 0.9))
    # The moments are the run's.
    (was, now) = (each.optimizer.state_dict()["state"] for each in (trainer, resumed))
    assert all(torch.equal(was[i]["exp_avg"], now[i]["exp_avg"]) for i in was)
    rate = resumed.train(make_batch(seed=1, step=1), version=3).metrics["lr"]
    assert rate == pytest.approx(5e-4)


def test_a_checkpoint_in_shards_is_refused_where_tensors_are_whole_with_the_way_out(
    folder: Path, tmp_path: Path
) -> None:
    path = checkpoint.save(tmp_path, make_trainer(folder), Progress(step=1, version=1), keep=1)
    (path / "sharded").mkdir()
    with pytest.raises(
        SetupError, match=r"holds shards in .*, and with learner.accelerate_config = None .* --from RUN"
    ):
        checkpoint.load(path, make_trainer(folder))


def test_a_crash_before_the_rename_leaves_the_last_good_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(folder)
    trainer.train(make_batch(), version=3)
    good = checkpoint.save(tmp_path, trainer, Progress(step=1, version=1), keep=1)
    expected = weights(trainer)
    trainer.train(make_batch(seed=1), version=3)

    def crash(aside: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, trainer, Progress(step=2, version=2), keep=1)
    assert checkpoint.list_checkpoints(tmp_path) == [good]
    fresh = make_trainer(folder)
    checkpoint.load(good, fresh)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(fresh).items())
    # The next one clears what the crash left.
    better = checkpoint.save(tmp_path, trainer, Progress(step=2, version=2), keep=1)
    assert sorted(tmp_path.iterdir()) == [better]


def test_only_the_newest_are_kept_and_the_new_one_is_there_before_the_old_one_goes(
    folder: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(folder)
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, trainer, Progress(step=step, version=step), keep=2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-000010-v000010", "step-000100-v000100"]


def test_the_learner_and_every_reader_of_a_run_agree_on_what_a_checkpoint_is(folder: Path, tmp_path: Path) -> None:
    assert checkpoint.list_checkpoints is policy.list_checkpoints
    saved = checkpoint.save(tmp_path, make_trainer(folder), Progress(step=1, version=1), keep=2)
    for name in (".writing-step-000002-v000002", "step-000003", "step-000004-v000004.old"):
        (tmp_path / name).mkdir()
    assert policy.list_checkpoints(tmp_path) == [saved]
    assert policy.list_checkpoints(tmp_path / "nowhere") == []


def test_a_checkpoint_holds_no_pickle(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(folder)
    trainer.train(make_batch(), version=3)
    path = checkpoint.save(tmp_path, trainer, Progress(step=1, version=1), keep=1)
    assert {p.suffix for p in path.rglob("*")} == {".safetensors", ".json"}
    state = json.loads((path / "state.json").read_text())
    assert (state["step"], state["version"], state["updates"]) == (1, 1, 2)


def test_the_guards_go_on_where_they_were(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(folder)
    for i in range(5):
        trainer.train(make_batch(seed=i, step=i), version=3)
    assert len(trainer.history.grad_norms.norms) == 10  # two a batch: enough for a median
    trainer.history.skips = SkipCount(2, 3)
    path = checkpoint.save(tmp_path, trainer, Progress(step=5, version=5), keep=1)
    resumed = make_trainer(folder)
    assert resumed.history.grad_norms.spike(1e9, 30.0) is None
    checkpoint.load(path, resumed)
    assert resumed.history.grad_norms == trainer.history.grad_norms
    assert resumed.history.skips == SkipCount(2, 3)
    assert resumed.history.grad_norms.spike(1e9, 30.0) is not None


def test_a_checkpoint_from_before_the_guard_loads_and_its_history_starts_anew(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(folder)
    trainer.train(make_batch(), version=3)
    path = checkpoint.save(tmp_path, trainer, Progress(step=1, version=1), keep=1)
    state = json.loads((path / "state.json").read_text())
    del state["grad_norms"]
    (path / "state.json").write_text(json.dumps(state))
    resumed = make_trainer(folder)
    resumed.train(make_batch(), version=3)
    assert checkpoint.load(path, resumed) == Progress(step=1, version=1)
    assert resumed.history.grad_norms == GradNorms()
    assert resumed.history.updates == 2


@pytest.mark.parametrize("history", [None, ["much"], [[1.0]], 3.0])
def test_a_history_that_is_none_is_a_damaged_checkpoint(folder: Path, tmp_path: Path, history: object) -> None:
    path = checkpoint.save(tmp_path, make_trainer(folder), Progress(step=1, version=1), keep=1)
    state = json.loads((path / "state.json").read_text()) | {"grad_norms": history}
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(SetupError, match=r"step-000001-v000001 cannot be loaded.*go on from the one before"):
        checkpoint.load(path, make_trainer(folder))


@pytest.mark.parametrize("broken", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(folder: Path, tmp_path: Path, broken: str) -> None:
    trainer = make_trainer(folder)
    trainer.train(make_batch(), version=3)
    path = checkpoint.save(tmp_path, trainer, Progress(step=1, version=1), keep=1)
    (path / broken).write_bytes(b"{")
    with pytest.raises(SetupError, match=r"step-000001-v000001 cannot be loaded.*go on from the one before"):
        checkpoint.load(path, make_trainer(folder))


def test_the_exported_model_is_an_ordinary_folder_with_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(folder)
    trainer.train(make_batch(), version=3)
    target = tmp_path / "model"
    for _ in range(2):  # a second time over the first
        export_model(trainer.policy, trainer.whole.tensors(), folder, target, precision(folder, "source"))
    assert (target / "tokenizer_config.json").is_file()
    again = AutoModelForCausalLM.from_pretrained(target)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens).logits, trainer.policy.hf(input_ids=tokens).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
