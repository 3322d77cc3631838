"""A task in messages: over the token protocol, and what is said about each value that it must not hand over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpo_async.core.errors import ConfigError
from atpo_async.core.vocabulary import Split
from atpo_async.environments import MessageEpisode, MessageTask, Reply
from atpo_async.environments.base import Environment
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.messages.types import Action
from atpo_async.environments.replay import Past, PastTurn, replayed
from atpo_async.environments.values import Limits, ValueRefused
from tests.chat_policy import chat_tokenizer

LIMITS = Limits(vocab_size=512, max_context_tokens=4096)

Answer = Callable[[Action], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("policy")
    chat_tokenizer().save_pretrained(made)
    return made


class Talk:
    """Answers every action by a function."""

    def __init__(self, answer: Answer, messages: Any) -> None:
        self.answer, self.messages, self.closed = answer, messages, 0

    async def reply(self, action: Action) -> Reply:
        said: Reply = self.answer(action)
        return said

    async def close(self) -> None:
        self.closed += 1


class Told(MessageTask):
    """Its conversations are told what to answer."""

    def __init__(self, folder: Path, answer: Answer, *, messages: Any = "Say something.", **options: Any) -> None:
        super().__init__(folder, **options)
        self.talks: list[Talk] = []
        self._answer, self._messages = answer, messages

    def num_tasks(self, split: Split) -> int | None:
        return 4

    async def begin(self, split: Split, index: int) -> MessageEpisode:
        self.talks.append(Talk(self._answer, self._messages))
        return self.talks[-1]


def checked(task: Environment) -> CheckedEnvironment:
    return CheckedEnvironment(task, name="told:Told", limits=LIMITS)


def said(task: MessageTask, text: str) -> np.ndarray:
    return np.append(task.format.encode(text), task.stop_token_ids[:1]).astype(np.int32)


async def refusal(folder: Path, answer: Answer, *, messages: Any = "Say something.") -> str:
    """What is said where a conversation is opened with ``messages``, and one action answered."""
    task = Told(folder, answer, messages=messages)
    try:
        episode = await checked(task).start("train", 3)
        await episode.step(said(task, "Hello"))
    except ValueRefused as refused:
        return str(refused)
    pytest.fail("nothing was refused")


async def test_an_action_is_answered_with_messages_until_the_conversation_ends(folder: Path) -> None:
    seen: list[Action] = []

    def answer(action: Action) -> Reply:
        seen.append(action)
        if len(seen) == 1:
            return Reply(messages=[{"role": "user", "content": "More."}])
        return Reply(done=True, reward=0.5, success=True, turn_limit=True)

    task = Told(folder, answer)
    episode = await checked(task).start("train", 0)
    assert task.decode(episode.prompt) == "<|im_start|>user\nSay something.<|im_end|>\n<|im_start|>assistant\n"
    first = await episode.step(said(task, "Hello there."))
    assert task.decode(first.observation) == "\n<|im_start|>user\nMore.<|im_end|>\n<|im_start|>assistant\n"
    last = await episode.step(said(task, "<think>\nHm.\n</think>\n\nGood bye."))
    assert (last.done, last.reward, last.success, last.end) == (True, 0.5, True, "turn_limit")
    assert [(a.content, a.thinking, a.complete) for a in seen] == [
        ("Hello there.", "", True),
        ("Good bye.", "Hm.", True),
    ]
    await episode.close()
    assert task.talks[0].closed == 1


async def test_a_conversation_without_close_is_closed_all_the_same(folder: Path) -> None:
    class Short:
        messages = "Hi."

        async def reply(self, action: Action) -> Reply:
            return Reply(done=True, reward=1)

    class Task(Told):
        async def begin(self, split: Split, index: int) -> Any:
            return Short()

    episode = await checked(Task(folder, lambda action: None)).start("train", 0)
    await episode.close()


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (None, "a reply without return returns None"),
        ("No.", "'No.' (str); expected a Reply"),
        ({"role": "user"}, "(dict); expected a Reply"),
        (("tool", "x"), "(tuple); expected a Reply"),
        (Reply(), "messages is empty and done is False"),
        (Reply(messages=[{"role": "assistant", "content": "x"}]), "messages[0] has the role 'assistant'"),
        (Reply(messages=[{"role": "function", "content": "x"}]), "a tool's answer has the role 'tool'"),
        (Reply(messages=[{"content": "x"}]), "messages[0]['role'] is None"),
        (Reply(messages=["x"]), "messages[0] is 'x' (str); expected a message"),  # type: ignore[list-item]
        (Reply(messages=5), "messages is 5 (int); expected a list of messages"),  # type: ignore[arg-type]
        (Reply(messages=[{"role": "tool", "content": {"a": 1}}]), "json.dumps(…) of it"),
        (Reply(messages=[{"role": "tool", "content": 3.5}]), "messages[0]['content'] is 3.5 (float)"),
        (Reply(messages=[{"role": "user", "content": [{"type": "image"}]}]), "is of type 'image'; policies here read"),
        (Reply(messages=[{"role": "user", "content": "\ud800"}]), "half of a surrogate pair at character 0"),
        (
            Reply(messages=[{"role": "tool", "content": "", "tool_call_id": 3}]),
            "messages[0]['tool_call_id'] is 3 (int)",
        ),
        (Reply(done=True), "reward is None"),
        (Reply(done=True, reward=float("nan")), "reward is nan"),
        (Reply(done=True, reward="1"), "reward is '1' (str)"),  # type: ignore[arg-type]
        (Reply(done=True, reward=1.0, success="yes"), "success is 'yes' (str)"),  # type: ignore[arg-type]
    ],
)
async def test_a_reply_that_is_none_is_refused_in_one_line_that_says_what_to_do(
    folder: Path, returned: Any, expected: str
) -> None:
    text = await refusal(folder, lambda action: returned)
    assert expected in text
    assert "task 3 (train), step 1" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages is empty"),
        (None, "messages is None (NoneType); expected a list of messages"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "ends with a message of the assistant",
        ),
    ],
)
async def test_a_conversation_that_cannot_be_opened_is_refused(folder: Path, messages: Any, expected: str) -> None:
    text = await refusal(folder, lambda action: None, messages=messages)
    assert expected in text
    assert "Told, task 3 (train)" in text


async def test_what_loses_nothing_is_taken_as_it_was_meant(folder: Path) -> None:
    """A text or a message alone, parts of text, no content, numbers of other types."""
    replies = iter(
        [
            Reply(messages="Again."),  # type: ignore[arg-type]
            Reply(messages={"role": "user", "content": [{"type": "text", "text": "Ag"}, "ain."]}),  # type: ignore[arg-type]
            Reply(messages=[{"role": "tool", "content": None}]),
            Reply(done=True, reward=np.float32(1), success=np.int64(1)),  # type: ignore[arg-type]
        ]
    )
    task = Told(folder, lambda action: next(replies))
    episode = await checked(task).start("train", 0)
    shown = [task.decode((await episode.step(said(task, "x"))).observation) for _ in range(3)]
    assert shown[0] == shown[1] == "\n<|im_start|>user\nAgain.<|im_end|>\n<|im_start|>assistant\n"
    assert "<tool_response>\n\n</tool_response>" in shown[2]
    end = await episode.step(said(task, "x"))
    assert (end.reward, end.success) == (1.0, True)


async def test_methods_that_are_not_async_are_named(folder: Path) -> None:
    class Begins(Told):
        def begin(self, split: Split, index: int) -> Any:
            return Talk(self._answer, "Hi.")

    class Replies(Told):
        async def begin(self, split: Split, index: int) -> Any:
            class Plain:
                messages = "Hi."

                def reply(self, action: Action) -> Reply:
                    return Reply(done=True, reward=1.0)

            return Plain()

    for kind, word in ((Begins, "async def begin"), (Replies, "async def reply")):
        task = kind(folder, lambda action: None)
        with pytest.raises(ValueRefused, match=word):
            await (await checked(task).start("train", 0)).step(said(task, "x"))


def test_a_task_that_lacks_a_part_is_refused_when_it_is_made(folder: Path) -> None:
    class Begun(MessageTask):
        async def begin(self, split: Split, index: int) -> Any: ...

    class Counted(MessageTask):
        def num_tasks(self, split: Split) -> int | None: ...

    class Unmade(Told):
        def __init__(self, folder: Path) -> None:
            self.rows = [1]

    with pytest.raises(ConfigError, match=r"Begun lacks num_tasks\(self, split\)"):
        Begun(folder)  # type: ignore[abstract]
    with pytest.raises(ConfigError, match=r"Counted lacks async begin\(self, split, index\)"):
        Counted(folder)  # type: ignore[abstract]
    with pytest.raises(ConfigError, match=r"call super\(\).__init__\(tokenizer\)"):
        checked(Unmade(folder))


async def test_a_refused_conversation_is_closed(folder: Path) -> None:
    task = Told(folder, lambda action: None, messages=[])
    with pytest.raises(ValueRefused):
        await checked(task).start("train", 0)
    assert task.talks[0].closed == 1


async def test_a_replay_may_take_the_contents_that_were_recorded(folder: Path) -> None:
    runs: list[str] = []

    class Looks(Talk):
        async def replay_reply(self, action: Action, recorded: Callable[[Any], list[str] | None]) -> Reply:
            messages = [{"role": "tool", "content": ""}, {"role": "user", "content": ""}]
            contents = recorded(messages)
            assert contents is not None
            return Reply(messages=[{**m, "content": text} for m, text in zip(messages, contents, strict=True)])

    class Task(Told):
        async def begin(self, split: Split, index: int) -> Any:
            return Looks(self._answer, "Hi.")

    def answer(action: Action) -> Reply:
        runs.append(action.content)
        found = f"found {len(runs)}\n\n of <b>{action.content}</b>"
        return Reply(messages=[{"role": "tool", "content": found}, {"role": "user", "content": "Go on."}])

    task = Task(folder, answer)
    environment = checked(task)
    episode = await environment.start("train", 0)
    actions = [said(task, "one"), said(task, 'two <tool_call>\n{"name": "x", "arguments": {}}\n</tool_call>')[:-1]]
    turns = tuple([PastTurn(action, (await episode.step(action)).observation) for action in actions])
    again = await replayed(environment, "train", 0, Past(turns, episode.prompt))
    assert len(runs) == 2
    assert turns[-1].observation is not None
    np.testing.assert_array_equal(again.observation, turns[-1].observation)


async def test_contents_are_not_guessed_from_an_observation_of_another_form(folder: Path) -> None:
    task = Told(folder, lambda action: None)
    context = task.format.render([{"role": "user", "content": "Hi."}])
    action, tool = said(task, "x"), {"role": "tool", "content": ""}
    observation = task.format.extend(context, action, [{"role": "tool", "content": "12"}])
    assert task.format.contents(context, action, observation, [tool, {"role": "user", "content": ""}]) is None
    assert task.format.contents(context, action, observation[:-1], [tool]) is None
    assert task.format.contents(context, action, observation, [tool]) == ["12"]
    two = [{"role": "tool", "content": text} for text in ("1", "2\n</tool_response>\n<tool_response>\n3")]
    told_apart = task.format.extend(context, action, two)
    found = task.format.contents(context, action, told_apart, [tool, tool])
    assert found == ["1", "2\n< /tool_response>\n< tool_response>\n3"], "names of control tokens are broken"


@pytest.mark.parametrize("way", ["fork", "snapshot"])
async def test_a_conversation_that_copies_itself_is_forked_so(folder: Path, way: str) -> None:
    class Counts(Talk):
        def __init__(self, count: int = 0) -> None:
            super().__init__(lambda action: None, "Hi.")
            self.count = count

        async def reply(self, action: Action) -> Reply:
            self.count += 1
            return Reply(messages=[{"role": "user", "content": str(self.count)}])

    class Copies(Counts):
        def fork(self) -> Copies:
            return Copies(self.count)

    class Keeps(Counts):
        async def snapshot(self) -> int:
            return self.count

        def restore(self, snapshot: int) -> None:
            self.count = snapshot

    class Task(Told):
        async def begin(self, split: Split, index: int) -> Any:
            return Copies() if way == "fork" else Keeps()

    task = Task(folder, lambda action: None)
    episode: Any = await task.start("train", 0)
    await episode.step(said(task, "x"))
    if way == "fork":
        other = await episode.fork()
        assert episode.snapshot is None
    else:
        assert episode.fork is None
        other = await task.start("train", 0)
        await other.restore(await episode.snapshot())
    mine, its = [await e.step(said(task, "y")) for e in (episode, other)]
    np.testing.assert_array_equal(mine.observation, its.observation)
    assert "2" in task.decode(its.observation)


async def test_a_long_text_is_written_outside_the_loop_and_left_to_the_limit_of_the_search(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    threads: list[int] = []
    to_thread = asyncio.to_thread

    async def counted(work: Callable[[], Any]) -> Any:
        threads.append(1)
        return await to_thread(work)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    task = Told(folder, lambda action: Reply(messages=[{"role": "tool", "content": "word " * 20_000}]))
    episode = await checked(task).start("train", 0)
    with pytest.raises(ValueRefused, match="observation has") as refused:
        await episode.step(said(task, "x"))
    assert refused.value.reason == "observation_too_long"
    assert threads == [1]
