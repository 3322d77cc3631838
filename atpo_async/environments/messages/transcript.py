"""Conversations as text, for people: token ids divided into messages where the chat format is known."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atpo_async.core.texts import of_error
from atpo_async.environments.messages import probes
from atpo_async.environments.messages.chat_format import ChatFormat
from atpo_async.environments.messages.library import FastTokenizer, load_tokenizer
from atpo_async.environments.messages.types import Message, Shown, ToolCall

log = logging.getLogger("atpo.environments.messages")

MARKS = ("Xqz1", "Xqz2", "Xqz3")
"""Contents that no conversation has, to find what a format writes around them."""

NOTHING = np.zeros(0, dtype=np.int32)

NAME = "Xqzn"
"""A tool of that name, likewise."""


def transcript(
    source: ChatFormat | str | Path,
    prompt_ids: np.ndarray,
    turns: Iterable[tuple[np.ndarray, np.ndarray]],
) -> list[Shown]:
    """A path of a tree as messages.  Never raises, whatever the ids are.

    Args:
        source: the chat format, or the policy's folder.
        prompt_ids: int32[P].
        turns: of the path in order: int32[O], what was observed before an action, and int32[T], the action.
    """
    return (Transcriber(source) if isinstance(source, ChatFormat) else Transcriber.load(source)).path(prompt_ids, turns)


class Transcriber:
    """Makes messages of the ids of one policy.  Never raises.

    Args:
        source: the chat format; or a tokenizer alone, or nothing, and then ids become text or numbers, undivided.
    """

    def __init__(self, source: ChatFormat | FastTokenizer | None) -> None:
        self._chat = source if isinstance(source, ChatFormat) else None
        self._tokenizer = source if isinstance(source, FastTokenizer) else None
        self._division = None if self._chat is None else Division.of(self._chat)

    @classmethod
    def load(cls, folder: str | Path, *, renderer: str = "auto", **options: Any) -> Transcriber:
        """Of a policy's folder: its chat format; where it has none, its tokenizer."""
        try:
            return cls(ChatFormat.load(folder, renderer=renderer, **options))
        except Exception as exc:
            log.info("conversations of %s are shown undivided: %s", folder, of_error(exc))
        try:
            return cls(load_tokenizer(folder))
        except Exception as exc:
            log.info("token ids of %s are shown as numbers: %s", folder, of_error(exc))
            return cls(None)

    def path(self, prompt_ids: np.ndarray, turns: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[Shown]:
        """Prompt, actions and observations of a path, in order."""
        shown, context, before = list(self.prompt(prompt_ids)), np.asarray(prompt_ids), NOTHING
        for observation, action in turns:
            shown += self.observation(observation, before)
            context = np.concatenate([context, np.asarray(observation)])
            shown.append(self.action(context, action))
            context, before = np.concatenate([context, np.asarray(action)]), np.asarray(action)
        return shown

    def prompt(self, ids: np.ndarray) -> tuple[Shown, ...]:
        """The messages that open a conversation."""
        return self._messages(self.text(ids), "", opens=True)

    def observation(self, ids: np.ndarray, action_ids: np.ndarray) -> tuple[Shown, ...]:
        """The messages of an observation, which followed an action.

        In some formats the token that ends an action is the first of the message that follows it.
        """
        return self._messages(self.text(ids), self.text(action_ids[-1:]), opens=False)

    def _messages(self, text: str, before: str, *, opens: bool) -> tuple[Shown, ...]:
        if not text.strip():
            return ()
        try:
            found = () if self._division is None else tuple(self._division.messages(before + text, opens=opens))
        except Exception as exc:
            log.debug("messages are shown undivided: %s", of_error(exc))
            found = ()
        return found or (Shown(role="", text=text),)

    def action(self, context_ids: np.ndarray, ids: np.ndarray) -> Shown:
        """An action, which followed ``context_ids``."""
        if self._chat is None:
            return Shown(role="", text=self.text(ids))
        try:
            said = self._chat.parse(context_ids, ids)
        except Exception:
            return Shown(role="assistant", text=self.text(ids))
        calls = tuple(call_text(call) for call in said.tool_calls)
        return Shown(role="assistant", text=said.content, thinking=said.thinking, tool_calls=calls)

    def text(self, ids: np.ndarray) -> str:
        """Text of ids, special tokens kept; the ids themselves without a tokenizer."""
        listed = np.asarray(ids).tolist()
        source = self._chat or self._tokenizer
        try:
            return " ".join(map(str, listed)) if source is None else source.decode(listed)
        except Exception:
            return " ".join(map(str, listed))


def call_text(call: ToolCall) -> str:
    """``name(argument="value")``, or the text of a malformed call."""
    if call.fault or not call.name:
        return call.raw
    given = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    return f"{call.name}({given})"


# --- what a format writes around messages --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opener:
    """What a format writes before a message of one role, as a pattern."""

    role: str
    pattern: str


class Division:
    """Where messages begin and end in the text of one chat format.

    Args:
        openers: of every role that could be found out.
        closers: what may end a message, longest first.
        head: what every conversation begins with.
        special: tokens of the format.
    """

    def __init__(self, openers: Sequence[Opener], closers: Sequence[str], head: str, special: Sequence[str]) -> None:
        self._roles = [opener.role for opener in openers]
        self._openers = re.compile("|".join(f"({opener.pattern})" for opener in openers))
        self._closers = tuple(closers)
        self._head = head
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    @classmethod
    def of(cls, chat: ChatFormat) -> Division | None:
        """By what the format writes for a few messages; None where it does not tell messages apart."""
        try:
            return cls(*_around(Writer(chat)), chat.special_tokens)
        except Exception as exc:
            log.info("conversations of renderer %r are shown undivided: %s", chat.name, of_error(exc))
            return None

    def messages(self, text: str, *, opens: bool) -> Iterator[Shown]:
        """The messages of a prompt (``opens``) or an observation; the opening of an answer to come is none."""
        found = list(self._openers.finditer(text))
        if not found:
            return
        before = self._closed(text[: found[0].start()].removeprefix(self._head))
        if opens and self._special.sub("", before).strip():
            yield Shown(role="system", text=before)
        for at, match in enumerate(found):
            last = at + 1 == len(found)
            role = self._roles[(match.lastindex or 1) - 1]
            if last and role == "assistant":
                return
            said = self._closed(text[match.end() : len(text) if last else found[at + 1].start()])
            thinking, closed, rest = said.partition("</think>") if role == "assistant" else ("", "", said)
            if closed:
                yield Shown(role=role, text=rest.strip(), thinking=thinking.replace("<think>", "").strip())
            else:
                yield Shown(role=role, text=said)

    def _closed(self, text: str) -> str:
        for closer in self._closers:
            if closer and text.endswith(closer):
                return text.removesuffix(closer)
        return text


class Writer:
    """What a format writes for messages, as text."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat

    def __call__(self, *messages: Message, opens: bool = False) -> str:
        return self._chat.text_of(messages, opens=opens)

    def answers(self, *messages: Message) -> str:
        """What follows an action that these answer."""
        chat = self._chat
        context = chat.render([probes.user(MARKS[0])])
        action = np.append(chat.encode("ok</think>ok"), chat.stop_token_ids[:1])
        return chat.decode(chat.extend(context, action, messages))


def _around(write: Writer) -> tuple[list[Opener], list[str], str]:
    """Openers, closers and the head.  Raises ValueError where users' messages are not told apart."""
    one, two, three = MARKS
    ask, again = probes.user(one), probes.user(two)
    after = write(ask).rpartition(one)[2]
    between = _inside(write(ask, again), one, two)
    opener = between.removeprefix(after)
    if not opener.strip() or not between.startswith(after):
        raise ValueError(f"it writes {between!r} between two messages of a user")
    head = write(ask).partition(one)[0].removesuffix(opener)
    openers, closers = [Opener("user", re.escape(opener))], [after]
    opened = write(ask, opens=True).removeprefix(write(ask))
    answered = _inside(write(ask, probes.assistant(three)), one, three).removeprefix(after)
    start = (_common(opened, answered) or opened).partition("<think")[0]
    openers.append(Opener("assistant", re.escape(re.sub(r"</?\Z", "", start))))
    closers.append(write(ask, probes.assistant(three)).rpartition(three)[2])
    for role_of in (_system, _tools):
        try:
            more, ends = role_of(write, opener, head)
        except Exception as exc:
            log.debug("a role is not told apart: %s", of_error(exc))
            continue
        openers += more
        closers += ends
    # The longest first: one may begin as another does.
    openers.sort(key=lambda found: -len(found.pattern))
    return openers, sorted(set(closers), key=len, reverse=True), head


def _system(write: Writer, opener: str, head: str) -> tuple[list[Opener], list[str]]:
    rules, ask = probes.system(MARKS[0]), probes.user(MARKS[1])
    text = write(rules, ask)
    end = _inside(text, MARKS[0], MARKS[1]).removesuffix(opener)
    begin = text.partition(MARKS[0])[0]
    alike = re.sub("user", "system", opener)
    start = alike if alike != opener and alike in begin else begin.removeprefix(_common(begin, head))
    return ([Opener("system", re.escape(start))] if start.strip() else []), [end]


def _tools(write: Writer, opener: str, head: str) -> tuple[list[Opener], list[str]]:
    """A tool's name and its call's id may be in what is written before its answer."""
    one, two = MARKS[1], MARKS[2]
    text = write.answers(probes.tool(one, NAME), probes.tool(two, NAME, 1))
    opened = write(probes.user(MARKS[0]), opens=True).removeprefix(write(probes.user(MARKS[0])))
    end = text.rpartition(two)[2].removesuffix(opened)
    between = _inside(text, one, two)
    second = between.removeprefix(end) if end and between.startswith(end) else between
    return [Opener("tool", _named(text.partition(one)[0].lstrip())), Opener("tool", _named(second))], [end]


def _named(opener: str) -> str:
    """A pattern of an opener, with any tool's name and call's id in it."""
    if not opener.strip():
        raise ValueError("nothing is written before a tool's answer")
    ids = re.escape(opener).replace(re.escape(f"functions.{NAME}:0"), "[^\\n<>]*?")
    ids = ids.replace(re.escape(f"functions.{NAME}:1"), "[^\\n<>]*?")
    return ids.replace(re.escape(NAME), "[^\\n<>]*?")


def _inside(text: str, one: str, other: str) -> str:
    return text.partition(one)[2].partition(other)[0]


def _common(one: str, other: str) -> str:
    """What both begin with."""
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]
