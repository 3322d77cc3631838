"""A user's file of data, tools and rewards trains from an empty folder, with a policy that chats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atpo_async.run.metrics import read_metrics
from tests.capitals_support import CAPITALS, capitals_policy
from tests.e2e_support import DEADLINE_S, Process

SYSTEM = "Use the tool, then answer."

MY_TASK = f"""
from atpo_async.environments import ToolTask, tool

CAPITALS = {CAPITALS!r}


@tool(read_only=True)
def lookup(relation: str, name: str) -> str:
    "Look one fact up."
    return CAPITALS.get(name, "unknown") if relation == "capital" else "unknown"


def correct(answer: str, row: dict) -> float:
    return float(answer.strip() == row["answer"])


async def looked(messages: list) -> float:
    return float(any(message["role"] == "tool" for message in messages))


def make(tokenizer, **options):
    return ToolTask(
        tokenizer, data="train.jsonl", eval_data="dev.jsonl", system={SYSTEM!r}, tools=[lookup],
        rewards=[correct, (looked, 0.2)], **options,
    )
"""

CONFIG = """
run.name = "capitals"
run.steps = 2
model.path = "policy"
model.max_context_tokens = 512
environment.name = "capitals_task:make"
environment.options = { max_turns = 3 }
search = { initial_rollouts = 4, branches = 2, rounds = 1, max_action_tokens = 48 }
staleness.trees_per_batch = 4
learner = { lr = 3e-4, device = "cpu", num_threads = 1 }
actor = { engine = "transformers", device = "cpu", num_threads = 1, report_every_s = 0.05 }
eval = { every_steps = 0, at_start = false, num_tasks = 1 }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what a user brings: a model, data, a task and a configuration."""
    capitals_policy(tmp_path / "policy", system=SYSTEM, question="Capital of {}?")
    rows = [json.dumps({"question": f"Capital of {c}?", "answer": a}) + "\n" for c, a in CAPITALS.items()]
    (tmp_path / "train.jsonl").write_text("".join(rows[:5]))
    (tmp_path / "dev.jsonl").write_text(rows[5])
    (tmp_path / "capitals_task.py").write_text(MY_TASK)
    (tmp_path / "capitals.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_users_file_trains_from_an_empty_folder(folder: Path) -> None:
    process = Process(["train", "capitals.toml"], folder / "output.txt")
    try:
        code = process.popen.wait(timeout=DEADLINE_S)
    finally:
        process.end()
    assert code == 0, process.said()
    records = list(read_metrics(folder / "runs" / "capitals" / "metrics.jsonl"))
    steps = [r for r in records if r.source == "learner" and "train/loss" in r.metrics]
    assert len(steps) == 2
    assert any(r.metrics["train/loss"] != 0 for r in steps)
    assert {"reward/correct", "reward/looked"} <= {name for r in records for name in r.metrics}
    counted = {name for r in records if r.source == "actor-0" for name in r.metrics if name.startswith("tool/")}
    assert {"tool/lookup/calls", "tool/lookup/seconds"} <= counted
    assert "a branch failed" not in process.said()
