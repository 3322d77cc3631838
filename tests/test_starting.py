"""``--from RUN[:STEP]``: a new run begins with another run's policy, and with nothing else of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from atpo_async.api import other_run
from atpo_async.api.beginning import beginning
from atpo_async.api.notes import at_the_start
from atpo_async.api.other_run import assembled, described, find, is_same
from atpo_async.config import Config, build
from atpo_async.core.errors import RunMismatch, SetupError
from atpo_async.run.rundir import RunDir
from tests.learner_support import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def source(model: Path, tmp_path: Path) -> RunDir:
    """A run under way: checkpoints of steps 4 and 6."""
    run = RunDir.create(config_in(tmp_path, name="a", model=model))
    for step in (4, 6):
        save_checkpoint(run, model, step)
    return run


def config_in(folder: Path, *, name: str, model: Path | None = None, **sections: dict[str, Any]) -> Config:
    own: dict[str, Any] = {"warm_start": True} if model is None else {"path": str(model)}
    return build({"run": {"dir": str(folder), "name": name}, "model": own, **sections})


def save_checkpoint(run: RunDir, model: Path, step: int) -> Path:
    """As the learner's: every tensor is ``step`` all over."""
    folder = run.checkpoints / f"step-{step:06d}-v{step + 1:06d}"
    folder.mkdir(parents=True)
    tensors = {f"hf.{name}": tensor * 0 + step for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "state.json").write_text(json.dumps({"updates": step}))
    return folder


def step_of(folder: Path) -> int:
    """Which checkpoint a policy is of."""
    (value,) = {float(tensor.flat[0]) for tensor in load_file(folder / "model.safetensors").values()}
    return int(value)


@pytest.mark.parametrize(("asked", "step"), [("a", 6), ("a:6", 6), ("a:4", 4)])
def test_a_new_run_begins_with_the_newest_policy_or_that_of_a_step(
    asked: str, step: int, source: RunDir, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in source.path.rglob("*")}
    with beginning(config_in(tmp_path, name="b"), asked) as begun:
        assert begun.checked.model.path != begun.config.model.path
        with RunDir.held(begun.config, start=begun.start) as run:
            lines = at_the_start(begun, run)
    assert step_of(run.path / "start") == step
    assert (run.path / "start" / "tokenizer_config.json").is_file()
    assert run.config.model.path == str(tmp_path / "b" / "start")
    assert not run.config.model.warm_start
    # Neither its optimizer nor its steps.
    assert not run.is_trained
    assert not list(run.checkpoints.iterdir())
    recorded = RunDir.open(run.path).started_from
    assert recorded is not None
    assert (recorded["run_id"], recorded["step"]) == (source.run_id, step)
    (line,) = lines
    assert line.startswith(f"the run began with the policy of {source.path}, step {step} (")
    assert {path: path.stat().st_mtime_ns for path in source.path.rglob("*")} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "latest"]


def test_the_trained_policy_of_a_run_that_is_over_is_its_newest(source: RunDir, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, source.path / "model")
    tensors = {name: tensor * 0 + 9 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, source.path / "model" / "model.safetensors")
    (source.path / "model" / "config.json").touch()
    with assembled(find(str(source.path), tmp_path), config_in(tmp_path, name="b")) as (_, start):
        assert step_of(start.folder) == 9
        assert start.record["step"] == 6


def test_a_step_that_is_not_kept_is_refused_with_those_that_are(source: RunDir, tmp_path: Path) -> None:
    with (
        pytest.raises(
            SetupError,
            match=r"keeps no checkpoint of step 5; of steps: 4, 6 \(it saves every \d+ steps, learner.checkpoint_e",
        ),
        beginning(config_in(tmp_path, name="b"), "a:5"),
    ):
        raise AssertionError
    assert not (tmp_path / "b").exists()


