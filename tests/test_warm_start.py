"""Making the demo's policy: what it is, that it learns, and that nothing is made twice or half."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.environments.hopqa import warm_start
from atpo_async.environments.hopqa.warm_start import (
    Recipe,
    demonstration_batch,
    main,
    make_policy,
    new_model,
    policy_folder,
    recipe_for,
)
from atpo_async.environments.hopqa.world import World
from atpo_async.environments.policy_folder import lr_factor
from atpo_async.run import scratch

TINY = Recipe(seed=1, steps=3, batch_size=4, width=32, layers=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = policy_folder(tmp_path_factory.mktemp("models"), TINY)
    report = make_policy(path, TINY, device="cpu", num_threads=1)
    assert not report.reused
    return path


def test_the_policy_is_an_ordinary_qwen3_folder(made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = {file.name for file in made.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "warm_start.json",
    } <= files
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    assert model.config.model_type == "qwen3"
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size == len(tokenizer) == len(World().words)
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert model.dtype == torch.float32


def test_the_default_policy_has_four_layers_of_width_128_and_about_0_6_million_parameters() -> None:
    model = new_model(Recipe())
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (4, 128)
    assert 550_000 < sum(p.numel() for p in model.parameters()) < 700_000


def test_a_second_call_with_the_same_recipe_makes_nothing(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
    monkeypatch.setattr(warm_start, "_make", lambda *_args, **_kwargs: pytest.fail("made again"))
    report = make_policy(made, TINY)
    assert report.reused
    assert report.path == made
    assert {file.name: file.stat().st_mtime_ns for file in made.iterdir()} == before


def test_another_recipe_has_another_folder_and_is_refused_in_the_first_ones(made: Path) -> None:
    other = Recipe(seed=2, steps=3, batch_size=4, width=32, layers=1)
    assert policy_folder(made.parent, other) != made
    with pytest.raises(SetupError, match=r"warm-started with other settings \(seed 1 not 2\); remove it"):
        make_policy(made, other)


def test_the_same_recipe_gives_the_same_weights_and_leaves_torchs_generator_alone(made: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    make_policy(tmp_path / "again", TINY, device="cpu", num_threads=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    first, second = (load_file(p / "model.safetensors") for p in (made, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_failure_in_the_middle_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(warm_start, "save_tokenizer", fails)
    with pytest.raises(SetupError, match=r"models/policy cannot be written: no space left on device"):
        make_policy(tmp_path / "models" / "policy", TINY, device="cpu", num_threads=1)
    assert list((tmp_path / "models").iterdir()) == []


def test_folders_of_others_are_left_alone_and_named(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "warm_start.json").write_text("{")
    for name, says in (("mine", "was not made by the warm start"), ("file", "is a file"), ("torn", "unreadable")):
        with pytest.raises(SetupError, match=says) as caught:
            make_policy(tmp_path / name, TINY)
        assert str(tmp_path / name) in str(caught.value)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_the_record_says_how_it_was_made(made: Path) -> None:
    record = json.loads((made / "warm_start.json").read_text())
    assert record["recipe"]["seed"] == 1
    assert record["recipe"]["steps"] == 3
    assert record["fingerprint"] == TINY.fingerprint
    assert record["loss"] > 0
    assert record["torch"] == torch.__version__


def test_imitation_lowers_the_loss(tmp_path: Path) -> None:
    told: list[tuple[int, int, float]] = []
    recipe = Recipe(steps=40, batch_size=8, width=64, layers=1)
    make_policy(tmp_path / "p", recipe, device="cpu", num_threads=1, progress=lambda *now: told.append(now))
    assert [step for step, _, _ in told] == [10, 20, 30, 40]
    assert told[-1][2] < 0.7 * told[0][2]


def test_the_loss_is_on_actions_and_never_on_questions_observations_or_padding() -> None:
    recipe = Recipe(batch_size=6)
    rows, is_action = demonstration_batch(recipe, 0, Random(0))
    assert rows.shape == is_action.shape
    assert rows.shape[0] == 6
    words = recipe.world.words
    for row, mask in zip(rows.tolist(), is_action.tolist(), strict=True):
        trained = [words[i] for i, m in zip(row, mask, strict=True) if m]
        untouched = [words[i] for i, m in zip(row, mask, strict=True) if not m]
        assert untouched[:2] == ["Find", ":"]
        assert trained[0] in ("look", "answer")
        assert trained[-1] == "<end>"
        assert "<end>" not in untouched
        assert not {"<obs>", "</obs>", "<pad>", "error"} & set(trained)


def test_every_step_has_other_demonstrations_and_none_is_held_out() -> None:
    recipe = Recipe(batch_size=4)
    first, _ = demonstration_batch(recipe, 0, Random(0))
    second, _ = demonstration_batch(recipe, 1, Random(0))
    assert first[:, :10].tolist() != second[:, :10].tolist()


def test_the_learning_rate_rises_for_twenty_steps_and_falls_to_a_tenth() -> None:
    assert lr_factor(0, 200) == pytest.approx(0.05)
    assert lr_factor(19, 200) == pytest.approx(1.0, abs=0.03)
    assert lr_factor(199, 200) == pytest.approx(0.1, abs=0.001)


def test_the_recipe_follows_the_environments_options() -> None:
    recipe = recipe_for(seed=3, steps=50, options={"hops": 2, "num_names": 32, "turn_limit": 9, "eval_tasks": 10})
    assert recipe == Recipe(seed=3, steps=50, min_hops=2, max_hops=2, num_names=32)
    assert recipe_for(seed=3, options={"seed": 4, "min_hops": 1}) == Recipe(seed=4, min_hops=1)
    assert recipe_for(seed=0) == Recipe()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": -1}, "steps must be >= 0, got -1"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"width": 100}, "multiple of 32"),
        ({"noise": 1.0}, "noise must be in"),
        ({"mixed_up": 9}, "mixed_up must be 0 to 5"),
        ({"max_hops": 7}, "3 to 7"),
    ],
)
def test_a_recipe_out_of_range_is_refused_by_name(settings: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Recipe(**settings)  # type: ignore[arg-type]


def test_a_gpu_that_is_not_there_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SetupError, match="torch finds no GPU"):
        make_policy(tmp_path / "p", TINY, device="cuda")
    assert list(tmp_path.iterdir()) == []


def test_by_hand_it_prints_the_folder_and_faults_end_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["--root", str(tmp_path), "--steps", "1", "--batch-size", "2", "--width", "32", "--layers", "1"]
    assert main([*tiny, "--device", "cpu"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "model.safetensors").is_file()
    assert main(["--root", str(tmp_path), "--width", "33"]) == 2
    assert "width must be a multiple of 32" in capsys.readouterr().err


def test_seeing_that_nothing_changed_does_not_load_torch(made: Path) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from atpo_async.environments.hopqa.warm_start import Recipe, make_policy; "
        f"r = make_policy(Path({str(made)!r}), Recipe(seed=1, steps=3, batch_size=4, width=32, layers=1)); "
        "sys.exit(not r.reused or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_warm_start_that_a_signal_ends_leaves_no_folder_behind(number: signal.Signals, tmp_path: Path) -> None:
    small = "--steps 100000 --batch-size 4 --width 32 --layers 1 --device cpu --num-threads 1"
    command = [sys.executable, "-m", "atpo_async.environments.hopqa.warm_start", "--root", str(tmp_path)]
    process = subprocess.Popen([*command, *small.split()], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        assert "step 10 of 100000" in process.stderr.readline()
        assert [folder.name.rpartition(".")[2] for folder in tmp_path.iterdir()] == ["tmp"]
        process.send_signal(number)
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == -number
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_warm_start_left_goes_at_the_next_one_and_nothing_else_does(
    made: Path,
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    root = made.parent
    dead, alive, held, other = (
        root / name
        for name in (
            f".hopqa-01234567.{gone.pid}.tmp",
            f".hopqa-01234567.{os.getppid()}.tmp",
            f".hopqa-89abcdef.{gone.pid}.tmp",
            f".thesis.{gone.pid}.tmp",
        )
    )
    for folder in (dead, alive, held, other):
        folder.mkdir()
        (folder / "file").write_text("")
    lock = scratch.hold(held)
    try:
        assert make_policy(made, TINY).reused
    finally:
        assert lock is not None
        os.close(lock)
    assert {folder for folder in (dead, alive, held, other) if folder.exists()} == {alive, held, other}
    for folder in (alive, held, other):
        shutil.rmtree(folder)
