"""What a tool returned, as the text that the policy reads: a text as it is, plain values as JSON, nothing else."""

from __future__ import annotations

import inspect
import json
import numbers
from collections.abc import Callable
from typing import Any

from atpo_async.core.texts import of_type, of_value
from atpo_async.environments.tools.faults import ToolFailed

CHARACTERS = 16
"""Characters for each token that may be shown: what is beyond them is not even encoded."""

NOTICE = "\n[cut: the answer was longer]"

Cut = Callable[[str, int, str], str]
"""(text, most tokens, notice) -> the text, its end replaced by the notice where it is longer."""


def text_of(value: Any, name: str) -> str:
    """Raises ToolFailed for what is neither a text nor a plain value."""
    if isinstance(value, str):
        text = str(value)
    elif isinstance(value, bool | dict | list | tuple | numbers.Real) or hasattr(value, "tolist"):
        text = _json(value, name)
    else:
        raise _refused(value, name)
    # A lone half of a surrogate pair has no bytes, and no token.
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _json(value: Any, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as exc:
        raise _refused(value, name, why=f": {exc}") from None


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and the like."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"it holds {of_type(value)}")


def _refused(value: Any, name: str, why: str = "") -> ToolFailed:
    hint = "; return '' for an empty answer" if value is None else ""
    if inspect.isawaitable(value):
        hint = "; await it inside: async def"
        if inspect.iscoroutine(value):
            value.close()
    hint = "; decode it: return data.decode()" if isinstance(value, bytes | bytearray) else hint
    return ToolFailed(
        f"tool {name!r} returned {of_value(value)} ({of_type(value)}){why}; expected a str, or a number, dict or list, "
        f"which is shown as JSON{hint}",
        kind=f"value of tool {name!r}",
    )


def shown(text: str, most_tokens: int, cut: Cut) -> tuple[str, bool]:
    """(the text within ``most_tokens``, whether it was cut)."""
    if len(text) <= most_tokens // 4:
        return text, False  # the usual case: no text has more tokens than bytes, four to a character
    head = text[: CHARACTERS * most_tokens]
    found = cut(head, most_tokens, NOTICE)
    if found == head and len(head) < len(text):
        found = head + NOTICE
    return found, found != text
