"""Which renderer a chat format takes: templates are judged before they are used, and refused with the way out."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.environments.messages import probes
from atpo_async.environments.messages.chat_format import ChatFormat, NotExtended
from tests.chat_families import OPENING, TOOLS, families_folder, families_tokenizer
from tests.chat_policy import TEMPLATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families_folder(tmp_path_factory.mktemp("families"))


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
    ChatFormat.load(folder, renderer="qwen3", tools=TOOLS)  # the library is loaded
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
