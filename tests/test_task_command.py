"""``atpo task``: a task shown as messages, and played by lines, by a file and by a function."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpo_async.api.task import __main__ as task_process
from atpo_async.api.task.scripts import parsed
from atpo_async.api.task.voice import Voice, assistant
from atpo_async.core.errors import AtpoError, ConfigError
from atpo_async.environments.messages.chat_format import ChatFormat
from tests.chat_policy import chat_policy

SEARCH = {
    "name": "search",
    "description": "Look it up.",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
}

TASK = """
from atpo_async.environments.base import NotJudged
from atpo_async.environments.messages.task import MessageTask
from atpo_async.environments.messages.types import Reply

SEARCH = {"name": "search", "description": "Look it up.",
          "parameters": {"type": "object", "properties": {"query": {"type": "string"}}}}


class Guess(MessageTask):
    def __init__(self, tokenizer, **options):
        super().__init__(tokenizer, tools=[SEARCH])

    def num_tasks(self, split):
        return 3 if split == "eval" else None

    async def begin(self, split, index):
        return Game(index)


class Game:
    def __init__(self, number):
        self.number = number
        self.messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Guess my number."}]

    async def reply(self, action):
        if action.tool_calls:
            query = action.tool_calls[0].arguments["query"]
            return Reply(messages=[{"role": "tool", "content": f"nothing about {query}"}], turn_reward=0.25)
        if action.content == "skip":
            raise NotJudged("nobody can tell")
        right = action.content == str(self.number)
        return Reply(done=True, reward=float(right), success=right, rewards={"exact": float(right)})


def policy(messages):
    if messages[-1]["role"] == "user":
        return {"tool_calls": [{"name": "search", "arguments": {"query": "numbers"}}]}
    return "2" if "numbers" in messages[-1]["content"] else "lost"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a policy, a task and its configuration."""
    made = tmp_path_factory.mktemp("task")
    chat_policy(made / "policy")
    (made / "guess.py").write_text(TASK)
    (made / "guess.toml").write_text(
        '[model]\npath = "policy"\nmax_context_tokens = 1024\n[environment]\nname = "guess:Guess"\n'
    )
    return made


Play = Callable[..., tuple[int, str]]


@pytest.fixture
def play(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Play:
    """Plays in this process; returns the exit code and all that was printed."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))

    def run(typed: str | io.StringIO = "", **asked: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed) if isinstance(typed, str) else typed)
        plain = {
            "split": "train",
            "index": 0,
            "ids": False,
            "raw": False,
            "show": False,
            "actions": None,
            "policy": None,
        }
        code = task_process.main("guess.toml", json.dumps(plain | asked))
        return code, capsys.readouterr().out

    return run


