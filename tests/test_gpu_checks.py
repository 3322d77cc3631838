"""What runs on a GPU machine: which checks there are, their limits of time and the table, with other commands."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from atpo_async.config import load
from atpo_async.run.metrics import Record
from benchmarks import whole_run
from benchmarks.learner import parse
from benchmarks.learner_parts.gpu import rows_of
from scripts import gpu_checks
from scripts.gpu_checks import CHECKS, Check, Outcome, chosen, figures, main, markdown, run, run_all, write

ROOT = Path(__file__).resolve().parent.parent
WHERE = {"card": "A Card, 81559 MiB", "date": "1 May 2026", "commit": "abc", "torch": "2.11"}
ROW = {
    "model": "0.6b", "varied": {"learner.kernels": "liger"}, "ended": "done",
    "figures": {"mfu": 0.412, "tokens_s": 45000.0, "over_bare": 2.13, "mb_a_token": 0.76, "slowest": 1.02},
}  # fmt: skip


def check(script: str, *, name: str = "a", limit_s: float = 60.0) -> Check:
    words = ("sh", "-c", script, "sh", "{json}", "{limit}")
    return Check(name=name, target="a target", words=words, limit_s=limit_s)


# --- the checks


def test_names_are_unique_and_every_command_is_there() -> None:
    assert len({one.name for one in CHECKS}) == len(CHECKS)
    for one in CHECKS:
        assert one.words[0] == "{python}"
        assert one.words[1] == "-m" or (ROOT / one.words[1]).is_file(), one.name
        assert one.limit_s <= 540


def test_every_file_with_a_test_for_a_gpu_is_in_one_check() -> None:
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").glob("test_*.py")
        if path != Path(__file__) and "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    }
    asked = [word for one in CHECKS if one.name.startswith("tests-") for word in one.words if word.endswith(".py")]
    assert sorted(asked) == sorted(marked)


def test_every_target_of_the_learner_names_a_model_and_rows_that_the_benchmark_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for one in CHECKS:
        if one.words[1] != "benchmarks/learner.py":
            continue
        words = [{"{limit}": "500", "{json}": "x.json"}.get(word, word) for word in one.words[2:]]
        args, plan = parse(words)
        assert args.part == ["gpu"]
        assert plan.device == "cuda"
        for row in rows_of(args.models, args.vary):
            load((), row.varied)  # each value is one of its field


def test_the_demo_is_tried_with_both_engines_both_precisions_and_three_seeds() -> None:
    demos = [one for one in CHECKS if one.name.startswith("demo")]
    assert len({one.words for one in demos}) == len(demos) == 3 * 2 * 2
    script = (ROOT / "scripts" / "demo_seeds.py").read_text(encoding="utf-8")
    assert all(f'"{word}"' in script for one in demos for word in one.words if word.startswith("--"))


def test_checks_are_chosen_by_the_beginnings_of_their_names() -> None:
    assert [one.name for one in chosen(["learner"])] == ["learner-0.6b", "learner-1.7b", "learner-4b"]
    assert chosen([]) == list(CHECKS)
    with pytest.raises(ValueError, match=r"no check begins with 'lerner'; there are tests-learner, tests-sharded"):
        chosen(["lerner"])


def test_the_list_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--part", "actors"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("actors  (420 s)  >= 0.95 of raw AsyncLLM")
    assert "actor_overhead.py --model 0.6b" in said


# --- running them


def test_a_check_gives_its_json_its_command_and_the_end_of_its_output() -> None:
    result = json.dumps({"rows": [ROW]})
    one = run(check(f"echo some words; echo '{result}' > \"$1\"; echo limit $2"), left_s=100.0)
    assert one.ended == "done"
    assert one.result == {"rows": [ROW]}
    assert one.output.splitlines() == ["some words", "limit 45"]
    assert one.said == "0.6b kernels=liger: MFU 41.2 %, 45,000 tokens/s, 2.13 x bare, 0.76 MB a token, " + (
        "slowest step / median 1.02"
    )
    assert "FILE.json" in one.command


def test_a_check_that_fails_says_so_and_the_next_is_run() -> None:
    told: list[int] = []
    checks = [check("echo 3 failed, 2 passed in 4 s; exit 5", name="a"), check("echo fine", name="b")]
    found = run_all(checks, limit_s=1000.0, told=lambda outcomes: told.append(len(outcomes)))
    assert [one.ended for one in found] == ["ended with status 5", "done"]
    assert [one.said for one in found] == ["3 failed, 2 passed in 4 s", "fine"]
    assert told == [1, 2]


def test_a_check_that_takes_too_long_is_interrupted_first_and_what_it_started_ends_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_checks, "GRACE_S", 2.0)
    script = "trap 'echo interrupted; exit 0' INT; sleep 600 & echo $!; while :; do wait; done"
    one = run(check(script, limit_s=4.0), left_s=100.0)
    child, word = one.output.split()
    assert word == "interrupted"
    assert one.ended == "cut short after 4 s"
    with contextlib.suppress(psutil.NoSuchProcess):
        left = psutil.Process(int(child))
        assert left.status() == psutil.STATUS_ZOMBIE or left.wait(timeout=60) is None


def test_without_time_a_check_is_not_begun() -> None:
    found = run_all([check("echo fine")], limit_s=1.0, told=lambda outcomes: None)
    assert (found[0].ended, found[0].output, found[0].said) == ("not begun: no time left", "", "")


def test_a_check_sees_the_project_and_runs_in_its_root() -> None:
    words = ("{python}", "-c", "import os, atpo_async; print(os.getcwd(), os.environ['A'])")
    one = run(Check(name="a", target="", words=words, limit_s=60.0, env=(("A", "b"),)), left_s=100.0)
    assert one.output.strip() == f"{ROOT} b"
    assert one.command.startswith("python3 -c")


# --- the table


def outcome(**changes: Any) -> Outcome:
    kept: dict[str, Any] = {"name": "a", "target": "t | u", "command": "c", "ended": "done", "seconds": 3.0}
    return Outcome(**(kept | changes))


def test_the_table_names_card_date_commit_and_command_and_what_was_not_measured() -> None:
    said = markdown(WHERE, [outcome(said="MFU 40 %"), outcome(name="b", ended="not begun: no time left", seconds=0.0)])
    assert said.splitlines()[0] == "A Card, 81559 MiB; 1 May 2026; commit abc; torch 2.11."
    assert "| a | t / u | MFU 40 % | done, 3 s | `c` |" in said
    assert "| b | t / u | not measured | not begun: no time left, 0 s | `c` |" in said


def test_both_files_are_whole_after_every_check(tmp_path: Path) -> None:
    write(tmp_path / "out", WHERE, [outcome(result={"x": 1})])
    kept = json.loads((tmp_path / "out" / "gpu_checks.json").read_text())
    assert kept["where"]["commit"] == "abc"
    assert kept["checks"][0]["result"] == {"x": 1}
    assert (tmp_path / "out" / "gpu_checks.md").read_text() == markdown(WHERE, [outcome()])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu_checks.json", "gpu_checks.md"]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("step 1\ngreedy success 0.98\nreport: x\n", "greedy success 0.98"),
        ("5 passed, 2 skipped in 3 s\n", "5 passed, 2 skipped in 3 s"),
        ("first\nsecond\nthird\n", "second / third"),
        ("", ""),
    ],
)
def test_without_rows_the_line_that_says_it_is_told(output: str, said: str) -> None:
    assert figures(outcome(output=output)) == said


def test_as_a_script_it_needs_nothing_but_the_standard_library() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "scripts" / "gpu_checks.py"), "--list"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n    {python}") == len(CHECKS)


# --- a configuration on a made-up policy


def test_a_configuration_is_run_with_made_up_tasks_that_fit_its_context(tmp_path: Path) -> None:
    for path in sorted((ROOT / "configs").glob("gpu_*.toml")):
        config = load(path)
        settings = whole_run.settings_of(config, folder=tmp_path, model=tmp_path, steps=3)
        resolved = load(path, settings)
        options = resolved.environment.options
        turns, action = int(str(options["turns"])), resolved.search.max_action_tokens
        longest = int(str(options["prompt"])) + turns * (action + int(str(options["observation"])))
        assert longest <= resolved.model.max_context_tokens
        assert resolved.run.steps == 3
        assert config.model.path in whole_run.SIZE_OF


def test_its_figures_are_medians_after_the_first_step() -> None:
    def record(**metrics: float) -> Record:
        named = {name.replace("__", "/"): value for name, value in metrics.items()}
        return Record(time=0.0, source="learner", step=1, version=1, metrics=named)

    found = whole_run.figures(
        [record(time__step_s=9.0), record(time__step_s=2.0, other=5.0), record(weights__swap_s=0.5),
         record(time__step_s=4.0), record(weights__swap_s=0.25)]
    )  # fmt: skip
    assert found == {"steps": 3, "time/step_s": 3.0, "weights/swap_s": 0.25}
