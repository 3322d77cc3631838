"""Several environments in one run: each task in its own, its stop tokens with it, faults and metrics told apart."""

from __future__ import annotations

import itertools
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from actors.environments import Environments, host_environments
from actors.evaluate import success
from actors.faults.fault import Fault
from actors.faults.faults import Faults
from atpo_async.api.own_parts_process import look_at
from atpo_async.cli.benchmarks import with_search_qa_alone
from atpo_async.config import Config, build
from atpo_async.core.errors import ConfigError, EnvironmentBroken, SetupError
from atpo_async.core.mixture import Mixture
from atpo_async.environments.base import Split
from atpo_async.models.policy import warm_start_command
from atpo_async.report.by_environment import environment_facts, table
from atpo_async.run.metrics import Record
from atpo_async.study.plan import settings_of
from atpo_async.wire.messages import EvalRequest
from tests.actor_support import CountingEnvironment, CountingEpisode, ScriptedEngine, ints, lease
from tests.buffer_peers_support import configured, grown, stateful, take
from tests.e2e_support import job

EASY_AND_HARD = [{"name": "hopqa", "label": "easy", "weight": 2}, {"name": "hopqa", "label": "hard"}]


def two(**sections: Any) -> Config:
    return configured(environments=EASY_AND_HARD, **sections)


class Recording(CountingEnvironment):
    """Records which tasks were begun; its actions end with a token of its own."""

    def __init__(self, stop: int, held_out: int | None = None, fault: Exception | None = None) -> None:
        super().__init__(fault=lambda number, action: fault)
        self.stop_token_ids = (stop,)
        self.begun: list[tuple[Split, int]] = []
        self.held_out = held_out

    def num_tasks(self, split: Split) -> int | None:
        return self.held_out if split == "eval" else None

    async def start(self, split: Split, task_index: int) -> CountingEpisode:
        self.begun.append((split, task_index))
        return await super().start(split, task_index)


# --- actors ------------------------------------------------------------------------------------------------------


def test_each_lease_has_one_environment_and_counts_up_that_ones_own_tasks() -> None:
    environments = Environments(two(), [Recording(1), Recording(2)])
    tasks = [environments.task("train", index) for index in range(300)]
    assert Counter(task.label for task in tasks) == {"easy": 200, "hard": 100}
    for label, number in (("easy", 200), ("hard", 100)):
        assert [task.task for task in tasks if task.label == label] == list(range(number))
    assert all((task.label == "easy") == (task.environment is environments.made[0]) for task in tasks)


async def test_an_evaluation_goes_through_each_environments_own_tasks_with_its_own_stop_tokens() -> None:
    easy, hard, engine = Recording(1), Recording(2, fault=OSError("no page")), ScriptedEngine()
    found = await success(two(), engine=engine, environment=Environments(two(), [easy, hard]), num_tasks=5)
    assert sorted(set(easy.begun)) == [("eval", 0), ("eval", 1), ("eval", 2)]
    assert sorted(set(hard.begun)) == [("eval", 0), ("eval", 1)]
    assert {sampling.stop_token_ids for sampling in engine.samplings} == {(1,), (2,)}
    assert found["success"] == 0.6
    assert (found["easy/success"], found["easy/num_tasks"], found["hard/failed"]) == (1.0, 3.0, 2.0)


def test_an_environment_with_too_few_held_out_tasks_is_named_with_its_part() -> None:
    environments = Environments(two(), [Recording(1, held_out=10), Recording(2, held_out=4)])
    environments.check_eval_tasks(9)
    with pytest.raises(ConfigError, match=r"eval.num_tasks = 10 asks for 5 of each .* 4 held-out tasks .*'hard'"):
        environments.check_eval_tasks(10)


def test_a_fault_in_every_task_of_one_environment_ends_the_run_naming_it_while_the_other_is_well() -> None:
    sent: list[str] = []
    faults = Faults(["easy", "hard"], at_once=4, notify=lambda line, key: sent.append(line), clock=lambda: 0.0)
    fault = Fault("environment_failed", "KeyError in step", "task 3 (train), step: KeyError: 'boss'")
    begun = itertools.count()

    def grow(label: str) -> None:
        tree_id = f"t{next(begun)}"
        with faults.growing(lease(tree_id=tree_id), label):
            for _ in range(4):
                faults.chain_ended(tree_id, "chain", fault if label == "hard" else None)

    for _ in range(3):
        grow("easy")
        grow("hard")
    grow("easy")
    with pytest.raises(EnvironmentBroken, match=r"^environment 'hard': 4 trees in a row"):
        grow("hard")
    assert sent[0].endswith("environment 'hard', task 3 (train), step: KeyError: 'boss'")


