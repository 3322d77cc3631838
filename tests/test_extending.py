"""docs/extending.md: each of its examples is short, comes in by its door, and all of them serve one real run."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from atpo_async.config.doors import DOORS
from tests.e2e_support import job
from tests.learner_support import small_policy

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
MAX_CODE_LINES = 30

EXAMPLES: dict[str, str] = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL))
"""Module -> its code."""
SETTINGS = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


LISTS = tuple(door.field.rpartition(".")[2] for door in DOORS if door.options_by_name)
"""Fields that name several parts."""


def code_lines(code: str) -> int:
    """Lines that are neither blank nor comments; docstrings count."""
    return sum(1 for line in code.splitlines() if line.strip() and not line.strip().startswith("#"))


def test_every_door_has_a_page_with_an_example() -> None:
    titles = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    for door in DOORS:
        assert f"`{door.field}`" in PAGE, door.field
        named = re.search(r'docs/extending\.md, "([^"]+)"', door.protocol)
        assert named is not None, door.protocol
        assert named[1] in titles, door.field
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert not [section.splitlines()[0] for section in sections if "```python\n# " not in section]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_complete_python_of_at_most_thirty_lines(name: str) -> None:
    ast.parse(EXAMPLES[name])
    assert code_lines(EXAMPLES[name]) <= MAX_CODE_LINES


def test_the_settings_of_the_page_name_the_examples() -> None:
    named = {
        value.partition(":")[0]
        for text in SETTINGS
        for section in tomllib.loads(text).values()
        for value in (*section.values(), *(part for name in LISTS for part in section.get(name, ())))
        if isinstance(value, str) and ":" in value
    }
    assert named == EXAMPLES.keys()


@pytest.mark.slow
def test_all_examples_serve_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment, a strategy, a credit rule, a loss, a correction, a sampler, a transport, a launcher and a sink of
    a user's own, out of the folder in which the run is started; the engine's example has no weights to train."""
    for name, code in EXAMPLES.items():
        (tmp_path / f"{name}.py").write_text(code)
    layers = []
    for number, text in enumerate(SETTINGS):
        if "table_engine" not in text:
            layers.append(tmp_path / f"layer{number}.toml")
            layers[-1].write_text(text)
    (tmp_path / "shared").mkdir()
    monkeypatch.chdir(tmp_path)
    policy = small_policy(tmp_path / "policy", steps=1)
    with job(tmp_path, policy, gated=False, **{"run.steps": 3}) as made:
        made.config.write_text(re.sub(r"^environment\..*\n", "", made.config.read_text(), flags=re.MULTILINE))
        assert made.exit_code(made.start("train", made.config, *layers)) == 0, made.story()
        story = made.story()
        metrics = {name for record in made.records() for name in record.metrics}
        steps = [record.metrics["train/loss"] for record in made.steps()]
    assert steps, story
    assert "of 3 steps" in story, story
    assert {"surrogate/gate", "is/edge", "near/distance", "early/edge"} <= metrics
    assert (tmp_path / "lines.txt").read_text().splitlines()[0] == "run run"
    assert (tmp_path / "lines.txt").read_text().splitlines()[-1] == "done"
    assert any(name.endswith(".bin") for name in map(str, (tmp_path / "shared").iterdir())), story