@pytest.mark.slow
def test_the_command_plays_in_a_process_of_its_own(folder: Path) -> None:
    argv = [sys.executable, "-m", "atpo_async.cli", "task", "guess.toml", "--index", "2", "--policy", "guess:policy"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "success: yes" in done.stdout


def test_lines_play_a_task_and_every_reward_is_shown(play: Play) -> None:
    code, said = play('/search {"query": "the number"}\n2\n', index=2, split="eval", ids=True)
    assert code == 0, said
    for words in (
        "guess:Guess, task 2 (eval); tasks: endless train, 3 eval", "'<|im_end|>'",
        "tool: search(query: string): Look it up.",
        "system: Be brief.", "user: Guess my number.", 'assistant calls: search({"query": "the number"})',
        "tool: nothing about the number", "turn reward: 0.25", "assistant: 2", "reward/exact: 1",
        "reward: 1 for the outcome", "turn rewards: 0.25 together",
        "success: yes", "prompt ids: (", "action ids: (", "observation ids: (",
    ):  # fmt: skip
        assert words in said, said


def test_a_function_plays_a_task(play: Play) -> None:
    code, said = play(index=2, policy="guess:policy")
    assert code == 0, said
    assert "success: yes" in said


def test_a_task_can_be_shown_alone(play: Play) -> None:
    code, said = play(show=True)
    assert code == 0
    assert said.endswith("user: Guess my number.\n")


def test_a_file_plays_a_task_and_what_cannot_be_judged_is_said(play: Play, folder: Path) -> None:
    (folder / "actions.txt").write_text('{"tool_calls": [{"name": "search", "arguments": {"query": "x"}}]}\nskip\n')
    code, said = play(actions="actions.txt")
    assert code == 0, said
    assert "not judged: nobody can tell; in training this leaf is left out" in said


def test_a_task_that_is_left_early_says_so(play: Play) -> None:
    assert "the task was left before its end" in play("")[1]


def test_a_fault_names_the_line_of_the_users_code(play: Play) -> None:
    code, said = play('/search {"q": 1}\n')
    assert code == 1
    assert "failed: KeyError: 'query'" in said
    assert 'query = action.tool_calls[0].arguments["query"]' in said
    assert "guess.py:" in said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"split": "eval", "index": 3}, "--index 3: split 'eval' has tasks 0 to 2"),
        ({"actions": "none.txt"}, "--actions none.txt"),
        ({"policy": "guess:polcy"}, "--policy guess:polcy: "),
    ],
)
def test_what_is_not_there_is_one_line(play: Play, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(AtpoError) as caught:
        play(**asked)
    assert said in str(caught.value)


def test_a_line_of_a_file_that_is_no_action_is_named(play: Play, folder: Path) -> None:
    (folder / "odd.txt").write_text('/search {"query": "x"}\n{"content": \n')
    with pytest.raises(ConfigError, match=r"odd\.txt, line 2: the action .* begins like JSON and is none"):
        play(actions="odd.txt")


def test_a_person_who_mistypes_is_asked_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    answers = iter(['/search "x"', "2"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    code, said = play(Terminal(), index=2)
    assert code == 0, said
    assert 'a call as /search {"query": …}' in said
    assert "note: " in said
    assert "success: yes" in said


def test_an_action_is_written_as_the_policy_would(folder: Path) -> None:
    chat = ChatFormat.load(folder / "policy", tools=[SEARCH])
    voice = Voice(folder / "policy", chat, chat.stop_token_ids)
    ids = voice.action('/search {"query": "a b"}')
    call = chat.parse(np.zeros(0, dtype=np.int32), ids).tool_calls[0]
    assert (call.name, call.arguments, call.fault) == ("search", {"query": "a b"}, "")
    assert int(ids[-1]) in chat.stop_token_ids
    assert chat.parse(np.zeros(0, dtype=np.int32), voice.action("//slash")).content == "/slash"
    alone = voice.action({"name": "search", "arguments": {"query": "a b"}})
    assert np.array_equal(alone, ids)
    raw = voice.action("<tool_call>", raw=True)
    assert voice.text(raw) == "<tool_call><|im_end|>"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"content": ', "begins like JSON and is none"),
        ("/search query", "a call is written /search"),
        ('{"contents": "x"}', "an action has contents"),
        ('{"tool_calls": [{"nam": "x"}]}', "tool_calls[0]"),
        ('{"tool_calls": [{"name": "x", "arguments": "y"}]}', "expected an object"),
    ],
)
def test_an_action_that_cannot_be_written_says_its_form(folder: Path, line: str, said: str) -> None:
    chat = ChatFormat.load(folder / "policy", tools=[SEARCH])
    voice = Voice(folder / "policy", chat, chat.stop_token_ids)
    with pytest.raises(ConfigError) as caught:
        voice.action(parsed(line))
    assert said in str(caught.value)


def test_a_message_may_have_thinking_and_calls() -> None:
    said = assistant({"content": "x", "reasoning_content": "hm", "tool_calls": [{"name": "f"}]})
    assert said["reasoning_content"] == "hm"
    assert said["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
