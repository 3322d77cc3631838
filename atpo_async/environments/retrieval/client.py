"""The client of a retrieval server: connections reused, concurrent queries gathered into requests, answers cached.

Several callers with the same query share one request: one that is cancelled takes nothing from the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import aiohttp

from atpo_async.core.errors import ConfigError
from atpo_async.environments.retrieval.batching import Batcher
from atpo_async.environments.retrieval.cache import AnswerCache, Key
from atpo_async.environments.retrieval.posting import MAY_BE_ONE_QUERY, Answered, Patience, Requests, checked_url
from atpo_async.environments.retrieval.protocol import (
    DEFAULT_TOPK,
    MAX_QUERIES,
    Passage,
    RetrievalFailed,
    checked_queries,
    checked_topk,
)

Found = tuple[Passage, ...]


@dataclass(slots=True)
class Counters:
    """What a client has done so far."""

    queries: int = 0
    cache_hits: int = 0
    """Queries answered from the cache."""
    shared: int = 0
    """Queries that another caller was waiting for already."""
    requests: int = 0
    """Posted, attempts counted one by one."""
    retries: int = 0
    failures: int = 0
    """Queries that got no answer."""
    seconds: float = 0.0
    """In requests, pauses included; of requests at the same time, the sum."""


class RetrievalClient:
    """Passages from a retrieval server over HTTP (``protocol.py``).

    It may be made anywhere, without a running loop too: connections belong to the loop that ``search`` is called on,
    and are opened anew on another one.

    Args:
        url: ``http://HOST:PORT/retrieve``; the path may be left out.
        topk: passages a query, where a search names no other number.
        timeout_s: of one attempt.
        total_s: of all attempts of a request and the pauses between them.
        attempts: of a request that met a 5xx status, a fault of the connection or ``timeout_s``; 4xx is not retried.
        backoff_s: the pause before the second attempt (``posting.py``).
        max_batch: queries in one request.
        max_requests: at the same time; while so many run, queries gather.
        gather_s: how long a query waits for others while a request could be made.
        cache_entries, cache_bytes: bounds of the cache; 0 entries: no cache.
        seed: of the pauses' jitter.

    Raises:
        ConfigError: the URL is none, or a number is out of its range.
        BadRequest: ``topk`` is outside its range.
    """

    def __init__(
        self,
        url: str,
        *,
        topk: int = DEFAULT_TOPK,
        timeout_s: float = 20.0,
        total_s: float = 50.0,
        attempts: int = 5,
        backoff_s: float = 0.2,
        max_batch: int = 64,
        max_requests: int = 8,
        gather_s: float = 0.002,
        cache_entries: int = 100_000,
        cache_bytes: int = 512 * 1024**2,
        seed: int = 0,
    ) -> None:
        self.url = checked_url(url)
        self._topk = checked_topk(topk)
        for name, number, least in (
            ("timeout_s", timeout_s, 0.001),
            ("total_s", total_s, 0.001),
            ("attempts", attempts, 1),
            ("backoff_s", backoff_s, 0),
            ("max_batch", max_batch, 1),
            ("max_requests", max_requests, 1),
            ("gather_s", gather_s, 0),
            ("cache_entries", cache_entries, 0),
            ("cache_bytes", cache_bytes, 0),
        ):
            if not number >= least:
                raise ConfigError(f"{name} of the retrieval client must be at least {least:g}, got {number}")
        if max_batch > MAX_QUERIES:
            raise ConfigError(f"max_batch of the retrieval client must be at most {MAX_QUERIES}, got {max_batch}")
        self._patience = Patience(timeout_s=timeout_s, total_s=total_s, attempts=attempts, backoff_s=backoff_s)
        self._max_batch, self._max_requests, self._gather_s = max_batch, max_requests, gather_s
        self._cache = AnswerCache(max_entries=cache_entries, max_bytes=cache_bytes)
        self._draw = random.Random(seed)
        self._counters = Counters()
        self._connection: _Connection | None = None

    @property
    def counters(self) -> Counters:
        """A copy."""
        return Counters(**asdict(self._counters))

    async def search(self, queries: Sequence[str], topk: int | None = None) -> list[list[Passage]]:
        """As ``Retriever.search``.

        Raises:
            BadRequest: a query or ``topk`` is none.
            RetrievalFailed: names the URL and what was wrong.
        """
        asked = checked_queries(queries)
        most = self._topk if topk is None else checked_topk(topk)
        self._counters.queries += len(asked)
        self._connect()
        waits = [self._answer((query, most)) for query in asked]
        # Shielded: others may wait for the same query.
        return [list(wait if isinstance(wait, tuple) else await asyncio.shield(wait)) for wait in waits]

    async def close(self) -> None:
        """Close the connections.  Searches under way fail."""
        connection, self._connection = self._connection, None
        if connection is not None and connection.loop is asyncio.get_running_loop():
            await connection.close(RetrievalFailed(f"the client of {self.url} was closed"))

    def _answer(self, key: Key) -> Found | asyncio.Future[Found]:
        if not key[0].strip():
            return ()
        if (kept := self._cache.get(key)) is not None:
            self._counters.cache_hits += 1
            return kept
        assert self._connection is not None
        if (under_way := self._connection.asked.get(key)) is not None:
            self._counters.shared += 1
            return under_way
        return self._connection.ask(key)

    def _connect(self) -> None:
        """To the running loop.  An earlier loop's connections are left: its thread was given up, or has ended."""
        if self._connection is not None and self._connection.loop is not asyncio.get_running_loop():
            self._connection.leave()
            self._connection = None
        if self._connection is None:
            self._connection = _Connection(self.url, self._patience, self._draw, self._counters, self._cache)
            self._connection.open(self._max_batch, self._max_requests, self._gather_s)


