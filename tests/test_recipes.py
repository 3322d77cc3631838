"""The recipes as they stand in configs/recipes/, and their list."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpo_async import config as configuration
from atpo_async.cli import main
from atpo_async.config import Config, as_options, load
from atpo_async.config.credit_rule import credit_rule
from atpo_async.config.recipes import SECTIONS, algorithm
from atpo_async.core.credit import TreeArrays
from atpo_async.core.credit.rewards import STD_FLOOR
from atpo_async.core.errors import ConfigError, SetupError
from scripts import recipes_list

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "configs" / "demo.toml"
BIG = ROOT / "configs" / "gpu_8x80gb.toml"
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.toml"))
SCALES = sorted((ROOT / "configs" / "recipes" / "demo_scale").glob("*.toml"))

SIZES = {"search.initial_rollouts", "search.rounds"}
"""Of a tree, that a recipe may set: the size of a group, and how often states are drawn."""

by_name = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def recipe(name: str, base: Path = DEMO) -> Config:
    return load([base, ROOT / "configs" / "recipes" / f"{name}.toml"])


# --- the files ----------------------------------------------------------------------------------------------------


def test_the_recipes_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert {path.stem for path in RECIPES} >= set(recipes_list.ORDER)
    for path in (*RECIPES, *SCALES):
        assert str(path.relative_to(ROOT / "configs")) in page
    assert {path.stem for path in SCALES} <= {path.stem for path in RECIPES}


def test_the_methods_stand_in_alphabetical_order_and_every_recipe_is_named_among_them() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").partition("## The methods\n")[2]
    titles = [
        re.sub("[^a-z0-9]+", " ", line[4:].lower().replace("*", "")) for line in page.splitlines() if line[:4] == "### "
    ]
    assert titles == sorted(titles)
    assert len(titles) == len(set(titles)) > 20
    assert not [path.stem for path in RECIPES if f"`{path.stem}`" not in page and f"[{path.stem}]" not in page]


@by_name
def test_a_recipe_goes_over_the_demo_and_over_a_large_model(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale = [file for file in SCALES if file.stem == path.stem]
    for files in ([DEMO, path], [DEMO, path, *scale], [BIG, path]):
        merged, base = load(files), load(files[0])
        changed = {
            key for key in configuration.fields() if configuration.get(merged, key) != configuration.get(base, key)
        }
        assert changed <= set(as_options(files[1:]))
        capsys.readouterr()
        assert main.main(["config", *map(str, files)]) == 0
        assert capsys.readouterr().out.startswith(configuration.to_toml(merged))


@by_name
def test_a_recipe_sets_the_algorithm_and_leaves_task_machine_and_run_alone(path: Path) -> None:
    own = names_in(path)
    assert {key.partition(".")[0] for key in own} <= {*SECTIONS, "staleness", "buffer", "learner"}
    assert path.stem == "at2po_paper" or own <= {*algorithm(), *SIZES}


@by_name
def test_a_recipe_says_its_name_and_its_source(path: Path) -> None:
    about = configuration.recipe_of(path)
    assert about is not None
    assert (about.name, bool(about.source)) == (path.stem, True)


SERVED_BEFORE_THEY_END = {
    **dict.fromkeys(("dr_bot", "ragen2", "spear", "starpo_s"), r"buffer\.keep_share = .*buffer\.ready = 'partial'"),
    "rhombus": r"buffer\.ready = 'partial' with team\.proposers",
}
"""Recipes whose trees are judged when they have ended -> what is said where they are to be served before."""
USED_TWICE = {"at2po_paper": r"staleness\.max_lag = 0 cannot hold with .*staleness\.max_uses = 2"}


@by_name
@pytest.mark.parametrize(
    ("option", "value", "refused"),
    [("staleness.max_uses", "2", USED_TWICE), ("buffer.ready", "partial", SERVED_BEFORE_THEY_END)],
)
def test_a_recipe_goes_with_trees_that_are_used_again_or_before_they_end_or_says_why_not(
    path: Path, option: str, value: str, refused: dict[str, str]
) -> None:
    if (said := refused.get(path.stem)) is None:
        assert str(configuration.get(load([DEMO, path], {option: value}), option)) == value
    else:
        with pytest.raises(ConfigError, match=said):
            load([DEMO, path], {option: value})


@pytest.mark.parametrize("base", [DEMO, BIG], ids=lambda path: path.stem)
def test_of_a_recipe_nothing_is_left_under_another_one(base: Path) -> None:
    """But the number of chains, which is a scale; and at2po_paper's scale is its own."""
    names = [path for path in RECIPES if path.stem != "at2po_paper"]
    for first, second in zip(names, [*names[1:], names[0]], strict=True):
        alone, over = load([base, second]), load([base, first, second])
        left = {k for k in configuration.fields() if configuration.get(alone, k) != configuration.get(over, k)}
        assert left <= SIZES


