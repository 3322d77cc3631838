"""One request to a retrieval server: what is tried again, for how long, and what an answer that cannot be used says."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from atpo_async.core import texts
from atpo_async.core.errors import ConfigError
from atpo_async.environments.retrieval.protocol import Passage, RetrievalFailed, parse_answer

MAX_ANSWER_BYTES = 256 * 1024**2

MAY_BE_ONE_QUERY = frozenset({400, 413, 422, 500})
"""Statuses of a request that another set of queries may not get."""


class Answered(RetrievalFailed):
    """The server answered, with an error."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long and how often a request is tried."""

    timeout_s: float
    """Of one attempt, from the connection to the last byte."""
    total_s: float
    """Of all attempts and the pauses between them."""
    attempts: int
    backoff_s: float
    """Before the second attempt, up to half as long again; twice as long before each one after it."""
    backoff_max_s: float = 5.0

    def pause_s(self, attempt: int, draw: float) -> float:
        """Before attempt ``attempt`` + 1, counted from 1; ``draw`` is in [0, 1)."""
        return float(min(self.backoff_max_s, self.backoff_s * 2 ** (attempt - 1)) * (1 + draw / 2))


def checked_url(url: str) -> str:
    """The URL to post to; ``/retrieve`` where it has no path.  Raises ConfigError."""
    if not isinstance(url, str) or not url.strip():
        raise ConfigError(f"the retrieval URL is {texts.of_value(url)}; write http://HOST:PORT/retrieve")
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError as exc:
        raise ConfigError(f"the retrieval URL {url!r} is none: {exc}; write http://HOST:PORT/retrieve") from None
    if parts.scheme not in ("http", "https") or not host:
        # `localhost:8000` is read as a scheme and a path.
        said = url.strip().rpartition("://")[2]
        way_out = f"http://{said}" if said.strip("/:") else "http://HOST:PORT/retrieve"
        raise ConfigError(
            f"the retrieval URL {url!r} does not begin with http:// or https:// and a host; write {way_out}"
        )
    return urlunsplit(parts._replace(path="/retrieve") if parts.path in ("", "/") else parts)


class Requests:
    """Posts batches of queries of one ``topk`` each.

    Args:
        session: of the loop that this is used on.
        url: checked.
        draw: for the jitter of pauses.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, patience: Patience, draw: random.Random) -> None:
        self._session, self._url, self._patience, self._draw = session, url, patience, draw
        self.requests = 0
        self.retries = 0

    async def post(
        self, queries: Sequence[str], topk: int, *, deadline: float, attempts: int | None = None
    ) -> list[list[Passage]]:
        """Passages by query.

        Args:
            deadline: time of the loop, after which nothing is tried again.
            attempts: at most; of ``patience`` where it is None.

        Raises:
            Answered: the server refused, or failed on every attempt.
            RetrievalFailed: the server could not be reached or did not answer; or its answer cannot be read.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        most = attempts or self._patience.attempts
        for attempt in range(1, most + 1):
            fault: RetrievalFailed
            try:
                return await self._once(queries, topk, min(self._patience.timeout_s, deadline - loop.time()))
            except Answered as exc:
                if exc.status < 500:
                    raise
                fault = exc
            except TimeoutError:
                fault = RetrievalFailed(f"{self._url} did not answer within {self._patience.timeout_s:g} s")
            except (aiohttp.ClientError, OSError) as exc:
                fault = RetrievalFailed(
                    f"{self._url} cannot be reached ({texts.of_error(exc, 160)}); start the retrieval server "
                    "(`atpo retriever CORPUS.jsonl`) or correct the URL"
                )
            pause_s = self._patience.pause_s(attempt, self._draw.random())
            if attempt == most or loop.time() + pause_s >= deadline:
                tried = texts.counted(attempt, "attempt")
                fault.args = (f"{fault}; {tried} in {loop.time() - began:.1f} s",)
                raise fault
            self.retries += 1
            await asyncio.sleep(pause_s)
        raise AssertionError("there is at least one attempt")

    async def _once(self, queries: Sequence[str], topk: int, timeout_s: float) -> list[list[Passage]]:
        self.requests += 1
        body = {"queries": list(queries), "topk": topk, "return_scores": True}
        limit = aiohttp.ClientTimeout(total=max(timeout_s, 0.001))
        async with self._session.post(self._url, json=body, timeout=limit, allow_redirects=False) as response:
            read = await self._read(response)
            if response.status != 200:
                raise Answered(self._refusal(response, read), response.status)
        try:
            return parse_answer(json.loads(read), num_queries=len(queries))
        except (ValueError, RecursionError) as exc:
            said = "it is no JSON" if isinstance(exc, json.JSONDecodeError | UnicodeDecodeError) else str(exc)
            begins = texts.shortened(read[:400].decode(errors="replace"), 80)
            fault = f"{self._url} gave an answer that cannot be read: {said}"
            raise RetrievalFailed(f"{fault}; it begins {begins}") from None

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        parts = []
        left = MAX_ANSWER_BYTES
        async for part in response.content.iter_any():
            parts.append(part)
            left -= len(part)
            if left < 0:
                raise RetrievalFailed(f"{self._url} gave an answer of more than {MAX_ANSWER_BYTES / 1024**2:.0f} MiB")
        return b"".join(parts)

    def _refusal(self, response: aiohttp.ClientResponse, read: bytes) -> str:
        where = response.headers.get("Location")
        detail = f"; it names {where}: use that URL" if where else ""
        said = texts.shortened(read[:2000].decode(errors="replace"), 200)
        return f"{self._url} answered {response.status} {response.reason or ''}: {said or 'no text'}{detail}"
