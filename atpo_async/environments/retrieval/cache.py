"""Keeps the answers to recent queries, bounded by number and bytes; the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict

from atpo_async.environments.retrieval.protocol import Passage

Key = tuple[str, int]
"""(query, topk)."""

_OVERHEAD = 200
"""Bytes of Python's objects around one passage, about."""


class AnswerCache:
    """Least recently used answers.

    Args:
        max_entries: queries; 0 keeps none.
        max_bytes: of all texts, at four bytes a character as Python may hold them, and what is around them.
    """

    def __init__(self, *, max_entries: int, max_bytes: int) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._answers: OrderedDict[Key, tuple[tuple[Passage, ...], int]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: Key) -> tuple[Passage, ...] | None:
        """The answer, now the most recently used; None where it is not kept."""
        kept = self._answers.get(key)
        if kept is None:
            return None
        self._answers.move_to_end(key)
        return kept[0]

    def put(self, key: Key, passages: tuple[Passage, ...]) -> None:
        """Keep an answer; one that is larger than the cache is not kept."""
        size = 4 * (len(key[0]) + sum(passage.size for passage in passages)) + _OVERHEAD * (1 + len(passages))
        if size > self._max_bytes or not self._max_entries:
            return
        if key in self._answers:
            self._bytes -= self._answers.pop(key)[1]
        self._answers[key] = (passages, size)
        self._bytes += size
        while len(self._answers) > self._max_entries or self._bytes > self._max_bytes:
            self._bytes -= self._answers.popitem(last=False)[1][1]
