"""Messages to token ids and back, for one policy: opens a conversation, parses an action, extends what was sampled."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_error
from atpo_async.environments.messages import probes
from atpo_async.environments.messages.choosing import AUTO, choose
from atpo_async.environments.messages.controls import Controls
from atpo_async.environments.messages.library import FastTokenizer, Kept, RendererLike, end_ids, key_of, load_tokenizer
from atpo_async.environments.messages.types import Action, Message, ToolCall, ToolSchema

log = logging.getLogger("atpo.environments.messages")

KEPT = 64
"""So many openings are kept as ids."""

MARK = "Xqz7"
"""A text that no tool answers, to find where a message's content is in an observation."""

FAULTS = {
    "invalid_json": "its arguments are not valid JSON",
    "unclosed_block": "it is not closed",
    "missing_name": "it names no tool",
    "malformed_structure": "it is not of the form of a tool call",
}
"""The library's status of a call -> what is wrong with it, for the policy to read."""


class NotExtended(Exception):
    """A conversation cannot go on after an action with these messages; says why."""


class ChatFormat:
    """The chat format of one policy.

    Made by ``ChatFormat.load``.  An action is never decoded and encoded again: ``extend`` returns the ids that follow
    what was sampled.  Several threads may use one.

    Attributes:
        name: of the renderer; ``default`` for the tokenizer's own chat template.
        stop_token_ids: tokens that end an action.
        tools: that the policy is shown.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        renderer: RendererLike,
        *,
        name: str,
        tools: Sequence[ToolSchema] = (),
        ends: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.tools = tuple(tools)
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._shown = probes.enveloped(list(tools))
        own = renderer.get_stop_token_ids()
        self._own_stops = frozenset(own)
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *self._ending(ends)]))
        self._opening, self._parses_blindly = self._short_opening()
        self._kept: Kept[np.ndarray] = Kept(KEPT)
        self._controls = Controls(self.special_tokens)
        self._odd_actions = 0
        self._longest: int | None = None

    @classmethod
    def load(
        cls, tokenizer_folder: str | Path, *, renderer: str = AUTO, tools: Sequence[ToolSchema] = (), **options: Any
    ) -> Self:
        """The chat format of a model folder.

        Args:
            tokenizer_folder: with the tokenizer's files, and a chat template unless ``renderer`` names a family.
            renderer: ``auto``, a name of the library `renderers` (``qwen3``, ``glm-4.5``, …), or ``default``: the
                folder's own chat template.
            tools: schemas of the tools that the policy is shown.
            options: of the renderer, for instance ``enable_thinking=False``.

        Raises:
            SetupError: the tokenizer cannot be loaded.
            ConfigError: there is no such renderer or option, or the chat template cannot be extended.
        """
        tokenizer = load_tokenizer(tokenizer_folder)
        _check_tools(tools)
        chosen = choose(tokenizer, renderer, tools, options)
        return cls(tokenizer, chosen.renderer, name=chosen.name, tools=tools, ends=end_ids(tokenizer_folder))

    # --- messages -> ids ---------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message]) -> np.ndarray:
        """int32[P]: a conversation, ending where the policy is to speak.  Raises what the renderer raises.

        All chains of a tree open alike, so that the latest ``KEPT`` are kept; each caller has an array of its own.
        """
        key = key_of(messages)
        ids = self._kept.get(key) if key else None
        if ids is None:
            made = self._renderer.render_ids(list(messages), tools=self._shown, add_generation_prompt=True)
            ids = np.array(made, dtype=np.int32)
            if key:
                self._kept.put(key, ids)
        return ids.copy()

    def written(self, message: Message) -> np.ndarray:
        """int32[T]: an assistant's message as an action, its stop token included.

        Not for what a policy sampled, which goes on as it is: for demonstrations, and for people who play a task.
        """
        asked = [probes.user("What time is it?")]
        opening = self._renderer.render_ids(asked, tools=self._shown, add_generation_prompt=True)
        whole = self._renderer.render_ids([*asked, message], tools=self._shown, add_generation_prompt=False)
        if whole[: len(opening)] != opening:
            text = message["content"] if isinstance(message.get("content"), str) else ""
            return np.array([*self._tokenizer.encode(text), *self.stop_token_ids[:1]], dtype=np.int32)
        ids = whole[len(opening) :]
        ends = [at for at, i in enumerate(ids) if i in self._own_stops]
        # Some formats end an answer with the first token of what follows it.
        said = ids[: ends[-1] + 1] if ends else [*ids, self.stop_token_ids[0]]
        return np.array(said, dtype=np.int32)

    def text_of(self, messages: Sequence[Message], *, opens: bool) -> str:
        """A conversation as text; ``opens``: up to where the policy is to speak.  Raises what the renderer raises."""
        ids = self._renderer.render_ids(list(messages), tools=self._shown, add_generation_prompt=opens)
        return self.decode(ids)

    def extend(self, context_ids: np.ndarray, action_ids: np.ndarray, new_messages: Sequence[Message]) -> np.ndarray:
        """int32[O]: what follows a sampled action, up to where the next one begins.

        An action that no stop token ended is closed first, as the renderer closes one.  Names of control tokens in
        what a tool answers are broken (``controls.py``), so that it stays one message.

        Args:
            context_ids: int32[C], all that the policy was shown before the action.
            action_ids: int32[T], as it was sampled.
            new_messages: of tools and users, at least one.

        Raises:
            NotExtended: the renderer does not allow it.
        """
        if not new_messages:
            raise NotExtended("there is no message to extend the conversation with")
        messages = [self._inert(message) for message in self._named(context_ids, action_ids, new_messages)]
        prompt, action = self._tail(context_ids), np.asarray(action_ids).tolist()
        added = self._bridged(prompt, action, messages)
        if added is None:
            added = self._after_a_stand_in(prompt, action, messages)
        return np.array(added, dtype=np.int32)

    def _inert(self, message: Message) -> Message:
        text = message["content"]
        if message["role"] != "tool" or not isinstance(text, str) or (broken := self._controls.broken(text)) is text:
            return message
        return {**message, "content": broken}

    def _bridged(self, prompt: list[int], action: list[int], messages: list[Message]) -> list[int] | None:
        """What follows ``prompt + action``; None where the renderer does not extend exactly that."""
        try:
            made = self._renderer.bridge_to_next_turn(prompt, action, messages, tools=self._shown)
        except Exception as exc:
            raise NotExtended(f"renderer {self.name!r} cannot write {_roles(messages)}: {of_error(exc)}") from exc
        if made is None:
            return None
        ids: list[int] = made.token_ids
        sampled = len(prompt) + len(action)
        # A renderer drops, for instance, what follows a stop token within an action.
        return ids[sampled:] if ids[:sampled] == [*prompt, *action] else None

    def _after_a_stand_in(self, prompt: list[int], action: list[int], messages: list[Message]) -> list[int]:
        """What follows the same stop token after an ordinary answer.

        A renderer does not extend, for instance, an action that a stop token ended in the middle of thinking; the task
        answers every action all the same, and what follows a stop token does not depend on what came before it.
        """
        stop = action[-1:] if action and action[-1] in self._own_stops else []
        for text in ("</think>", "</think>\n\nok", "ok"):
            stand_in = [*self._tokenizer.encode(text), *stop]
            if (added := self._bridged(prompt, stand_in, messages)) is not None:
                return added
        kept = getattr(self._renderer, "effective_thinking_retention", "all")
        why = "" if kept == "all" else f" with thinking_retention = {kept!r}: set it to 'all'"
        raise NotExtended(f"renderer {self.name!r} does not extend a conversation by {_roles(messages)}{why}")

    def _named(self, context_ids: np.ndarray, action_ids: np.ndarray, messages: Sequence[Message]) -> list[Message]:
        """Messages of tools have the name and the id of the call that they answer."""
        if all(m["role"] != "tool" or (m.get("name") and m.get("tool_call_id")) for m in messages):
            return list(messages)
        return answers_named(messages, self.parse(context_ids, action_ids).tool_calls)

    def contents(
        self, context_ids: np.ndarray, action_ids: np.ndarray, observation: np.ndarray, messages: Sequence[Message]
    ) -> list[str] | None:
        """The contents with which ``messages`` give ``observation``.

        None where there are none, where they are not certain, or where they do not give it to the token.
        """
        marks = [f"{MARK}{number}{MARK}" for number in range(len(messages))]
        try:
            marked = self.extend(context_ids, action_ids, _with_contents(messages, marks))
            form = re.split("|".join(map(re.escape, marks)), self.decode(marked))
            if len(form) != len(messages) + 1:
                return None
            said = _between(form, self.decode(observation))
            again = None if said is None else self.extend(context_ids, action_ids, _with_contents(messages, said))
        except NotExtended:
            return None
        return said if again is not None and np.array_equal(again, observation) else None

    # --- ids -> messages ---------------------------------------------------------------------------------------

    def parse(self, context_ids: np.ndarray, action_ids: np.ndarray) -> Action:
        """An action as thinking, content and tool calls.  Never raises for what a policy wrote.

        Args:
            context_ids: int32[C], all that the policy was shown before the action.
            action_ids: int32[T], as it was sampled.
        """
        ids = np.asarray(action_ids, dtype=np.int32)
        listed = ids.tolist()
        complete = bool(listed) and listed[-1] in self.stop_token_ids
        read = listed[:-1] if complete and listed[-1] not in self._own_stops else listed
        try:
            tail = self._tail(context_ids)
            seen = [] if self._parses_blindly and tail == self._opening else tail
            said = self._renderer.parse_response(read, tools=self._shown, prompt_ids=seen)
            return Action(
                ids=ids,
                content=(said.content or "").strip(),
                thinking=(said.reasoning_content or "").strip(),
                tool_calls=tuple(_call(call, n, typed=bool(self.tools)) for n, call in enumerate(said.tool_calls)),
                complete=complete,
            )
        except Exception as exc:
            self._odd_actions += 1
            if self._odd_actions == 1:
                log.warning("renderer %r cannot parse an action, taken as text: %s", self.name, of_error(exc))
            return Action(ids=ids, content=self.decode(read), thinking="", complete=complete)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of the tokens that stand for themselves."""
        return tuple(self._tokenizer.added_tokens())

    # --- text --------------------------------------------------------------------------------------------------

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Text of ids, special tokens kept.  Ids that the tokenizer does not know have no text."""
        try:
            return self._tokenizer.decode(np.asarray(ids).tolist())
        except Exception as exc:
            return f"({len(ids)} token ids that cannot be decoded: {of_error(exc)})"

    def encode(self, text: str) -> np.ndarray:
        """int32[N]: ids of a text alone, in which names of special tokens become those tokens."""
        return np.array(self._tokenizer.encode(text), dtype=np.int32)

    def cut(self, text: str, max_tokens: int, notice: str = "") -> str:
        """``text`` where it has at most ``max_tokens`` tokens, else its beginning and ``notice``, together as long."""
        near = max_tokens * self._most_characters()
        if len(text) <= near and len(self._tokenizer.encode(text)) <= max_tokens:
            return text
        budget = max(0, max_tokens - len(self._tokenizer.encode(notice)))
        _, ends = self._tokenizer.offsets(text[: near + 1])
        for keep in range(min(budget, len(ends)), 0, -1):
            shortened = text[: ends[keep - 1]] + notice
            if len(self._tokenizer.encode(shortened)) <= max_tokens:
                return shortened
        return notice

    def _most_characters(self) -> int:
        """Of one token, at most."""
        if self._longest is None:
            self._longest = max(map(len, self._tokenizer.plain.get_vocab()), default=1)
        return self._longest

    # --- what is constant --------------------------------------------------------------------------------------

    def _tail(self, context_ids: np.ndarray) -> list[int]:
        """What of the context a renderer looks at: the opening of the answer, where that has been shown to suffice."""
        ids = np.asarray(context_ids)
        if self._opening is None:
            return [*ids.tolist()]
        tail: list[int] = ids[max(0, len(ids) - len(self._opening)) :].tolist()
        return tail if tail == self._opening else [*ids.tolist()]

    def _short_opening(self) -> tuple[list[int] | None, bool]:
        """The ids that open an answer, where the renderer extends and parses by them alone as by the whole context;
        and whether it parses by nothing alike."""
        asked = [probes.system("Be brief."), probes.user("What time is it?")]
        try:
            whole = self._renderer.render_ids(asked, tools=self._shown, add_generation_prompt=True)
            closed = self._renderer.render_ids(asked, tools=self._shown, add_generation_prompt=False)
            opening = whole[len(closed) :]
            if whole[: len(closed)] != closed or not all(self._alike(a, opening, whole) for a in self._samples()):
                return None, False
            parse = self._renderer.parse_response
            blind = all(parse(a, prompt_ids=[]) == parse(a, prompt_ids=opening) for a in self._samples())
        except Exception as exc:  # not every format has system messages, or tools
            log.debug("renderer %r is given whole contexts: %s", self.name, of_error(exc))
            return None, False
        return opening, blind

    def _samples(self) -> Iterator[list[int]]:
        for text in ("Noon.", "Hm.</think>\n\nNoon.", "<think>\nHm.\n</think>\n\nNoon.", "<think>\nHm."):
            ids = self._tokenizer.encode(text)
            yield from (ids, [*ids, *self.stop_token_ids[:1]])

    def _alike(self, action: list[int], opening: list[int], whole: list[int]) -> bool:
        parse = self._renderer.parse_response
        news = [probes.user("And now?")], [probes.tool("12:00", "clock"), probes.tool("1", "clock", 1)]
        return parse(action, tools=self._shown, prompt_ids=opening) == parse(
            action, tools=self._shown, prompt_ids=whole
        ) and all(self._bridged(opening, action, new) == self._bridged(whole, action, new) for new in news)

    def _ending(self, ends: Sequence[int]) -> list[int]:
        """Those of the model's own end tokens that do end an answer: none that is written within one."""
        inside: set[int] = set()
        call = probes.assistant("Let me look.", ("clock", {}), thinking="Hm.")
        for answer in (probes.assistant("Noon.", thinking="Hm."), call):
            try:
                ids = self._renderer.render_ids([probes.user("What time is it?"), answer], tools=self._shown)
            except Exception as exc:  # not every template writes calls
                log.debug("renderer %r does not write %s: %s", self.name, answer, of_error(exc))
                continue
            last = max((at for at, i in enumerate(ids) if i in self._own_stops), default=len(ids))
            inside.update(ids[:last])
        return [i for i in ends if i not in inside]


