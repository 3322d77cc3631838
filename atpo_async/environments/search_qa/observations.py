"""How passages are written into the text, by dialect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from atpo_async.environments.search_qa.dialects import Dialect

NOTHING_FOUND = "No search results found."


class Contents(Protocol):
    """A passage."""

    @property
    def contents(self) -> str:
        r"""``"title"\ntext``, as the corpora have it."""


class Text(NamedTuple):
    """A passage as it is shown."""

    contents: str


def observation_of(passages: Sequence[Contents], dialect: Dialect) -> str:
    """The text that follows an action which searched."""
    if dialect.name == "at2po":
        return f" <result>\n{pages(passages, dialect.passage_characters)}\n</result>"
    return f"\n\n<information>{docs(passages).strip()}</information>\n\n"


def pages(passages: Sequence[Contents], characters: int) -> str:
    """``Page 1: …``, one a line; a passage that came before, or is empty, is left out.

    ``characters`` of each are kept, its title's line included; 0 for all.
    """
    texts = list(dict.fromkeys(text for passage in passages if (text := passage.contents.strip())))
    if not texts:
        return NOTHING_FOUND
    return "\n".join(f"Page {at}: {text[: characters or None]}" for at, text in enumerate(texts, 1))


def docs(passages: Sequence[Contents]) -> str:
    """``Doc 1(Title: "…") …``, one a line; the first line of a passage is its title."""
    lines = []
    for at, passage in enumerate(passages, 1):
        title, _, text = passage.contents.partition("\n")
        lines.append(f"Doc {at}(Title: {title}) {text}\n")
    return "".join(lines)
