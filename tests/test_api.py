"""The Python door: a run is trained, gone on with, evaluated and read from a program, without the command line."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import atpo_async
from atpo_async import Config, Run, evaluate, load, open_run, train
from atpo_async.api.training import train_to_the_end
from atpo_async.cli import main
from atpo_async.config import build
from atpo_async.core.errors import AtpoError, ConfigError, RoleCrashed, SetupError
from atpo_async.ops.specs import RoleSpec
from atpo_async.run import processes
from atpo_async.run.rundir import RunDir
from tests.e2e_support import job

OLD_RUN = Path(__file__).with_name("old_run.tar.xz")


# --- a real run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def file(folder: Path, hopqa_policy: Path) -> Path:
    """A configuration file with which a step takes a second."""
    with job(folder, hopqa_policy, gated=False, **{"learner.lineage": True, "run.steps": 2}) as made:
        return made.config


@pytest.fixture(scope="module")
def trained(file: Path) -> Run:
    """Two steps, trained where an event loop runs already, as in a notebook."""

    async def cell() -> Run:
        return train(file, progress=False, eval={"at_start": False, "at_end": False})

    return asyncio.run(cell())


@pytest.mark.slow
def test_a_run_is_trained_and_read_from_a_program(trained: Run, file: Path) -> None:
    assert trained.step == 2
    assert trained.ended
    assert trained.config.eval.at_start is False
    assert (trained.path / "report.html").is_file()
    steps, values = trained.metrics["train/reward"]
    assert steps.tolist() == [1, 2]
    assert (steps.dtype.name, values.dtype.name, values.shape) == ("int64", "float64", (2,))
    assert {"learner", "buffer", "actor-0", "supervisor"} <= set(trained.metrics.sources)
    assert "train/loss" in trained.metrics.by("learner")
    assert "train/loss" not in trained.metrics.by("buffer")
    assert [checkpoint.step for checkpoint in trained.checkpoints] == [1, 2]
    assert trained.trees
    assert trained.trees[0].turns[0].action
    assert [(batch["step"], bool(batch["trees"])) for batch in trained.lineage] == [(0, True), (1, True)]
    assert trained.policy is not None
    assert (trained.policy / "model.safetensors").is_file()
    assert not trained.status.running
    assert processes.marked(trained.run_id) == []
    assert repr(trained) == f"<Run {trained.path}: step 2 of 2>"


@pytest.mark.slow
def test_a_run_of_a_program_and_one_of_the_command_line_are_the_same(
    trained: Run, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--eval.at_start", "false", "--eval.at_end", "false"]
    assert main.main(["train", str(file), *words]) == 0
    by_command = capsys.readouterr().out
    again = train(trained.config)
    assert capsys.readouterr().out == by_command
    assert by_command.startswith(f"run {trained.path} has done its 2 steps")
    assert (again.path, again.run_id) == (trained.path, trained.run_id)


@pytest.mark.slow
def test_a_policy_is_evaluated_in_a_process_of_its_own(trained: Run) -> None:
    found = evaluate(trained, eval={"num_tasks": 3})
    assert (found.num_tasks, found.unknown) == (3, 0)
    assert found.success is not None
    assert 0 <= found.success <= 1
    assert found.line("p").startswith("p: success ")


# --- a run that the command line of an earlier program made -----------------------------------------------------


@pytest.fixture(scope="module")
def old_run(folder: Path) -> Path:
    with tarfile.open(OLD_RUN) as archive:
        archive.extractall(folder / "old", filter="data")
    (found,) = (folder / "old").rglob("run.json")
    return found.parent


def test_a_run_that_was_killed_is_read_without_being_changed(old_run: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in old_run.rglob("*"))
    run = open_run(old_run)
    assert not run.ended
    assert run.policy is None
    assert run.step == run.checkpoints[-1].step > 0
    steps, values = run.metrics.by("learner")["train/loss"]
    assert list(steps) == sorted(set(steps.tolist()))
    assert np.isfinite(values).all()
    assert not run.status.running
    assert {batch["step"] + 1 for batch in run.lineage} == set(steps.tolist())
    assert sorted((p, p.stat().st_mtime_ns) for p in old_run.rglob("*")) == before


def test_lineage_holds_what_the_learner_did_last(tmp_path: Path) -> None:
    run = Run(RunDir.create(build({"run": {"dir": tmp_path}})))
    with pytest.raises(SetupError, match=r"keeps no lineage; it is written with learner\.lineage = true"):
        _ = run.lineage
    lines = ['{"starts_at":1,"rank":0}', *(f'{{"step":{s},"rank":0,"trees":[{n}]}}' for n, s in enumerate((1, 2, 3)))]
    lines += ['{"starts_at":2,"rank":0}', '{"step":2,"rank":0,"trees":[9]}']
    (run.path / "lineage.jsonl").write_text("\n".join(lines) + "\n")
    assert [(batch["step"], batch["trees"]) for batch in run.lineage] == [(1, [0]), (2, [9])]


def test_a_metric_that_nobody_reported_is_refused_with_the_one_that_may_be_meant(old_run: Path) -> None:
    metrics = open_run(old_run).metrics
    with pytest.raises(KeyError, match=r"no metric 'train/rewrad' in run .*; did you mean 'train/reward'\?"):
        metrics["train/rewrad"]
    with pytest.raises(KeyError, match=r"no metric 'loss' in run .*; did you mean 'train/loss'\?"):
        metrics["loss"]
    with pytest.raises(KeyError, match=r"no metric 3 in run .* names are in it"):
        metrics[3]  # type: ignore[index]
    assert re.fullmatch(r"<Metrics of run .*: \d+ names: train/\w+, train/.*, …>", repr(metrics))
    with pytest.raises(KeyError, match=f"no metric 'zzz' in run .*; {len(metrics)} names are in it"):
        metrics["zzz"]
    with pytest.raises(KeyError, match=r"'trainer' reported nothing in run .*; there are .*learner"):
        metrics.by("trainer")
    assert "zzz" not in metrics
    assert set(metrics) > {"train/reward"}


# --- interruption and failure -----------------------------------------------------------------------------------

INTERRUPTING = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(1000)"
"""A learner that interrupts the program that started it."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return build({"model": {"path": "model"}, "actor": {"engine": "transformers"}, "supervisor": {"max_restarts": 0}})


