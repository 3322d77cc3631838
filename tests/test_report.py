"""The report: its figures from hand-made records, its drawings as well-formed SVG, nothing fetched."""

from __future__ import annotations

import io
import re
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from atpo_async.config import build, load, resolved
from atpo_async.core.errors import SetupError
from atpo_async.report import charts
from atpo_async.report.charts import Axes, Line, ticks
from atpo_async.report.collapse import advice, collapse_of
from atpo_async.report.facts import facts, failures, series, wait_share
from atpo_async.report.learning_curve import write_figure
from atpo_async.report.page import page, write_report
from atpo_async.report.progress import Progress, RunState, duration, panel, plain
from atpo_async.report.tree_drawing import draw_tree
from atpo_async.report.tree_samples import TreeTurn, append_tree_sample, choose, read_tree_samples
from atpo_async.run.metrics import MetricsWriter, Record, read_metrics
from atpo_async.run.rundir import RunDir

ROOT = Path(__file__).resolve().parent.parent
T0 = 1_700_000_000.0


def record(time: float, source: str = "learner", step: int = 0, **metrics: float) -> Record:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return Record(time=T0 + time, source=source, step=step, version=step, metrics=named)


@pytest.fixture
def trained(tmp_path: Path) -> RunDir:
    """Six steps, two seconds each, 0.9 reached at step 5."""
    run = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r", "steps": 6}}))
    with MetricsWriter(run.metrics_path, source="buffer") as writer:
        writer.write(step=0, version=0, metrics={"time/first_lease": T0 + 1}, time_s=T0 + 1)
        writer.write(step=0, version=0, metrics={"eval/success": 0.5}, time_s=T0 + 1.5)
        writer.write(step=6, version=6, metrics={"eval/success": 1.0}, time_s=T0 + 14)
    with MetricsWriter(run.metrics_path, source="learner") as writer:
        for step, success in enumerate((0.1, 0.5, 0.8, 0.9, 1.0, 1.0), start=1):
            metrics = {
                "train/success": success, "train/loss": 0.1, "lag/mean": 1.0, "lag/max": 2.0, "lag/turns_0": 30,
                "lag/turns_1": 10, "is/ess_frac": 0.9, "clip_share": 0.1, "time/learner_wait_s": 0.5,
                "time/between_steps_s": 2.0, "weights/publish_s": 0.1,
            }  # fmt: skip
            writer.write(step=step, version=step, metrics=metrics, time_s=T0 + 1 + 2 * step)
    with MetricsWriter(run.metrics_path, source="actor-0") as writer:
        metrics = {"time/actor_wait_s": 0.2, "time/actor_interval_s": 2.0, "engine/probe_error": 1e-6}
        writer.write(step=1, version=1, metrics=metrics, time_s=T0 + 4)
    with MetricsWriter(run.metrics_path, source="supervisor") as writer:
        for size in (100.0, 300.0, 200.0):
            writer.write(step=1, version=1, metrics={"memory/buffer_mb": size}, time_s=T0 - 20)
    return run


def turn(id: int, parent: int, *, reward: float | None = None, action: str = "look", round: int = 0) -> TreeTurn:
    return TreeTurn(
        id=id, parent=parent, entropy=0.5, value=0.25 * id, reward=reward, action=action, observation="<obs>",
        round=round, versions=(3, 4),
    )  # fmt: skip


def test_the_facts_follow_from_the_records(trained: RunDir) -> None:
    found = facts(trained)
    assert found.origin == T0 + 1
    assert found.goal is not None
    assert (found.goal.step, found.goal.time - found.origin) == (5, 10.0)  # mean of 0.8, 0.9, 1.0
    assert [e.value for e in found.evals] == [0.5, 1.0]
    assert found.learner_wait_share == pytest.approx(0.25)
    assert found.actor_wait_share == pytest.approx(0.1)
    assert (found.lag_mean, found.lag_max) == (1.0, 2.0)
    assert found.memory_mb == {"buffer": 300.0}
    assert "0.9 sampled success (mean of three steps) 10 s after the first lease, at step 5" in found.lines()


def test_success_at_the_start_and_at_the_end_is_the_same_measure(tmp_path: Path) -> None:
    run = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}}))
    records = [record(n, step=n, train__success=v) for n, v in enumerate((0.0, 0.6, 0.3, 0.9, 0.6, 0.9), start=1)]
    (line,) = (line for line in facts(run, records).lines() if "in training" in line)
    assert line == "sampled success in training, mean of the first → last three steps: 0.30 → 0.80"
    shown = page(run, facts(run, records), records)
    assert "0.30 → 0.80" in shown
    assert "mean of the first → last three steps" in shown


