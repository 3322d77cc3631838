"""Text from outside, such as a tool's answer, never becomes a chat format's own tokens.

A page that a tool has read may hold ``<|im_end|>``; encoded as it stands it would end the tool's message and begin one
that no one wrote.  Such names are broken by a space, and stay readable: ``< |im_end|>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LEAST = 3
"""Characters of a name; shorter tokens stand for ordinary text."""

OPENING = "<[{|"
"""What the names of control tokens begin with in every format; others are ordinary words that were added."""


class Controls:
    """Breaks the names of control tokens in a text.

    Args:
        tokens: texts of the tokens that a tokenizer takes for themselves.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        names = sorted({t for t in tokens if len(t) >= LEAST and t[0] in OPENING and not t.isspace()}, key=len)
        self._names = re.compile("|".join(map(re.escape, reversed(names))) or r"(?!)")

    def broken(self, text: str) -> str:
        """``text`` without any of the names; the same object where it has none."""
        while self._names.search(text) is not None:  # a name may remain around one that was broken
            text = self._names.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text
