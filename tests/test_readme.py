"""The README: every command in it is run by a test, or named as one that needs a GPU, a network or the whole suite."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atpo_async.config import load
from atpo_async.environments.hopqa.warm_start import Recipe
from tests.capitals_support import capitals_policy
from tests.e2e_support import BASE, DEADLINE_S, WORLD, Process
from tests.learner_support import small_policy

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TASKS = (ROOT / "docs" / "tasks.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)

QUICK = ("atpo config", "atpo doctor", "atpo --version", "atpo keys")
"""Run here as they stand, in an empty folder that has the checkout's configs/."""

RUN_ELSEWHERE = {
    "make demo": "test_readme.py::test_the_demo_trains_and_names_its_report",
    "make demo-agent": "test_passage_qa_warm_start.py::test_the_demo_of_an_agent_trains_and_names_its_report",
    "make test": "test_setup.py",
    "source ": "test_setup.py",
    "atpo task capitals.toml": "test_readme.py::test_a_task_of_ones_own_trains_as_the_readme_says",
    "atpo train capitals.toml": "test_readme.py::test_a_task_of_ones_own_trains_as_the_readme_says",
    "atpo trees runs/capitals": "test_readme.py::test_a_task_of_ones_own_trains_as_the_readme_says",
    "atpo train configs/demo.toml": "test_readme.py::test_the_demo_trains_and_names_its_report",
    "atpo study staleness": "test_study.py",
    "atpo status ray://": "test_ray_cluster.py::test_every_node_is_lost_and_comes_back_and_the_run_is_exact",
    "atpo launch slurm": "test_placing_runs.py::test_a_printed_sbatch_script_takes_a_run_to_its_end",
    "pip install 'atpo-async[ray]'": "test_ray_cluster.py",
}
"""Beginning of a command -> the test that runs it, or the same with fewer steps."""

TABLE = {
    "atpo train CONFIG": "test_cli.py::test_a_run_goes_to_its_end_and_names_its_report",
    "atpo demo agent": "test_passage_qa_warm_start.py::test_the_demo_of_an_agent_trains_and_names_its_report",
    "atpo demo text": "test_demos.py::test_a_demo_by_name_is_its_file_in_a_new_run",
    "atpo demo team": "test_demos.py::test_a_demo_by_name_is_its_file_in_a_new_run",
    "atpo demo": "test_readme.py::test_the_demo_trains_and_names_its_report",
    "atpo config": "test_cli.py::test_the_resolved_configuration_and_the_table_of_knobs_are_printed",
    "atpo doctor": "test_cli.py::test_the_doctor_names_what_is_missing_and_how_to_get_it",
    "atpo study NAME": "test_study.py",
    "atpo actor CONFIG --join HOST:PORT": "test_cli.py::test_an_actor_joins_by_address_without_the_runs_folder",
    "atpo buffer CONFIG": "test_cli.py::test_a_role_by_hand_gets_what_further_files_set_as_options",
    "atpo learner CONFIG": "test_cli.py::test_a_learner_by_hand_is_started_as_the_supervisor_would",
    "atpo actor CONFIG --join RUN_DIR": "test_cli.py::test_a_role_by_hand_gets_what_further_files_set_as_options",
    "atpo launch": "test_placing_runs.py::test_a_printed_sbatch_script_takes_a_run_to_its_end",
    "atpo follower": "test_follower_promotion.py::test_the_command_says_how_the_run_goes_on",
    "atpo relay --join HOST:PORT": "test_relay_command.py"
    "::test_actors_with_keys_join_a_relay_and_go_on_without_it_when_it_is_killed",
    "atpo keys": "test_cli.py::test_keys_are_made_for_this_host_and_for_another",
    "atpo task CONFIG": "test_task_command.py::test_the_command_plays_in_a_process_of_its_own",
    "atpo trees RUN": "test_conversation.py::test_the_command_lists_trees_and_shows_one",
    "atpo retriever CORPUS.jsonl": "test_retrieval_server.py"
    "::test_the_command_serves_from_a_worker_process_that_it_replaces_and_takes_with_it",
    "atpo status RUN": "test_readme.py::test_a_task_of_ones_own_trains_as_the_readme_says",
    "atpo eval": "test_readme.py::test_a_task_of_ones_own_trains_as_the_readme_says",
    "atpo --version": "test_cli.py::test_help_and_version_load_nothing_heavy",
    "atpo report RUN": "test_readme.py::test_a_task_of_ones_own_trains_as_the_readme_says",
}
"""Beginning of a command in the table of commands -> the test that runs it."""

NEEDS_A_GPU = ("python3 -m venv .venv-cuda", "pip install -e '.[vllm,gpu]'", "atpo train configs/gpu_8x80gb.toml")


def commands() -> Iterator[str]:
    for block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            command = line.partition("  #")[0].strip()
            if command and not command.startswith("#"):
                yield " ".join(command.split())


