"""Whether the tokens of an action spell a text that ends it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from atpo_async.core.errors import SetupError
from atpo_async.models.tokenizers import decode, load_tokenizer

Decode = Callable[[Sequence[int]], str]


class StopStrings:
    """Looks for stop strings at the end of an action.

    Args:
        decode: text of tokens, with the texts of special tokens.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode

    @classmethod
    def of_folder(cls, folder: Path) -> StopStrings:
        """With the tokenizer of a model folder.  Raises SetupError where it has none that can be read."""
        try:
            tokenizer = load_tokenizer(folder)
        except SetupError as exc:
            raise SetupError(f"the environment ends actions at texts (stop_strings), and {exc}") from None
        return cls(functools.partial(decode, tokenizer))

    def ended(self, action: Sequence[int], strings: Sequence[str]) -> bool:
        """Whether the newest token of ``action`` has completed one of ``strings``; asked after each token."""
        # Every token but a few special ones is a byte at least, so no string begins further back.
        last = max(len(text.encode()) for text in strings)
        text = self._decode(action[-last:])
        return any(string in text for string in strings)
