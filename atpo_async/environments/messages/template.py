"""A renderer over a tokenizer's own chat template, where that template only ever appends."""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_error
from atpo_async.environments.messages import probes
from atpo_async.environments.messages.library import TEMPLATE, FastTokenizer, Kept, configured, key_of, library, nearest
from atpo_async.environments.messages.types import Message, ToolSchema

RETENTION = "thinking_retention"
MARK = "Xqz7"
"""What the template is given as an answer's text, to find what follows an answer."""

KEPT, KEPT_CHARACTERS = 1024, 8192
"""The ids of so many replies are kept, of at most so many characters each."""

PARSERS_BY_MARK = (
    ("<arg_key>", "glm"),
    ("<function=", "qwen3.5"),
    ("<｜tool▁calls▁begin｜>", "deepseek-v3"),
    ("<tool_call>", "qwen3"),
)
"""What a template writes around a tool call -> the library's parser for it; the first that is found."""

HERMES = "hermes"
"""Another name for JSON between ``<tool_call>`` and ``</tool_call>``, which the library calls qwen3."""

ALWAYS_GIVEN = frozenset(
    {"messages", "tools", "add_generation_prompt", "documents", "raise_exception", "strftime_now"}
    | {"bos_token", "eos_token", "pad_token", "unk_token", "namespace", "range", "dict"}
)
"""Variables of a template that are no options."""

_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)


class TemplateRefused(Exception):
    """The template cannot be extended: why, as the end of a sentence about it."""


@dataclass(frozen=True, slots=True)
class Extended:
    """Ids of a conversation after an extension."""

    token_ids: list[int]