def example(name: str, page: str = README) -> str:
    """The text of a file that a page shows."""
    language = {"py": "python", "jsonl": "json"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
    found = re.search(rf"`{re.escape(name)}`[^\n]*(?:\n[^\n]+)*:\n\n```{language}\n(.*?)```", page, re.DOTALL)
    assert found is not None, f"the page shows no {name}"
    return found[1]


def python_example(start: str) -> str:
    """The README's piece of a program from a line on, behind its imports."""
    block: str = next(found for found in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if start in found)
    return block[: block.index("\n\n")] + "\n" + block[block.index(start) :]


def test_every_command_of_the_readme_is_run_by_a_test_or_needs_a_gpu() -> None:
    known = (*QUICK, *RUN_ELSEWHERE, *NEEDS_A_GPU)
    assert not [command for command in commands() if not command.startswith(known)]
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `atpo ")]
    table = [command for row in rows for command in re.findall(r"`(atpo [^`]+)`", row)]
    assert not [command for command in table if not command.startswith(tuple(TABLE))]
    for place in (*RUN_ELSEWHERE.values(), *TABLE.values()):
        file, _, test = place.partition("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text() if test else (ROOT / "tests" / file).is_file()


def test_what_needs_a_gpu_is_said_to() -> None:
    section = README[README.index("## A real model") :]
    section = section[: section.index("\n## ", 3)]
    assert "GPU" in section
    assert all(start in section for start in NEEDS_A_GPU)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith(QUICK)])
def test_a_quick_command_of_the_readme_ends_well(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = [sys.executable, "-m", "atpo_async", *shlex.split(command)[1:]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


FEWER = {
    **{name: value for name, value in BASE.items() if name.startswith(("learner.", "actor."))},
    "run.steps": 2,
    "staleness.trees_per_batch": 4,
    "search.initial_rollouts": 4,
    "eval.num_tasks": 4,
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_policy(tmp_path_factory.mktemp("readme") / "policy", steps=60)


def options(settings: dict[str, object], policy: Path) -> list[str]:
    return [
        f"--{name}={value}" for name, value in {**settings, "model.path": policy, "model.warm_start": False}.items()
    ]


def ended(process: Process) -> str:
    """What a command said; fails where it does not end well."""
    try:
        code = process.popen.wait(timeout=2 * DEADLINE_S)
    finally:
        process.end()
    assert code == 0, process.said()
    return process.said()


SMALL = {
    **{name: value for name, value in BASE.items() if name.startswith(("learner.", "actor."))},
    "model.max_context_tokens": 512,
    "run.steps": 2,
    "staleness.trees_per_batch": 4,
    "search.initial_rollouts": 6,
    "search.branches": 2,
    "search.max_action_tokens": 48,
}


@pytest.mark.slow
def test_a_task_of_ones_own_trains_as_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three files as they are shown, with fewer steps, a small policy and the quicker engine; then the table of
    commands has for a run."""
    for name in ("capitals.py", "train.jsonl", "capitals.toml"):
        (tmp_path / name).write_text(example(name))
    monkeypatch.chdir(tmp_path)
    question = "What is the capital of {}?"
    chat = capitals_policy(tmp_path / "policy", system="Use the tool, then answer in one word.", question=question)
    played = ended(Process(["task", "capitals.toml", f"--model.path={chat}", "--show"], tmp_path / "task.txt"))
    assert "user: What is the capital of" in played, played
    said = ended(Process(["train", "capitals.toml", *options(SMALL, chat)], tmp_path / "train.txt"))
    assert "done in" in said, said
    assert "report: " in said, said
    assert "assistant" in ended(Process(["trees", "runs/capitals", "--step", "1"], tmp_path / "trees.txt"))
    status = ended(Process(["status", "runs/capitals"], tmp_path / "status.txt"))
    assert "its 2 steps are done" in status, status
    ended(Process(["report", "runs/capitals", "--figure", "curve.svg"], tmp_path / "report.txt"))
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")
    assert "held-out task" in ended(Process(["eval", "runs/capitals"], tmp_path / "eval.txt"))
    looked_at = python_example("run = open_run(")
    done = subprocess.run([sys.executable, "-c", looked_at], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2\n"), done.stdout


@pytest.mark.slow
def test_a_task_in_tokens_trains_as_the_page_on_tasks_says(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`echo.py` and `echo.toml` as they are shown, with fewer steps, a smaller policy and the quicker engine."""
    for name in ("echo.py", "echo.toml"):
        (tmp_path / name).write_text(example(name, TASKS))
    monkeypatch.chdir(tmp_path)
    said = ended(Process(["train", "echo.toml", *options(FEWER, policy)], tmp_path / "train.txt"))
    assert "done in" in said, said


@pytest.mark.slow
def test_the_demo_trains_and_names_its_report(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make demo` runs, on a smaller policy that is there (test_warm_start.py makes the demo's), with the quicker
    engine."""
    assert re.search(r"^demo:.*\n\t@\$\(BIN\)/atpo demo", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    world = {f"environment.options.{name}": value for name, value in WORLD.items()}
    said = ended(Process(["demo", *options({**FEWER, **world}, policy)], tmp_path / "demo.txt"))
    assert "report: " in said, said


def test_the_page_on_tasks_names_the_policy_that_the_demo_makes() -> None:
    config = load(ROOT / "configs" / "demo.toml")
    recipe = Recipe(seed=config.run.seed, steps=config.model.warm_start_steps)
    assert f'"models/hopqa-{recipe.fingerprint}"' in TASKS
