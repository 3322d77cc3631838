"""The weights' benchmark: every side runs on the same bytes, in turns, and within its limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from actors.engines.common.direct import placements, uncovered
from benchmarks.learner_parts import trees
from benchmarks.learner_parts.sides import SIZES, Times
from benchmarks.learner_parts.trees import Shape
from benchmarks.weights import Limit, main, rotate
from benchmarks.weights_parts import trained
from benchmarks.weights_parts.memory import Stacked, tensors_of
from benchmarks.weights_parts.model import config_for
from scripts.namespaces import why_not


def test_publish_fetch_and_load_are_told_beside_a_copy_of_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    into = tmp_path / "found.json"
    assert main(["--model", "demo", "--rounds", "1", "--part", "publish", "fetch", "load", "--json", str(into)]) == 0
    found = json.loads(into.read_text())["models"]["demo"]
    assert found["publish"].keys() == {"copy", "copy to file", "publish", "write + sha256"}
    assert found["publish"]["publish"].keys() == {"held", "aside", "bytes"}
    assert {name: sides.get("hashed") for name, sides in found["fetch"].items()} == {
        "copy": None, "1 actor": 1.0, "3 actors": 1.0, "3 actors, each for itself": 3.0,
    }  # fmt: skip
    assert found["load"].keys() == {"copy", "load", "clone + load + compare"}
    said = capsys.readouterr().out
    assert "of a copy" in said
    assert "publish: held" in said
    assert not list(Path("/dev/shm").glob("atpo-benchmark-weights*"))


def test_the_made_up_weights_are_all_of_a_qwen3_and_fill_a_stacked_model() -> None:
    tensors = tensors_of(SIZES["demo"], torch.bfloat16)
    expected = SIZES["demo"].make(device="cpu").state_dict()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {n: tuple(t.shape) for n, t in expected.items()}
    model = Stacked(tensors)
    assert uncovered(model, tensors, placements(model, tensors)) == []


def test_a_model_that_fits_one_card_only_with_a_smaller_optimizer_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    small, large = (config_for(model).learner for model in ("0.6b", "4b"))
    assert (small.optimizer, small.gradient_checkpointing) == ("adamw", False)
    assert (large.optimizer, large.gradient_checkpointing, large.mixed_precision) == ("adamw8bit", "auto", "bf16")


def test_sides_take_turns_and_a_limit_ends_them_after_one_round() -> None:
    order: list[str] = []

    def side(name: str) -> Times:
        order.append(name)
        return {"s": 1.0}

    sides = {name: lambda name=name: side(name) for name in "abc"}
    taken = rotate(sides, 3, Limit(0.0))  # type: ignore[arg-type]
    assert order == ["a", "b", "c", "b", "c", "a"]
    assert [len(times) for times in taken.values()] == [1, 1, 1]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's policy, trained on trees of two short leaves."""
    folder = tmp_path_factory.mktemp("versions")
    shape = Shape(rollouts=2, rounds=0, branches=0, turns=1, prompt=256, observation=0, action=256, spread=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "SHAPES", {"m8": shape})
        trained.Versions(folder, "demo").need(trees=1, over=lambda: False)
    return folder


def test_differences_of_trained_versions_are_told_in_both_precisions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], versions: Path
) -> None:
    kept = {path.name: path.stat().st_mtime_ns for path in (versions / "demo").iterdir()}
    into = tmp_path / "found.json"
    words = ["--model", "demo", "--rounds", "1", "--part", "delta", "--versions", str(versions), "--json", str(into)]
    assert main(words) == 0
    found = json.loads(into.read_text())["models"]["demo"]["delta"]
    assert found.keys() == {"bfloat16, 1 step", "bfloat16, 8 steps", "float32, 1 step", "float32, 8 steps"}
    for name, case in found.items():
        assert case.keys() == {"bytes", "total_bytes", "ratio", "copy", "encode", "decode"}
        assert 0 < case["ratio"] < (0.1 if name.startswith("bfloat16") else 0.6)
    assert found["bfloat16, 1 step"]["bytes"] < found["bfloat16, 8 steps"]["bytes"]
    assert "encode" in capsys.readouterr().out
    # What was trained is used again as it is.
    assert {path.name: path.stat().st_mtime_ns for path in (versions / "demo").iterdir()} == kept
    assert not list(Path("/dev/shm").glob("atpo-bench-*"))


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_versions_cross_a_thin_link_whole_and_as_differences(tmp_path: Path, versions: Path) -> None:
    into = tmp_path / "found.json"
    words = ["--model", "demo", "--part", "link", "--rate-mbit", "50", "--versions", str(versions), "--json", str(into)]
    assert main(words) == 0
    found = json.loads(into.read_text())["models"]["demo"]["link"]
    whole, differences = found["taken"]["whole"], found["taken"]["differences"]
    assert [len(whole), len(differences)] == [2, 2]
    assert all(each["weights/differences/bytes"] < found["total_bytes"] / 8 for each in differences)
    assert not any("weights/differences/versions" in each for each in whole)