class _Connection:
    """What a client holds on one loop: its session, the queries that are under way, and how they gather."""

    def __init__(
        self, url: str, patience: Patience, draw: random.Random, counters: Counters, cache: AnswerCache
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.asked: dict[Key, asyncio.Future[Found]] = {}
        self._url, self._patience, self._draw = url, patience, draw
        self._counters, self._cache = counters, cache
        self._session: aiohttp.ClientSession
        self._batcher: Batcher[Key, Found]

    def open(self, max_batch: int, max_requests: int, gather_s: float) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._batcher = Batcher(
            self._handle, max_items=max_batch, max_running=max_requests, gather_s=gather_s, name="retrieval"
        )

    def ask(self, key: Key) -> asyncio.Future[Found]:
        future = self.asked[key] = self._batcher.submit(key)
        future.add_done_callback(lambda done: self._answered(key, done))
        return future

    async def close(self, error: RetrievalFailed) -> None:
        await self._batcher.close(error)
        await self._session.close()

    def leave(self) -> None:
        """Close what another loop's connections hold, from outside of it."""
        if not self.loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it closed meanwhile
                closing = self.close(RetrievalFailed(f"the client of {self._url} is used on another loop"))
                asyncio.run_coroutine_threadsafe(closing, self.loop)
        self._let_go()

    def _let_go(self) -> None:
        """Of a closed loop nothing is left to wait for: aiohttp only notes that the session is closed."""
        if self.loop.is_closed() and not self._session.closed:
            closing = self._session.close()
            with contextlib.suppress(StopIteration):
                closing.send(None)

    def __del__(self) -> None:
        # An environment has no end at which it could close its client; aiohttp would log that as an error.
        with contextlib.suppress(Exception):
            self._let_go()

    def _answered(self, key: Key, future: asyncio.Future[Found]) -> None:
        self.asked.pop(key, None)
        # Reading the exception keeps asyncio from reporting one that no waiter was left for.
        if not future.cancelled() and future.exception() is None:
            self._cache.put(key, future.result())

    async def _handle(self, keys: list[Key]) -> list[Found | Exception]:
        """One batch: a request for each ``topk`` in it, nearly always one."""
        by_topk: dict[int, list[str]] = {}
        for query, topk in keys:
            by_topk.setdefault(topk, []).append(query)
        deadline = self.loop.time() + self._patience.total_s
        sets = await asyncio.gather(*(self._ask(queries, topk, deadline) for topk, queries in by_topk.items()))
        found: dict[Key, Found | Exception] = {}
        for (topk, queries), answers in zip(by_topk.items(), sets, strict=True):
            found |= zip(((query, topk) for query in queries), answers, strict=True)
        return [found[key] for key in keys]

    async def _ask(
        self, queries: list[str], topk: int, deadline: float, attempts: int | None = None
    ) -> list[Found | Exception]:
        requests = Requests(self._session, self._url, self._patience, self._draw)
        began = self.loop.time()
        try:
            answers = await requests.post(queries, topk, deadline=deadline, attempts=attempts)
            return [tuple(passages) for passages in answers]
        except Answered as exc:
            if len(queries) == 1 or exc.status not in MAY_BE_ONE_QUERY or self.loop.time() >= deadline:
                return self._failed(queries, exc)
        except RetrievalFailed as exc:
            return self._failed(queries, exc)
        finally:
            self._counters.requests += requests.requests
            self._counters.retries += requests.retries
            self._counters.seconds += self.loop.time() - began
        # One query may be what the server stumbled over: it must not take the others with it.
        half = len(queries) // 2
        first = await self._ask(queries[:half], topk, deadline, 1)
        return first + await self._ask(queries[half:], topk, deadline, 1)

    def _failed(self, queries: list[str], error: RetrievalFailed) -> list[Found | Exception]:
        self._counters.failures += len(queries)
        return [error] * len(queries)