def scripted(monkeypatch: pytest.MonkeyPatch, learner: str) -> None:
    spec = RoleSpec(name="learner", argv=(sys.executable, "-c", learner), ends_run=True)
    monkeypatch.setattr("atpo_async.api.training.role_specs", lambda *_, **__: [spec])


def test_an_interruption_stops_the_run_orderly(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, INTERRUPTING)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=False)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert processes.marked(open_run("runs/run").run_id) == []


def test_an_interruption_stops_the_run_orderly_also_where_an_event_loop_runs(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, INTERRUPTING)
    screen = io.StringIO()

    async def cell() -> bool:
        console = Console(file=screen, soft_wrap=True)
        return train_to_the_end(config, console=console, again="the same call").interrupted

    loop = asyncio.new_event_loop()
    try:  # not `asyncio.run`, which takes the signal itself: a notebook leaves it to Python
        assert loop.run_until_complete(cell())
    finally:
        loop.close()
    assert "stopping; Ctrl-C again ends everything at once" in screen.getvalue()
    assert "no process is left" in screen.getvalue()
    assert screen.getvalue().rstrip().endswith("The run goes on with:  the same call")
    assert processes.marked(open_run("runs/run").run_id) == []


@pytest.mark.parametrize("in_a_loop", [False, True])
@pytest.mark.parametrize(
    ("learner", "error", "reason"),
    [
        ("print('out of paper'); raise SystemExit(1)", RoleCrashed, "learner crashed 1 times .*out of paper"),
        ("print('error: no <end>'); raise SystemExit(2)", SetupError, "learner: no <end>"),
    ],
)
def test_a_run_that_fails_raises_its_reason(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    learner: str,
    error: type[AtpoError],
    reason: str,
    in_a_loop: bool,
) -> None:
    scripted(monkeypatch, learner)

    async def cell() -> None:
        train(config, progress=False)

    with pytest.raises(error, match=f"(?s){reason}"):
        asyncio.run(cell()) if in_a_loop else train(config, progress=False)


