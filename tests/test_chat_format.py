"""Chat formats: what the engine saw is extended, whatever a policy wrote; templates are judged before they are used."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.expansion.expansion import Expansion
from actors.search.tree_search import TreeSearch
from atpo_async.config import SearchConfig
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.vocabulary import Split
from atpo_async.environments import MessageEpisode, MessageTask, Reply
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.messages import probes
from atpo_async.environments.messages.chat_format import KEPT, ChatFormat, NotExtended, answers_named
from atpo_async.environments.messages.types import Action, Message, ToolCall
from atpo_async.environments.values import Limits
from tests.actor_support import ScriptedEngine, lease
from tests.chat_families import FAMILIES, ONE_CALL, TOOLS, families_folder, families_tokenizer, split_finer, written
from tests.chat_policy import TEMPLATE

OPENING = [probes.system("Be brief."), probes.user("What is the weather in Örebro?")]
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


# --- which renderer ------------------------------------------------------------------------------------------------


def saved(where: Path, template: str | None, **more: Any) -> Path:
    tokenizer = families_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(where)
    if more:
        (where / "generation_config.json").write_text(json.dumps(more))
    return where


QWEN3 = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- HEAD }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
{{- FOOT + '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set last = namespace(at=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.at = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > last.at and (loop.last or m.reasoning_content) %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}
{{- m.content }}
{%- for c in m.tool_calls or [] %}{%- if not loop.first or m.content %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""


def qwen3_template() -> str:
    """A template that writes what the library's renderer for Qwen3 writes, which drops earlier thinking."""
    import renderers.qwen3 as qwen3

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

    return QWEN3.replace("HEAD", quoted(qwen3._TOOLS_HEADER)).replace("FOOT", quoted(qwen3._TOOLS_FOOTER))


def test_a_folder_is_recognised_by_what_its_template_writes(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of(folder, "qwen3")  # the library is loaded
    caplog.set_level(logging.INFO)
    chat = ChatFormat.load(saved(tmp_path / "a", qwen3_template()), tools=TOOLS)
    assert chat.name == "qwen3"
    assert "renderer 'qwen3', whose texts its chat template writes" in caplog.text
    quiet = ChatFormat.load(tmp_path / "a", enable_thinking=False)
    assert chat.decode(quiet.render(OPENING)).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    other = qwen3_template().replace("You may call", "You can call")
    with pytest.raises(ConfigError, match="renderer to the model's family"):
        ChatFormat.load(saved(tmp_path / "b", other), tools=TOOLS)


def test_a_model_that_the_library_knows_by_its_name_needs_no_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "Qwen" / "Qwen3-4B", None)
    monkeypatch.chdir(tmp_path)
    assert ChatFormat.load("Qwen/Qwen3-4B").name == "qwen3"


def test_no_renderer_is_looked_for_on_the_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert ChatFormat.load(folder, tools=TOOLS).name == "default"
    assert ChatFormat.load(saved(tmp_path, qwen3_template()), tools=TOOLS).name == "qwen3"
    assert asked == []


