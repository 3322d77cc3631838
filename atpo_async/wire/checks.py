"""Checks messages against their types: the bounds of their fields, and the rules that types cannot express.

The wire's parser enforces the bounds itself, so that a receiver checks only the rest (``rest_of``).  A message that
was made in this process is checked against both (``check``).  All checks follow from the types of the fields
(``core.bounds``): a new message needs no line here.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from types import UnionType
from typing import Any

import msgspec
import numpy as np

from atpo_async.core.bounds import MAX_ID, MAX_NAME_BYTES, MAX_NUMBER, MAX_SIZE, MAX_TEXT_BYTES, Content
from atpo_async.core.dtypes import FLOAT32, INT32, UINT8
from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import Turn
from atpo_async.wire import messages as m
from atpo_async.wire.records import TurnRecords
from atpo_async.wire.rules import (
    Part,
    TurnFault,
    is_name,
    logprob_fault,
    manifest_fault,
    token_fault,
    turn_faults,
)

Rule = Callable[[Any], str | None]
"""Of a whole message: the fact that breaks what its type promises, or None."""
ValueRule = Callable[[str, Any], str | None]
"""Of one value of a field, by the field's name."""


def check(message: msgspec.Struct) -> None:
    """Check ``message`` against all rules of its type, every turn included.  Raises BadMessage."""
    for one in (message, *_turns_within(message)):
        # Reading records decodes them, and so checks them.
        fact = bounds_of(type(one))(one) or rest_of(type(one))(one)
        if fact is not None:
            raise bad(one, fact)


def faults_of(turn: Turn) -> Iterator[TurnFault]:
    """Every fault of a turn that was made in this process, independently of its tree."""
    for name, rule in _fields(Turn, _bounds):
        if (fact := rule(name, getattr(turn, name))) is not None:
            yield TurnFault(_PARTS.get(name, "order"), fact)
    yield from turn_faults(turn)


_PARTS: dict[str, Part] = {"reward": "outcome", "spans": "spans"}
"""Field of a turn -> what a value out of its bounds is a fault of, where that is not the order of turns."""


def bad(message: Any, fact: str) -> BadMessage:
    """The error that ``fact`` is true of ``message``."""
    return BadMessage(f"{_identity(message)}: {fact}")


def _identity(message: Any) -> str:
    names = ("run", "actor", "tree_id", "turn_id", "batch_id", "step", "version", "index", "name")
    known = ", ".join(f"{n} {getattr(message, n)!r:.60}" for n in names if hasattr(message, n))
    return f"{type(message).__name__} ({known})"


def _turns_within(message: Any) -> Iterable[Turn]:
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, TurnRecords):
            yield from value
        elif type(value) is tuple:
            for item in value:
                if type(item) is Turn:
                    yield item
                elif isinstance(item, msgspec.Struct):
                    yield from _turns_within(item)


# --- bounds of the types --------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def bounds_of(kind: type) -> Rule:
    """The bounds of a message type's fields, of the structs in it too."""
    return _all(_fields(kind, _bounds))


def _bounds(hint: Any) -> ValueRule | None:
    base, metas, content = _parts(hint)
    if base is str and content is not None:
        return _CONTENT_RULES[content]  # of its length too
    if typing.get_origin(base) is tuple:
        return _both(_length(metas[0]) if metas else None, _each(typing.get_args(base)[0], _bounds, bounds_of))
    if typing.get_origin(base) is dict:
        return _both(_keys, _values(_bounds(typing.get_args(base)[1])))
    return _range(metas[0]) if metas else None


def _range(bounds: msgspec.Meta) -> ValueRule:
    least, most = bounds.ge, bounds.le
    if least is None or most is None:
        raise TypeError(f"a number of a message needs both bounds, got {bounds}")
    if most == MAX_NUMBER:
        expected = "a finite number that fits float32" + ("" if least else " and is at least 0")
    elif isinstance(most, float):
        expected = f"a finite number of at least {least:g} and at most {most:g}"
    else:
        expected = f"{least} to { ({MAX_ID: '2**31 - 1', MAX_SIZE: '2**63 - 1'}.get(most, most)) }"

    def rule(name: str, value: Any) -> str | None:
        return None if value is None or least <= value <= most else f"{name} is {value}, expected {expected}"

    return rule


def _length(bounds: msgspec.Meta) -> ValueRule:
    most = bounds.max_length or 0
    return lambda name, items: None if len(items) <= most else f"{name} has {len(items)} items, expected {most} at most"


# --- rules beyond the types -------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def rest_of(kind: type) -> Rule:
    """The rules of a message type beyond its fields' bounds.  Records are not decoded, and so not checked."""
    if kind is Turn:
        return _turn
    of_fields = _all(_fields(kind, _content))
    if kind is m.WeightsManifest:
        return lambda manifest: of_fields(manifest) or manifest_fault(manifest)
    return of_fields


