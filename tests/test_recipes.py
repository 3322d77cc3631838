"""The recipes as they stand in configs/recipes/, and the table that compares them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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
from atpo_async.run.metrics import MetricsWriter
from atpo_async.run.rundir import RunDir
from scripts import recipes_table

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "configs" / "demo.toml"
BIG = ROOT / "configs" / "gpu_8x80gb.toml"
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.toml"))
SCALES = sorted((ROOT / "configs" / "recipes" / "demo_scale").glob("*.toml"))

by_name = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def recipe(name: str, base: Path = DEMO) -> Config:
    return load([base, ROOT / "configs" / "recipes" / f"{name}.toml"])


# --- the files ----------------------------------------------------------------------------------------------------


def test_the_recipes_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert {path.stem for path in RECIPES} >= set(recipes_table.ORDER)
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
    assert path.stem == "at2po_paper" or own <= {*algorithm(), "search.initial_rollouts"}


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
        assert left <= {"search.initial_rollouts"}


def test_the_six_recipes_mean_over_a_task_file_what_they_set_and_it_has() -> None:
    """They name every field of the algorithm that the task files set."""
    for base in (DEMO, BIG):
        for name in recipes_table.ORDER:
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
    assert recipes_table.overview() in page, "run: python scripts/recipes_table.py --list"


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


# --- the table ----------------------------------------------------------------------------------------------------

STEPS = 6


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the table's runs lie; the project is the working folder, as for the script."""
    monkeypatch.chdir(ROOT)
    return tmp_path / "runs"


def planned(folder: Path, names: list[str], seeds: list[int], **options: str) -> list[Any]:
    found: list[Any] = recipes_table.plan(names, seeds, folder, {"run.steps": str(STEPS), **options})
    return found


def pretend(run: Any, success: list[float], *, greedy: float | None = 1.0, done: bool = True) -> None:
    """What a run of these settings leaves behind."""
    rundir = RunDir.create(run.config)
    with MetricsWriter(rundir.metrics_path, source="buffer") as buffer:
        buffer.write(step=0, version=0, metrics={"time/first_lease": 2_000_000_100.0}, time_s=2_000_000_100.0)
    with MetricsWriter(rundir.metrics_path, source="learner") as learner:
        learner.write(step=0, version=0, metrics={"eval/success": 0.25}, time_s=2_000_000_090.0)
        for step, value in enumerate(success, 1):
            metrics = {"train/success": value, "tokens/trained": 1000.0 + step}
            if step == 2:
                # A learner that began again does a step twice; the first time does not count.
                learner.write(
                    step=step, version=step, metrics={**metrics, "train/success": 1.0}, time_s=2_000_000_115.0
                )
            learner.write(step=step, version=step, metrics=metrics, time_s=2_000_000_100.0 + 10 * step)
        if greedy is not None:
            learner.write(step=len(success), version=9, metrics={"eval/success": greedy}, time_s=2_000_000_200.0)
    if done:
        (rundir.checkpoints / f"step-{STEPS:06d}-v{STEPS:06d}").mkdir()
        (rundir.path / "model").mkdir()


def test_the_plan_has_every_recipe_with_its_scale_and_its_own_folder(folder: Path) -> None:
    runs = planned(folder, recipes_table.recipes(), [1, 2], **{"learner.weight_decay": "0.5"})
    assert [run.recipe for run in runs] == [*recipes_table.recipes(), *recipes_table.recipes()]
    assert runs[0].recipe == recipes_table.ORDER[0]
    assert len({run.path for run in runs}) == len(runs)
    for run in runs:
        assert (run.config.run.seed, run.config.run.steps, run.config.learner.weight_decay) == (run.seed, STEPS, 0.5)
        assert run.config.max_leaves == 9, "all recipes get as many rollouts of a task"
        assert run.config.staleness.trees_per_batch == 12
        assert run.arguments[:2] == ("configs/demo.toml", f"configs/recipes/{run.recipe}.toml")


def test_an_unknown_recipe_is_named_with_those_there_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes_table.main(["--recipes", "ppo", "--dir", str(folder)]) == 2
    assert capsys.readouterr().err.startswith(
        "error: --recipes ppo: unknown recipe; there are at2po, at2po_paper, grpo"
    )
    assert recipes_table.main(["--learner.lrr", "1", "--dir", str(folder)]) == 2
    assert "unknown option" in capsys.readouterr().err
    assert not folder.exists()


def test_what_a_run_came_to_is_read_from_its_own_metrics(folder: Path) -> None:
    (run,) = planned(folder, ["grpo"], [1])
    pretend(run, [0.2, 0.5, 0.85, 0.95, 0.92, 0.96], greedy=0.995)
    found = recipes_table.outcome(run)
    assert (found.leaves, found.greedy, found.goal_step, found.goal_s) == (9, 0.995, 5, 50.0)
    assert found.goal_tokens == 1001 + 1002 + 1003 + 1004 + 1005
    assert found.sampled == pytest.approx((0.95 + 0.92 + 0.96) / 3)


def test_what_was_not_reached_or_not_measured_is_no_number(folder: Path) -> None:
    (run,) = planned(folder, ["gspo"], [1])
    pretend(run, [0.2] * STEPS, greedy=None)
    found = recipes_table.outcome(run)
    assert (found.greedy, found.goal_step, found.goal_tokens, found.goal_s) == (None, None, None, None)
    assert recipes_table.described(found) == "greedy –; 0.9 sampled success not reached"