def test_without_a_first_lease_time_starts_at_the_first_record_of_a_working_role(tmp_path: Path) -> None:
    run = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}}))
    found = facts(run, [record(0, "supervisor", memory__buffer_mb=1.0), record(9, train__success=0.5)])
    assert (found.origin, found.origin_is_lease) == (T0 + 9, False)


def test_a_step_done_again_after_a_resume_counts_once() -> None:
    records = [record(1, step=1, x=1.0), record(2, step=2, x=2.0), record(9, step=2, x=3.0)]
    assert [s.value for s in series(records, "x")] == [1.0, 3.0]


def test_waits_are_shares_of_the_time_that_records_cover() -> None:
    records = [record(0, w=9.0), record(10, w=2.0), record(20, w=3.0)]
    assert wait_share(records, "w") == pytest.approx(0.25)
    assert wait_share(records[:1], "w") is None


class Checker(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "srcset")]


def test_the_page_is_one_file_that_fetches_nothing_and_whose_drawings_are_well_formed(trained: RunDir) -> None:
    append_tree_sample(
        trained.trees_path, tree_id="t<1>", step=2, version=2, prompt="Find : a & b",
        turns=[turn(1, 0), turn(2, 1, reward=1.0, action="answer <end>"), turn(3, 1, reward=0.0, round=1)],
    )  # fmt: skip
    text = write_report(trained).read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.fetched == []
    assert not {"script", "link", "img", "iframe"} & set(checker.tags)
    assert "url(" not in text
    assert "@import" not in text
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) >= 11
    for drawing in drawings:
        ET.fromstring(drawing)
    for words in ("Learning", "Staleness", "Where the time went", "Correction", "answer &lt;end&gt;", "t&lt;1&gt;"):
        assert words in text


def test_every_time_axis_and_the_head_name_the_event_that_they_count_from(trained: RunDir) -> None:
    text = write_report(trained).read_text(encoding="utf-8")
    # Success, weights and memory; throughput is not recorded here.
    assert text.count(">seconds from the first lease</text>") == 3
    assert ">seconds</text>" not in text
    assert "steps in 0:13 from the first lease" in text


def test_a_guide_is_labelled_with_its_value_and_things_are_counted_in_the_singular_too(trained: RunDir) -> None:
    text = write_report(trained).read_text(encoding="utf-8")
    assert text.count('font-size="10">90%</text>') == 2, "the dotted line of both figures of success"
    config = trained.config.learner
    assert (config.minibatches, config.num_processes) == (1, 1)
    assert "1 mini-batch, 1 process" in text
    assert "(es)" not in text


def test_a_wheel_has_every_template() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    templates = sorted((ROOT / "atpo_async").rglob("*.j2"))
    assert len(templates) >= 4
    for path in templates:
        package = path.parent.parent
        assert (package / "__init__.py").is_file()
        assert any(path in package.glob(pattern) for pattern in settings["package-data"]["*"]), path


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path: Path) -> None:
    run = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}}))
    with MetricsWriter(run.metrics_path, source="buffer") as writer:
        writer.write(step=0, version=0, metrics={"buffer/trees": 1})
    assert "nothing recorded" in write_report(run).read_text(encoding="utf-8")


def test_the_page_names_what_a_method_adds_to_the_objective(tmp_path: Path) -> None:
    objective = {"terms": ["lp-reg"], "token_weights": ["top-entropy"]}
    run = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}, "objective": objective}))
    with MetricsWriter(run.metrics_path, source="buffer") as writer:
        writer.write(step=0, version=0, metrics={"buffer/trees": 1})
    assert ", term lp-reg, tokens weighed by top-entropy; " in write_report(run).read_text(encoding="utf-8")


def test_the_parts_of_the_reward_are_drawn_and_named_at_the_end(trained: RunDir) -> None:
    found = [record(2.0 * step, step=step, reward__correct=0.1 * step, reward__brief=0.5) for step in range(1, 7)]
    found = [*read_metrics(trained.metrics_path), *found]
    said = "\n".join(facts(trained, found).lines())
    assert "parts of the reward, the same: brief 0.50 → 0.50, correct 0.20 → 0.50" in said
    assert "Parts of the reward by name" in page(trained, facts(trained, found), found)
    assert "Parts of the reward by name" not in write_report(trained).read_text(encoding="utf-8")


def test_the_learning_curve_can_be_had_alone(trained: RunDir, tmp_path: Path) -> None:
    ET.fromstring(write_figure(trained, tmp_path / "docs" / "curve.svg").read_text(encoding="utf-8"))
    assert write_figure(trained, tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SetupError, match=r"must end in \.svg or \.png"):
        write_figure(trained, tmp_path / "curve.pdf")


