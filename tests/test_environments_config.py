"""``[[environments]]``: several environments by weight, in files, as options and from Python."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

import atpo_async.config as configuration
from atpo_async import load
from atpo_async.cli import main
from atpo_async.config import Config, build, resolved, to_toml
from atpo_async.config.resuming import describe_changes, refused
from atpo_async.core.errors import ConfigError

TWO = """
[[environments]]
name = "hopqa"
label = "easy"
weight = 2
options = { hops = 2 }

[[environments]]
name = "my_pkg.hard_task:make"
"""


def two(tmp_path: Path, more: str = "") -> Path:
    file = tmp_path / "two.toml"
    file.write_text(TWO + more)
    return file


def said(data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_entries_have_weight_1_and_a_label_from_their_module_unless_they_say_otherwise(tmp_path: Path) -> None:
    easy, hard = load(two(tmp_path)).every_environment
    assert (easy.label, easy.weight, easy.options) == ("easy", 2.0, {"hops": 2})
    assert (hard.label, hard.weight, hard.name) == ("hard_task", 1.0, "my_pkg.hard_task:make")
    assert load(two(tmp_path)).task_name == "2 easy + 1 hard_task"


def test_one_environment_is_what_it_always_was() -> None:
    config = build({"environment": {"name": "my.env:make", "options": {"n": 1}}})
    (only,) = config.every_environment
    assert (only.name, only.label, only.options, only.weight) == ("my.env:make", "my.env:make", {"n": 1}, 1.0)
    assert config.task_name == "my.env:make"


def test_what_atpo_config_prints_and_a_run_folder_records_is_read_back_as_the_same(tmp_path: Path) -> None:
    config = load(two(tmp_path))
    text = to_toml(config)
    assert "[environment]" not in text
    assert len(tomllib.loads(text)["environments"]) == 2
    (tmp_path / "again.toml").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    assert load(tmp_path / "again.toml") == load(tmp_path / "config.json") == config
    assert configuration.load((), configuration.as_options(two(tmp_path))) == config


def test_fields_of_an_entry_are_options_by_its_number_and_by_its_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--environments.easy.weight",
        "3",
        "--environments.1.options.level",
        "2",
        "--environments.0.options.hops=3",
    ]
    assert main.main(["config", str(two(tmp_path)), *words]) == 0
    (tmp_path / "out.toml").write_text(capsys.readouterr().out.partition("\nstaleness, in")[0])
    easy, hard = load(tmp_path / "out.toml").every_environment
    assert (easy.weight, easy.options, hard.options) == (3.0, {"hops": 3}, {"level": 2})


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("environments.2.weight", ["no environment '2'", "0 (easy), 1 (hard_task)"]),
        ("environments.esay.weight", ["no environment 'esay'", "0 (easy), 1 (hard_task)"]),
        ("environments.0.wieght", ["environments.NUMBER.FIELD", "weight"]),
        ("environments", ["environments.NUMBER.FIELD"]),
    ],
)
def test_options_of_no_entry_name_those_that_there_are(
    option: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["config", str(two(tmp_path)), f"--{option}", "2"]) == 2
    text = capsys.readouterr().err
    assert all(word in text for word in words), text


def test_python_gives_a_list_of_entries_or_a_field_of_one(tmp_path: Path) -> None:
    config = resolved((), {"environments": [{"name": "hopqa", "label": "a"}, {"name": "hopqa", "label": "b"}]})
    assert [each.label for each in config.every_environment] == ["a", "b"]
    changed = resolved(config, {"environments.b.weight": 5})
    assert [each.weight for each in changed.every_environment] == [1.0, 5.0]
    assert resolved((), {"environments": config.environments}).environments == config.environments


ENTRY = {"name": "hopqa"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"environments": [ENTRY], "environment": {"options": {"hops": 2}}}, ["leave [environment] out"]),
        ({"environments": [ENTRY, ENTRY]}, ["2 of them have the label 'hopqa'", "label = 'easy'"]),
        ({"environments": [ENTRY | {"weight": 0}]}, ["environments.0.weight must be > 0, got 0"]),
        ({"environments": [ENTRY | {"weight": float("nan")}]}, ["environments.0.weight"]),
        ({"environments": [ENTRY | {"weight": "a lot"}]}, ["environments.0.weight must be a number"]),
        ({"environments": [{"weight": 1}]}, ["environments.0.name is missing"]),
        ({"environments": [ENTRY | {"wieght": 2}]}, ["environments.0.wieght", "name, options, weight, label"]),
        (
            {"environments": [ENTRY, {"name": "hopaq"}]},
            ["environments.1.name = 'hopaq' is unknown; did you mean hopqa"],
        ),
        ({"environments": [ENTRY | {"label": "a b"}]}, ["environments.0.label"]),
        ({"environments": {"name": "hopqa"}}, ["[[environments]]"]),
        ({"environments": ["hopqa"]}, ["environments.0 must be a section"]),
    ],
)
def test_entries_that_cannot_be_are_refused_with_their_place_and_the_way_out(data: Any, words: list[str]) -> None:
    text = said(data)
    assert all(word in text for word in words), text


def test_a_resumed_run_keeps_its_environments_and_their_weights_for_they_decide_which_task_is_which() -> None:
    before = build({"environments": [ENTRY | {"label": "a"}, ENTRY | {"label": "b"}]})
    after = build({"environments": [ENTRY | {"label": "a"}, ENTRY | {"label": "b", "weight": 2}]})
    assert [path for path, _, _ in refused(before, after)] == ["environments"]
    (line,) = describe_changes(before, after, updates=0, steps=0)
    assert "b: hopqa, weight 1" in line
    assert "b: hopqa, weight 2" in line
    assert [path for path, _, _ in refused(Config(), before)] == ["environments"]
