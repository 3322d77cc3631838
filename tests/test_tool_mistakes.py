"""Mistakes of a first task of one's own: each is refused at once, in one line that says what to write."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
from pathlib import Path

import pytest

from atpo_async.config.doors import ENVIRONMENT
from atpo_async.core.errors import AtpoError
from tests.tool_task_support import tokenizer_folder

GOOD = """
from atpo_async.environments import ToolTask, tool

@tool
def lookup(relation: str, name: str) -> str:
    "Look one fact up."
    return "Paris"

def correct(answer: str, row: dict) -> float:
    return float(answer.strip() == row["answer"])

def make(tokenizer, **options):
    return ToolTask(tokenizer, data="train.jsonl", eval_data="dev.jsonl", tools=[lookup], rewards=[correct])
"""

# What is written in place of what -> what the user reads.
MISTAKES = {
    "a tool's parameter without an annotation": (
        ("relation: str, name: str", "relation, name: str"),
        "tool 'lookup': parameter 'relation' has no annotation, from which the policy learns what to give: write "
        "relation: str, or int",
    ),
    "a reward that asks for what there is not": (
        ("correct(answer: str, row: dict)", "correct(response: str, row: dict)"),
        "rewards[0]: correct asks for 'response', which there is not; a reward may ask for answer, row, target, ",
    ),
    "a column as an argument": (
        ("correct(answer: str, row: dict)", "correct(answer: str, golden: str)"),
        "(columns of the data are in row: row['golden'])",
    ),
    "a reward that was called": (
        ("rewards=[correct]", 'rewards=[correct("", {"answer": ""})]'),
        "rewards[0] is 1.0 (float); expected a function; it is what the function returned: leave the () away",
    ),
    "a lambda": (
        ("rewards=[correct]", "rewards=[lambda answer: 1.0]"),
        "rewards[0] is a lambda, without a name for its metric; write def correct(answer, row): …",
    ),
    "no rewards": (("rewards=[correct]", "rewards=[]"), "rewards is empty; expected at least one function"),
    "rewards left out": ((", rewards=[correct]", ""), "ToolTask has no rewards; give at least one function"),
    "a weight that is none": (
        ("rewards=[correct]", 'rewards=[(correct, "0.5")]'),
        "rewards[0]: the weight of 'correct' is '0.5' (str); expected a number",
    ),
    "a file that is not there": (
        ('data="train.jsonl"', 'data="trian.jsonl"'),
        "there is no such file in",
    ),
    "no data": (('data="train.jsonl", eval_data="dev.jsonl", ', ""), "ToolTask has no data; give data='train.jsonl'"),
    "a tool that is its result": (
        ("tools=[lookup]", 'tools=[lookup("capital", "France")]'),
        "tools[0] is 'Paris' (str); expected a function with @tool above it; its result stands there",
    ),
    "a tool alone": (("tools=[lookup]", "tools=lookup"), "expected a list of functions: tools=[lookup]"),
    "an option of @tool that there is not": (
        ("@tool\n", "@tool(timeout=3)\n"),
        "@tool of 'lookup' has no option 'timeout'; options: name, description, read_only, timeout_s",
    ),
    "an argument of ToolTask that there is not": (
        ("rewards=[correct]", "rewards=[correct], max_turn=3"),
        "ToolTask has no option 'max_turn'; did you mean 'max_turns'?",
    ),
    "no turns": (
        ("rewards=[correct]", "rewards=[correct], max_turns=0"),
        "max_turns is 0 (int); expected a whole number of at least 1",
    ),
    "an extract without a group": (
        ("rewards=[correct]", 'rewards=[correct], extract="<answer>.*</answer>"'),
        "expected one group around the answer: r'<answer>(.*?)</answer>'",
    ),
    "make without a return": (("    return ToolTask(", "    ToolTask("), "its factory returned None; it must return"),
}

_number = itertools.count()


def made_with(folder: Path, old: str, new: str) -> None:
    """Makes the task of a file in which ``new`` stands for ``old``, through the door that a run takes."""
    assert old in GOOD
    name = f"mistaken_task_{next(_number)}"
    (folder / f"{name}.py").write_text(GOOD.replace(old, new))
    importlib.invalidate_caches()
    try:
        ENVIRONMENT.make(f"{name}:make", tokenizer_folder())
    finally:
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, country in (("train", "France"), ("dev", "Italy")):
        row = {"question": f"Capital of {country}?", "answer": "Paris"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_without_a_mistake_there_is_nothing_to_refuse(folder: Path) -> None:
    made_with(folder, "Look one fact up.", "Look a fact up.")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_in_one_line_that_says_what_to_write(folder: Path, mistake: str) -> None:
    (old, new), told = MISTAKES[mistake]
    with pytest.raises(AtpoError, match=re.escape(told)) as caught:
        made_with(folder, old, new)
    assert "\n" not in str(caught.value)
    print(f"{mistake}: {caught.value}")  # pytest -rP reads like the page of a new user's mistakes