def _between(form: Sequence[str], text: str) -> list[str] | None:
    """What ``text`` has between the parts of ``form``; None where it does not have these, or in more than one way."""
    found = [re.fullmatch(gap.join(map(re.escape, form)), text, re.DOTALL) for gap in ("(.*)", "(.*?)")]
    said = [list(match.groups()) for match in found if match is not None]
    return said[0] if said and said[0] == said[-1] else None


def _with_contents(messages: Sequence[Message], contents: Sequence[str]) -> list[Message]:
    return [{**message, "content": text} for message, text in zip(messages, contents, strict=True)]


def answers_named(messages: Sequence[Message], calls: Sequence[ToolCall]) -> list[Message]:
    """Messages of tools that name neither a call nor its id are answers to ``calls`` in their order."""
    by_id = {call.id: call for call in calls}
    waiting = [call for call in calls if call.id not in {m.get("tool_call_id") for m in messages}]
    named = []
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            call = by_id.get(str(message.get("tool_call_id")))
            if call is None and waiting and not message.get("tool_call_id"):
                call = next((c for c in waiting if c.name == message.get("name")), waiting[0])
                waiting.remove(call)
            named.append(
                {
                    **message,
                    "name": message.get("name") or (call.name if call else "") or "unknown",
                    "tool_call_id": message.get("tool_call_id") or (call.id if call else f"call_{number}"),
                }
            )
        else:
            named.append(message)
    return named


def _call(call: Any, number: int, *, typed: bool) -> ToolCall:
    """A call as the library parsed it, with what is wrong with its form; ``typed``: the tools' schemas are known."""
    arguments = call.arguments if isinstance(call.arguments, dict) else {}
    fault = FAULTS.get(str(call.status), "")
    if not typed and arguments and str(call.status) == "invalid_json":
        fault = ""  # without a schema, a text that is no JSON is a text
    if not fault and not isinstance(call.arguments, dict):
        fault = "its arguments are no JSON object"
    if not fault and not call.name:
        fault = FAULTS["missing_name"]
    name = call.name if isinstance(call.name, str) else ""
    return ToolCall(
        id=call.id or f"call_{number}", name=name, arguments=arguments, raw=call.raw or "", fault=fault
    )  # fmt: skip


def _check_tools(tools: Sequence[ToolSchema]) -> None:
    for number, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or "parameters" not in inner:
            raise ConfigError(
                f"tools[{number}] is {type(tool).__name__}; expected a schema: name, description and parameters "
                "(JSON schema); @tool makes one of a function"
            )


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(f"a message of role {message['role']!r}" for message in messages[:3])
