"""Trees as conversations: what ``trees.jsonl`` holds of them, on a terminal, in the report, and by ``atpo trees``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from atpo_async.cli.main import main
from atpo_async.config import build
from atpo_async.environments.messages.types import Shown
from atpo_async.report.conversation import as_tree, best_and_worst, chain_to, figures, transcript_lines
from atpo_async.report.facts import facts
from atpo_async.report.page import page
from atpo_async.report.tree_samples import TreeSample, TreeTurn, append_tree_sample, read_tree_samples
from atpo_async.run.metrics import Record
from atpo_async.run.rundir import RunDir

ASKED = (Shown(role="system", text="Use the tool."), Shown(role="user", text="Who is Ada's <boss>?"))
CALL = Shown(role="assistant", text="", thinking="look it up", tool_calls=('search(query="boss of Ada")',))
FOUND = (Shown(role="tool", text="Ada's boss is Bob."),)


def turn(number: int, parent: int, said: Shown, *, heard: tuple[Shown, ...] = (), **values: object) -> TreeTurn:
    plain: dict[str, object] = {
        "entropy": 0.25, "value": 0.5, "reward": None, "action": "raw", "observation": "raw" if heard else "",
        "round": 0, "versions": (3, 4), "end": "continue",
    }  # fmt: skip
    return TreeTurn(id=number, parent=parent, said=said, heard=heard, **{**plain, **values})  # type: ignore[arg-type]


TURNS = (
    turn(1, 0, CALL, turn_reward=0.1),
    turn(2, 1, Shown(role="assistant", text="Bob"), heard=FOUND, reward=1.2, rewards={"correct": 1.0, "brief": 0.2},
         success=True, end="done"),
    turn(3, 1, Shown(role="assistant", text="Cleo"), heard=FOUND, reward=0.0, round=1, end="turn_limit", success=False),
)  # fmt: skip
SAMPLE = TreeSample(
    tree_id="t-7", step=4, version=3, prompt="raw", turns=TURNS, task=57, environment="qa", messages=ASKED
)


def written(path: Path, sample: TreeSample = SAMPLE) -> None:
    append_tree_sample(
        path, tree_id=sample.tree_id, step=sample.step, version=sample.version, prompt=sample.prompt,
        turns=sample.turns, task=sample.task, environment=sample.environment, messages=sample.messages,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with one recorded tree."""
    made = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}}))
    written(made.trees_path)
    return made


def on_a_terminal(sample: TreeSample) -> str:
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(as_tree(sample))
    return captured.get()


def test_a_conversation_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written(tmp_path / "trees.jsonl")
    assert read_tree_samples(tmp_path / "trees.jsonl") == [SAMPLE]


def test_text_with_other_line_ends_stays_one_record(tmp_path: Path) -> None:
    odd = TreeSample(tree_id="x", step=1, version=1, prompt="a\u2028b\u0085c\x1cd", turns=TURNS)
    written(tmp_path / "trees.jsonl", odd)
    (sample,) = read_tree_samples(tmp_path / "trees.jsonl")
    assert sample.prompt == odd.prompt


def test_a_run_that_recorded_text_only_is_shown_without_roles(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    old = {"id": 1, "parent": 0, "entropy": 0.1, "reward": 1.0, "action": "answer Bob", "observation": "", "round": 0}
    path.write_text(json.dumps({"tree_id": "a", "step": 1, "version": 0, "prompt": "Find", "turns": [old]}) + "\n")
    (sample,) = read_tree_samples(path)
    shown = on_a_terminal(sample)
    assert "prompt: Find" in shown
    assert "action: answer Bob" in shown
    assert sample.task is None


def test_the_terminal_shows_roles_calls_rewards_and_versions_once_each() -> None:
    shown = on_a_terminal(SAMPLE)
    for words in (
        "tree t-7, trained on at step 4 (version 3), task 57 of qa: 3 turns, 2 leaves, rewards 0 to 1.2",
        "system: Use the tool.", "user: Who is Ada's <boss>?", "assistant thinks: look it up",
        'assistant calls: search(query="boss of Ada")', "turn reward 0.1", "reward 1.2 (correct 1, brief 0.2)",
        "v3→v4", "round 1", "reward 0, turn limit",
    ):  # fmt: skip
        assert shown.count(words) >= 1, words
    assert shown.count("Ada's boss is Bob.") == 1, "siblings share their observation"


def test_the_chain_to_a_leaf_is_the_whole_conversation() -> None:
    assert [t.id for t in chain_to(SAMPLE, TURNS[2])] == [1, 3]
    assert [t.id for t in best_and_worst(SAMPLE)] == [2, 3]
    kinds = [kind for kind, _ in transcript_lines(SAMPLE, TURNS[1])]
    assert kinds == ["system", "user", "assistant thinks", "assistant calls", "turn", "tool", "assistant", "turn"]
    assert figures(TURNS[1]).startswith("turn 2 · v3→v4 · H 0.25 · V +0.50 · reward 1.2")


def test_the_report_has_the_conversations_and_escapes_them(run: RunDir) -> None:
    record = Record(time=1.0, source="learner", step=1, version=1, metrics={"train/reward": 1.0})
    html = page(run, facts(run, [record]), [record])
    assert "Conversation to turn 2, reward 1.2" in html
    assert "Who is Ada&#39;s &lt;boss&gt;?" in html
    assert "<boss>" not in html


def test_the_command_lists_trees_and_shows_one(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trees", str(run.path)]) == 0
    listed = capsys.readouterr().out
    assert "t-7" in listed
    assert "0 to 1.2" in listed
    assert "Who is Ada's <boss>?" in listed
    assert main(["trees", str(run.path), "--tree", "t-7", "--step", "4"]) == 0
    assert "assistant calls" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step", "9"], "no tree of step 9 was written down; there are steps 4"),
        (["--tree", "t-8"], "no tree of tree t-8 was written down; there are trees t-7"),
        (["--tree", "t-7", "--step", "9"], "no tree of tree t-7 and step 9"),
    ],
)
def test_a_tree_that_is_not_there_is_answered_with_those_that_are(
    run: RunDir, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["trees", str(run.path), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_trees_says_when_there_will_be_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}}))
    assert main(["trees", str(made.path)]) == 2
    assert "has no trees yet" in capsys.readouterr().err