class TemplateRenderer:
    """Renders by the tokenizer's Jinja template, and extends by what the template adds after an answer.

    Args:
        tokenizer: with a chat template.
        tools: that the policy may call.
        options: variables of the template (``enable_thinking``, …), ``tool_parser``, ``reasoning_parser``, and
            ``thinking_retention = "all"``: earlier thinking stays, though the template would drop it.

    Raises:
        ConfigError: an option that the template does not read, tools that it cannot show or whose calls cannot be read.
        TemplateRefused: it does not only append.
    """

    def __init__(self, tokenizer: FastTokenizer, tools: Sequence[ToolSchema], options: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._template = str(tokenizer.plain.chat_template)
        self._tools = probes.enveloped(list(tools))
        self._keeps_thinking = _retention(options)
        given = {name: value for name, value in options.items() if name != RETENTION}
        parser = given.pop("tool_parser", None)
        reasoning = given.pop("reasoning_parser", None)
        self._check_variables(given)
        self._variables = given
        self._parser = self._parser_name(parser)
        config = configured(TEMPLATE, {"tool_parser": self._parser, "reasoning_parser": reasoning})
        self._parsing = library().RENDERER_REGISTRY[TEMPLATE](tokenizer, config)
        self._calls_are_text = self._parser == "qwen3" and "<tool_call>" not in tokenizer.plain.get_vocab()
        self._close, self._close_id = self._find_close()
        self._kept: Kept[tuple[int, ...]] = Kept(KEPT)
        self._head = functools.lru_cache(maxsize=64)(self._rendered_head)
        if self._tools and self.text(_OPENING) == self.text(_OPENING, tools=None):
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path} does not show tools (it writes the same with and "
                "without): describe them in the system message and read the calls yourself, or use another template"
            )
        self._prove()

    # --- texts -------------------------------------------------------------------------------------------------

    def text(self, messages: Sequence[Message], *, opens: bool = True, tools: Any = ...) -> str:
        """What the template writes.  Raises what the template raises."""
        return template_text(
            self._tokenizer, messages, opens=opens, tools=self._tools if tools is ... else tools, **self._variables
        )

    def _find_close(self) -> tuple[str, int]:
        """What the template writes at the end of an answer, and the token that it ends with."""
        written = self.text([probes.user("a"), probes.assistant(MARK)], opens=False)
        after = written.rpartition(MARK)[2]
        places = {text: at for text in self._tokenizer.added_tokens() if text and (at := after.find(text)) >= 0}
        if not places:
            raise TemplateRefused(f"ends an answer with no token of its own (it writes {after[:40]!r} after one)")
        first = min(places, key=lambda text: (places[text], -len(text)))
        lead = after[: places[first]]
        if lead.strip():
            raise TemplateRefused(f"ends an answer with text of its own, {lead[:40]!r}, before {first!r}")
        return lead + first, self._tokenizer.added_tokens()[first]

    def _rendered_head(self, calls: tuple[tuple[str, str], ...]) -> str:
        """A question and an answer, with tool calls of these (id, name)."""
        return self.text(_answered(calls), opens=False)

    def _suffix(self, new_messages: Sequence[Message]) -> str:
        """What the template writes after an answer's close when ``new_messages`` follow.  Raises what it raises."""
        calls = tuple(
            (str(m.get("tool_call_id", "")), str(m.get("name", ""))) for m in new_messages if m["role"] == "tool"
        )
        head = self._head(calls)
        whole = self.text([*_answered(calls), *new_messages])
        if not whole.startswith(head):
            raise TemplateRefused(f"writes an answer again when messages follow: {probes.difference(head, whole)}")
        return whole[head.rindex(self._close) + len(self._close) :]

    # --- as the library's renderers ----------------------------------------------------------------------------

    def render_ids(
        self, messages: list[Message], *, tools: list[ToolSchema] | None = None, add_generation_prompt: bool = False
    ) -> list[int]:
        return self._tokenizer.encode(self.text(messages, opens=add_generation_prompt, tools=tools))

    def get_stop_token_ids(self) -> list[int]:
        return [self._close_id]

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: list[int],
        previous_completion_ids: list[int],
        new_messages: list[Message],
        *,
        tools: list[ToolSchema] | None = None,
    ) -> Extended:
        """Ids so far, the close where the action has none, and what the template adds.  Raises what it raises."""
        closed = bool(previous_completion_ids) and previous_completion_ids[-1] == self._close_id
        added = self._after_close(new_messages)
        start = added.index(self._close_id) + 1 if closed else 0
        return Extended([*previous_prompt_ids, *previous_completion_ids, *added[start:]])

    def _after_close(self, new_messages: list[Message]) -> tuple[int, ...]:
        """Ids of an answer's close and of what follows it.  Branches and replays ask for the same again and again."""
        key = key_of(new_messages)
        found = self._kept.get(key) if key else None
        if found is None:
            # With the close in front, so that the tokenizer splits the text as in the middle of a conversation.
            found = tuple(self._tokenizer.encode(self._close + self._suffix(new_messages)))
            if 0 < len(key) <= KEPT_CHARACTERS:
                self._kept.put(key, found)
        return found

    def parse_response(
        self, token_ids: list[int], *, tools: list[ToolSchema] | None = None, prompt_ids: list[int] | None = None
    ) -> Any:
        ids = token_ids[:-1] if token_ids and token_ids[-1] == self._close_id else token_ids
        said = self._parsing.parse_response(ids, tools=tools, prompt_ids=prompt_ids)
        if self._calls_are_text and not said.tool_calls:
            said.tool_calls = list(text_calls(said.content))
            said.content = _CALL.sub("", said.content)
        return said

    # --- what is checked at the start --------------------------------------------------------------------------

    def _check_variables(self, given: Mapping[str, Any]) -> None:
        read = variables(self._template)
        for name in given:
            if name not in read:
                raise ConfigError(
                    f"the chat template of {self._tokenizer.name_or_path} reads no variable {name!r}"
                    f"{nearest(name, sorted(read))}; it reads {', '.join(sorted(read)) or 'none'}; options of the "
                    f"layer itself: tool_parser, reasoning_parser, {RETENTION}"
                )

    def _parser_name(self, asked: str | None) -> str | None:
        known = sorted(importlib.import_module("renderers.parsers").TOOL_PARSERS)
        if asked is not None:
            if asked not in (*known, HERMES):
                hint = nearest(asked, [*known, HERMES])
                raise ConfigError(f"tool_parser = {asked!r} is not known{hint}; known: {', '.join(known)}, {HERMES}")
            return "qwen3" if asked == HERMES else asked
        found = next((parser for mark, parser in PARSERS_BY_MARK if mark in self._template), None)
        if found is None and self._tools:
            raise ConfigError(
                f"the chat template of {self._tokenizer.name_or_path} writes tool calls in a form that is not known "
                f"here: set tool_parser to one of {', '.join(known)}, or use renderer = … of the model's family"
            )
        return found

    def _prove(self) -> None:
        """Raises TemplateRefused unless whole conversations are their parts, one after another."""
        for conversation in self._conversations():
            self._prove_one(conversation)

    def _conversations(self) -> Iterator[list[Message]]:
        thinking = "" if self._keeps_thinking else "Hm. I think."
        ask, more = probes.user("What time is it?"), probes.user("And now?")
        rules = [probes.system("Be brief.")] if self._writes([probes.system("Be brief."), ask]) else []
        yield [*rules, ask, probes.assistant("Noon."), more, probes.assistant("Later."), probes.user("Thanks.")]
        if self._tools:
            call = probes.assistant("A look.", ("clock", {}), thinking=thinking)
            calls = probes.assistant("", ("clock", {}), ("weather", probes.CITY))
            answers = [probes.tool("12:00", "clock"), probes.tool("-2", "weather", 1)]
            yield [*rules, ask, call, answers[0], calls, *answers, probes.assistant("Noon."), more]
        if thinking:
            yield [ask, probes.assistant("Noon.", thinking=thinking), more, probes.assistant("Later."), more]

    def _writes(self, messages: Sequence[Message]) -> bool:
        """Whether the template takes such a conversation: some have no system message."""
        try:
            return bool(self.text(messages))
        except Exception:
            return False

    def _prove_one(self, conversation: list[Message]) -> None:
        try:
            whole = self.text(conversation)
            for at, message in enumerate(conversation):
                if message["role"] == "assistant":
                    following = conversation[at + 1 :]
                    until = next((i for i, m in enumerate(following) if m["role"] == "assistant"), len(following))
                    self._prove_turn(conversation[: at + 1], following[:until], whole)
        except TemplateRefused:
            raise
        except Exception as exc:
            raise TemplateRefused(f"fails on a conversation of {_roles(conversation)}: {of_error(exc)}") from exc

    def _prove_turn(self, so_far: list[Message], following: list[Message], whole: str) -> None:
        """One answer: it follows the opening, stays as it was written, and what is added to it is known."""
        opened = self.text(so_far[:-1])
        answered = self.text(so_far, opens=False)
        if not self._keeps_thinking and not answered.startswith(opened):
            raise TemplateRefused(
                f"opens an answer otherwise than it writes one that was given: {probes.difference(opened, answered)}"
            )
        if not whole.startswith(answered):
            drops = " (it drops earlier thinking)" if "reasoning_content" in so_far[-1] else ""
            raise TemplateRefused(
                f"writes an answer again when the conversation goes on{drops}: {probes.difference(answered, whole)}"
            )
        suffix = self._suffix(following)
        closed = answered.rstrip().removesuffix(self._close.strip())
        if not self.text([*so_far, *following]).endswith(self._close + suffix) or closed == answered.rstrip():
            raise TemplateRefused(f"does not end every answer with {self._close!r} alone")
        expected = self._tokenizer.encode(closed + self._close + suffix)
        if expected != self._tokenizer.encode(closed + self._close) + self._added(suffix):
            raise TemplateRefused("is split into other tokens when a conversation is read in parts")

    def _added(self, suffix: str) -> list[int]:
        ids = self._tokenizer.encode(self._close + suffix)
        return ids[ids.index(self._close_id) + 1 :]


