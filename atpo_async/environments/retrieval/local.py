"""Retrieval in this process: the interface of the client over an index, for tests and for machines without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from atpo_async.core.errors import SetupError
from atpo_async.environments.retrieval.index import PassageIndex
from atpo_async.environments.retrieval.protocol import (
    DEFAULT_TOPK,
    Passage,
    RetrievalFailed,
    checked_queries,
    checked_topk,
)


class LocalRetriever:
    """Answers from an index in a thread, so that the loop goes on meanwhile.

    Args:
        index: an open index, or the corpus file whose index is opened, and made where it is missing.
        topk: passages a query, where a search names no other number.

    Raises:
        SetupError: of ``PassageIndex.open``.
        BadRequest: ``topk`` is outside its range.
    """

    def __init__(self, index: PassageIndex | str | Path, *, topk: int = DEFAULT_TOPK) -> None:
        self._topk = checked_topk(topk)
        self._index = index if isinstance(index, PassageIndex) else PassageIndex.open(index)

    async def search(self, queries: Sequence[str], topk: int | None = None) -> list[list[Passage]]:
        """As ``Retriever.search``.

        Raises:
            BadRequest: a query or ``topk`` is none.
            RetrievalFailed: the corpus was changed since its index was made.
        """
        asked = checked_queries(queries)
        most = self._topk if topk is None else checked_topk(topk)
        try:
            return await asyncio.to_thread(self._index.passages, asked, most)
        except SetupError as exc:
            raise RetrievalFailed(str(exc)) from exc

    async def close(self) -> None:
        """Nothing is to be let go of: the index is closed by its own ``close``."""
