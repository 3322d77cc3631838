"""The grid of a study: axes of any kind, what each of their values sets, what is refused, and the first stage."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atpo_async.cli.study import reproducing
from atpo_async.config import load, to_toml
from atpo_async.core.errors import ConfigError, RunMismatch, SetupError
from atpo_async.study.cells import CellResult, from_json, to_json
from atpo_async.study.folder import StudyFolder
from atpo_async.study.grid.axes import canonical, parse_axis, recipes
from atpo_async.study.grid.choosing import choices
from atpo_async.study.grid.corrections import CORRECTIONS
from atpo_async.study.grid.making import Wanted, make_plan
from atpo_async.study.grid.misleading import misleading_parts
from atpo_async.study.grid.names import slug
from atpo_async.study.grid.overriding import overridden
from atpo_async.study.grid.presets import PRESETS
from atpo_async.study.plan import Plan
from tests.study_support import DEMO, ROOT, cell, done, failed, plan_of

RUNS = Path("runs")


def of_demo(*axes: str, **more: object) -> Plan:
    return plan_of(axes=axes, name="mine", files=[DEMO], **more)  # type: ignore[arg-type]


# --- what values set ----------------------------------------------------------------------------------------------


def test_every_cell_of_every_named_correction_is_a_run_that_a_configuration_allows() -> None:
    plan = plan_of(lags="5,0,2", corrections=",".join(CORRECTIONS))
    cells = plan.cells()
    assert plan.axes[0].values == ("0", "2", "5")
    assert plan.seeds == (1, 2)
    assert len(cells) == len({each.name for each in cells}) == 3 * len(CORRECTIONS) * 2
    for each in cells:
        config = plan.config(each, runs=Path("somewhere"))
        assert (config.run.name, config.run.seed, config.run.dir) == (each.name, each.seed, Path("somewhere"))
        assert (config.staleness.exact_lag, config.staleness.max_lag) == (each.lag, each.lag)
        assert config.correction.ess_floor == 0
        assert config.supervisor.max_restarts == 0


def test_the_names_of_corrections_mean_what_they_say() -> None:
    plan = plan_of(lags="4", corrections="none,token,turn,turn+ess,clip-keep", seeds=1)
    found = {dict(each.at)["correction"]: plan.config(each, runs=RUNS) for each in plan.cells()}
    correction = {name: config.correction for name, config in found.items()}
    assert correction["none"].action == "none"
    assert correction["none"].accept_bias
    assert (correction["token"].action, correction["token"].level) == ("truncate", "token")
    assert (correction["turn"].action, correction["turn"].level, correction["turn"].exponent) == (
        "truncate", "turn", "fixed",
    )  # fmt: skip
    assert (correction["turn+ess"].level, correction["turn+ess"].exponent) == ("turn", "ess")
    assert not any(correction[name].accept_bias for name in ("token", "turn", "turn+ess"))
    assert found["clip-keep"].objective.surrogate == "clip-keep"
    assert {found[name].objective.surrogate for name in ("none", "turn")} == {"clip"}


def test_every_lag_grows_as_many_batches_whose_success_counts() -> None:
    plan = plan_of(lags="0,3,5")
    assert [plan.config(each, runs=RUNS).run.steps for each in plan.cells()[::2][:3]] == [6, 9, 11]


def test_the_whole_grid_comes_once_before_a_second_seed() -> None:
    assert [each.seed for each in plan_of().cells()] == [1] * 4 + [2] * 4
    assert [each.name for each in plan_of().cells()[:3]] == ["lag0-none-seed1", "lag0-turn-seed1", "lag4-none-seed1"]


def test_any_field_is_an_axis_and_cells_without_lags_are_ordinary_runs() -> None:
    plan = of_demo("learner.lr=4e-4,2e-4", "staleness.max_lag=0,8", "search.strategy=none,random")
    assert [axis.values for axis in plan.axes] == [("0.0002", "0.0004"), ("0", "8"), ("none", "random")]
    found = [plan.config(each, runs=RUNS) for each in plan.cells()[: plan.num_groups]]
    assert {(c.learner.lr, c.staleness.max_lag, c.search.strategy) for c in found} == {
        (lr, lag, name) for lr in (2e-4, 4e-4) for lag in (0, 8) for name in ("none", "random")
    }
    assert {(c.staleness.exact_lag, c.run.steps, c.learner.schedule) for c in found} == {(None, 6, "linear")}
    assert plan.cells()[0].name == "learner.lr-0.0002-staleness.max_lag-0-search.strategy-none-seed1"


def test_a_recipe_sets_the_algorithm_with_what_the_demos_scale_asks_for_and_options_go_over_it() -> None:
    plan = of_demo("recipe=at2po,grpo,gspo", options={"objective.kl_coef": "0.5"})
    at2po, grpo, gspo = (plan.config(each, runs=RUNS) for each in plan.cells()[:3])
    assert (grpo.search.strategy, grpo.search.initial_rollouts) == ("none", 9)  # the recipe, and its demo_scale
    assert grpo.objective.kl_coef == gspo.objective.kl_coef == at2po.objective.kl_coef == 0.5
    assert gspo.objective.ratio_level == "sequence"
    files = [DEMO, *(ROOT / "configs" / "recipes" / name for name in ("grpo.toml", "demo_scale/grpo.toml"))]
    same = load(files, {"run.steps": "6", "objective.kl_coef": "0.5"})
    assert (same.search, same.objective, same.credit, same.correction) == (
        grpo.search, grpo.objective, grpo.credit, grpo.correction,
    )  # fmt: skip


def test_a_recipe_by_its_path_and_on_another_task_has_no_demo_scale(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text('[recipe]\nname = "mine"\n[credit]\nvalue_mode = "leaf_mean"\n')
    plan = of_demo(f"recipe={own},at2po")
    assert [each.at[0][1] for each in plan.cells()[:2]] == ["mine", "at2po"]
    assert plan.config(plan.cells()[0], runs=RUNS).credit.value_mode == "leaf_mean"
    other = tmp_path / "task.toml"
    other.write_text(to_toml(load(DEMO)))
    plan = plan_of(axes=["recipe=grpo,at2po"], files=[other])
    assert plan.config(plan.cells()[0], runs=RUNS).search.initial_rollouts == 16


def test_layers_go_over_the_files_and_under_the_recipe_and_tasks_below_all(tmp_path: Path) -> None:
    layer = tmp_path / "layer.toml"
    layer.write_text('[learner]\nlr = 1e-5\n[credit]\nvalue_mode = "leaf_mean"\n')
    plan = plan_of(axes=["task=demo,demo_agent", f"config={layer}", "recipe=grpo"], files=[], options={})
    demo, agent = (plan.config(each, runs=RUNS) for each in plan.cells()[:2])
    assert (demo.environment.name, agent.environment.name) == ("hopqa", "passage_qa")
    assert (demo.learner.lr, demo.credit.value_mode) == (
        1e-5,
        load(ROOT / "configs/recipes/grpo.toml").credit.value_mode,
    )
    assert not any(axis.is_compared for axis in plan.axes if axis.name == "task")


def test_all_recipes_are_those_for_any_task() -> None:
    preset = PRESETS["methods"]
    axes = [f"{name}={listed}" for name, listed in preset.axes.items()]
    plan = make_plan(Wanted(name="methods", axes=axes, options=preset.options), root=ROOT)
    assert set(recipes(ROOT)) - set(plan.axes[0].values) == {"rhombus", "rlpt"}
    assert {"at2po", "grpo", "dapo", "gspo", "tree_grpo"} <= set(plan.axes[0].values)
    assert plan.axes[0].against == "at2po"
    assert {plan.config(each, runs=RUNS).actor.engine for each in plan.cells()[:4]} == {"transformers"}


@pytest.mark.parametrize(
    ("word", "text"),
    [("3e-4", "0.0003"), ("0.0003", "0.0003"), ("1e-6", "1e-06"), ("12", "12"), ("true", "true"), ("None", "none"),
     ("[1, 2]", "[1, 2]"), ('["a","b"]', '["a", "b"]'), ("child_mean", "child_mean")],
)  # fmt: skip
def test_a_value_has_one_text(word: str, text: str) -> None:
    assert canonical(word) == text


@given(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60))
def test_the_folder_of_a_value_is_its_own_and_a_name_that_a_run_may_have(first: str, second: str) -> None:
    names = [slug("learner.lr", value) for value in (first, second)]
    assert (names[0] == names[1]) == (first == second)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) for name in names)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ([], "a study takes an axis at least"),
        (["learner.lr"], "--axis learner.lr: an axis is NAME=VALUE,VALUE"),
        (["learner.lrr=1"], "--axis learner.lrr: unknown option; did you mean --learner.lr?"),
        (["rate=1,2"], "--axis rate is no axis; an axis is a field of the configuration"),
        (["learner.lr=1e-4,,2e-4"], "there is no value between two commas"),
        (["learner.lr="], "there is no value at all"),
        (["learner.lr=2e-4,0.0002"], "0.0002 is given twice"),
        (["learner.lr=1e-4", "learner.lr=2e-4"], "--axis learner.lr is given twice"),
        (["learner.lr=0,1e-4"], "--axis learner.lr=0: cell learner.lr 0, seed 1: learner.lr must be > 0"),
        (["learner.minibatches=1,two"], "--axis learner.minibatches=two: cell"),
        (["search.strategy=entropy,random", "learner.lr=0,1e-4"], "--axis learner.lr=0: cell"),
        (["learner.betas=[0.9, 0.9"], "a bracket or quote has no partner"),
        (["lag=0,two"], "--axis lag=two: 'two' is no lag"),
        (["lag=-1"], "'-1' is no lag"),
        (["correction=turn,tokens"], f"'tokens' is unknown; known: {', '.join(CORRECTIONS)}"),
        (["recipe=grpo,ppo"], "--axis recipe=ppo: 'ppo' is unknown; there are at2po"),
        (["config=nowhere.toml"], "there is no file nowhere.toml here"),
        (["config=demo"], "'demo' is no file; name a TOML file"),
        (["run.seed=1,2"], "--axis run.seed: a study sets that itself; use --seeds"),
        (["staleness.exact_lag=1,2"], "use --axis lag="),
        (["lag=0,1", "staleness.max_lag=0,1"], "both set staleness.max_lag; take one of the two out"),
        (["correction=none,turn", "correction.cap=1,2"], "both set correction.cap; take one of the two out"),
        (["lag=0,6"], "cell lag 6, seed 1: lag 6 with run.steps = 6 would never be reached"),
        (["environment.options=1"], "--axis environment.options=1: cell"),
        (["recipe=all,grpo"], "--axis recipe=all,grpo: all stands for every recipe"),
    ],
)
def test_an_axis_that_makes_no_grid_is_refused_with_its_name_and_value(axes: Sequence[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        plan_of(axes=axes)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"seeds": 0}, "--seeds must be >= 1, got 0"),
        ({"seeds": 1001}, "--seeds 1001: a study has at most 1000"),
        ({"options": {"run.seed": str(2**31 - 5)}}, "seeds are below 2147483648"),
        ({"options": {"correction.level": "token"}}, "--correction.level: the grid of the study sets it"),
        ({"options": {"staleness.max_lag": "2"}}, "the grid of the study sets it; use --axis lag="),
        (
            {"axes": ["lag=0,1"], "options": {"run.steps": "2"}},
            "run.steps = 2: a cell's success is the mean of its last 3",
        ),
        (
            {"axes": ["learner.lr=1e-4,2e-4"], "options": {"run.steps": "4"}},
            "run.steps = 4 with staleness.max_lag = 2: a cell's success is the mean of 3 steps, and the last 2",
        ),
        ({"axes": ["learner.lr=1e-4,2e-4"], "options": {"run.steps": "2"}}, "use at least --run.steps 5"),
        ({"options": {"run.name": "x"}}, "the grid of the study sets it; use --out"),
        ({"options": {"learner.schedule": "linear"}}, "use --learner.schedule constant"),
        (
            {"options": {"staleness.max_uses": "2"}},
            "--axis lag=0: cell lag 0, none, seed 1: staleness.max_lag = 0 cannot hold",
        ),
        ({"against": ["correction=token"]}, "--against correction=token: 'token' is none of the values of correction"),
        ({"against": ["recipe=at2po"]}, "--against recipe=at2po: name an axis of the grid"),
        ({"choose_by": "correction"}, "name it with --choose FIELD=VALUE,VALUE"),
        ({"choose": "learner.lr=1e-4,2e-4"}, "--choose-by lag or correction, or --choose-by all"),
        ({"choose": "learner.lr=1e-4", "choose_by": "all"}, "a choice takes two different candidates at least"),
        ({"choose": "learner.lr=1e-4,0", "choose_by": "all"}, "learner.lr must be > 0"),
        ({"choose": "learner.lr", "choose_by": "all"}, "--choose learner.lr: name a field and its candidates"),
        ({"choose": "learner.lrr=1,2", "choose_by": "all"}, "--choose learner.lrr: unknown option; did you mean"),
        ({"choose": "run.seed=1,2", "choose_by": "all"}, "--choose run.seed: a study sets that itself; use --seeds"),
        ({"choose": "learner.lr=1e-4,x", "choose_by": "all"}, "--choose learner.lr=x: cell choose: lag 0, none, learn"),
        (
            {"axes": ["learner.epochs=1,x"], "choose": "learner.lr=1e-4,2e-4", "choose_by": "all"},
            "--axis learner.epochs=x: cell",
        ),
        ({"choose": "learner.lr=1e-4,2e-4", "choose_by": "recipe"}, "--choose-by recipe: the grid has no such axis"),
        (
            {"choose": "learner.lr=1e-4,2e-4", "choose_by": "correction", "choose_at": ["lag=2"]},
            "--choose-at lag=2: '2' is none of the grid's lag: 0, 4",
        ),
        (
            {"choose": "learner.lr=1e-4,2e-4", "choose_by": "lag", "choose_at": ["lag=0"]},
            "--choose-at lag: a value is chosen for every lag",
        ),
        (
            {"choose": "learner.lr=1e-4,2e-4", "choose_by": "all", "options": {"learner.lr": "1e-4"}},
            "--learner.lr: the grid of the study sets it; use --choose learner.lr=",
        ),
        ({"choose": "learner.lr=1e-4,2e-4", "choose_by": "all", "choose_seeds": 0}, "--choose-seeds must be >= 1"),
        ({"choose_seeds": 3}, "--choose-seeds say how a value is chosen: name it with --choose FIELD=VALUE,VALUE"),
    ],
)
def test_what_contradicts_the_grid_is_refused_with_the_way_out(more: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        plan_of(**more)  # type: ignore[arg-type]


def test_an_exact_lag_that_is_no_axis_and_cells_that_are_one_run_are_refused(tmp_path: Path) -> None:
    exact = tmp_path / "exact.toml"
    exact.write_text('[staleness]\nexact_lag = 2\n[learner]\nschedule = "constant"\n')
    with pytest.raises(ConfigError, match=r"staleness\.exact_lag = 2 grows no trees in the last"):
        plan_of(axes=["learner.lr=1e-4,2e-4"], files=[DEMO, exact])
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text("[learner]\nlr = 1e-4\n")
    with pytest.raises(ConfigError, match="cell b, seed 1 would be the same run as cell a, seed 1"):
        of_demo(f"config={tmp_path / 'a.toml'},{tmp_path / 'b.toml'}")
    with pytest.raises(ConfigError, match="'a' is there twice"):
        of_demo(f"config={tmp_path / 'a.toml'},{tmp_path / 'a.toml'}")
    with pytest.raises(ConfigError, match=r"same run .*: model\.warm_start = true makes .* --model\.warm_start false"):
        of_demo("model.path=one,two")


# --- settings, and going on ---------------------------------------------------------------------------------------


def test_what_bears_on_a_cell_is_in_its_settings_and_where_it_lies_is_not() -> None:
    one = cell(lag=4, correction="turn")
    settings = plan_of().settings(one)
    assert settings == plan_of(lags="4,5", corrections="turn", seeds=5).settings(one)
    assert settings["staleness.exact_lag"] == 4
    assert settings["run.seed"] == 1
    assert not {"run.dir", "run.name", "model.path"} & set(settings)
    assert settings != plan_of().settings(replace(one, seed=2))
    other = plan_of(lags="4", corrections="turn", options={"learner.lr": "0.5"}).settings(one)
    assert {name for name in settings if settings[name] != other[name]} == {"learner.lr"}


def test_a_folder_of_any_axes_is_read_back_whole_and_goes_on_with_more_values(tmp_path: Path) -> None:
    axes = ["recipe=at2po,grpo", "learner.lr=2e-4,4e-4"]
    plan, folder = of_demo(*axes), StudyFolder(tmp_path / "s")
    with folder.held(plan):
        folder.write_result(plan, done(plan.cells()[0]))
    found = folder.plan()
    assert (found.axes, found.seeds, found.cells()) == (plan.axes, plan.seeds, plan.cells())
    assert list(folder.results(found)) == [plan.cells()[0]]
    grown = of_demo("recipe=at2po,grpo,gspo", "learner.lr=2e-4,3e-4,4e-4", seeds=3)
    folder.check(grown)
    assert list(folder.results(grown)) == [plan.cells()[0]]
    part = folder.plan(axes={"learner.lr": "4e-4", "recipe": "grpo"}, seeds=1)
    assert [each.name for each in part.cells()] == ["grpo-learner.lr-0.0004-seed1"]
    for other, words in (
        (of_demo("recipe=at2po", axes[1]), "--axis recipe had at2po,grpo, has at2po"),
        (of_demo(axes[1], axes[0]), "its axes were recipe,learner.lr, are learner.lr,recipe"),
        (of_demo(*axes, options={"objective.kl_coef": "0.5"}), "objective.kl_coef was "),
        (
            of_demo(*axes, options={"learner.max_grad_norm": "2"}),
            "settings: learner.max_grad_norm was 0.2, is 2.0.  Use",
        ),
        (of_demo(*axes, by_tokens=True), "success was compared by steps, and is by the other now"),
        (replace(plan, name="other"), "its name was 'mine', is 'other'"),
        (
            plan_of(axes=axes, name="mine", files=[DEMO], choose="learner.max_grad_norm=1,2", choose_by="all"),
            "its first stage was none, is --choose learner.max_grad_norm=1,2",
        ),
    ):
        with pytest.raises(RunMismatch, match=re.escape(words)):
            folder.check(other)


def test_a_recipe_file_that_has_changed_is_named(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text("[learner]\nlr = 1e-4\n")
    plan, folder = of_demo(f"config={own}"), StudyFolder(tmp_path / "s")
    with folder.held(plan):
        pass
    own.write_text("[learner]\nlr = 2e-4\n")
    with pytest.raises(RunMismatch, match="the file of config mine has changed"):
        folder.check(of_demo(f"config={own}"))


def test_a_folder_of_the_program_that_had_lags_and_corrections_only_goes_on(tmp_path: Path) -> None:
    plan, folder = plan_of(), StudyFolder(tmp_path / "s")
    one = plan.cells()[2]
    with folder.held(plan):
        folder.write_result(plan, done(one))
    record = json.loads((folder.path / "study.json").read_text())
    old = {
        "kind": "staleness", "lags": [0, 4], "corrections": ["none", "turn"], "seeds": [1, 2], "words": [],
        "base": record["base"],
    }  # fmt: skip
    (folder.path / "study.json").write_text(json.dumps(old))
    marker = json.loads(folder.marker(one).read_text())
    del marker["axes"]
    folder.marker(one).write_text(json.dumps(marker | {"lag": 4, "correction": "none"}))
    assert folder.plan().cells() == plan.cells()
    assert list(folder.results(folder.plan())) == [one]
    with folder.held(plan_of(lags="0,2,4")):
        assert list(folder.results(plan)) == [one]
    assert folder.plan().axes[0].values == ("0", "2", "4")


def test_a_record_that_is_no_record_is_named(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "s")
    with folder.held(plan_of()):
        pass
    for text in ("{", "[]", '{"kind": "x", "seeds": [], "axes": [], "base": {}}', '{"kind": "x"}'):
        (folder.path / "study.json").write_text(text)
        with pytest.raises(SetupError, match=r"study\.json is damaged"):
            folder.plan()


def test_a_result_is_read_as_it_was_written() -> None:
    of = cell(seed=3, lag=8, correction="turn+ess")
    result = CellResult(cell=of, status="done", figures={"sampled": 0.5}, curve=[(1, 0.5)], tokens=[70.0])
    assert from_json(json.loads(json.dumps(to_json(result)))) == result
    staged = replace(result, cell=replace(of, stage="choose"))
    assert from_json(json.loads(json.dumps(to_json(staged)))) == staged


# --- the first stage ----------------------------------------------------------------------------------------------

CHOOSE: dict[str, object] = {
    "choose": "learner.lr=1e-4,3e-4,9e-4", "choose_by": "correction", "choose_at": ["lag=4"], "choose_seeds": 2,
}  # fmt: skip


def test_the_first_stage_has_seeds_that_no_result_ever_has() -> None:
    plan = plan_of(**CHOOSE)  # type: ignore[arg-type]
    first = plan.first_stage()
    assert len(first) == 2 * 3 * 2
    assert not {each.seed for each in first} & set(range(1, 1001))
    assert first[0].name == "choose-lag4-none-learner.lr-0.0001-seed1001"
    assert first[0].label == "choose: lag 4, none, learner.lr 0.0001, seed 1001"
    found = plan.config(first[1], runs=RUNS)
    assert (found.learner.lr, found.staleness.exact_lag, found.run.seed) == (3e-4, 4, 1001)
    assert {each.stage for each in plan.cells()} == {""}


def test_the_highest_mean_is_chosen_for_each_value_and_a_failure_counts_as_nothing() -> None:
    plan = plan_of(**CHOOSE)  # type: ignore[arg-type]
    assert plan.choosing is not None
    areas = {("none", "0.0001"): 0.5, ("none", "0.0003"): 0.6, ("none", "0.0009"): 0.9, ("turn", "0.0009"): 0.7}
    results = []
    for each in plan.first_stage():
        at = dict(each.at)
        area = areas.get((at["correction"], at["learner.lr"]), 0.6)
        breaks = at["correction"] == "none" and at["learner.lr"] == "0.0009" and each.seed == 1001
        results.append(failed(each) if breaks else done(each, area=area))
    found = choices(plan.choosing, plan.axes, results)
    assert {of: choice.value for of, choice in found.items()} == {"none": "0.0003", "turn": "0.0009"}
    assert found["none"].means == pytest.approx({"0.0001": 0.5, "0.0003": 0.6, "0.0009": 0.45})
    assert found["none"].num_failed["0.0009"] == 1
    assert (found["none"].edge, found["turn"].edge) == ("", "highest")
    second = plan.with_chosen({of: choice.value for of, choice in found.items()})
    rates = {dict(each.at)["correction"]: second.config(each, runs=RUNS).learner.lr for each in second.cells()}
    assert rates == {"none": 3e-4, "turn": 9e-4}


def test_nothing_is_chosen_before_all_cells_of_a_value_have_ended(tmp_path: Path) -> None:
    plan, folder = plan_of(**CHOOSE), StudyFolder(tmp_path / "s")  # type: ignore[arg-type]
    with folder.held(plan):
        for each in plan.first_stage()[:-1]:
            folder.write_result(plan, done(each, area=0.5))
    assert {of: choice.value for of, choice in folder.choices(plan).items()} == {"none": "0.0001"}
    assert folder.plan().chosen == {"none": "0.0001"}
    assert folder.plan().choosing == plan.choosing


def test_the_command_that_makes_a_study_again_makes_the_same_plan() -> None:
    plan = plan_of(**CHOOSE, against=["correction=turn"])  # type: ignore[arg-type]
    assert reproducing(plan) == (
        "atpo study staleness --lags 0,4 --corrections none,turn --seeds 2 --against correction=turn --choose "
        "learner.lr=0.0001,0.0003,0.0009 --choose-seeds 2 --choose-by correction --choose-at lag=4"
    )
    assert parse_axis("learner.lr=2e-4", root=ROOT).text == "learner.lr=0.0002"
    mine = of_demo("recipe=at2po,grpo", by_tokens=True, arguments=["a.toml"])
    assert reproducing(mine) == "atpo study mine a.toml --axis recipe=at2po,grpo --seeds 2 --by tokens"


def test_a_file_is_named_by_its_path_wherever_its_value_is(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[recipe]\nname = "mine"\nsource = "here"\n')
    axes = [f"recipe=grpo,{mine}", "learner.max_grad_norm=1,2"]
    plan = plan_of(
        axes=axes, files=[DEMO], against=[f"recipe={mine}"], choose="learner.lr=1e-4,2e-4",
        choose_by="learner.max_grad_norm", choose_at=[f"recipe={mine}"],
    )  # fmt: skip
    assert plan.axes[0].against == "mine"
    assert {dict(cell.at)["recipe"] for cell in plan.first_stage()} == {"mine"}
    folder = StudyFolder(tmp_path / "s")
    with folder.held(plan):
        part = folder.plan(axes={"recipe": str(mine), "learner.max_grad_norm": "1.0"})
    assert [axis.values for axis in part.axes] == [("mine",), ("1",)]


def test_what_an_option_of_the_grid_takes_from_recipes_is_said(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    about = '[recipe]\nname = "mine"\nsource = "here"\n'
    mine.write_text(f'{about}[learner.lora]\nrank = 4\n[correction]\nlevel = "token"\n')
    other = tmp_path / "other.toml"
    other.write_text(f"{about}[learner]\nlr = 1e-4\n")
    recipes = f"recipe={mine},{other}"
    assert overridden(plan_of(axes=[recipes, "correction=none,turn"], files=[DEMO])) == [
        "--axis correction= goes over what 1 of 2 values of recipe set: correction.level"
    ]
    both = plan_of(axes=[recipes, "learner.lora.rank=2,8"], files=[DEMO], choose="learner.lr=1,2", choose_by="all")
    assert overridden(both) == [
        "--axis learner.lora.rank= goes over what 1 of 2 values of recipe set: learner.lora.rank",
        "--choose learner.lr= goes over what 1 of 2 values of recipe set: learner.lr",
    ]
    assert not overridden(plan_of(axes=["task=demo,demo_agent", "learner.lr=1e-4,2e-4"], files=[]))


def test_an_axis_without_effect_is_said_to_be_one() -> None:
    branches = "search.branches=1,5"
    assert misleading_parts(of_demo(branches, options={"search.strategy": "none"})) == [
        "--axis search.branches has no effect with search.strategy = 'none' (it has with a strategy that adds "
        "branches): its values are the same run, and a difference between them is chance"
    ]
    (some,) = misleading_parts(of_demo("search.strategy=none,entropy", branches))
    assert some.startswith("search.branches has no effect with search.strategy = 'none' (it has with ")
    assert some.endswith(" in 2 of 4 cells of a seed, as in search.strategy none, search.branches 1, seed 1: there its "
                         "values are the same run")  # fmt: skip
    assert misleading_parts(of_demo(branches)) == []
    assert misleading_parts(of_demo("learner.lr=1e-4,2e-4")) == []


def test_a_recipe_on_a_task_that_is_not_its_own_is_said_to_be(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[recipe]\nname = "mine"\n\n[run]\nsteps = 33\n')
    assert misleading_parts(of_demo(f"recipe=grpo,rlpt,{mine}", options={})) == [
        "recipe rlpt is for environment.name = 'next_text', and runs on hopqa here: it is not the method of its name "
        "there"
    ]  # --run.steps goes over a recipe's
    longer = make_plan(Wanted(name="m", axes=[f"recipe=grpo,{mine}"], files=[DEMO], seeds=1), root=ROOT)
    assert misleading_parts(longer) == [
        "cells differ in run.steps: 33 (mine, seed 1), 40 (grpo, seed 1); success is compared after 33"
    ]


def test_a_lag_that_is_there_for_few_steps_is_said_to_be() -> None:
    constant = {"learner.schedule": "constant"}
    assert misleading_parts(of_demo("lag=0,3", options=constant)) == []
    assert misleading_parts(of_demo("lag=0,3,4", options=constant)) == [
        "lag 4: of the 6 steps over which success counts the first 4 train on batches of the first policy, at smaller "
        "lags; --run.steps 8 or more makes it count for half of them"
    ]


def test_a_schedule_is_a_value_of_an_axis() -> None:
    one = '{kind="linear", start=1e-1, end=0.0, steps=5}'
    plan = of_demo(f"objective.kl_coef={one},0.2")
    text = '{ kind = "linear", start = 0.1, end = 0, steps = 5 }'
    assert plan.axes[0].values == (text, "0.2")
    assert canonical(text) == text
    scheduled = plan.config(plan.cells()[0], runs=RUNS).objective.kl_coef
    assert (scheduled.kind, scheduled.start, scheduled.end) == ("linear", 0.1, 0.0)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="kind = 'liner' is unknown; known: constant, linear"):
        of_demo(f"objective.kl_coef={one.replace('linear', 'liner')},0.2")


def test_files_of_the_checkout_are_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    axis = parse_axis("config=configs/placement/random.toml,configs/placement/none.toml", root=ROOT, on_demo=True)
    assert axis.values == ("random", "none")
    with pytest.raises(ConfigError, match=r"there is no file configs/placement/else.toml here"):
        parse_axis("config=configs/placement/else.toml", root=ROOT, on_demo=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"--axis recipe=.*own.toml: .*own.toml is no recipe, for it has no \[recipe\] table"),
        (
            '[recipe]\nname = "own"\nauthor = "me"\n',
            r"--axis recipe=.*own.toml: recipe.author: unknown key in .*own.toml",
        ),
        ('[recipe]\nsource = "here"\n', r"--axis recipe=.*own.toml: recipe.name is missing in .*own.toml"),
    ],
)
def test_what_is_no_recipe_is_refused_by_its_file(content: str, message: str, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(content)
    with pytest.raises(ConfigError, match=message):
        of_demo(f"recipe=grpo,{own}")