_OPENING = [probes.user("What time is it?")]


def _answered(calls: Sequence[tuple[str, str]]) -> list[Message]:
    answer: Message = {"role": "assistant", "content": "" if calls else MARK}
    if calls:
        answer["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": {}}} for call_id, name in calls
        ]
    return [*_OPENING, answer]


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(str(message["role"]) for message in messages)


def _retention(options: Mapping[str, Any]) -> bool:
    asked = options.get(RETENTION)
    if asked not in (None, "all"):
        raise ConfigError(f"{RETENTION} = {asked!r} is not known; expected 'all', or none")
    return asked == "all"


def template_text(
    tokenizer: FastTokenizer, messages: Sequence[Message], *, opens: bool, tools: Any, **variables: Any
) -> str:
    """What the tokenizer's chat template writes.  Arguments of calls are given as JSON where it asks for a text."""

    def written(given: Sequence[Message]) -> str:
        return str(
            tokenizer.plain.apply_chat_template(
                list(given), tools=tools, tokenize=False, add_generation_prompt=opens, **variables
            )
        )

    try:
        return written(messages)
    except TypeError:
        return written([_with_json_arguments(message) for message in messages])


def _with_json_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)}}
        for c in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def variables(template: str) -> set[str]:
    """The variables that a chat template reads, apart from those that it is always given."""
    import jinja2.meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        # transformers adds {% generation %} to the language, which changes no variable.
        parsed = environment.parse(_GENERATION.sub("", template))
    except jinja2.TemplateError as exc:
        raise TemplateRefused(f"cannot be read: {of_error(exc)}") from exc
    return jinja2.meta.find_undeclared_variables(parsed) - ALWAYS_GIVEN


def text_calls(content: str) -> Iterator[Any]:
    """JSON tool calls that are written as plain text, for a tokenizer that has no tokens for the tags."""
    base = library()
    status = base.ToolCallParseStatus
    for found in _CALL.finditer(content):
        raw = found.group(1).strip()
        if not found.group(2):
            yield base.ParsedToolCall(raw=raw, status=status.UNCLOSED_BLOCK)
            continue
        try:
            said = json.loads(raw)
        except ValueError:
            yield base.ParsedToolCall(raw=raw, status=status.INVALID_JSON)
            continue
        name = said.get("name") if isinstance(said, dict) else None
        yield base.ParsedToolCall(
            raw=raw,
            name=name if isinstance(name, str) else None,
            arguments=said.get("arguments", {}) if isinstance(said, dict) else None,
            status=status.OK if isinstance(name, str) and name else status.MISSING_NAME,
        )
