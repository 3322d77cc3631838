"""Conversations as text: divided into messages as the format says, undivided where it is not known, never an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from atpo_async.environments.messages import probes
from atpo_async.environments.messages.chat_format import ChatFormat
from atpo_async.environments.messages.transcript import Transcriber, transcript
from atpo_async.environments.messages.types import Shown
from tests.chat_families import FAMILIES, ONE_CALL, TOOLS, families_folder, families_tokenizer, written

ASK = probes.user("What is the weather\nin Örebro?")
ANSWER = probes.assistant("It is cold.", thinking="-2 is cold.")
UNTHINKING = frozenset({"deepseek-v3", "kimi-k2", "llama-3"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families_folder(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_path_is_shown_as_the_messages_that_it_was_made_of(folder: Path, family: str) -> None:
    """Whoever shows it knows the folder alone, and no tools."""
    chat = ChatFormat.load(folder, renderer=family, tools=TOOLS)
    count = 1 if family in ONE_CALL else 2
    call = probes.assistant("", *[("weather", probes.CITY), ("clock", {})][:count], thinking="I look.")
    results = [probes.tool("-2 °C\n\nand wind", "weather"), probes.tool("12:00", "clock", 1)][:count]
    prompt = chat.render([probes.system("Be brief."), ASK])
    first = written(chat, [probes.system("Be brief."), ASK], call, results)
    heard = chat.extend(prompt, first, results)
    context = np.concatenate([prompt, first, heard])
    cut = chat.encode("<think>Hm. I")
    told = chat.extend(context, cut, [probes.user("Go on."), probes.user("Please.")])
    last = written(chat, [probes.system("Be brief."), ASK], ANSWER, [])
    turns = [(np.zeros(0, np.int32), first), (heard, cut), (told, last)]
    shown = Transcriber.load(folder, renderer=family).path(prompt, turns)
    assert [message.role for message in shown if message.role != "system"] == [
        *("user", "assistant"), *(["tool"] * count), *("assistant", "user", "user", "assistant"),
    ]  # fmt: skip
    assert "Be brief." in "".join(message.text for message in shown if message.role == "system")
    said = {role: [m for m in shown if m.role == role] for role in ("user", "tool", "assistant")}
    # Llama's tools are written in the user's message.
    assert said["user"][0].text.endswith("What is the weather\nin Örebro?")
    assert [m.text for m in said["user"][1:]] == ["Go on.", "Please."]
    assert [m.text.replace("\\n", "\n") for m in said["tool"]] == [r["content"] for r in results]
    calls = ('weather(city="Örebro", days=3, units=["°C", "m/s"])', "clock()")[:count]
    assert said["assistant"][0].tool_calls == calls
    assert said["assistant"][-1].text == "It is cold."
    if family not in UNTHINKING:
        assert [m.thinking for m in said["assistant"]] == ["I look.", "Hm. I", "-2 is cold."]


@pytest.mark.parametrize("family", ["qwen3", "glm-5", "kimi-k2", "default"])
def test_answers_given_as_examples_are_shown_with_their_thinking_apart(folder: Path, family: str) -> None:
    chat = ChatFormat.load(folder, renderer=family)
    prompt = chat.render([probes.user("One?"), probes.assistant("1."), probes.user("Two?")])
    # Kimi's opens with a system message of its own.
    assert [message for message in transcript(chat, prompt, []) if message.role != "system"] == [
        Shown(role="user", text="One?"),
        Shown(role="assistant", text="1."),
        Shown(role="user", text="Two?"),
    ]


def test_a_malformed_call_is_shown_as_it_was_written(folder: Path) -> None:
    chat = ChatFormat.load(folder, renderer="qwen3")
    shown = Transcriber(chat).action(
        chat.render([ASK]), chat.encode('Hm <tool_call>\n{"name": "clock", "ar\n</tool_call>')
    )
    assert shown == Shown(role="assistant", text="Hm", tool_calls=('{"name": "clock", "ar',))


def test_a_folder_without_a_chat_template_is_shown_undivided(tmp_path: Path) -> None:
    tokenizer = families_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    ids = np.array(tokenizer.encode("Find : boss", add_special_tokens=False), dtype=np.int32)
    shown = transcript(tmp_path, ids, [(np.zeros(0, np.int32), ids), (ids, ids)])
    assert shown == [Shown(role="", text="Find : boss")] * 4


def test_a_folder_that_is_not_there_is_shown_as_numbers(tmp_path: Path) -> None:
    assert transcript(tmp_path / "none", np.array([3, 5]), [(np.array([7]), np.array([9]))]) == [
        Shown(role="", text="3 5"),
        Shown(role="", text="7"),
        Shown(role="", text="9"),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_ids_are_too_odd_to_be_shown(folder: Path, family: str) -> None:
    rng = np.random.default_rng(1)
    transcriber = Transcriber.load(folder, renderer=family)
    for length in (0, 1, 5, 60):
        for _ in range(10):
            odd = rng.integers(-3, 900, length)
            assert isinstance(transcriber.path(odd, [(odd, odd), (odd, odd[:0])]), list)
