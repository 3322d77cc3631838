"""What can be known of a function or class before it is called: whether it is async, and which options it takes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from atpo_async.core.texts import of_type, of_value

_PLAIN = (bool, int, float, str, type(None))
"""Types of options; an annotation with any other type is not judged."""


def is_async(method: object) -> bool:
    """Whether it is declared with ``async def``, also where it is bound, partly applied, or an object with an async
    ``__call__``."""
    while isinstance(method, functools.partial):
        method = method.func
    if inspect.isclass(method):
        return False  # calling it makes an object
    plain = inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)
    return plain or inspect.iscoroutinefunction(getattr(method, "__call__", None))  # noqa: B004


def methods_not_async(made_by: type, names: tuple[str, ...]) -> list[str]:
    """Those of ``names`` that a class defines as plain functions."""
    found = ((name, inspect.getattr_static(made_by, name, None)) for name in names)
    return [name for name, method in found if inspect.isfunction(method) and not is_async(method)]


def misfit(found: Callable[..., Any], options: Mapping[str, bool | int | float | str]) -> str | None:
    """What is wrong with the type of an option, by the annotations of ``found``; None where nothing is known to be."""
    hints = _hints(found.__init__ if inspect.isclass(found) else found)
    for name, value in options.items():
        kinds = _plain_types(hints.get(name))
        if kinds and not any(_fits(value, kind) for kind in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            return f"its option {name!r} is {wanted or 'None'}, not {of_type(value)} {of_value(value)}"
    return None


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, apart from those that refer to what is not there when it runs."""
    try:
        return typing.get_type_hints(function)
    except Exception:  # whatever a user's annotations refer to
        written = getattr(function, "__annotations__", {})
    found: dict[str, Any] = {}
    for name, annotation in written.items():
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        with contextlib.suppress(Exception):
            found |= typing.get_type_hints(alone, globalns=getattr(function, "__globals__", {}))
    return found


def _plain_types(annotation: Any) -> tuple[type, ...]:
    """The types that an annotation allows; none where it is no plain one."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    return kinds if all(kind in _PLAIN for kind in kinds) else ()


def _fits(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