HOSTED = """
import threading
from tests.actor_support import CountingEnvironment

class World(CountingEnvironment):
    def __init__(self, tokenizer, *, stop=1):
        super().__init__()
        self.stop_token_ids = (stop,)
        self.thread = threading.current_thread().name

def fails(tokenizer):
    raise OSError("no such index")
"""


@pytest.fixture
def worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "worlds_of_several"
    (tmp_path / f"{name}.py").write_text(HOSTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


async def test_each_environment_is_made_with_its_own_options_on_a_loop_of_its_own(worlds: str, tmp_path: Path) -> None:
    entries = [{"name": f"{worlds}:World", "label": f"w{stop}", "options": {"stop": stop}} for stop in (3, 5)]
    async with host_environments(build({"environments": entries}), tmp_path) as environments:
        assert [each.stop_token_ids for each in environments.made] == [(3,), (5,)]
        names = {thread.name for thread in threading.enumerate()}
        assert all(any(f"environment '{label}'" in name for name in names) for label in ("w3", "w5"))
        episode = await environments.task("train", 0).environment.start("train", 0)
        assert not (await episode.step(ints(7))).done
        await episode.close()
        assert environments.take_counts() == {}


async def test_one_that_cannot_be_made_is_named_by_its_place_and_the_others_are_ended(
    worlds: str, tmp_path: Path
) -> None:
    entries = [{"name": f"{worlds}:World", "label": "good"}, {"name": f"{worlds}:fails", "label": "bad"}]
    with pytest.raises(SetupError, match=r"environments\.1\.name = .*no such index"):
        async with host_environments(build({"environments": entries}), tmp_path):
            pytest.fail("it was made")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"name": "worlds_of_several:Wrold"}, r"environments\.1\.name = .*did you mean worlds_of_several:World"),
        ({"name": "worlds_of_several:World", "options": {"stpo": 2}}, r"environments\.1\.name = .*'stpo'"),
    ],
)
def test_entries_of_ones_own_are_looked_at_before_the_run(entry: dict[str, Any], said: str, worlds: str) -> None:
    config = build({"environments": [{"name": f"{worlds}:World", "label": "a"}, entry | {"label": "b"}]})
    with pytest.raises(ConfigError, match=said):
        look_at(config, lambda what: None)


# --- buffer ------------------------------------------------------------------------------------------------------


def test_training_metrics_are_told_by_environment_and_together() -> None:
    state, mixture = stateful(two(staleness={"trees_per_batch": 6, "max_lag": 1})), Mixture((2, 1), 0)
    for each in state.lease("a", 6, 0.0).leases:
        easy = mixture.place("train", each.task_index).environment == 0
        take(state, grown(each, (1.0, 1.0, 0.0, 1.0) if easy else (1.0, 0.0, 0.0, 0.0)))
    since = state.counters.since
    means = {name: total / number for name, (total, number) in since.means.items()}
    assert (means["train/easy/reward"], means["train/hard/reward"]) == (0.75, 0.25)
    assert (means["train/easy/success"], means["train/hard/success"]) == (0.75, 0.25)
    assert means["train/success"] == pytest.approx((4 * 0.75 + 2 * 0.25) / 6)
    counts = {name: count for name, count in since.counts.items() if name.endswith("/trees")}
    assert counts == {"train/easy/trees": 4, "train/hard/trees": 2}


def test_an_evaluation_has_its_success_by_environment() -> None:
    state = stateful(two())
    state.evaluate(EvalRequest(run="r", step=0, version=0, num_tasks=5, blocking=False))
    for each in state.lease("a", 5, 0.0).leases:
        take(state, grown(each, (float(each.task_index < 3),)))
    ((_, _, metrics),) = state.ledger.evaluations.drain_records()
    by_label = {name: value for name, value in metrics.items() if name.count("/") == 2}
    assert by_label == {
        "eval/easy/success": pytest.approx(2 / 3), "eval/easy/failed": 0.0, "eval/easy/tasks": 3.0,
        "eval/hard/success": 0.5, "eval/hard/failed": 0.0, "eval/hard/tasks": 2.0,
    }  # fmt: skip


def test_a_run_of_one_environment_has_the_metrics_that_it_always_had() -> None:
    state = stateful(configured())
    for each in state.lease("a", 2, 0.0).leases:
        take(state, grown(each))
    assert not [name for name in (*state.counters.since.means, *state.counters.since.counts) if name.count("/") > 1]


# --- warm start, report -------------------------------------------------------------------------------------------