def test_trees_come_back_as_written_and_broken_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    turns = (turn(1, 0), turn(2, 1, reward=1.0))
    append_tree_sample(path, tree_id="a", step=1, version=2, prompt="Find", turns=turns)
    with path.open("a") as file:
        file.write('{"tree_id": "torn\n')
        file.write(
            '{"tree_id":"x","step":1,"version":1,"prompt":"","turns":[{"id":1,"parent":9,"entropy":0,"action":""}]}\n'
        )
    (sample,) = read_tree_samples(path)
    assert sample.turns == turns
    assert read_tree_samples(tmp_path / "none") == []


def test_an_early_and_a_late_tree_are_chosen_rather_with_mixed_rewards(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    for step in range(1, 9):
        rewards = (0.0, 1.0) if step in (2, 7) else (0.0, 0.0)
        turns = [turn(i + 1, 0, reward=reward) for i, reward in enumerate(rewards)]
        append_tree_sample(path, tree_id=str(step), step=step, version=step, prompt="", turns=turns)
    assert [sample.step for sample in choose(read_tree_samples(path))] == [2, 7]


def test_a_huge_tree_is_drawn_in_part_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    turns = [turn(i, 0, reward=0.0) for i in range(1, 41)]
    append_tree_sample(path, tree_id="big", step=1, version=1, prompt="p", turns=turns)
    drawing = draw_tree(read_tree_samples(path)[0])
    ET.fromstring(drawing)
    assert "24 more leaves are not drawn" in drawing


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), max_size=20),
    st.text(max_size=10).filter(lambda t: all(c.isprintable() for c in t)),
)
def test_any_numbers_and_words_make_well_formed_drawings(points: list[tuple[float, float]], words: str) -> None:
    line = Line(name=words, points=sorted(points), color=charts.BLUE, dots=True)
    ET.fromstring(charts.line_chart([line], Axes(x_label=words, y_label=words)))


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0, count=5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3.0, 61.0, count=6) == pytest.approx([10, 20, 30, 40, 50, 60])
    assert ticks(-0.5, 1.5, count=5, whole=True) == [0, 1]
    assert ticks(2.0, 2.0, count=5) == [2.0]
    assert ticks(0.0, 5e-324, count=5) == [0.0], "next to zero"


# --- progress ---------------------------------------------------------------------------------------------------


def test_the_state_holds_the_newest_figures_and_the_pace() -> None:
    state = RunState(total_steps=10, since=T0)
    state.feed(
        [
            record(-50, step=1, train__loss=1.0, train__success=0.1, time__learner_wait_s=9.0),  # before this start
            record(2, step=2, train__loss=1.0, train__success=0.3, time__learner_wait_s=1.0),
            record(4, step=3, train__loss=1.0, train__success=0.4, time__learner_wait_s=1.0),
            record(4, "actor-0", tokens__generated_per_s=100.0),
            record(4, "actor-1", tokens__generated_per_s=50.0),
            record(5, "buffer", step=2, eval__success=0.75),
        ]
    )
    assert (state.step, state.latest["train/success"], state.evals) == (3, 0.4, [(2, 0.75)])
    assert state.summed("tokens/generated_per_s") == 150.0
    assert state.wait_share("time/learner_wait_s") == pytest.approx(0.5)
    assert state.left_s() == pytest.approx(14.0)
    line = plain(state)
    for words in ("step 3/10", "success 0.40", "eval 0.750 (step 2)", "150 tokens/s", "learner waits 50%", "0:14 left"):
        assert words in line


def test_plain_lines_come_every_few_seconds_and_at_every_eval() -> None:
    now = [T0]
    console = Console(file=(out := io.StringIO()), force_terminal=False, width=200)
    with Progress(console, title="t", total_steps=9, clock=lambda: now[0]) as progress:
        for step in range(1, 5):
            now[0] += 2.0
            progress.feed([record(2.0 * step, step=step, train__loss=1.0)])
        progress.feed([record(8.5, step=4, eval__success=1.0)])
    steps = re.findall(r"^step (\d+)/9", out.getvalue(), re.MULTILINE)
    assert steps == ["3", "4"]


