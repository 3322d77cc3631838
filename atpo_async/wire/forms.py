"""The types that the header of a message is parsed into: as the message's own, with descriptors in place of arrays.

Bounds of the fields (``core.bounds``) are part of them, and lists and maps have an end: what is out of range ends the
parse where it stands.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any

import msgspec
import numpy as np

from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import VersionSpan
from atpo_async.wire.arrays import Arrays, Buffer
from atpo_async.wire.checks import bad, bounds_of
from atpo_async.wire.records import TurnRecords

MAX_ITEMS = 1 << 16
"""Of any one list or map in the header."""


class _Nothing(msgspec.Struct, tag="", frozen=True):
    """A type alone is parsed without its tag, too; with a second one the tag must be there."""


class _Tag(msgspec.Struct, frozen=True):
    """What a header that could not be parsed says it is."""

    type: str = ""


_PARSE_TAG = msgspec.msgpack.Decoder(_Tag).decode


class Form:
    """A struct as the header has it.

    Args:
        kind: the struct.
        bounded: with the bounds of its fields; without them whatever has the right types is parsed.
    """

    def __init__(self, kind: Any, *, bounded: bool = True) -> None:
        self.kind = kind
        self._raised: list[tuple[str, Callable[[Any, Arrays], Any]]] = []
        hints = typing.get_type_hints(kind, include_extras=True)
        fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
        for field in msgspec.structs.fields(kind):
            hint, raised = _lowered(hints[field.name], bounded)
            if raised is not None:
                self._raised.append((field.name, raised))
            if field.required:
                fields.append((field.name, hint))
            elif field.default_factory is msgspec.NODEFAULT:
                fields.append((field.name, hint, field.default))
            else:
                fields.append((field.name, hint, msgspec.field(default_factory=field.default_factory)))
        config = kind.__struct_config__
        self.wire = msgspec.defstruct(
            kind.__name__,
            fields,
            tag=config.tag,
            kw_only=not config.array_like,
            array_like=config.array_like,
            frozen=True,
            forbid_unknown_fields=True,
            eq=False,
        )

    def message(self, value: Any, arrays: Arrays) -> Any:
        """The message that was parsed into ``value``."""
        fields = msgspec.structs.asdict(value)
        for name, raised in self._raised:
            fields[name] = raised(fields[name], arrays)
        return self.kind(**fields)


def _lowered(hint: Any, bounded: bool) -> tuple[Any, Callable[[Any, Arrays], Any] | None]:
    """The type that stands for ``hint`` in the header, and how to get from its value to the one of ``hint``."""
    metas: list[msgspec.Meta] = []
    if typing.get_origin(hint) is Annotated:
        hint, *said = typing.get_args(hint)
        metas = [part for part in said if isinstance(part, msgspec.Meta)] if bounded else []
    if hint is np.ndarray:
        return tuple[int, int, int], lambda value, arrays: arrays.view(value)
    if hint is TurnRecords:
        return tuple[int, int, int, int], lambda value, arrays: arrays.records(value)
    origin = typing.get_origin(hint)
    plain = hint if bounded else _without_bounds(hint)
    if origin is dict:
        return Annotated[plain, msgspec.Meta(max_length=MAX_ITEMS)], None
    if origin is not tuple:
        return (Annotated[plain, metas[0]] if metas else plain), None
    limit = metas[0] if metas else msgspec.Meta(max_length=MAX_ITEMS)
    kind = typing.get_args(hint)[0]
    if kind is VersionSpan and not bounded:
        span = form_of(VersionSpan, bounded=False).wire
        return Annotated[tuple[span, ...], limit], None  # type: ignore[valid-type]
    if not isinstance(kind, type) or not issubclass(kind, msgspec.Struct) or kind is VersionSpan:
        return Annotated[plain, limit], None
    item = form_of(kind, bounded=bounded)
    of_items = tuple[item.wire, ...]  # type: ignore[name-defined]
    return Annotated[of_items, limit], lambda value, arrays: tuple([item.message(v, arrays) for v in value])


def _without_bounds(hint: Any) -> Any:
    """``hint`` without any ``Annotated`` in it."""
    holder: dict[str, Any] = {"__annotations__": {"field": hint}}
    return typing.get_type_hints(type("Holder", (), holder))["field"]


@lru_cache(maxsize=128)
def form_of(kind: Any, *, bounded: bool = True) -> Form:
    return Form(kind, bounded=bounded)


class Receiver:
    """The parser for one union of message types."""

    def __init__(self, union_type: Any) -> None:
        self._kinds = typing.get_args(union_type) or (union_type,)
        self.forms = {form.wire: form for form in map(form_of, self._kinds)}
        self.tags = tuple(str(kind.__struct_config__.tag) for kind in self._kinds)
        self.parse = msgspec.msgpack.Decoder(typing.Union[(_Nothing, *self.forms)]).decode

    def explain(self, header: Buffer, payload: Buffer, exc: Exception) -> BadMessage:
        """Why ``header`` could not be parsed: which bound of whose message, where it is that."""
        if not isinstance(exc, msgspec.ValidationError):
            return BadMessage(f"header is no msgpack within the limits: {type(exc).__name__} {exc!s:.200}")
        try:
            tag = _PARSE_TAG(header).type
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return BadMessage(f"header is no message: {exc!s:.200}")
        if tag not in self.tags:
            return self.unknown(tag)
        return self._out_of_bounds(self._kinds[self.tags.index(tag)], header, payload) or BadMessage(
            f"{tag}: {exc!s:.200}"
        )

    def _out_of_bounds(self, kind: Any, header: Buffer, payload: Buffer) -> BadMessage | None:
        """The error of a message that has the right types and a value out of its bounds."""
        form = form_of(kind, bounded=False)
        try:
            value = msgspec.msgpack.Decoder(_Nothing | form.wire).decode(header)
            message = form.message(value, Arrays(payload))
            fact = bounds_of(kind)(message)
        except BadMessage as exc:
            return exc
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None
        return None if fact is None else bad(message, fact)

    def unknown(self, tag: str) -> BadMessage:
        return BadMessage(f"message type {tag!r:.80} is unknown here; expected one of {', '.join(self.tags)}")


_receivers: dict[int, tuple[Any, Receiver]] = {}
"""By the union's id, as its hash takes longer than the whole parse.

The union is stored too: while it lives, no other object gets its id.
"""


def receiver_of(union_type: Any) -> Receiver:
    known = _receivers.get(id(union_type))
    if known is not None:
        return known[1]
    receiver = _made(union_type)
    # Unions that are made anew for every call must not pile up.
    if len(_receivers) < 64:
        _receivers[id(union_type)] = (union_type, receiver)
    return receiver


@lru_cache(maxsize=64)
def _made(union_type: Any) -> Receiver:
    return Receiver(union_type)