def test_a_warm_start_makes_one_policy_for_all_hopqa_of_a_run_and_says_where_none_fits_all() -> None:
    def command(*options: dict[str, int], other: bool = False) -> dict[str, str]:
        entries: list[dict[str, Any]] = [
            {"name": "hopqa", "label": f"h{number}", "options": each} for number, each in enumerate(options)
        ]
        entries += [{"name": "my.task:make"}] if other else []
        words = warm_start_command(build({"environments": entries}))
        return dict(zip(words[4::2], words[5::2], strict=True))

    found = command({"hops": 2, "num_names": 16}, {"hops": 3, "num_names": 16}, other=True)
    assert (found["--min-hops"], found["--max-hops"], found["--num-names"]) == ("2", "3", "16")
    with pytest.raises(ConfigError, match="differ in num_names"):
        command({"num_names": 8}, {"num_names": 16})
    with pytest.raises(ConfigError, match="some of the 2 hopqa environments set min_hops"):
        command({"hops": 2}, {})
    with pytest.raises(ConfigError, match=r"environments\.1\.options\.hops must be a whole number"):
        command({"hops": 2}, {"hops": True})
    with pytest.raises(
        ConfigError,
        match=r"or passage_qa or next_text, these only, not for environments\.0\.name = 'my\.task:make'",
    ):
        command(other=True)


def test_the_report_has_a_table_by_environment() -> None:
    def record(step: int, source: str = "buffer", **metrics: float) -> Record:
        return Record(
            time=float(step), source=source, step=step, version=step,
            metrics={name.replace("_in_", "/"): value for name, value in metrics.items()},
        )  # fmt: skip

    records = [
        record(0, eval_in_easy_in_success=0.25),
        *(record(n, train_in_easy_in_success=n / 10, train_in_easy_in_trees=3.0) for n in range(1, 7)),
        record(6, train_in_easy_in_success=0.9),  # the step is taken again, by a run that was resumed
        record(6, eval_in_easy_in_success=0.75),
        record(6, "actor-0", actor_in_easy_in_failed_branches=2.0),
        record(7, "actor-0", actor_in_easy_in_failed_branches=1.0),
    ]
    easy, hard = environment_facts(["easy", "hard"], records)
    assert (easy.trees, easy.greedy, easy.failed_branches) == (18, (0.25, 0.75), 3)
    assert easy.success == pytest.approx((0.2, (0.4 + 0.5 + 0.9) / 3))
    assert easy.line() == (
        "environment easy: sampled success 0.20 → 0.60, greedy 0.250 → 0.750, 18 trees, 3 branches failed"
    )
    head, first, second = table([easy, hard])
    assert first == ("easy", "0.20 → 0.60", "–", "0.250 → 0.750", "18", "3")
    assert second == ("hard", "–", "–", "–", "0", "0")
    assert len(head) == 6
    assert table([]) == []


def test_a_study_records_several_environments_and_no_empty_list_of_them() -> None:
    several, one = two(), configured()
    recorded = settings_of(several)
    assert [each["label"] for each in recorded["environments"]] == ["easy", "hard"]
    assert "environments" not in settings_of(one), "studies of before keep the names of their cells"


def test_published_test_sets_are_asked_of_the_search_qa_among_several() -> None:
    search = {"name": "search_qa", "label": "qa", "options": {"dialect": "search_r1"}}
    alone = with_search_qa_alone(build({"environments": [EASY_AND_HARD[0], search]}))
    assert (alone.environment.name, alone.environment.options) == ("search_qa", {"dialect": "search_r1"})
    assert alone.environments == ()
    assert with_search_qa_alone(two()) == two()


# --- a whole run ---------------------------------------------------------------------------------------------------

ENVIRONMENTS = """
[[environments]]
name = "hopqa"
label = "one"
weight = 2
options = { hops = 1, num_names = 16, num_relations = 4 }

[[environments]]
name = "hopqa"
label = "two"
options = { hops = 2, num_names = 16, num_relations = 4 }
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_over_two_environments_trains_on_both_and_tells_them_apart(hopqa_policy: Path, tmp_path: Path) -> None:
    with job(tmp_path, hopqa_policy) as run:
        lines = [line for line in run.config.read_text().splitlines() if not line.startswith("environment.")]
        run.config.write_text("\n".join(lines) + ENVIRONMENTS)
        train = run.train()
        assert run.exit_code(train) == 0, run.story()
        names = {name for record in run.records() for name in record.metrics}
        for label in ("one", "two"):
            assert {f"train/{label}/reward", f"train/{label}/success", f"eval/{label}/success"} <= names
            assert f"environment {label}: sampled success" in train.said()
        trees = {label: sum(r.metrics[f"train/{label}/trees"] for r in run.with_metric(f"train/{label}/trees"))
                 for label in ("one", "two")}  # fmt: skip
        assert trees["one"] > trees["two"] > 0
        one, two = (run.with_metric(f"eval/{label}/tasks")[0].metrics[f"eval/{label}/tasks"] for label in trees)
        assert one == two, "held-out tasks go round evenly"
        page = (run.path / "report.html").read_text()
        assert "<td>one</td>" in page
        resumed = run.start("train", run.config, "--environments.two.weight", "3")
        assert run.exit_code(resumed) == 2
        assert "environments was" in resumed.said()
