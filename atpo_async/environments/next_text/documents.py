"""The documents that sentences are predicted of: files of text or rows of data, some of them held out; or stories."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.shuffling import shuffled
from atpo_async.core.texts import of_error, of_type, shortened
from atpo_async.core.vocabulary import Split
from atpo_async.environments.data.opening import open_rows
from atpo_async.environments.data.rows import Rows
from atpo_async.environments.next_text.sentences import sentences
from atpo_async.environments.next_text.stories import story

STORIES = "stories"
"""``corpus`` of the built-in one."""

TRIES = 64
"""Documents in a row that are looked at for one with sentences enough."""
KEPT = 4096
"""Documents whose sentences are kept."""


class Documents(Protocol):
    """Documents by task."""

    num_eval: int
    """Held out."""

    def sentences(self, split: Split, index: int) -> list[str]:
        """Of the document of task ``index``, with enough of them.  Raises ValueError where there is none."""


class Stories:
    """One story a task, without end."""

    def __init__(self, seed: int, num_eval: int) -> None:
        self._seed, self.num_eval = seed, num_eval

    def sentences(self, split: Split, index: int) -> list[str]:
        return story(self._seed, split, index)


class Corpus:
    """Documents of files, taken in an order of their own in each pass over them.

    Args:
        corpus: a ``.txt`` file or a pattern of such, a document each; or data with a column of text.
        column: that holds the text.
        eval_share: of the documents that are held out.
        seed: of the order.
        least: sentences of a document that can be used.
        min_chars: as of ``sentences``.

    Raises:
        ConfigError: ``corpus`` names nothing that is read, the column is missing, or nothing would be left to train on.
        SetupError: a file is missing.
    """

    def __init__(
        self, corpus: str | Sequence[str], *, column: str, eval_share: float, seed: int, least: int, min_chars: int
    ) -> None:
        self._rows = _open(corpus)
        if column not in (known := self._rows.columns()):
            raise ConfigError(
                f"environment.options.column = {column!r}: {self._rows.name} has no such column; it has: "
                f"{', '.join(known)}"
            )
        self._column, self._seed, self._least, self._min_chars = column, seed, least, min_chars
        order = shuffled(len(self._rows), 0)
        self.num_eval = max(1, round(eval_share * len(order))) if eval_share else 0
        if self.num_eval >= len(order):
            raise ConfigError(
                f"environment.options.corpus = {corpus!r} holds {len(order)} document(s), of which eval_share = "
                f"{eval_share} are held out: nothing is left to train on; name more files (.txt: a document each)"
            )
        self._held_out, self._train = order[: self.num_eval], order[self.num_eval :]
        self._read = lru_cache(maxsize=KEPT)(self._sentences)

    def sentences(self, split: Split, index: int) -> list[str]:
        part = self._held_out if split == "eval" else self._train
        turn, at = divmod(index, len(part))
        order = part if split == "eval" else part[shuffled(len(part), self._seed + turn)]
        looked_at = order[(at + np.arange(min(TRIES, len(part)))) % len(part)]
        for document in looked_at:
            found = self._read(int(document))
            if len(found) >= self._least:
                return found
        more = f" and the {len(looked_at) - 1} documents after it" if len(looked_at) > 1 else ""
        raise ValueError(
            f"{self._rows.where(int(looked_at[0]))}{more}: fewer than {self._least} sentences; lower "
            "environment.options.min_context or min_chars, or name longer documents"
        )

    def _sentences(self, document: int) -> list[str]:
        text = self._rows.row(document).get(self._column)
        if not isinstance(text, str):
            raise ValueError(
                f"{self._rows.where(document)}: column {self._column!r} is {shortened(repr(text), 60)} "
                f"({of_type(text)}); expected text"
            )
        return sentences(text, min_chars=self._min_chars)


class TextFiles:
    """``.txt`` files as rows with a column ``text``."""

    def __init__(self, paths: Sequence[str], name: str) -> None:
        self.name = name
        self._paths = tuple(paths)
        self.num_bytes = sum(Path(path).stat().st_size for path in paths)

    def __len__(self) -> int:
        return len(self._paths)

    def columns(self) -> tuple[str, ...]:
        return ("text",)

    def row(self, at: int) -> dict[str, str]:
        try:
            return {"text": Path(self._paths[at]).read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as exc:
            raise ValueError(f"{self._paths[at]} cannot be read as text in UTF-8: {of_error(exc)}") from exc

    def where(self, at: int) -> str:
        return self._paths[at]


def _open(corpus: str | Sequence[str]) -> TextFiles | Rows:
    if isinstance(corpus, str) and corpus.lower().endswith(".txt"):
        found = sorted(glob.glob(corpus)) if glob.has_magic(corpus) else [corpus]
        missing = [path for path in found if not Path(path).is_file()]
        if missing or not found:
            raise SetupError(
                f"environment.options.corpus = {corpus!r}: no such file, looked for from {str(Path.cwd())!r}"
            )
        return TextFiles(found, corpus)
    if isinstance(corpus, str) and Path(corpus).is_dir() and any(Path(corpus).glob("*.txt")):
        raise SetupError(
            f"environment.options.corpus = {corpus!r} is a folder: name its files, {str(Path(corpus, '*.txt'))!r}, of "
            "which each is a document"
        )
    return open_rows(corpus, None, field="environment.options.corpus")