def _content(hint: Any) -> ValueRule | None:
    base, _, content = _parts(hint)
    if content is not None:
        return _CONTENT_RULES[content]
    if base is np.ndarray:
        raise TypeError("an array of a message needs its content: core.bounds.Tokens, Logprobs or RawBytes")
    if typing.get_origin(base) is tuple:
        return _each(typing.get_args(base)[0], _content, rest_of)
    return _keys if typing.get_origin(base) is dict else None


def _name(name: str, text: str | None) -> str | None:
    if text is None or is_name(text):
        return None
    return f"{name} {text!r:.60} is no name, expected {MAX_NAME_BYTES} printable bytes at most"


def _text(name: str, text: str | None) -> str | None:
    # A character takes four bytes at most.
    if text is None or len(text) <= MAX_TEXT_BYTES // 4 or len(text.encode()) <= MAX_TEXT_BYTES:
        return None
    return f"{name} has {len(text.encode())} bytes, expected {MAX_TEXT_BYTES} at most"


def _dtype(name: str, array: np.ndarray, expected: np.dtype[Any]) -> str | None:
    return None if array.dtype == expected else f"{name} is {array.dtype}, expected {expected}"


_CONTENT_RULES: dict[Content, ValueRule] = {
    Content.NAME: _name,
    Content.TEXT: _text,
    Content.TOKENS: lambda name, array: _dtype(name, array, INT32) or token_fault(name, array),
    Content.LOGPROBS: lambda name, array: _dtype(name, array, FLOAT32) or logprob_fault(name, array),
    Content.BYTES: lambda name, array: _dtype(name, array, UINT8),
}


def _keys(name: str, values: dict[str, Any]) -> str | None:
    key = next((key for key in values if not is_name(key)), None)
    return None if key is None else _name(f"{name} has the key", key)


def _turn(turn: Turn) -> str | None:
    fact = (
        _name("run", turn.run)
        or _name("tree_id", turn.tree_id)
        or _dtype("observation", turn.observation, INT32)
        or _dtype("action", turn.action, INT32)
        or _dtype("logprobs", turn.logprobs, FLOAT32)
    )
    return fact or next((fault.fact for fault in turn_faults(turn)), None)


# --- from types to rules ---------------------------------------------------------------------------------------


def _parts(hint: Any) -> tuple[Any, list[msgspec.Meta], Content | None]:
    """A field's type without ``Annotated`` and ``| None``, its bounds, and what it holds."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return _parts(kinds[0]) if len(kinds) == 1 else (hint, [], None)
    if typing.get_origin(hint) is not typing.Annotated:
        return hint, [], None
    base, *said = typing.get_args(hint)
    metas = [part for part in said if isinstance(part, msgspec.Meta)]
    return base, metas, next((part for part in said if isinstance(part, Content)), None)


@lru_cache(maxsize=128)
def _fields(kind: Any, rule_of: Callable[[Any], ValueRule | None]) -> tuple[tuple[str, ValueRule], ...]:
    """The rule of each field that has one."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = ((name, rule_of(hints[name])) for name in kind.__struct_fields__)
    return tuple((name, rule) for name, rule in found if rule is not None)


def _all(fields: tuple[tuple[str, ValueRule], ...]) -> Rule:
    def rule(message: Any) -> str | None:
        for name, of_value in fields:
            if (fact := of_value(name, getattr(message, name))) is not None:
                return fact
        return None

    return rule


def _both(first: ValueRule | None, second: ValueRule | None) -> ValueRule | None:
    if first is None or second is None:
        return first or second
    return lambda name, value: first(name, value) or second(name, value)


def _each(hint: Any, rule_of: Callable[[Any], ValueRule | None], of_kind: Callable[[type], Rule]) -> ValueRule | None:
    """Of each item of a list; where an item is a message of its own, the fact names it."""
    of_item = _within(of_kind(hint)) if _is_struct(hint) else rule_of(hint)
    if of_item is None:
        return None

    def rule(name: str, items: Any) -> str | None:
        facts = (of_item(f"{name}[{at}]", item) for at, item in enumerate(items))
        return next((fact for fact in facts if fact is not None), None)

    return rule


def _within(of_item: Rule) -> ValueRule:
    def rule(name: str, item: Any) -> str | None:
        fact = of_item(item)
        if fact is None:
            return None
        return f"{name}: {fact}" if item.__struct_config__.array_like else f"{name}: {_identity(item)}: {fact}"

    return rule


def _is_struct(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, msgspec.Struct)


def _values(of_value: ValueRule | None) -> ValueRule | None:
    if of_value is None:
        return None

    def rule(name: str, values: dict[str, Any]) -> str | None:
        facts = (of_value(f"{name}[{key!r:.60}]", value) for key, value in values.items())
        return next((fact for fact in facts if fact is not None), None)

    return rule