def test_the_table_has_a_row_a_recipe_with_each_seed_and_the_mean(folder: Path) -> None:
    of_recipe = {name: planned(folder, [name], [1, 2]) for name in ("at2po", "gspo")}
    pretend(of_recipe["at2po"][0], [0.2, 0.5, 0.9, 0.9, 0.9, 0.9], greedy=0.99)
    pretend(of_recipe["at2po"][1], [0.9] * STEPS, greedy=1.0)
    pretend(of_recipe["gspo"][0], [0.1] * STEPS, greedy=0.5)
    pretend(of_recipe["gspo"][1], [0.9] * STEPS, greedy=1.0)
    outcomes = {name: [recipes_table.outcome(run) for run in runs] for name, runs in of_recipe.items()}
    lines = recipes_table.table(outcomes, [1, 2]).splitlines()
    assert lines[0] == "Where a cell has several numbers: seed 1 · seed 2 · **mean**."
    assert lines[-2] == (
        "| [at2po](../configs/recipes/at2po.toml) | 9 | 1 | 2 | 0.990 · 1.000 · **0.995** | 0.90 · 0.90 · **0.90** "
        "| 5 · 3 · **4** | 5,015 · 3,006 · **4,010** | 50 · 30 · **40** |"
    )
    assert lines[-1] == (
        "| [gspo](../configs/recipes/gspo.toml) | 9 | 4 | 2 | 0.500 · 1.000 · **0.750** | 0.10 · 0.90 · **0.50** "
        "| not reached · 3 · – | not reached · 3,006 · – | not reached · 30 · – |"
    )


def test_a_run_that_is_done_is_not_run_again_and_one_broken_off_begins_anew(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done, broken = planned(folder, ["at2po", "grpo"], [1])
    pretend(done, [0.9] * STEPS)
    pretend(broken, [0.1, 0.1], greedy=None, done=False)
    assert recipes_table.is_done(done)
    assert not recipes_table.is_done(broken)
    ran = []

    def start(run: Any, log: Any) -> Any:
        assert not run.path.exists(), "its clock has a gap: it begins anew"
        ran.append(str(run))
        pretend(run, [0.9] * STEPS)
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(recipes_table, "start", start)
    monkeypatch.setattr(recipes_table, "make_policies", lambda runs: None)
    monkeypatch.setattr(recipes_table, "LOOK_S", 0.01)
    words = ["--recipes", "at2po", "grpo", "at2po", "--seeds", "1", "1", "--dir", str(folder), "--no-docs"]
    assert recipes_table.main([*words, f"--run.steps={STEPS}"]) == 0
    assert ran == ["grpo, seed 1"]
    out = capsys.readouterr().out
    assert "at2po, seed 1: done before; greedy 1.000; 0.9 sampled success at step 3, 30 s" in out
    assert "- grpo: `search.initial_rollouts = 9`" in out
    assert "6 steps each, one run at a time." in out


def test_a_run_of_other_settings_is_refused_and_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = planned(folder, ["grpo"], [1])
    pretend(run, [0.9] * STEPS)
    words = ["--recipes", "grpo", "--seeds", "1", "--dir", str(folder), "--no-docs", f"--run.steps={STEPS}"]
    assert recipes_table.main([*words, "--objective.kl_coef=0"]) == 2
    assert "objective.kl_coef was 0.04, is 0.0): remove it, or name another --dir" in capsys.readouterr().err
    assert recipes_table.is_done(run)


def test_a_run_still_under_way_is_left_alone(folder: Path) -> None:
    (run,) = planned(folder, ["grpo"], [1])
    with RunDir.held(run.config), pytest.raises(SetupError, match=f"is in use by process {os.getpid()}"):
        recipes_table.clear(run)
    recipes_table.clear(run)
    assert not run.path.exists()


def test_a_run_that_fails_is_reported_in_its_last_line_and_makes_no_table(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(run: Any, log: Any) -> Any:
        code = "import sys; print('making ready'); print('error: out of paper'); sys.exit(2)"
        return subprocess.Popen([sys.executable, "-c", code], stdout=log)

    monkeypatch.setattr(recipes_table, "start", start)
    monkeypatch.setattr(recipes_table, "make_policies", lambda runs: None)
    monkeypatch.setattr(recipes_table, "LOOK_S", 0.01)
    before = (ROOT / "docs" / "recipes.md").read_bytes()
    assert recipes_table.main(["--recipes", "grpo", "--seeds", "1", "--dir", str(folder), "--jobs", "2"]) == 1
    assert "no table: grpo, seed 1: error: out of paper  (exit code 2; log: " in capsys.readouterr().err
    assert (ROOT / "docs" / "recipes.md").read_bytes() == before


def test_the_table_goes_between_its_markers_and_nowhere_else() -> None:
    page = f"above\n{recipes_table.BEGIN}\nold\n{recipes_table.END}\nbelow\n"
    text = f"{recipes_table.BEGIN}\nnew\n{recipes_table.END}"
    assert recipes_table.put(page, text) == f"above\n{text}\nbelow\n"
    assert recipes_table.put(recipes_table.put(page, text), text) == f"above\n{text}\nbelow\n"
    with pytest.raises(SetupError, match="between which the table goes"):
        recipes_table.put("a page without markers", text)
    assert recipes_table.put((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), text)
