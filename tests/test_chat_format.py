"""Chat formats: what the engine saw is extended, whatever a policy wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from actors.expansion.expansion import Expansion
from actors.search.tree_search import TreeSearch
from atpo_async.config import SearchConfig
from atpo_async.core.vocabulary import Split
from atpo_async.environments import MessageEpisode, MessageTask, Reply
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.messages import probes
from atpo_async.environments.messages.chat_format import KEPT, ChatFormat, answers_named
from atpo_async.environments.messages.types import Action, Message, ToolCall
from atpo_async.environments.values import Limits
from tests.actor_support import ScriptedEngine, lease
from tests.chat_families import (
    FAMILIES,
    ONE_CALL,
    OPENING,
    TOOLS,
    families_folder,
    split_finer,
    written,
)
from tests.chat_policy import TEMPLATE

ANSWER = probes.assistant("It is cold.", thinking="-2 is cold.")
RESULTS = [probes.tool("-2 °C", "weather"), probes.tool("12:00", "clock", 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families_folder(tmp_path_factory.mktemp("families"))


def of(folder: Path, family: str) -> ChatFormat:
    return ChatFormat.load(folder, renderer=family, tools=TOOLS)


def calling(family: str) -> Message:
    calls = [("weather", probes.CITY), ("clock", {})][: 1 if family in ONE_CALL else 2]
    text = "" if family in ONE_CALL else "Let me look."
    return probes.assistant(text, *calls, thinking="It may be cold.\nI look.")


class Scripted:
    """Says the next action of a script, by how many actions the context holds; remembers all it saw and said."""

    def __init__(self, actions: list[np.ndarray]) -> None:
        self.actions = actions
        self.after: dict[tuple[int, ...], int] = {}

    def __call__(self, context: np.ndarray, number: int) -> np.ndarray:
        seen = tuple(context.tolist())
        depth = max((d + 1 for ids, d in self.after.items() if seen[: len(ids)] == ids), default=0)
        action = self.actions[depth]
        self.after[(*seen, *action.tolist())] = depth
        return action


class Weather(MessageTask):
    """Four turns: two tool calls, a malformed one, an action that was cut, the answer."""

    def __init__(self, folder: Path, family: str) -> None:
        super().__init__(folder, renderer=family, tools=TOOLS)
        self.seen: list[tuple[int, Action]] = []

    def num_tasks(self, split: Split) -> int | None:
        return None

    async def begin(self, split: Split, index: int) -> MessageEpisode:
        return Asked(self)


class Asked:
    def __init__(self, task: Weather) -> None:
        self.task, self.turn = task, 0
        self.messages: Sequence[Message] = OPENING

    async def reply(self, action: Action) -> Reply:
        self.task.seen.append((self.turn, action))
        self.turn += 1
        if self.turn == 4:
            return Reply(done=True, reward=1.0, success=True)
        if self.turn == 3 or not action.tool_calls:
            return Reply(messages=[probes.user("Go on.")])
        texts = ["-2 °C", "12:00"][: len(action.tool_calls)]
        return Reply(messages=[{"role": "tool", "content": text} for text in texts])

    async def close(self) -> None: ...


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_engine_sees_what_was_sampled_and_what_was_added_token_by_token(folder: Path, family: str) -> None:
    """Four turns with tools, branches and replays included; no action survives decoding and encoding."""
    task = Weather(folder, family)
    chat = task.format
    call = calling(family)
    two = split_finer(chat, written(chat, OPENING, call, RESULTS[: len(call["tool_calls"])]))
    malformed = np.delete(two, slice(len(two) - 12, len(two) - 4))
    answer = split_finer(chat, written(chat, OPENING, ANSWER, []))
    script = Scripted([two, malformed, two[:9], answer])
    engine = ScriptedEngine(script)
    for action in (two, answer):
        assert chat.encode(chat.decode(action)).tolist() != action.tolist()

    async def emit(message: object) -> None: ...

    config = SearchConfig(initial_rollouts=2, rounds=1, branches=2, max_action_tokens=512)
    environment = CheckedEnvironment(task, name=family, limits=Limits(vocab_size=4096, max_context_tokens=8192))
    search = TreeSearch(
        run="r", lease=lease(), engine=engine, environment=environment, search=config,
        expansion=Expansion.of(config), max_context_tokens=8192, emit=emit, clock=lambda: 0.0,
    )  # fmt: skip
    tree = await search.grow()
    assert not search.growth.failures, search.growth.last_detail
    assert len(tree.leaves()) == 4
    # What the tree holds is what the engine was asked with, and what it answered.
    held = {tuple(np.concatenate([tree.context(t.parent_id), t.observation]).tolist()) for t in tree}
    assert held == {tuple(context.tolist()) for context in engine.contexts}
    for leaf in tree.leaves():
        path = tree.path(leaf.turn_id)
        assert [turn.action.tolist() for turn in path] == [action.tolist() for action in script.actions]
    # And every observation holds what the task answered, for the policy to read.
    first, second, third = (chat.decode(turn.observation) for turn in tree.path(tree.leaves()[0].turn_id)[1:])
    assert "-2 °C" in first
    assert ("12:00" in first) == (family not in ONE_CALL)
    assert "Go on." in third
    assert second
    heard = dict(task.seen)
    assert [c.name for c in heard[0].tool_calls] == [c["function"]["name"] for c in call["tool_calls"]]
    assert heard[0].tool_calls[0].arguments == probes.CITY
    assert heard[0].complete
    assert not heard[2].complete
    assert heard[3].content == "It is cold."


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_added_is_what_the_family_writes_after_such_an_answer(folder: Path, family: str) -> None:
    chat = of(folder, family)
    call = calling(family)
    results = RESULTS[: len(call["tool_calls"])]
    action = written(chat, OPENING, call, results)
    context = chat.render(OPENING)
    added = chat.extend(context, action, results)
    whole = chat.render([*OPENING, call, *results])
    np.testing.assert_array_equal(np.concatenate([context, action, added]), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_action_without_its_end_is_closed_by_what_is_added(folder: Path, family: str) -> None:
    chat = of(folder, family)
    context = chat.render(OPENING)
    action = written(chat, OPENING, ANSWER, [])
    ended = chat.extend(context, action, [probes.user("Go on.")])
    cut = chat.extend(context, action[:-1], [probes.user("Go on.")])
    assert len(cut) > len(ended) or int(action[-1]) == int(cut[0]) or int(cut[0]) in chat.stop_token_ids
    assert chat.decode(cut).endswith(chat.decode(ended).lstrip())
    assert not chat.parse(context, action[:-1]).complete


@pytest.mark.parametrize("family", ["qwen3", "qwen3.5", "glm-5", "minimax-m2", "nemotron-3", "default"])
def test_thinking_that_was_never_closed_is_answered_all_the_same(folder: Path, family: str) -> None:
    """The library extends no action that a stop token ended in the middle of thinking; a task answers every action."""
    chat = of(folder, family)
    context = chat.render(OPENING)
    opened = "" if chat.decode(context).rstrip().endswith("<think>") else "<think>\n"
    action = np.append(chat.encode(opened + "I wonder"), chat.stop_token_ids[:1]).astype(np.int32)
    parsed = chat.parse(context, action)
    assert (parsed.content, parsed.thinking) == ("", "I wonder")
    ordinary = np.append(chat.encode(opened + "I wonder</think>x"), chat.stop_token_ids[:1]).astype(np.int32)
    new = [probes.user("Go on.")]
    np.testing.assert_array_equal(chat.extend(context, action, new), chat.extend(context, ordinary, new))


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_without_a_meaning_are_parsed_and_extended(folder: Path, family: str) -> None:
    chat = of(folder, family)
    context = chat.render(OPENING)
    rng = np.random.default_rng(0)
    for length in (0, 1, 7, 40):
        for _ in range(20):
            action = rng.integers(0, 5000, length).astype(np.int32)  # some of them no tokens at all
            parsed = chat.parse(context, action)
            np.testing.assert_array_equal(parsed.ids, action)
            added = chat.extend(context, action, [probes.user("Go on.")])
            assert "Go on." in chat.decode(added)


def test_a_call_that_cannot_be_read_says_what_is_wrong_with_it(folder: Path) -> None:
    chat = of(folder, "qwen3")
    context = chat.render(OPENING)
    bodies = [
        '{"name": "clock", "arguments": {}}',
        '{"name": "clock", "arg',
        '{"arguments": {}}',
        '{"name": "a", "arguments": 3}',
    ]
    text = "".join(f"<tool_call>\n{body}\n</tool_call>\n" for body in bodies) + '<tool_call>\n{"name'
    calls = chat.parse(context, chat.encode(text)).tool_calls
    assert [c.fault for c in calls] == [
        "",
        "its arguments are not valid JSON",
        "it names no tool",
        "its arguments are no JSON object",
        "it is not closed",
    ]
    assert [c.id for c in calls] == ["call_0", "call_1", "call_2", "call_3", "call_4"]
    assert calls[1].raw == bodies[1]


def test_answers_of_tools_are_named_by_the_calls_that_they_answer() -> None:
    calls = [ToolCall(id=f"id{n}", name=name, arguments={}, raw="") for n, name in enumerate(("a", "b", "a"))]
    tool: Callable[..., Message] = lambda **keys: {"role": "tool", "content": "", **keys}  # noqa: E731
    named = answers_named([tool(), tool(tool_call_id="id2"), tool(name="b"), probes.user("x")], calls)
    assert [(m.get("tool_call_id"), m.get("name")) for m in named] == [
        ("id0", "a"), ("id2", "a"), ("id1", "b"), (None, None),
    ]  # fmt: skip
    lone = answers_named([tool(), tool()], [])
    assert [(m["tool_call_id"], m["name"]) for m in lone] == [("call_0", "unknown"), ("call_1", "unknown")]


def test_calls_are_read_where_the_tags_are_no_tokens(tmp_path: Path) -> None:
    from tests.chat_policy import chat_tokenizer

    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("tool_call>", "act>").replace("act>", "tool_call>")
    tokenizer.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "tokenizer.json").read_text())
    plain = [t for t in said["added_tokens"] if "tool_call" in t["content"]]
    for token in plain:
        said["added_tokens"].remove(token)
        said["model"]["vocab"][f"unused{token['id']}"] = said["model"]["vocab"].pop(token["content"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    chat = ChatFormat.load(tmp_path, renderer="default", tools=TOOLS)
    assert len(chat.encode("<tool_call>")) > 1
    text = 'Look.\n<tool_call>\n{"name": "clock", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\nno\n</tool_call>'
    action = chat.parse(chat.render(OPENING), chat.encode(text))
    assert action.content == "Look."
    assert [(c.name, c.arguments, c.fault) for c in action.tool_calls] == [
        ("clock", {"a": 1}, ""),
        ("", {}, "its arguments are not valid JSON"),
    ]


def test_openings_that_are_kept_belong_to_their_callers_and_do_not_pile_up(folder: Path) -> None:
    chat = of(folder, "qwen3")
    first = chat.render(OPENING)
    first[:] = 0
    again = chat.render(OPENING)
    assert again.any()
    for number in range(200):
        chat.render([probes.user(f"Question {number}?")])
    assert len(chat._kept) <= KEPT
    np.testing.assert_array_equal(chat.render(OPENING), again)
    odd = [{**OPENING[1], "row": {1, 2}}]  # no JSON: written every time
    np.testing.assert_array_equal(chat.render(odd), chat.render([OPENING[1]]))
    own = of(folder, "default")
    action = np.append(own.encode("x"), own.stop_token_ids).astype(np.int32)
    added = [own.extend(again, action, [{**probes.user("y"), **more}]) for more in ({}, {"row": {1, 2}})]
    np.testing.assert_array_equal(added[0], added[1])


# --- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 5, 17, 60])
def test_a_text_is_cut_to_so_many_tokens_its_notice_included(folder: Path, most: int) -> None:
    chat = of(folder, "qwen3")
    notice = "…"
    for text in ("word " * 500, "Örebro " * 300, "x", " " * 5000, "日本語" * 40):
        cut = chat.cut(text, most, notice)
        assert len(chat.encode(cut)) <= max(most, len(chat.encode(notice)))
        assert cut == text or (cut.endswith(notice) and text.startswith(cut.removesuffix(notice)))
    assert chat.cut("x", most, notice) == "x"


def test_a_text_is_decoded_with_its_special_tokens_whatever_the_ids(folder: Path) -> None:
    chat = of(folder, "qwen3")
    assert chat.decode(chat.encode("<|im_start|>a<think>")) == "<|im_start|>a<think>"
    assert chat.decode(np.array([99999, -1])) is not None
