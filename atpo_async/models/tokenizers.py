"""The tokenizer in a model's folder, loaded by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atpo_async.core.errors import SetupError
from atpo_async.core.texts import of_error

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "tekken.json")
"""One of them at least is in a folder with a tokenizer.  Without any, transformers makes an empty one of some models'
config.json."""


def load_tokenizer(folder: Path) -> Any:
    """Raises SetupError where the folder has no tokenizer, or one that cannot be read."""
    if not any((folder / name).is_file() for name in FILES):
        raise SetupError(
            f"model folder {folder} has no tokenizer ({', '.join(FILES[:3])}); copy the tokenizer's files into it"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as exc:  # whatever a tokenizer's file or code raises
        raise SetupError(f"the tokenizer of {folder} cannot be loaded: {of_error(exc)}") from exc


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of tokens as they are: special tokens with their own texts, no blank taken away."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