def test_batches_without_a_tree_to_learn_from_are_told_after_some_and_ever_more_seldom() -> None:
    console = Console(file=(out := io.StringIO()), force_terminal=False, width=400)

    def fed(trees: float, steps: int) -> list[str]:
        out.seek(0)
        out.truncate()
        for _ in range(steps):
            progress.feed([record(1.0, step=1, batch__trees=trees, train__success=0.0)])
        return re.findall(r"^(\d+) batches in a row had no tree to learn from", out.getvalue(), re.MULTILINE)

    with Progress(console, title="t", total_steps=9, clock=lambda: T0) as progress:
        assert fed(0.0, 4) == []
        assert fed(0.0, 1) == ["5"]
        assert "(success 0.00)" in out.getvalue()
        assert fed(0.0, 20) == ["10", "20"]
        assert fed(3.0, 1) == []
        assert fed(0.0, 5) == ["5"]


def success_records(values: Sequence[float], *, first: int = 1) -> list[Record]:
    return [record(step, step=step, train__loss=0.1, train__success=v) for step, v in enumerate(values, first)]


RISE, FALL = [0.2, 0.6, 0.8, 0.9], [0.3, 0.05, 0.02, 0.0]


def test_a_collapse_is_told_once_with_what_to_try() -> None:
    console = Console(file=(out := io.StringIO()), force_terminal=False, width=400)
    with Progress(console, title="t", total_steps=9, advice="a lower learner.lr", clock=lambda: T0) as progress:
        for each in success_records([*RISE, *FALL, *RISE, *FALL]):
            progress.feed([each])
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("success has collapsed")]
    assert line == (
        "success has collapsed: from 0.77 at step 4 to 0.02 at step 8 (sampled, mean of 3 steps).  What to try: a "
        "lower learner.lr"
    )


@pytest.mark.parametrize(
    "values",
    [
        [*RISE, 0.0, 0.9, 0.0, 0.9],  # single batches
        [0.5, 0.6, 0.6, 0.6, 0.6, *FALL],  # never above 0.6
        [*RISE, 0.3, 0.2, 0.1, 0.1],  # not below 0.1
    ],
)
def test_what_is_no_collapse_is_not_told(values: list[float]) -> None:
    assert collapse_of(enumerate(values, 1)) is None


def test_a_collapse_from_before_a_resume_is_not_told_again_and_a_later_one_is() -> None:
    old = RunState(total_steps=20, since=T0 + 8.5)
    old.feed(success_records([*RISE, *FALL]))
    assert old.collapse is None
    late = RunState(total_steps=20, since=T0 + 6.5)  # its best step was before, its fall after
    late.feed(success_records([*RISE, *FALL]))
    assert late.collapse is not None
    assert (late.collapse.best_step, late.collapse.step) == (4, 8)


def test_the_advice_is_of_what_the_run_does_not_do_already() -> None:
    demo = load(Path(__file__).parents[1] / "configs" / "demo.toml")
    assert advice(demo).startswith("a lower learner.lr (0.0006 now, for instance --learner.lr 0.0003)")
    assert "--learner.schedule" not in advice(demo)
    constant = resolved(
        demo, {"learner.schedule": "constant", "correction.action": "none", "correction.accept_bias": True}
    )
    assert "--learner.schedule linear" in advice(constant)
    assert "--correction.action truncate" in advice(constant)
    assert "correction" not in advice(resolved(demo, {"staleness.max_lag": 0}))


def test_a_collapse_stands_in_the_report(trained: RunDir) -> None:
    found = facts(trained, success_records([*RISE, *FALL]))
    (note,) = found.notes
    assert note.startswith("success has collapsed: from 0.77 at step 4 to 0.02 at step 8")
    assert note in found.lines()
    assert "success has collapsed" in page(trained, found, success_records([*RISE, *FALL]))


def test_on_a_terminal_the_panel_fits_in_eighty_columns() -> None:
    state = RunState(total_steps=10)
    console = Console(file=(out := io.StringIO()), force_terminal=True, width=80, color_system=None)
    console.print(panel(state, title="atpo demo-1-1", elapsed_s=3.0))
    state.feed([record(2, step=5, train__loss=1.0, train__success=0.5, lag__mean=1.0, lag__max=3.0)])
    console.print(panel(state, title="atpo demo-1-1", elapsed_s=65.0))
    text = out.getvalue()
    assert "the engine loads" in text
    assert "step 5/10" in text
    assert "1.0 (max 3)" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_durations_are_read_as_on_a_clock() -> None:
    assert [duration(s) for s in (5, 65, 3600 + 125)] == ["0:05", "1:05", "1:02:05"]


def test_failures_are_told_apart_from_the_policys_own() -> None:
    assert failures(0, 0) == []
    branches, tasks = failures(230, 18)
    assert branches.startswith("230 branches failed and were left out")
    assert tasks == "18 held-out tasks failed in the evaluations and count as wrong"