def test_a_failure_is_not_shown_with_the_search_for_an_event_loop(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, "print('error: no end'); raise SystemExit(2)")
    with pytest.raises(SetupError) as refused:
        train(config, progress=False)
    assert "no running event loop" not in "".join(traceback.format_exception(refused.value))


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"lr": 3}, r"^lr = 3: values are given by section, .*; did you mean learner\.lr\?$"),
        ({"learner": 3}, r"^learner = 3: is a section, and takes its fields: learner=\{'lr': …\}$"),
        ({"learner": {"lr": 0}}, r"^learner\.lr must be > 0, got 0 in the call$"),
        ({"learner.lrr": 1e-3}, r"^learner\.lrr: unknown key \(value 0\.001\) in the call; did you mean learner\.lr"),
        (
            {"objective.surrogate": "clop"},
            r"^objective\.surrogate = 'clop' in the call is unknown; did you mean clip",
        ),
        ({"staleness": {"publish_every": 40}}, r"raise max_lag to at least 39.*staleness\.publish_every: the call"),
        ({"metrics.options.folder": "logs"}, "names no option of a sink"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_one_line(values: dict[str, Any], line: str) -> None:
    for call in (lambda: load(**values), lambda: train(Config(), **values)):
        with pytest.raises(ConfigError, match=line) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_values_of_a_program_go_over_files_and_over_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[learner]\nlr = 0.1\neps = 0.5\n[environment.options]\nhops = 2\n")
    values: dict[str, Any] = {"learner": {"lr": 0.2}, "environment.options.deep": True, "run.dir": tmp_path}
    of_file = load(file, **values)
    assert (of_file.learner.lr, of_file.learner.eps, of_file.run.dir) == (0.2, 0.5, tmp_path)
    assert load(model={"path": tmp_path}).model.path == str(tmp_path)
    assert of_file.environment.options == {"hops": 2, "deep": True}
    assert load([file]) == load(str(file))
    assert load() == Config()


@pytest.mark.parametrize(
    ("call", "error", "line"),
    [
        (lambda: train("nothing.toml"), ConfigError, "configuration nothing.toml does not exist"),
        (lambda: train(Config(), progress=False), SetupError, "model.path is empty"),
        (lambda: evaluate("nothing"), SetupError, "nothing is neither a run folder"),
        (lambda: evaluate("model", eval={"num_tasks": 0}), ConfigError, "eval.num_tasks must be >= 1, got 0"),
        (lambda: open_run("nothing"), SetupError, "nothing is no run folder: .*; name the folder of a run"),
        (lambda: train(Config(), begin_from="nothing", progress=False), SetupError, "nothing"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(config: Config, call: Any, error: type[AtpoError], line: str) -> None:
    with pytest.raises(error, match=line) as refused:
        call()
    assert "\n" not in str(refused.value)
    assert not Path("runs").exists()


untyped: Any = atpo_async
"""The door as a program calls it that is not type-checked."""


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda: untyped.train({"run": {"steps": 3}}),
            r"^train\(\) takes a Config, a path or a list of paths, got dict \{'run': \{'steps': 3\}\}; values go on "
            r"top by section: train\('a\.toml', run=\{'steps': 20\}\)$",
        ),
        (lambda: untyped.train({}), r"^train\(\) takes .*, got dict \{\}; values go on top"),
        (lambda: untyped.train([]), r"^train\(\) takes .*, got a list without any; leave it out for the defaults$"),
        (lambda: untyped.train(3), r"^train\(\) takes .*, got int 3$"),
        (lambda: untyped.train(None), r"^train\(\) takes .*, got None$"),
        (lambda: untyped.train(["a.toml", None]), r"^train\(\) takes .*, got a list that holds None$"),
        (
            lambda: untyped.train(Config(), progress="loud"),
            r"^train\(progress=…\) takes True or False, got str 'loud'; True",
        ),
        (lambda: untyped.train(Config(), begin_from=3), r"^train\(begin_from=…\) takes 'RUN' or .*, got int 3$"),
        (lambda: untyped.load(3), r"^load\(\) takes .*, got int 3$"),
        (lambda: untyped.evaluate(3), r"^evaluate\(\) takes a Run, or the path of .*, got int 3$"),
        (lambda: untyped.evaluate({}), r"^evaluate\(\) takes a Run, .*, got dict \{\}$"),
        (
            lambda: untyped.evaluate(Config()),
            r"^evaluate\(\) takes a Run, .*; it goes second: evaluate\('runs/run', config\)$",
        ),
        (lambda: untyped.evaluate("model", 3), r"^evaluate\(\) takes a Config, a path or a list of paths, got int 3$"),
        (lambda: untyped.open_run(None), r"^open_run\(\) takes the path of a run folder, got None$"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_in_one_line(config: Config, call: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as refused:
        call()
    assert "\n" not in str(refused.value)
    assert not Path("runs").exists()


def done(config: Config) -> str:
    """What is printed for a run whose steps are done, without its report."""
    screen = io.StringIO()
    train_to_the_end(config, console=Console(file=screen, soft_wrap=True), again="the same call")
    return screen.getvalue()


def test_settings_that_come_too_late_are_named_with_both_values(tmp_path: Path) -> None:
    run = RunDir.create(build({"run": {"dir": tmp_path, "steps": 5}}))
    (run.path / "model").mkdir()
    checkpoint = run.checkpoints / "step-000005-v6"
    checkpoint.mkdir()
    assert "note:" not in done(run.config)
    said = done(build({"run": {"dir": tmp_path, "steps": 5}, "staleness": {"trees_per_batch": 24}}))
    before = run.config.staleness.trees_per_batch
    assert f"no effect, as the run is done: staleness.trees_per_batch: {before} -> 24; train with them" in said
    assert "(--run.name NEW), or go on with this one (--run.steps, more than 5)" in said
    assert open_run(run.path).config == run.config


# --- what is loaded ---------------------------------------------------------------------------------------------


def test_the_door_has_what_it_promises() -> None:
    assert set(atpo_async.__all__) <= set(dir(atpo_async))
    for name in atpo_async.__all__:
        assert getattr(atpo_async, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        atpo_async.trian  # noqa: B018


@pytest.mark.parametrize(
    ("code", "unloaded"),
    [
        ("import atpo_async", {"pydantic", "numpy", "zmq", "rich", "torch"}),
        ("from atpo_async import Config, load", {"zmq", "rich", "torch"}),
        ("from atpo_async import train, evaluate, open_run, Run", {"torch", "transformers", "vllm", "matplotlib"}),
        ("from atpo_async.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
         {"pydantic", "numpy", "zmq", "rich", "msgspec", "asyncio", "torch"}),
        ("from atpo_async.cli.main import main; main(['version'])", {"pydantic", "numpy", "zmq", "rich", "torch"}),
        ("from atpo_async.cli.main import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass",
         {"torch", "transformers", "vllm", "matplotlib"}),
    ],
)  # fmt: skip
def test_nothing_heavy_is_loaded_before_it_is_needed(code: str, unloaded: set[str]) -> None:
    code = f"{code}\nimport sys\nprint(sorted(sys.modules), file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(ran.stderr.strip().splitlines()[-1].strip("[]").replace("'", "").split(", "))
    assert "atpo_async" in loaded
    assert not unloaded & loaded


@pytest.mark.parametrize("module", ["atpo_async", "atpo_async.cli"])
def test_the_command_line_is_a_module_too(module: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", module, "trian"], capture_output=True, text=True, timeout=60, env={**os.environ}
    )
    assert ran.returncode == 2
    assert textwrap.shorten(ran.stderr, 60).startswith("error: trian is no command; did you mean `atpo train`?")
