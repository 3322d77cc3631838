"""What an action asks for, read from its text: a search, an answer, neither."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["search", "answer", "none"]

_CALL = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
MOST_CHARACTERS = 20_000
OPEN, CLOSE = "<search>", "</search>"


@dataclass(frozen=True, slots=True)
class Asked:
    """One action, read."""

    kind: Kind
    text: str = ""
    """The query, or the answer, without blanks around it."""


def read_at2po(action: str) -> Asked:
    """A search where the text has ``</search>``: the query begins at the last ``<search>`` before it, and is empty
    where there is none.  Every other action ends the chain: an answer is looked for in the whole response."""
    before, close, _ = action.partition(CLOSE)
    if not close:
        return Asked("none")
    _, opened, query = before.rpartition(OPEN)
    return Asked("search", query.strip() if opened else "")


def query_of(text: str, dialect: str) -> str:
    """What the search engine is asked: AT2PO's tool takes quotation marks out of a query.  Cut where it is longer than
    any server takes."""
    asked = text.replace('"', "") if dialect == "at2po" else text
    return asked[:MOST_CHARACTERS]


def read_search_r1(action: str) -> Asked:
    """The first ``<search>…</search>`` or ``<answer>…</answer>`` of what comes before the first ``</search>``, or the
    first ``</answer>`` where there is no ``</search>``, tag included."""
    for tag in (CLOSE, "</answer>"):
        if tag in action:
            action = action.partition(tag)[0] + tag
            break
    found = _CALL.search(action)
    if found is None:
        return Asked("none")
    return Asked("search" if found[1] == "search" else "answer", found[2].strip())
