"""``ToolTask``: data, tools and rewards of a user's become conversations, judged at their ends and turn by turn."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from atpo_async.config.doors import ENVIRONMENT
from atpo_async.environments import Info, Row, ToolError, ToolTask, tool
from atpo_async.environments.base import NotJudged
from atpo_async.environments.messages.types import Action
from atpo_async.environments.tools.faults import ToolFailed
from atpo_async.environments.values import ValueRefused
from tests.tool_task_support import ROWS, Chat, action, called, correct, replayed, tokenizer_folder, tool_task

MY_TASK = """
from atpo_async.environments import ToolTask, tool

FACTS = {("capital", "France"): "Paris"}

@tool
def lookup(relation: str, name: str) -> str:
    "Look one fact up."
    return FACTS.get((relation, name), "unknown")

def correct(answer: str, row: dict) -> float:
    return float(answer.strip() == row["answer"])

def make(tokenizer, **options):
    return ToolTask(tokenizer, data="train.jsonl", eval_data="dev.jsonl", system="Use the tool.", tools=[lookup],
                    rewards=[correct], max_turns=6, **options)
"""


@pytest.fixture
def my_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a user's task and data."""
    (tmp_path / "my_tool_task.py").write_text(MY_TASK)
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "Capital of France?", "answer": "Paris"}) + "\n")
    (tmp_path / "dev.jsonl").write_text(json.dumps({"question": "Capital of Italy?", "answer": "Rome"}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "my_tool_task", raising=False)
    return tmp_path


async def test_a_users_file_is_a_task_and_its_options_reach_it(my_folder: Path) -> None:
    made = ENVIRONMENT.make("my_tool_task:make", tokenizer_folder(), options={"success_at": 0.5})
    assert isinstance(made, ToolTask)
    assert (made.num_tasks("train"), made.num_tasks("eval")) == (1, 1)
    chat = await Chat.begun(made)
    shown = made.format.decode(chat.episode.prompt)
    assert "Use the tool." in shown
    assert "Look one fact up." in shown
    assert "Capital of France?" in shown
    assert await chat.answers(called("lookup", relation="capital", name="France")) == ["Paris"]
    result = await chat.say("Paris")
    assert (result.done, result.reward, result.success, result.end) == (True, 1.0, True, "done")
    assert result.rewards == {"correct": 1.0}


# --- tools -------------------------------------------------------------------------------------------------------


@tool
async def slow(text: str, info: Info) -> str:
    """Ends when ``fast`` has been called."""
    await info.setdefault("called", asyncio.Event()).wait()
    return f"slow {text}"


@tool
async def fast(text: str, info: Info) -> str:
    info.setdefault("called", asyncio.Event()).set()
    return f"fast {text}"


async def test_calls_of_one_action_run_at_once_and_are_answered_in_their_order() -> None:
    chat = await Chat.begun(tool_task(tools=[slow, fast]))
    found = await chat.answers("Both.", called("slow", text="a"), called("fast", text="b"))
    assert found == ["slow a", "fast b"]


@tool
def double(number: int) -> int:
    if number < 0:
        raise ToolError("no negative numbers here")
    return 2 * number


async def test_what_the_policy_got_wrong_it_reads_and_may_try_again() -> None:
    task = tool_task(tools=[double])
    chat = await Chat.begun(task)
    found = await chat.answers(
        called("double", number="many"),
        called("double", numbr=1),
        called("treble", number=1),
        '<tool_call>\n{"name": "double", "argu\n</tool_call>',
        called("double", number=-1),
        called("double", number="21"),
    )
    assert found == [
        "Error: double: argument 'number': Input should be a valid integer, unable to parse string as an integer",
        "Error: double: argument 'number' is missing; there is no argument 'numbr' (arguments: number)",
        "Error: there is no tool 'treble'; tools: double",
        "Error: the call could not be read: its arguments are not valid JSON",
        "Error: double: no negative numbers here",
        "42",
    ]
    counts = task.take_counts()
    assert counts.pop("tool/double/seconds") > 0
    assert counts == {"tool/double/calls": 4, "tool/double/errors": 3, "tool/unknown": 1, "tool/malformed": 1}
    assert task.take_counts() == {}


async def test_errors_are_worded_as_the_task_says_and_kept_short() -> None:
    @tool(on_error="answer")
    def verbose() -> str:
        raise ValueError("x" * 5_000_000)

    chat = await Chat.begun(tool_task(tools=[verbose], error_text="[failed] {error}"))
    (found,) = await chat.answers(called("verbose"))
    assert found.startswith("[failed] verbose: ValueError: xxx")
    assert len(found) < 500


async def test_an_error_is_no_longer_than_a_hundred_tokens_of_any_vocabulary() -> None:
    chat = await Chat.begun(tool_task(tools=[double]))
    (found,) = await chat.answers(called("double", **{f"{letter * 50}": 1 for letter in "QXZÄÖ"}))
    assert found.startswith("Error: double: argument 'number' is missing; there is no argument 'QQ")
    assert found.endswith("…")
    assert 80 < len(chat.task.format.encode(found.removeprefix("Error: "))) <= 100


async def test_of_several_answers_the_longest_is_told_and_of_one_nothing() -> None:
    chat = await Chat.begun(tool_task(tools=[slow, fast]))
    said = await chat.say(called("fast", text="b"), called("slow", text="a" * 40), called("treble"))
    assert said.longest_answer == len(chat.task.format.encode("slow " + "a" * 40))
    assert (await chat.say(called("fast", text="b"))).longest_answer is None


async def test_calls_beyond_the_limit_of_one_action_are_not_made() -> None:
    task = tool_task(tools=[double], max_calls=2)
    chat = await Chat.begun(task)
    found = await chat.answers(*(called("double", number=i) for i in range(3)))
    assert found == ["0", "2", "Error: at most 2 calls in one message; this one was not made"]
    assert task.take_counts()["tool/double/calls"] == 2


async def test_a_long_answer_is_cut_to_its_tokens_and_counted() -> None:
    @tool(max_tokens=40)
    def page() -> str:
        return "all work and no play " * 250_000

    task = tool_task(tools=[page])
    chat = await Chat.begun(task)
    (found,) = await chat.answers(called("page"))
    assert found.startswith("all work and no play")
    assert found.endswith("[cut: the answer was longer]")
    assert len(task.format.encode(found)) <= 40
    assert task.take_counts()["tool/page/cut"] == 1


async def test_a_call_past_its_limit_is_an_answer_where_the_tool_says_so() -> None:
    @tool(timeout_s=0.05, on_timeout="answer")
    async def forever() -> str:
        await asyncio.Event().wait()
        return "never"

    task = tool_task(tools=[forever])
    chat = await Chat.begun(task)
    assert await chat.answers(called("forever")) == ["Error: forever: no answer within 0.05 s"]
    assert task.take_counts()["tool/forever/timeouts"] == 1


async def test_a_tool_is_given_the_row_and_the_episodes_info() -> None:
    @tool
    def peek(row: Row, info: Info) -> list[Any]:
        info["peeks"] = info.get("peeks", 0) + 1
        return [row["answer"], info["peeks"]]

    task = tool_task(tools=[peek], rewards=[number_of_peeks])
    chat = await Chat.begun(task)
    first, second = await chat.answers(called("peek")), await chat.answers(called("peek"))
    right = chat.episode.plain._row["answer"]
    assert (first, second) == ([f'["{right}", 1]'], [f'["{right}", 2]'])
    assert (await chat.say("done")).reward == 2.0
    other = await Chat.begun(task)
    assert (await other.say("done")).reward == 0.0


def number_of_peeks(info: dict[str, Any]) -> float:
    return float(info.get("peeks", 0))


async def test_when_the_turns_run_out_the_calls_are_not_run_and_the_answer_is_empty() -> None:
    asked: list[tuple[str, str, int]] = []

    def judge(answer: str, end: str, turns: int) -> float:
        asked.append((answer, end, turns))
        return 0.25

    task = tool_task(tools=[double], rewards=[judge], max_turns=2)
    chat = await Chat.begun(task)
    assert not (await chat.say("First.", called("double", number=1))).done
    result = await chat.say("Again.", called("double", number=2))
    assert (result.done, result.end, result.reward, result.success) == (True, "turn_limit", 0.25, False)
    assert asked == [("", "turn_limit", 2)]
    assert task.take_counts()["tool/double/calls"] == 1


# --- replays and forks -------------------------------------------------------------------------------------------


def counting(*, read_only: bool) -> tuple[Any, list[str]]:
    """A tool, and what it was called with."""
    calls: list[str] = []

    @tool(name="read" if read_only else "write", read_only=read_only)
    def count(text: str) -> str:
        calls.append(text)
        return f"{text} <b>\n\n{len(calls) if read_only else 'written'}"

    return count, calls


async def test_a_tool_that_only_reads_is_not_run_again_in_a_replay_and_another_one_is() -> None:
    (read, reads), (write, writes) = counting(read_only=True), counting(read_only=False)
    task = tool_task(tools=[read, write])
    chat = await Chat.begun(task)
    await chat.answers("Look.", called("read", text="a"), called("write", text="b"), called("read", text="c"))
    await chat.answers(called("read", text="d"), called("nothing"))
    assert await replayed(task, chat.turns) == [True, True]
    assert (reads, writes) == (["a", "c", "d"], ["b", "b"])
    assert task.take_counts()["tool/read/reused"] == 3


async def test_what_a_replay_reuses_is_what_rewards_read() -> None:
    read, _ = counting(read_only=True)

    def judge(messages: list[dict[str, Any]]) -> float:
        return float(messages[-2]["content"] == "a <b>\n\n1")

    task = tool_task(tools=[read], rewards=[judge])
    chat = await Chat.begun(task)
    await chat.answers(called("read", text="a"))
    episode = await task.start("train", 0)
    await episode.replay_step(*chat.turns[0])
    assert (await episode.step(action(task, "done"))).reward == 1.0


async def test_a_conversation_whose_tools_only_read_is_copied_for_a_branch_and_another_one_is_replayed() -> None:
    (read, reads), (write, _) = counting(read_only=True), counting(read_only=False)
    chat = await Chat.begun(tool_task(tools=[read]))
    await chat.answers(called("read", text="a"))
    copy = Chat(chat.task, await chat.episode.fork())
    assert await copy.answers(called("read", text="b")) == ["b <b>\n\n2"]
    assert (await chat.say("city 0")).done
    assert (await copy.say("city 0")).done
    assert reads == ["a", "b"]
    assert await (await Chat.begun(tool_task(tools=[read, write]))).episode.fork() is None


# --- rewards -----------------------------------------------------------------------------------------------------


async def test_a_reward_is_the_weighted_sum_of_functions_each_asking_for_what_it_needs() -> None:
    seen: dict[str, Any] = {}

    def full(answer: str, row: Any, target: str, messages: Any, info: Any, prompt: Any, turns: int, end: str) -> bool:
        seen.update(answer=answer, row=row, target=target, messages=messages, prompt=prompt, turns=turns, end=end)
        return answer == target

    async def brief(answer: str, scale: float = 10.0) -> float:
        return len(answer) / scale

    task = tool_task(tools=[double], rewards=[full, (brief, 0.5)], system="Be brief.")
    chat = await Chat.begun(task)
    right = chat.episode.plain._row["answer"]
    await chat.say(called("double", number=2))
    result = await chat.say(f"<think>\nHm.\n</think>\n\n{right}")
    assert result.reward == pytest.approx(1.0 + 0.5 * 0.6)
    assert result.rewards == {"full": 1.0, "brief": pytest.approx(0.6)}
    assert result.success is True
    assert (seen["answer"], seen["turns"], seen["end"]) == (right, 2, "done")
    assert [m["role"] for m in seen["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert [m["role"] for m in seen["prompt"]] == ["system", "user"]
    assert seen["messages"][-1]["reasoning_content"] == "Hm."


async def test_rewards_of_turns_add_up_by_weight_and_are_logged_as_sums() -> None:
    def short(action: Action) -> float:
        return 1.0 if len(action.content) < 5 else 0.0

    async def heard(answers: list[str], done: bool) -> float:
        return float(len(answers)) + done / 2

    task = tool_task(tools=[double], turn_rewards=[short, (heard, 0.1)])
    chat = await Chat.begun(task)
    first = await chat.say("Hm.", called("double", number=1), called("double", number=2))
    last = await chat.say("a long answer")
    assert first.turn_reward == pytest.approx(1.2)
    assert not first.rewards
    assert last.turn_reward == pytest.approx(0.05)
    assert last.rewards == {"correct": 0.0, "short": 1.0, "heard": 2.5}


@pytest.mark.parametrize(
    ("extract", "said", "answer"),
    [
        (None, " 42 \n", "42"),
        (r"<answer>(.*?)</answer>", "<answer>41</answer> no, <answer>\n42 </answer>", "42"),
        (r"<answer>(.*?)</answer>", "42", ""),
        (lambda text: text.split()[-1], "it is 42", "42"),
    ],
)
async def test_the_answer_is_what_extract_makes_of_the_last_action(extract: Any, said: str, answer: str) -> None:
    heard: list[str] = []

    def judge(answer: str) -> float:
        heard.append(answer)
        return 0.0

    await (await Chat.begun(tool_task(rewards=[judge], extract=extract))).say(said)
    assert heard == [answer]


@pytest.mark.parametrize(("success_at", "success"), [(1.0, False), (0.5, True), (None, None)])
async def test_success_is_what_the_first_reward_reaches(success_at: float | None, success: bool | None) -> None:
    def half() -> float:
        return 0.5

    def one() -> float:
        return 1.0

    result = await (await Chat.begun(tool_task(rewards=[half, one], success_at=success_at))).say("x")
    assert (result.reward, result.success) == (1.5, success)


def none_at_all() -> None: ...
def not_a_number() -> float:
    return float("nan")


def a_text() -> str:
    return "1.0"


def a_missing_column(row: dict[str, Any]) -> float:
    return float(row["solution"])


def too_large() -> float:
    return 1e300


@pytest.mark.parametrize(
    ("function", "error", "told"),
    [
        (none_at_all, NotJudged, r"task 0 \(train\), data\[\d\]: reward 'none_at_all' returned None"),
        (
            not_a_number,
            ValueRefused,
            r"task 0 \(train\), data\[\d\]: reward 'not_a_number' returned nan \(float\)",
        ),
        (a_text, ValueRefused, r"reward 'a_text' returned '1.0' \(str\); expected a finite number, or None"),
        (too_large, ValueRefused, r"reward 'too_large' returned 1e\+300"),
        (a_missing_column, ToolFailed, r"data\[\d\]: reward 'a_missing_column' raised KeyError: 'solution' \(a column"),
    ],
)
async def test_a_reward_that_is_none_costs_its_branch_and_names_function_row_and_value(
    function: Any, error: type[Exception], told: str
) -> None:
    chat = await Chat.begun(tool_task(rewards=[function]))
    with pytest.raises(error, match=told):
        await chat.say("x")


async def test_a_row_with_a_system_message_of_its_own_keeps_it() -> None:
    rows = [{"messages": [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi."}], "answer": "x"}]
    chat = await Chat.begun(tool_task(data=rows, system="Theirs."))
    shown = chat.task.format.decode(chat.episode.prompt)
    assert "Mine." in shown
    assert "Theirs." not in shown


async def test_a_task_without_tools_ends_with_the_first_action_whatever_it_says() -> None:
    assert (await (await Chat.begun(tool_task())).say("city")).done


def test_rows_are_the_same_in_every_environment_that_is_made() -> None:
    first, second = tool_task(seed=3), tool_task(seed=3)
    assert [first.data.task("train", i).row for i in range(5)] == [second.data.task("train", i).row for i in range(5)]
    assert len({str(first.data.task("train", i).row) for i in range(5)}) == len(ROWS)
    assert correct("city 1", {"answer": "city 1"}) == 1.0