def test_a_run_without_a_policy_and_one_that_is_none_are_named(tmp_path: Path, model: Path) -> None:
    RunDir.create(config_in(tmp_path, name="fresh", model=model))
    for asked, said in (
        ("fresh", "neither a checkpoint"),
        ("nowhere", "no run folder"),
        ("nowhere:3", "no run folder"),
    ):
        with pytest.raises(SetupError, match=said), beginning(config_in(tmp_path, name="b"), asked):
            raise AssertionError
    with pytest.raises(SetupError, match="names the run itself"), beginning(config_in(tmp_path, name="fresh"), "fresh"):
        raise AssertionError


def test_latest_is_the_run_started_last_also_by_its_name_alone(tmp_path: Path, model: Path) -> None:
    made = RunDir.create(config_in(tmp_path, name="fresh", model=model))
    runs = made.path.parent
    assert find("latest", runs).run.run_id == made.run_id
    (runs / "latest").unlink()
    (runs / "latest").write_text("fresh")
    assert find("latest", runs).run.run_id == made.run_id
    (runs / "latest").unlink()
    with pytest.raises(SetupError, match=r"--from latest: no run folder .*; runs are .*fresh"):
        find("latest", runs)


def test_the_same_command_goes_on_and_another_source_is_refused(source: RunDir, model: Path, tmp_path: Path) -> None:
    with beginning(config_in(tmp_path, name="b"), "a") as begun, RunDir.held(begun.config, start=begun.start) as run:
        pass
    save_checkpoint(run, model, 2)
    save_checkpoint(source, model, 8)
    for asked in ("a", "a:6", None):
        with beginning(config_in(tmp_path, name="b"), asked) as again:
            assert (again.anew, again.start) == (False, None)
            with RunDir.held(again.config) as same:
                assert same.run_id == run.run_id
                assert same.config.model.path == run.config.model.path
    other = find("a:4", tmp_path)
    with pytest.raises(RunMismatch, match=r"began from .*a, step 6, not from .*a:4"):
        is_same(other, run)


def test_a_folder_in_which_nothing_was_trained_takes_another_source(source: RunDir, tmp_path: Path) -> None:
    with beginning(config_in(tmp_path, name="b"), "a:4") as begun, RunDir.held(begun.config, start=begun.start) as run:
        pass
    with (
        beginning(config_in(tmp_path, name="b"), "a:6") as begun,
        RunDir.held(begun.config, start=begun.start) as again,
    ):
        assert begun.anew
    assert again.run_id != run.run_id
    assert step_of(run.path / "start") == 6


def test_a_checkpoint_that_goes_while_it_is_read_gives_way_to_the_next(
    source: RunDir, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = other_run._copy

    def overtaken(found: other_run.Source, origin: Path, folder: Path) -> None:
        if not (source.checkpoints / "step-000008-v000009").exists():
            save_checkpoint(source, model, 8)
            shutil.rmtree(origin)
        copy(found, origin, folder)

    monkeypatch.setattr(other_run, "_copy", overtaken)
    with assembled(find("a", tmp_path), config_in(tmp_path, name="b")) as (_, start):
        assert step_of(start.folder) == 8
        assert start.record["step"] == 8


def test_a_source_whose_own_model_is_gone_says_what_is_missing(source: RunDir, tmp_path: Path) -> None:
    config = json.loads((source.path / "config.json").read_text())
    config["model"]["path"] = "models/elsewhere"
    (source.path / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(SetupError, match=r"began with, model.path = 'models/elsewhere', is needed"),
        beginning(config_in(tmp_path, name="b"), "a"),
    ):
        raise AssertionError


def test_where_a_policy_is_from_reads_as_a_sentence() -> None:
    said = described({"run": "runs/a", "step": 6, "policy": "runs/a/checkpoints/step-000006-v000007"})
    assert said == (
        "the run began with the policy of runs/a, step 6 (runs/a/checkpoints/step-000006-v000007), and with an "
        "optimizer of its own"
    )
