"""Which renderer a tokenizer gets: the one that is asked for, or the one that writes what its chat template writes."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atpo_async.core.errors import ConfigError
from atpo_async.environments.messages import probes
from atpo_async.environments.messages.library import (
    HARMONY,
    TEMPLATE,
    FastTokenizer,
    RendererLike,
    library,
    made,
    names,
    nearest,
)
from atpo_async.environments.messages.template import TemplateRefused, TemplateRenderer, template_text
from atpo_async.environments.messages.types import ToolSchema

log = logging.getLogger("atpo.environments.messages")

AUTO = "auto"
_CHANNEL = "<|channel|>"
"""A token of gpt-oss, without which its renderer is not tried: making that may ask the network."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A renderer and its name."""

    name: str
    renderer: RendererLike


def choose(tokenizer: FastTokenizer, asked: str, tools: Sequence[ToolSchema], options: Mapping[str, Any]) -> Chosen:
    """The renderer for a tokenizer.

    Args:
        asked: a renderer's name, or ``auto``: the library's own for this model, else the one whose texts are those of
            the tokenizer's chat template, else one over that template itself.
        tools: that the policy may call.
        options: of the renderer.

    Raises:
        ConfigError: names the tokenizer, what is wrong, and the way out.
    """
    if not isinstance(asked, str) or asked not in (AUTO, *names()):
        raise ConfigError(f"renderer = {asked!r} is not known{nearest(str(asked), names())}; known: auto, {_names()}")
    if asked == TEMPLATE:
        return Chosen(TEMPLATE, _over_template(tokenizer, tools, options))
    if asked != AUTO:
        return Chosen(asked, made(tokenizer, asked, options))
    known = library().MODEL_RENDERER_MAP.get(tokenizer.name_or_path)
    if known is not None:
        log.info("chat format of %s: renderer %r, by the model's name", tokenizer.name_or_path, known)
        return Chosen(known, made(tokenizer, known, options))
    if not tokenizer.plain.chat_template:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: put the model's chat_template.jinja "
            f"there, or set renderer to the model's family (one of {_names()})"
        )
    if (found := recognised(tokenizer)) is not None:
        name, variant = found
        log.info("chat format of %s: renderer %r, whose texts its chat template writes", tokenizer.name_or_path, name)
        return Chosen(name, made(tokenizer, name, variant | dict(options)))
    renderer = _over_template(tokenizer, tools, options)
    log.info("chat format of %s: its own chat template, which only appends", tokenizer.name_or_path)
    return Chosen(TEMPLATE, renderer)


def _names() -> str:
    return ", ".join(sorted(names()))


def _over_template(
    tokenizer: FastTokenizer, tools: Sequence[ToolSchema], options: Mapping[str, Any]
) -> TemplateRenderer:
    where = f"the chat template of {tokenizer.name_or_path}"
    if not tokenizer.plain.chat_template:
        raise ConfigError(f"{where} is missing: put the model's chat_template.jinja there, or set another renderer")
    try:
        return TemplateRenderer(tokenizer, tools, options)
    except TemplateRefused as refused:
        raise ConfigError(
            f"{where} {refused}. A conversation is extended with what was sampled, so a template has to append only. "
            f"Set renderer to the model's family (one of {_names()}), or thinking_retention = 'all' if only earlier "
            "thinking is dropped and it may stay, or give the folder a template that only appends"
        ) from refused


def recognised(tokenizer: FastTokenizer) -> tuple[str, dict[str, Any]] | None:
    """The library's renderer, and its options, whose ids are the chat template's on every probe; None for none."""
    written: dict[int, list[int] | None] = {}
    for name, options in _candidates(tokenizer):
        try:
            renderer = made(tokenizer, name, options)
        except ConfigError:
            continue  # the tokenizer lacks its tokens
        if all(
            _same(renderer, tokenizer, number, probe, written)
            for number, probe in enumerate(probes.probes())
            if not (probe.looks_back and options.get("enable_thinking") is False)
        ):
            return name, options
    return None


def _candidates(tokenizer: FastTokenizer) -> Iterator[tuple[str, dict[str, Any]]]:
    configs = importlib.import_module("renderers.configs")._CONFIG_BY_NAME
    vocabulary = tokenizer.added_tokens()
    for name in names():
        if name == TEMPLATE or (name == HARMONY and _CHANNEL not in vocabulary):
            continue
        yield name, {}
        if "enable_thinking" in configs[name].model_fields:
            yield from ((name, {"enable_thinking": value}) for value in (True, False))


def _same(
    renderer: RendererLike,
    tokenizer: FastTokenizer,
    number: int,
    probe: probes.Probe,
    written: dict[int, list[int] | None],
) -> bool:
    tools = probes.enveloped(probe.tools)
    if number not in written:
        try:
            text = template_text(tokenizer, probe.messages, opens=probe.opens, tools=tools)
            written[number] = tokenizer.encode(text)
        except Exception:
            written[number] = None  # the template refuses such a conversation, and is not compared on it
    try:
        ids = renderer.render_ids(list(probe.messages), tools=tools, add_generation_prompt=probe.opens)
    except Exception:
        return written[number] is None
    return written[number] is None or ids == written[number]
