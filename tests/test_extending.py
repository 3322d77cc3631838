"""docs/extending.md: each of its examples is short, comes in by its door, and all of them serve one real run."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.expansion.expansion import Expansion
from atpo_async.config import CreditConfig, SearchConfig, TeamConfig
from atpo_async.config.credit_rule import credit_rule
from atpo_async.config.doors import DOORS, ENVIRONMENT
from atpo_async.core.credit import TreeArrays
from atpo_async.core.tree import ROOT, TurnTree
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.values import Limits
from tests.actor_support import ints, turn
from tests.e2e_support import job
from tests.learner_support import small_policy
from tests.test_team_search import team_search

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "extending.md").read_text()
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


APART = ("halves", "knowing", "my_rule", "by_distance")
"""Examples in the place of another one of the page: each is served by a test of its own."""


LIMITS = Limits(vocab_size=64, max_context_tokens=64)


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples lie in the working folder."""
    for name, code in EXAMPLES.items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))


def settings_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(tomllib.loads(text) for text in SETTINGS if f'"{name}:' in text)
    return found


@pytest.mark.usefixtures("beside")
async def test_the_teams_example_is_grown_as_a_group() -> None:
    given = settings_of("halves")
    task = CheckedEnvironment(
        ENVIRONMENT.make(given["environment"]["name"], "", options={}), name="halves", limits=LIMITS
    )
    team = TeamConfig(**given["team"])
    tree = await team_search(lambda context, n: ints(*context[1:], 2), team=team, task=task).grow()
    leaves = [turn for turn in tree if turn.is_leaf]
    assert len(leaves) == team.teams * (team.proposers + 1)
    assert all(turn.success for turn in leaves)
    assert next(turn for turn in tree if turn.role == "synthesizer").observation.tolist() == [4, 10, 11]


@pytest.mark.usefixtures("beside")
async def test_the_example_of_a_right_answer_has_one() -> None:
    plain = ENVIRONMENT.make(settings_of("knowing")["environment"]["name"], "", options={})
    found = await CheckedEnvironment(plain, name="knowing", limits=LIMITS).reference("train", 0)
    assert found is not None
    assert (found.answer.tolist(), found.prefix.tolist()) == ([6, 7], [5])


@pytest.mark.usefixtures("beside")
def test_the_example_of_a_rule_asks_for_another_try_of_what_found_little() -> None:
    settings = SearchConfig(**settings_of("my_rule")["search"])
    rule = Expansion.of(settings).strategy
    found = [turn(1, ROOT, fingerprint=(7,)), turn(2, 1, fingerprint=(7, 8, 9))]
    tree = TurnTree("t", 0, np.array([1], dtype=np.int32), tuple(found))
    asked = [[rule(tree, t.turn_id, 3, np.random.default_rng(seed), settings) for seed in range(20)] for t in found]
    assert {tuple(each) for each in asked[0]} == {(), (ROOT,)}
    assert {tuple(each) for each in asked[1]} == {()}


@pytest.mark.usefixtures("beside")
def test_the_example_of_credit_by_distance_reads_the_first_policy() -> None:
    rule = credit_rule(CreditConfig(**settings_of("by_distance")["credit"], normalise_leaves=False))
    arrays = TreeArrays(
        parent=np.array([-1, -1]), is_leaf=np.array([True, True]), reward=np.array([1.0, 0.0]),
        entropy=np.zeros(2), num_action_tokens=np.ones(2, dtype=np.int64), reference=np.array([0.5, -1.0]),
    )  # fmt: skip
    assert rule.credit(arrays).advantages.tolist() == [0.9, 0.2]


@pytest.mark.slow
def test_all_examples_serve_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment, a strategy, a credit rule, a loss, a correction, a sampler, a transport, a launcher and a sink of
    a user's own, out of the folder in which the run is started; the engine's example has no weights to train."""
    for name, code in EXAMPLES.items():
        (tmp_path / f"{name}.py").write_text(code)
    layers = []
    for number, text in enumerate(SETTINGS):
        if not any(f'"{name}:' in text for name in ("table_engine", *APART)):
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