def test_the_six_recipes_mean_over_a_task_file_what_they_set_and_it_has() -> None:
    """They name every field of the algorithm that the task files set."""
    for base in (DEMO, BIG):
        for name in recipes_list.ORDER:
            own = [(key, value) for key, value in parsed(base) + parsed(ROOT / "configs" / "recipes" / f"{name}.toml")]
            merged = recipe(name, base)
            for key, value in dict(own).items():
                found = configuration.get(merged, key)
                expected = None if value == "none" and key == "objective.dual_clip" else value
                assert (list(found) if isinstance(found, tuple) else found) == expected, key


def parsed(path: Path) -> list[tuple[str, Any]]:
    """(dotted path, value) of the sections of a file, as they stand there."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    table.pop("recipe", None)
    found = [(f"{section}.{key}", value) for section, own in table.items() for key, value in own.items()]
    return [(key, value) for key, value in found if not isinstance(value, dict)]


def names_in(path: Path) -> set[str]:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    table.pop("recipe", None)
    return {f"{section}.{key}" for section, own in table.items() for key in own}


def test_the_page_lists_every_recipe_as_its_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert recipes_list.overview() in page, "run: python scripts/recipes_list.py"


def test_at2po_is_what_the_defaults_are() -> None:
    mine = as_options(ROOT / "configs" / "recipes" / "at2po.toml")
    over_nothing = load([ROOT / "configs" / "recipes" / "at2po.toml"])
    assert over_nothing == Config()
    assert {"search.strategy", "credit.value_mode", "correction.level", "objective.ratio_level"} <= set(mine)


def test_the_papers_recipe_is_synchronous_and_has_its_published_numbers() -> None:
    found = recipe("at2po_paper", BIG)
    assert (found.search.initial_rollouts, found.search.rounds, found.search.branches) == (10, 2, 6)
    assert found.search.max_leaves == 22
    assert (found.staleness.max_lag, found.staleness.trees_per_batch, found.correction.action) == (0, 64, "none")
    assert (found.objective.clip_low, found.objective.clip_high, found.objective.dual_clip) == (3e-3, 4e-3, None)
    assert (found.learner.lr, found.learner.minibatches, found.learner.max_grad_norm) == (1e-6, 8, 1.0)
    assert (found.learner.weight_decay, found.search.truncated_reward) == (0.01, -1.0)
    with pytest.raises(ConfigError, match=r"trains off-policy uncorrected.*correction\.action: .*at2po_paper\.toml"):
        load([BIG, ROOT / "configs" / "recipes" / "at2po_paper.toml"], {"staleness.max_lag": "2"})


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_a_chain_recipe_gives_every_turn_the_groups_normalised_outcome(name: str) -> None:
    settings = recipe(name)
    assert settings.search.strategy == "none"
    assert settings.search.max_leaves == settings.search.initial_rollouts == 16
    rewards = [1.0, 0.0, 0.0, 1.0, 0.0]
    credited = credit_rule(settings.credit).credit(chains(rewards))
    mean, std = 0.4, (0.4 * 0.6) ** 0.5
    for chain, reward in enumerate(rewards):
        expected = (reward - mean) / (std + STD_FLOOR)
        assert credited.advantages[2 * chain : 2 * chain + 2] == pytest.approx([expected] * 2)


def test_tree_grpo_adds_the_turns_own_gain_to_its_leaves_group_advantage() -> None:
    settings = recipe("tree_grpo").credit
    # Prompt: two chains a-b and c-d, and e, a sibling of b.  Rewards of b, d, e: 1, 0, 0.
    arrays = arrays_of([-1, 0, -1, 2, 0], [0.0, 1.0, 0.0, 0.0, 0.0], [False, True, False, True, True])
    found = credit_rule(settings).credit(arrays).advantages
    unit = (2 / 9) ** 0.5 + STD_FLOOR
    b, d, e = (2 / 3) / unit, (-1 / 3) / unit, (-1 / 3) / unit
    a = (b + e) / 2
    assert found == pytest.approx([2 * a, b + (b - a), 2 * d, d, e + (e - a)])


def chains(rewards: list[float]) -> TreeArrays:
    """Chains of two turns from one prompt."""
    parents, values, leaves = [], [], []
    for number, reward in enumerate(rewards):
        parents += [-1, 2 * number]
        values += [0.0, reward]
        leaves += [False, True]
    return arrays_of(parents, values, leaves)


def arrays_of(parents: list[int], rewards: list[float], leaves: list[bool]) -> TreeArrays:
    return TreeArrays(
        parent=np.array(parents),
        is_leaf=np.array(leaves),
        reward=np.array(rewards),
        entropy=np.linspace(0.1, 0.9, len(parents)),
        num_action_tokens=np.full(len(parents), 3),
    )


# --- the list -----------------------------------------------------------------------------------------------------


def test_the_list_goes_between_its_marks_and_nowhere_else() -> None:
    page = f"above\n{recipes_list.BEGIN}\nold\n{recipes_list.END}\nbelow\n"
    text = f"{recipes_list.BEGIN}\nnew\n{recipes_list.END}"
    assert recipes_list.put(page, text) == f"above\n{text}\nbelow\n"
    assert recipes_list.put(recipes_list.put(page, text), text) == f"above\n{text}\nbelow\n"
    with pytest.raises(SetupError, match="between which the list goes"):
        recipes_list.put("a page without marks", text)


def test_every_recipe_gets_as_many_rollouts_of_a_demo_task_and_trees_a_batch() -> None:
    for path in RECIPES:
        scale = path.parent / "demo_scale" / path.name
        found = load([DEMO, path, *([scale] if scale.is_file() else [])])
        assert (found.max_leaves, found.staleness.trees_per_batch) == (9, 12), path.stem


# --- tasks that pay turns -----------------------------------------------------------------------------------------


def paid_chains(*chains: tuple[list[float], float]) -> TreeArrays:
    """Chains, each of what its turns were paid and its leaf's reward."""
    parents: list[int] = []
    leaf, reward, paid = [], [], []
    for turns, outcome in chains:
        for place, turn in enumerate(turns):
            parents.append(len(parents) - 1 if place else -1)
            last = place == len(turns) - 1
            leaf.append(last)
            reward.append(outcome if last else 0.0)
            paid.append(turn)
    return TreeArrays(
        parent=np.array(parents), is_leaf=np.array(leaf), reward=np.array(reward),
        entropy=np.full(len(parents), 0.5), num_action_tokens=np.full(len(parents), 3), turn_reward=np.array(paid),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dr_bot", "dr_grpo", "spear"])
def test_a_chain_has_one_advantage_whatever_its_turns_were_paid(name: str) -> None:
    rule = credit_rule(recipe(name).credit)
    tools = [0.1, 0.1, 0.1, 0.1, 0.0]
    found = rule.credit(paid_chains((tools, 1.0), (tools, 0.0))).advantages
    np.testing.assert_allclose(found, [0.5] * 5 + [-0.5] * 5, atol=1e-12)
    more = rule.credit(paid_chains((tools, 1.0), ([0.0, 0.0], 0.0))).advantages
    np.testing.assert_allclose(more, [0.7] * 5 + [-0.7] * 2, atol=1e-12)  # outcome and what the calls earned


def test_a_right_chain_has_the_whole_of_posterior_grpos_advantage_in_each_turn() -> None:
    rule = credit_rule(recipe("posterior_grpo").credit)
    found = rule.credit(paid_chains(([0.5, 0.5, 0.0], 1.0), ([0.5], 0.0))).advantages
    np.testing.assert_allclose(found, [1.0, 1.0, 1.0, -1.0], atol=2e-6)