def test_nothing_heavy_is_loaded_with_the_names_that_a_task_imports() -> None:
    code = (
        "import sys; from atpo_async.environments import MessageTask, Reply, MessageEpisode; "
        "print(sorted({'torch', 'transformers', 'renderers', 'tokenizers', 'zmq'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_template_that_is_not_known_and_only_appends_is_extended_by_itself(tmp_path: Path) -> None:
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eot_id|>{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    chat = ChatFormat.load(saved(tmp_path, template, eos_token_id=[2, 0]))
    assert chat.name == "default"
    assert [chat.decode([i]) for i in chat.stop_token_ids] == ["<|eot_id|>", "<|im_end|>", "<|endoftext|>"]
    context = chat.render(OPENING)
    action = np.append(chat.encode("Cold."), chat.stop_token_ids[:1]).astype(np.int32)
    added = chat.extend(context, action, [probes.user("Go on.")])
    assert chat.decode(added) == "<|user|>Go on.<|eot_id|><|assistant|>"
    assert chat.decode(chat.extend(context, action[:-1], [probes.user("Go on.")])).startswith("<|eot_id|><|user|>")
    foreign = np.append(action[:-1], 0).astype(np.int32)
    assert chat.parse(context, foreign).content == "Cold."
    assert chat.parse(context, foreign).complete
    assert chat.decode(chat.extend(context, foreign, [probes.user("Go on.")])).startswith("<|eot_id|><|user|>")


def test_a_template_that_refuses_some_conversations_is_used_for_the_others(tmp_path: Path) -> None:
    template = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role not in ('user', 'assistant') %}{{ raise_exception('only users and assistants') }}{% endif %}
{{- 'Q: ' + m.content + ' A: ' if m.role == 'user' else m.content + eos_token }}
{%- endfor %}"""
    chat = ChatFormat.load(saved(tmp_path, template))
    context = chat.render([probes.user("Who?")])
    assert chat.decode(context) == "<|begin_of_text|>Q: Who? A: "
    action = np.append(chat.encode("I."), chat.stop_token_ids).astype(np.int32)
    assert chat.decode(chat.extend(context, action, [probes.user("Why?")])) == "Q: Why? A: "
    with pytest.raises(NotExtended, match="role 'tool': TemplateError: only users and assistants"):
        chat.extend(context, action, [probes.tool("x", "clock")])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # Earlier answers lose their thinking.
        (("if message.reasoning_content", "if message.reasoning_content and loop.last"), "drops earlier thinking"),
        # An answer that is not the latest is marked.
        (("{{- message.content or '' }}", "{{- message.content + (' ' if loop.index0 + 2 < n else '') }}"), "again"),
        # An answer has no end.
        (("{{- '<|im_end|>\\n' }}\n{%- endif %}\n{%- endfor", "{{- '\\n' }}\n{%- endif %}\n{%- endfor"), "no token of"),
        # Written for a person, opened for the policy.
        (("'<|im_start|>assistant\\n' }}{%- endif", "'<|im_start|>bot\\n' }}{%- endif"), "opens an answer otherwise"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_only_append_is_refused_with_the_place(
    tmp_path: Path, change: tuple[str, str], expected: str
) -> None:
    assert change[0] in TEMPLATE
    where = saved(tmp_path, "{%- set n = messages | length %}" + TEMPLATE.replace(*change))
    with pytest.raises(ConfigError) as refused:
        ChatFormat.load(where, tools=TOOLS)
    text = str(refused.value)
    assert expected in text
    assert str(where) in text
    assert "renderer to the model's family (one of" in text
    assert "\n" not in text


def test_thinking_may_stay_where_the_template_would_drop_it(tmp_path: Path) -> None:
    drops = TEMPLATE.replace("if message.reasoning_content", "if message.reasoning_content and loop.last")
    chat = ChatFormat.load(saved(tmp_path, drops), tools=TOOLS, thinking_retention="all")
    context = chat.render(OPENING)
    action = np.append(chat.encode("<think>\nHm.\n</think>\n\nCold."), chat.stop_token_ids).astype(np.int32)
    assert chat.parse(context, action).thinking == "Hm."
    assert chat.decode(chat.extend(context, action, [probes.user("Go on.")])).startswith("\n<|im_start|>user\nGo on.")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"renderer": "qwen4"}, "did you mean 'qwen3'?"),
        ({"renderer": "hermes"}, "renderer = 'hermes' is not known"),
        ({"renderer": "qwen3", "enable_thinkin": True}, "no option 'enable_thinkin'; did you mean 'enable_thinking'?"),
        ({"renderer": "qwen3", "enable_thinking": "maybe"}, "does not take enable_thinking = 'maybe'"),
        ({"renderer": "glm-5", "clear_thinking": True}, "earlier thinking has to stay"),
        ({"renderer": "gemma4"}, "cannot be used with the tokenizer of"),
        ({"renderer": "hy3"}, "it is for another family of models"),
        ({"enable_thinking": True}, "reads no variable 'enable_thinking'"),
        ({"tool_parser": "hermess"}, "did you mean"),
        ({"thinking_retention": "some"}, "expected 'all', or none"),
        ({"tools": [len]}, "tools[0] is builtin_function_or_method"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_with_what_there_is(
    folder: Path, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        ChatFormat.load(folder, **({"tools": TOOLS} | options))
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_template_needs_a_renderers_name(tmp_path: Path) -> None:
    where = saved(tmp_path, None)
    with pytest.raises(ConfigError, match="has no chat template: put the model's chat_template"):
        ChatFormat.load(where)
    assert ChatFormat.load(where, renderer="qwen3").name == "qwen3"


def test_a_template_without_tools_is_refused_where_there_are_some(tmp_path: Path) -> None:
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eot_id|>{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    with pytest.raises(ConfigError, match="does not show tools"):
        ChatFormat.load(saved(tmp_path, template), tools=TOOLS, tool_parser="hermes")
    with pytest.raises(ConfigError, match="set tool_parser to one of"):
        ChatFormat.load(tmp_path, tools=TOOLS)


def test_a_folder_that_is_not_there_or_has_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="there is no such folder"):
        ChatFormat.load(tmp_path / "none")
    with pytest.raises(SetupError, match="cannot be loaded"):
        ChatFormat.load(tmp_path)


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
