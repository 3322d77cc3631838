"""Metrics sinks: every record goes once to each, a broken one harms nothing, and a user's own comes in by its name."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atpo_async.config import build
from atpo_async.config.doors import SINK
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.ops import metrics_sinks
from atpo_async.run.metrics import MetricsWriter, Record, read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.run.sinks.base import RunFacts
from atpo_async.run.sinks.follower import SinkFollower
from atpo_async.run.sinks.process import feed
from tests.e2e_support import DEADLINE_S

USERS = '''\
"""One line for each step of the learner, in a file of the user's."""

from pathlib import Path


class Lines:
    def __init__(self, run, *, path, metric="train/loss"):
        self._file = Path(path).open("a", buffering=1)
        self._metric = metric
        self._file.write(f"run {run.name}\\n")

    def write(self, record):
        if self._metric in record.metrics:
            self._file.write(f"step {record.step}: {record.metrics[self._metric]:.2f}\\n")

    def close(self, outcome):
        self._file.write(f"{outcome}\\n")
        self._file.close()
'''


class Fake:
    """Keeps what it is given."""

    def __init__(self, refuses: Callable[[Record], bool] = lambda record: False) -> None:
        self.taken: list[Record] = []
        self.outcomes: list[str] = []
        self._refuses = refuses

    def write(self, record: Record) -> None:
        if self._refuses(record):
            raise ConnectionError("no route to host")
        self.taken.append(record)

    def close(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def steps(self) -> list[int]:
        return [record.step for record in self.taken]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(build({"run": {"dir": str(tmp_path / "runs"), "name": "r"}}))


def write(run: RunDir, *steps: int, source: str = "learner", **metrics: float) -> None:
    with MetricsWriter(run.metrics_path, source=source) as writer:
        for step in steps:
            writer.write(step=step, version=step, metrics=metrics or {"train/loss": step / 4})


def follow(run: RunDir, sink: Fake, *, name: str = "fake", said: list[str] | None = None) -> SinkFollower:
    """All that is there."""
    lines: list[str] = [] if said is None else said
    follower = SinkFollower(name, sink, rundir=run.path, metrics=run.metrics_path, say=lines.append)
    stop = threading.Event()
    stop.set()
    follower.follow(stop)
    return follower


def test_a_run_that_goes_on_hands_no_record_on_twice(run: RunDir) -> None:
    write(run, 1, 2)
    follow(run, first := Fake())
    write(run, 3, 4)
    follow(run, second := Fake())
    assert (first.steps(), second.steps()) == ([1, 2], [3, 4])


def test_a_sink_that_is_named_later_gets_the_run_from_its_beginning(run: RunDir) -> None:
    write(run, 1, 2)
    follow(run, Fake())
    follow(run, late := Fake(), name="package.module:Late")
    assert late.steps() == [1, 2]


def test_a_sink_that_fails_is_told_of_once_and_gets_what_comes_after(run: RunDir) -> None:
    write(run, 1, 2, 3, 4)
    said: list[str] = []
    follower = follow(run, sink := Fake(lambda record: record.step in (2, 3)), said=said)
    assert sink.steps() == [1, 4]
    assert follower.num_lost == 2
    (line,) = said
    assert line.startswith("metrics sink 'fake' failed at step 2: ConnectionError: no route to host; training goes on")


def test_the_same_metric_of_two_actors_has_two_names(run: RunDir) -> None:
    for actor in ("actor-0", "far-away"):
        write(run, 1, source=actor, **{"tokens/generated_per_s": 5.0})
    write(run, 1, source="buffer", **{"buffer/trees": 3.0})
    follow(run, sink := Fake())
    names = [name for record in sink.taken for name in record.metrics]
    assert names == ["actor-0/tokens/generated_per_s", "far-away/tokens/generated_per_s", "buffer/trees"]


def test_lines_that_are_no_records_are_left_out(run: RunDir) -> None:
    write(run, 1)
    with run.metrics_path.open("ab") as file:
        file.write(b'{"torn\n')
    write(run, 2)
    follow(run, sink := Fake())
    assert sink.steps() == [1, 2]


def test_every_sink_gets_what_is_written_until_the_run_has_ended(run: RunDir) -> None:
    write(run, 1)
    sinks = [("a", Fake()), ("b", Fake())]

    def outcome() -> str:
        write(run, 2)  # the roles' last records
        return "interrupted"

    feed(run, sinks, wait_for_outcome=outcome, say=pytest.fail, close_s=DEADLINE_S)
    assert [(sink.steps(), sink.outcomes) for _, sink in sinks] == [([1, 2], ["interrupted"])] * 2


def test_a_sink_that_hangs_is_left_and_the_others_close(run: RunDir) -> None:
    write(run, 1, 2, 3)
    hanging, released, closed = threading.Event(), threading.Event(), threading.Event()

    class Hangs(Fake):
        def write(self, record: Record) -> None:
            hanging.set()
            released.wait(DEADLINE_S)

    class Tells(Fake):
        def close(self, outcome: str) -> None:
            super().close(outcome)
            closed.set()

    good = Tells()
    said: list[str] = []

    def outcome() -> str:
        assert hanging.wait(DEADLINE_S)
        return "done"

    # Time is up at once: what hangs is met, whatever the machine is busy with.
    feed(run, [("slow", Hangs()), ("good", good)], wait_for_outcome=outcome, say=said.append, close_s=0.0)
    assert any(
        line.startswith("metrics sink 'slow' did not finish within 0 s and was left; 2 records did not reach it, ")
        for line in said
    )
    assert closed.wait(DEADLINE_S)
    assert (good.steps(), good.outcomes) == ([1, 2, 3], ["done"])
    released.set()


# --- the built-in ones ------------------------------------------------------------------------------------------------


def facts(folder: Path) -> RunFacts:
    return RunFacts(run_id="r-01234567", name="r", folder=folder, config={"run": {"name": "r"}})


def record(step: int, **metrics: float) -> Record:
    return Record(time=1e9 + step, source="learner", step=step, version=step + 10, metrics=metrics)


FAKE_LIBRARY = """
calls = []
class Settings(dict):
    def __init__(self, **fields): super().__init__(fields)
class Run:
    def __init__(self): self.summary = {}
    def log(self, *words, **fields): calls.append(("log", words, fields))
    def define_metric(self, *words, **fields): calls.append(("define_metric", words, fields))
    def finish(self, **fields): calls.append(("finish", dict(self.summary), fields))
def init(**fields):
    calls.append(("init", (), fields))
    return Run()
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[Any]]]:
    """Puts a library in the place of W&B's or trackio's; its calls."""
    made: list[str] = []

    def put(name: str) -> list[Any]:
        (tmp_path / f"{name}.py").write_text(FAKE_LIBRARY)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, name, raising=False)
        made.append(name)
        calls: list[Any] = importlib.import_module(name).calls
        return calls

    yield put
    for name in made:
        sys.modules.pop(name, None)


def test_in_weights_and_biases_a_run_that_goes_on_is_one_run(
    tmp_path: Path, library: Callable[[str], list[Any]]
) -> None:
    calls = library("wandb")
    for outcome in ("interrupted", "done"):
        sink = SINK.make("wandb", facts(tmp_path), options={"project": "mine", "mode": "offline"})
        sink.write(record(3, **{"train/loss": 0.5}))
        sink.close(outcome)
    begun = [fields for call, _, fields in calls if call == "init"]
    assert [(b["id"], b["resume"], b["name"], b["project"], b["mode"]) for b in begun] == [
        ("r-01234567", "allow", "r", "mine", "offline")
    ] * 2
    assert begun[0]["config"] == {"run": {"name": "r"}}
    logged = [words for call, words, _ in calls if call == "log"]
    assert logged == [({"train/loss": 0.5, "step": 3, "version": 13, "_timestamp": 1e9 + 3},)] * 2
    assert ("define_metric", ("*",), {"step_metric": "step"}) in calls
    assert [words for call, words, _ in calls if call == "finish"] == [{"outcome": "interrupted"}, {"outcome": "done"}]


def test_in_trackio_a_run_that_goes_on_is_one_run(tmp_path: Path, library: Callable[[str], list[Any]]) -> None:
    calls = library("trackio")
    sink = SINK.make("trackio", facts(tmp_path), options={"project": "mine"})
    sink.write(record(3, **{"train/loss": 0.5}))
    sink.close("done")
    (_, _, begun), logged, ended = calls
    assert (begun["project"], begun["name"], begun["resume"]) == ("mine", "r-01234567", "allow")
    assert logged == ("log", ({"train/loss": 0.5, "version": 13},), {"step": 3})
    assert ended[0] == "finish"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_sink_that_gets_no_record_begins_nothing(
    tmp_path: Path, library: Callable[[str], list[Any]], name: str
) -> None:
    calls = library(name)
    SINK.make(name, facts(tmp_path)).close("failed")
    assert calls == []


def test_tensorboard_shows_each_metric_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = SINK.make("tensorboard", facts(tmp_path))
    for step in (1, 2):
        sink.write(record(step, **{"train/loss": step / 4}))
    sink.close("done")
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    values = [(e.step, e.wall_time, float(e.tensor_proto.float_val[0])) for e in found.Tensors("train/loss")]
    assert values == [(1, 1e9 + 1, 0.25), (2, 1e9 + 2, 0.5)]


def test_the_records_can_be_copied_to_another_file(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy.jsonl"
    sink = SINK.make("jsonl", facts(tmp_path), options={"path": str(copy)})
    sink.write(made := record(1, **{"train/loss": 0.25}))
    sink.close("done")
    assert list(read_metrics(copy)) == [made]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_library_that_is_missing_is_named_before_the_run_begins(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda library: None if library == name else find(library))
    config = build({"metrics": {"sinks": [name]}})
    with pytest.raises(SetupError, match=rf"metrics sink '{name}' needs {name}, .*pip install 'atpo-async\[{name}\]'"):
        metrics_sinks.check(config)


def test_learner_tensorboard_names_the_sink_too() -> None:
    assert build({"learner": {"tensorboard": True}}).sinks == ("jsonl", "tensorboard")


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's, outside our packages, that processes find too."""
    folder = tmp_path / "users"
    folder.mkdir()
    (folder / "sink_of_this_test.py").write_text(USERS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return folder


def run_with(tmp_path: Path, name: str, **options: object) -> RunDir:
    return RunDir.create(
        build(
            {
                "run": {"dir": str(tmp_path / "runs"), "name": "r"},
                "metrics": {"sinks": [name], "options": {name: options} if options else {}},
            }
        )
    )


def test_a_users_own_sink_of_a_few_lines_takes_the_metrics_of_a_run(tmp_path: Path, users_module: Path) -> None:
    lines = tmp_path / "lines.txt"
    run = run_with(tmp_path, "sink_of_this_test:Lines", path=str(lines))
    assert len(USERS.splitlines()) <= 30
    write(run, 1)
    with metrics_sinks.fed(run, say=pytest.fail, end_s=DEADLINE_S) as feeding:
        write(run, 2)
        feeding.outcome = "done"
    assert lines.read_text().splitlines() == ["run r", "step 1: 0.25", "step 2: 0.50", "done"]


@pytest.mark.parametrize(
    ("name", "options", "kind", "said"),
    [
        (
            "sink_of_this_test:Lines",
            {"file": "x"},
            ConfigError,
            "missing a required argument: 'path'; a metrics sink is called",
        ),
        ("sink_of_this_test:Lime", {}, ConfigError, "has no 'Lime'"),
        ("no_module_of_this_test:x", {}, SetupError, "'no_module_of_this_test' cannot be imported"),
    ],
)
def test_a_sink_that_cannot_be_made_keeps_the_run_from_beginning(
    tmp_path: Path, users_module: Path, name: str, options: dict[str, object], kind: type[Exception], said: str
) -> None:
    begun = False
    with pytest.raises(kind, match=said), metrics_sinks.fed(run_with(tmp_path, name, **options), say=pytest.fail):
        begun = True
    assert not begun


def test_a_sinks_process_that_does_not_end_is_killed_and_the_run_goes_on_to_its_end(
    tmp_path: Path, users_module: Path
) -> None:
    (users_module / "deaf_of_this_test.py").write_text(
        "import subprocess, sys, threading\n"
        "class Deaf:\n"
        "    def __init__(self, run):\n"
        "        subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], start_new_session=True)\n"
        "    def write(self, record): pass\n"
        "    def close(self, outcome): threading.Event().wait()\n"
    )
    run = run_with(tmp_path, "deaf_of_this_test:Deaf")
    said: list[str] = []
    with metrics_sinks.fed(run, say=said.append, end_s=0.0) as feeding:
        feeding.outcome = "done"
    assert [line.split(";")[0] for line in said] == ["metrics sinks did not end within 0 s and were killed"]


def test_without_another_sink_no_process_is_started(run: RunDir) -> None:
    with metrics_sinks.fed(run, say=pytest.fail) as feeding:
        feeding.outcome = "done"
    assert not list((run.path / "logs").glob("sinks.*"))
