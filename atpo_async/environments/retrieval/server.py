"""The retrieval server: the published protocol over HTTP on an index, with queries of concurrent requests in batches.

``POST /retrieve`` (``protocol.py``) and ``GET /health``.  A request that it cannot answer gets ``{"detail": …}``: 400
for no JSON, 422 for a field, 413 beyond the limits of size, 503 while too many queries wait.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from atpo_async.core import texts
from atpo_async.core.errors import SetupError
from atpo_async.environments.retrieval.batching import Batcher
from atpo_async.environments.retrieval.index import PassageIndex
from atpo_async.environments.retrieval.protocol import BadRequest, parse_request
from atpo_async.environments.retrieval.workers import Item, Workers

log = logging.getLogger("atpo.retriever")

MAX_BODY_BYTES = 64 * 1024**2
MAX_WAITING = 50_000
"""Queries that no worker has taken yet; beyond them requests are refused until there are fewer."""

BATCH = 32
"""Queries that a worker takes at once.  A large request is spread over all workers so."""

_STOP_S = 5.0
_LOOPBACK = "use --host 127.0.0.1, or an address of this host"
_PATHS = "POST /retrieve, GET /health"


@dataclass(slots=True)
class Served:
    """What a server has done so far."""

    requests: int = 0
    queries: int = 0
    batches: int = 0
    refused: int = 0


class RetrievalServer:
    """Answers requests on the loop that ``start`` is called on.

    Args:
        index: open.
        workers: started by ``start``.
        topk: passages a query, where a request names no other number.
    """

    def __init__(self, index: PassageIndex, workers: Workers, *, topk: int) -> None:
        self._index, self._workers, self._topk = index, workers, topk
        self.served = Served()
        self._batcher: Batcher[Item, bytes] = Batcher(
            self._answer, max_items=BATCH, max_running=2 * max(1, workers.count), name="answers"
        )
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_as_json])
        app.router.add_post("/retrieve", self._retrieve)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_STOP_S)

    async def start(self, bound: socket.socket) -> None:
        """Listen on a bound socket, once the workers are ready."""
        await self._workers.start()
        await self._runner.setup()
        try:
            await web.SockSite(self._runner, bound, backlog=1024).start()
        except OSError as exc:  # another process bound it at the same time, and listens
            raise _not_usable(exc, *bound.getsockname()[:2]) from exc

    async def close(self) -> None:
        """Stop listening, answer what is under way, end the workers."""
        await self._runner.cleanup()
        await self._batcher.close(SetupError("the retrieval server was stopped"))
        await asyncio.to_thread(self._workers.close)

    async def _answer(self, items: list[Item]) -> list[bytes]:
        self.served.batches += 1
        return await self._workers.answer(items)

    async def _retrieve(self, request: web.Request) -> web.Response:
        try:
            body = json.loads(await request.read())
        except web.RequestPayloadError as exc:
            self.served.refused += 1
            return _refusal(400, f"the body cannot be read: {texts.of_error(exc)}")
        except (ValueError, RecursionError) as exc:
            self.served.refused += 1
            return _refusal(400, f"the body is no JSON: {texts.of_error(exc)}")
        try:
            asked = parse_request(body, default_topk=self._topk)
        except BadRequest as exc:
            self.served.refused += 1
            return _refusal(422, str(exc))
        if self._batcher.num_waiting + len(asked.queries) > MAX_WAITING:
            self.served.refused += 1
            return _refusal(503, f"{self._batcher.num_waiting:,} queries wait already; ask again later")
        self.served.requests += 1
        self.served.queries += len(asked.queries)
        items = [(query, asked.topk, asked.return_scores) for query in asked.queries]
        found = await asyncio.gather(*map(self._batcher.submit, items))
        return web.Response(body=b'{"result": [' + b", ".join(found) + b"]}", content_type="application/json")

    async def _health(self, request: web.Request) -> web.Response:
        served = self.served
        return web.json_response(
            {
                "status": "ok",
                "passages": len(self._index),
                "corpus": str(self._index.corpus.path),
                "workers": self._workers.count,
                "worker_restarts": self._workers.restarts,
                "waiting": self._batcher.num_waiting,
                "requests": served.requests,
                "queries": served.queries,
                "batches": served.batches,
                "refused": served.refused,
            }
        )


def _refusal(status: int, detail: str) -> web.Response:
    return web.json_response({"detail": detail}, status=status)


@web.middleware
async def _as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every error is a JSON value with ``detail``, and what is the server's own fault is logged."""
    try:
        return await handler(request)
    except web.HTTPRequestEntityTooLarge:
        return _refusal(413, f"the body has more than {MAX_BODY_BYTES / 1024**2:.0f} MiB")
    except web.HTTPException as exc:
        there = f"; there is {_PATHS}" if exc.status in (404, 405) else ""
        return _refusal(exc.status, f"{request.method} {texts.shortened(request.path, 80)}: {exc.reason}{there}")
    except Exception as exc:
        log.error("%s %s failed: %s", request.method, request.path, texts.of_error(exc))
        return _refusal(500, texts.of_error(exc))


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket that is bound and does not listen yet; ``port`` 0: one that is free.  Raises SetupError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as exc:
        raise SetupError(f"{host!r} is no address of this host: {exc.strerror or exc}; {_LOOPBACK}") from exc
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as exc:
        bound.close()
        raise _not_usable(exc, host, port) from exc
    return bound


def _not_usable(error: OSError, host: str, port: int) -> SetupError:
    if error.errno == errno.EADDRINUSE:
        return SetupError(f"port {port} on {host} is in use; choose another with --port, or --port 0")
    way_out = "choose one above 1023 with --port" if error.errno == errno.EACCES else _LOOPBACK
    return SetupError(f"port {port} on {host} cannot be used: {error.strerror or error}; {way_out}")


def url_of(bound: socket.socket) -> str:
    """Where clients post to."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/retrieve"


async def serve_until_stopped(server: RetrievalServer, bound: socket.socket, *, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT.  ``ready`` is called once requests are answered."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await server.start(bound)
        ready()
        await stop.wait()
    finally:
        await server.close()
