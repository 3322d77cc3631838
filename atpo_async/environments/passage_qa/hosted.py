"""A retrieval server that lives as long as the environment that asks it, and the client that asks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atpo_async.environments.retrieval.client import RetrievalClient
from atpo_async.environments.retrieval.index import PassageIndex
from atpo_async.environments.retrieval.protocol import Passage

if TYPE_CHECKING:
    from atpo_async.environments.retrieval.server import RetrievalServer

LOOPBACK = "127.0.0.1"


class HostedRetriever:
    """Passages over HTTP, from a server in this process: it starts with the first search, on a free port of loopback.

    Args:
        corpus: a JSONL file; its index is made beside it where there is none.
        topk: passages a query.

    Raises:
        SetupError: of ``PassageIndex.open``.
    """

    def __init__(self, corpus: Path, *, topk: int) -> None:
        self._index = PassageIndex.open(corpus)
        self._topk = topk
        self._starting = asyncio.Lock()
        self._server: RetrievalServer | None = None
        self._client: RetrievalClient | None = None

    @property
    def url(self) -> str:
        """Where the server answers; empty before the first search."""
        return "" if self._client is None else self._client.url

    async def search(self, queries: Sequence[str], topk: int | None = None) -> list[list[Passage]]:
        """As ``RetrievalClient.search``."""
        client = self._client or await self._started()
        return await client.search(queries, topk)

    async def _started(self) -> RetrievalClient:
        async with self._starting:
            if self._client is None:
                from atpo_async.environments.retrieval.server import RetrievalServer, bind, url_of
                from atpo_async.environments.retrieval.workers import Workers

                bound = bind(LOOPBACK, 0)
                self._server = RetrievalServer(self._index, Workers(self._index, 0), topk=self._topk)
                await self._server.start(bound)
                self._client = RetrievalClient(url_of(bound), topk=self._topk)
            return self._client

    async def close(self) -> None:
        """Ends connections and server; without it they end with the process."""
        if self._client is not None:
            await self._client.close()
        if self._server is not None:
            await self._server.close()
        self._client = self._server = None
