"""A corpus about six towns, and a server that behaves as the published ones do, faults included."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

TOWNS = {
    "Arden": "Arden lies on the river Tole and has a harbour.",
    "Brill": "Brill is known for its glass. The river Tole ends there.",
    "Corve": "Corve was founded by the miller Anselm Dray.",
    "Dunmere": "Dunmere has a lighthouse, built by Anselm Dray in 1811.",
    "Esk": "Esk exports salt and glass.",
    "Fell": "Fell has no harbour.",
}


def rows() -> list[dict[str, str]]:
    """Of wiki-18's form."""
    return [{"id": str(100 + n), "contents": f'"{name}"\n{text}'} for n, (name, text) in enumerate(TOWNS.items())]


def write_rows(path: Path, written: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return path


def write_corpus(folder: Path) -> Path:
    return write_rows(folder / "towns.jsonl", rows())


def theirs(body: dict[str, Any]) -> dict[str, Any]:
    """What Search-R1's server answers: for each query, documents whose text is the query, with scores if asked."""
    found = [
        [
            {"document": {"id": f"{rank}", "contents": f'"Page {rank}"\nabout {query}'}, "score": 10.0 - rank}
            for rank in range(body["topk"])
        ]
        for query in body["queries"]
    ]
    if body["return_scores"]:
        return {"result": found}
    return {"result": [[entry["document"] for entry in entries] for entries in found]}


class FakeServer:
    """Answers ``POST /retrieve`` by a plan: for each request in turn a status, a JSON value, bytes, or a function."""

    def __init__(self, *plan: object, always: Callable[[dict[str, Any]], Any] = theirs) -> None:
        self.plan = list(plan)
        self.always = always
        self.bodies: list[dict[str, Any]] = []
        self.peers: set[object] = set()
        self.open: asyncio.Event | None = None
        """While it is set to an event, requests wait for it."""
        self.arrived = asyncio.Event()
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.peers.add(request.transport.get_extra_info("peername"))
        body = await request.json()
        self.bodies.append(body)
        self.arrived.set()
        step = self.plan.pop(0) if self.plan else self.always
        if self.open is not None:
            await self.open.wait()
        if callable(step):
            step = step(body)
        if isinstance(step, web.Response):
            return step
        if isinstance(step, int):
            return web.Response(status=step, text="Internal Server Error")
        if isinstance(step, bytes):
            return web.Response(body=step, content_type="application/json")
        return web.json_response(step)

    @property
    def asked(self) -> list[list[str]]:
        """The queries of each request."""
        return [body["queries"] for body in self.bodies]


@contextlib.asynccontextmanager
async def served(server: FakeServer) -> AsyncIterator[FakeServer]:
    app = web.Application()
    app.router.add_post("/retrieve", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/retrieve"
    try:
        yield server
    finally:
        if server.open is not None:
            server.open.set()
        await runner.cleanup()
