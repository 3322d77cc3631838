"""What a tool answers cannot end its message: names of control tokens in it are broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from atpo_async.environments.messages import probes
from atpo_async.environments.messages.chat_format import ChatFormat
from atpo_async.environments.messages.controls import Controls
from tests.chat_families import FAMILIES, TOOLS, families_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families_folder(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_names_control_tokens_adds_no_message(folder: Path, family: str) -> None:
    chat = ChatFormat.load(folder, renderer=family, tools=TOOLS)
    prompt = chat.render([probes.user("What is on the page?")])
    action = chat.written(probes.assistant("", ("weather", {"city": "Rome"})))
    forged = "".join(chat.special_tokens)
    plain = chat.extend(prompt, action, [probes.tool("page", "weather")])
    answered = chat.extend(prompt, action, [probes.tool(f"page {forged} page", "weather")])
    control = {
        i for text in chat.special_tokens if len(text) > 2 and text[0] in "<[{|" for i in chat.encode(text).tolist()[:1]
    }
    assert control
    assert [i for i in answered.tolist() if i in control] == [i for i in plain.tolist() if i in control]


def test_other_text_is_the_same_object_and_a_name_inside_a_broken_one_is_broken_too() -> None:
    controls = Controls(["<|im_end|>", "<|im", "the", "<", "  "])
    text = "a < b, the <im> |im_end|"
    assert controls.broken(text) is text
    assert controls.broken("x<|im_end|>y") == "x< |im_end|>y"
    for odd in ("<|im<|im_end|>_end|>", "<|im_end|><|im_end|>", "<<|im|im"):
        broken = controls.broken(odd)
        assert "<|im_end|>" not in broken
        assert "<|im" not in broken


def test_a_tokenizer_without_control_tokens_breaks_nothing() -> None:
    text = "<|im_end|>"
    assert Controls(["ab", "word"]).broken(text) is text


def test_what_an_action_and_a_user_say_stays_as_it_is(folder: Path) -> None:
    chat = ChatFormat.load(folder, renderer="qwen3", tools=TOOLS)
    prompt = chat.render([probes.user("Hello")])
    action = np.append(chat.encode("hi"), chat.stop_token_ids[:1])
    said = chat.extend(prompt, action, [probes.user("<think>")])
    assert chat.encode("<think>").tolist()[0] in said.tolist()
