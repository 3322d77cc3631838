"""The retrieval server: the published requests and their answers, what it refuses, its batches, its end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from atpo_async.cli import retriever
from atpo_async.cli.main import main
from atpo_async.core.errors import SetupError
from atpo_async.environments.retrieval import LocalRetriever, PassageIndex, RetrievalClient, RetrievalFailed
from atpo_async.environments.retrieval import server as server_module
from atpo_async.environments.retrieval.server import RetrievalServer, bind, url_of
from atpo_async.environments.retrieval.workers import Item, Workers
from atpo_async.links import advertised
from benchmarks.retriever import measured
from tests.retrieval_support import TOWNS, rows, write_corpus

DEADLINE_S = 60


class HeldWorkers(Workers):
    """Threads that answer once they are let, and note each batch."""

    def __init__(self, index: PassageIndex) -> None:
        super().__init__(index, 0)
        self.batches: list[list[Item]] = []
        self.let = asyncio.Event()
        self.let.set()
        self.taken = asyncio.Event()

    async def answer(self, items: list[Item]) -> list[bytes]:
        self.batches.append(items)
        self.taken.set()
        await self.let.wait()
        return await super().answer(items)


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[tuple[str, RetrievalServer, HeldWorkers]]:
    index = PassageIndex.open(write_corpus(folder))
    workers = HeldWorkers(index)
    server = RetrievalServer(index, workers, topk=2)
    with bind("127.0.0.1", 0) as bound:
        await server.start(bound)
        try:
            yield url_of(bound), server, workers
        finally:
            workers.let.set()
            await server.close()


async def posted(url: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.ClientSession() as session, session.post(url, data=data) as response:
        return response.status, await response.json()


async def test_the_request_of_search_r1s_client_is_answered_as_it_reads_it(tmp_path: Path) -> None:
    payload = {"queries": ["Who founded Corve?", "salt exports"], "topk": 1, "return_scores": True}
    async with running(tmp_path) as (url, _, _):
        status, answer = await posted(url, payload)
    assert status == 200
    shown = []
    for found in answer["result"]:
        text = ""
        for number, entry in enumerate(found):
            contents = entry["document"]["contents"]
            title, body = contents.split("\n")[0], "\n".join(contents.split("\n")[1:])
            text += f"Doc {number + 1}(Title: {title}) {body}\n"
        shown.append(text)
    assert shown == [f'Doc 1(Title: "{town}") {TOWNS[town]}\n' for town in ("Corve", "Esk")]
    assert {type(entry["score"]) for found in answer["result"] for entry in found} == {float}
    assert answer["result"][1][0]["document"] == rows()[4]


async def test_without_scores_an_answer_is_documents_and_the_servers_own_topk_holds(tmp_path: Path) -> None:
    async with running(tmp_path) as (url, _, _):
        for body in ({"queries": ["glass"]}, {"query": "glass"}, {"query": ["glass"], "topk": None}):
            status, answer = await posted(url, body)
            assert (status, answer) == (200, {"result": [[rows()[4], rows()[1]]]})
        assert await posted(url, {"queries": ["river", "", " \n"], "topk": 1, "return_scores": False}) == (
            200,
            {"result": [[rows()[0]], [], []]},
        )
        assert await posted(url, {"queries": [], "return_scores": True}) == (200, {"result": []})


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"queries=x", 400, "the body is no JSON: JSONDecodeError: Expecting value"),
        (b"\xff", 400, "the body is no JSON: UnicodeDecodeError"),
        (b"[" * 50_000, 400, "the body is no JSON: RecursionError"),
        ([], 422, "the body is []: it must be an object"),
        ({}, 422, 'the body has no "queries", a list of texts'),
        ({"queries": ["a"], "query": "a"}, 422, 'the body has both "queries" and "query"'),
        ({"queries": "a"}, 422, "queries is 'a': it must be a list of texts"),
        ({"query": 3}, 422, "query is 3: it must be a list of texts"),
        ({"queries": ["a", None]}, 422, "queries[1] is None (NoneType): it must be a text"),
        ({"queries": ["a" * 20_001]}, 422, "queries[0] has 20,001 characters; a query has at most 20,000"),
        ({"queries": ["a"] * 10_001}, 422, "queries has 10,001 entries; at most 10,000 fit in one request"),
        ({"queries": ["a"], "topk": 0}, 422, "topk is 0: it must be a whole number from 1 to 100"),
        ({"queries": ["a"], "topk": 2.5}, 422, "topk is 2.5"),
        ({"queries": ["a"], "topk": "3"}, 422, "topk is '3'"),
        ({"queries": ["a"], "return_scores": 1}, 422, "return_scores is 1: it must be true or false"),
    ],
)
async def test_a_malformed_request_is_refused_with_the_field_and_its_value(
    tmp_path: Path, body: Any, status: int, said: str
) -> None:
    async with running(tmp_path) as (url, server, workers):
        got, answer = await posted(url, body)
        assert (got, answer["detail"][: len(said)]) == (status, said)
        assert server.served.refused == 1
        assert not workers.batches


async def test_other_paths_methods_and_bodies_beyond_the_limit_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_BODY_BYTES", 1024**2)
    async with running(tmp_path) as (url, _, _):
        status, answer = await posted(url.replace("retrieve", "search"), {})
        assert (status, answer["detail"]) == (
            404,
            "POST /search: Not Found; there is POST /retrieve, GET /health",
        )
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            assert response.status == 405
        assert await posted(url, b"x" * 1024**2 + b"x") == (413, {"detail": "the body has more than 1 MiB"})


async def test_a_body_that_cannot_be_unpacked_is_the_clients_fault(tmp_path: Path) -> None:
    async with running(tmp_path) as (url, server, _), aiohttp.ClientSession() as session:
        headers = {"Content-Encoding": "gzip"}
        async with session.post(url, data=b"xx", headers=headers, skip_auto_headers=["Content-Type"]) as response:
            assert response.status == 400
            assert "cannot be read" in (await response.json())["detail"]
        assert server.served.refused == 1


async def test_queries_of_concurrent_requests_are_computed_in_common_batches(tmp_path: Path) -> None:
    async with running(tmp_path) as (url, server, workers), aiohttp.ClientSession() as session:
        workers.let.clear()

        async def ask(query: str) -> Any:
            async with session.post(url, json={"queries": [query]}) as response:
                return (await response.json())["result"]

        first = []
        for _ in range(2):  # as many batches as run at once
            workers.taken.clear()
            first.append(asyncio.create_task(ask("salt")))
            await workers.taken.wait()
        later = [asyncio.create_task(ask("glass")) for _ in range(10)]
        while server._batcher.num_waiting < len(later):
            async with session.get(url.replace("retrieve", "health")) as response:
                assert response.status == 200
        workers.let.set()
        assert await asyncio.gather(*first) == [[[rows()[4]]]] * 2
        assert await asyncio.gather(*later) == [[[rows()[4], rows()[1]]]] * 10
        assert [len(batch) for batch in workers.batches] == [1, 1, 10]


async def test_one_large_request_is_spread_over_batches(tmp_path: Path) -> None:
    async with running(tmp_path) as (url, _, workers):
        status, answer = await posted(url, {"queries": ["salt", "glass"] * 50})
        assert status == 200
        assert answer["result"] == [[rows()[4]], [rows()[4], rows()[1]]] * 50
        assert [len(batch) for batch in workers.batches] == [32, 32, 32, 4]
        async with aiohttp.ClientSession() as session, session.get(url.replace("retrieve", "health")) as response:
            health = await response.json()
    assert health.items() >= {"status": "ok", "passages": 6, "requests": 1, "queries": 100, "batches": 4}.items()


async def test_a_server_with_too_many_queries_waiting_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_WAITING", 1)
    async with running(tmp_path) as (url, _, _):
        status, answer = await posted(url, {"queries": ["a", "b"]})
        assert (status, answer["detail"]) == (503, "0 queries wait already; ask again later")


async def test_client_and_server_find_what_the_index_finds_in_this_process(tmp_path: Path) -> None:
    queries = ["salt", "", "river harbour", "Who built the lighthouse of Dunmere?", "zebra"]
    local = LocalRetriever(write_corpus(tmp_path))
    async with running(tmp_path) as (url, _, workers):
        client = RetrievalClient(url)
        assert await client.search(queries) == await local.search(queries)
        assert sorted(query for query, _, _ in workers.batches[0]) == sorted(query for query in queries if query)
        await client.close()


async def test_a_corpus_that_changed_is_an_answer_that_says_so(tmp_path: Path, caplog: Any) -> None:
    async with running(tmp_path) as (url, _, _):
        shutil.copyfile(os.devnull, tmp_path / "towns.jsonl")
        status, answer = await posted(url, {"queries": ["salt"]})
        assert status == 500
        assert "towns.jsonl was changed since its index was made: start again" in answer["detail"]
        assert "POST /retrieve failed" in caplog.text
        client = RetrievalClient(url, attempts=1)
        with pytest.raises(RetrievalFailed, match=r"answered 500 .*was changed since its index was made"):
            await client.search(["salt"])
        await client.close()


async def test_a_server_that_stops_answers_what_is_under_way(tmp_path: Path) -> None:
    async with running(tmp_path) as (url, server, workers):
        workers.let.clear()
        asked = asyncio.create_task(posted(url, {"queries": ["salt"]}))
        await workers.taken.wait()
        closing = asyncio.create_task(server.close())
        workers.let.set()
        assert await asked == (200, {"result": [[rows()[4]]]})
        await closing


def test_an_address_that_cannot_be_used_is_named_with_the_way_out() -> None:
    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(SetupError, match=rf"port {port} on 127.0.0.1 is in use; choose another with --port"):
            bind("127.0.0.1", port)
    with pytest.raises(
        SetupError, match=r"'no\.such\.host\.invalid' is no address of this host: .*use --host 127.0.0.1"
    ):
        bind("no.such.host.invalid", 0)


def test_a_server_at_every_address_names_those_of_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advertised, "own_addresses", lambda ipv6: ("10.0.0.9", "fd00::9")[: 1 + ipv6])
    at_all = "http://[::]:80/retrieve"
    assert retriever.urls(at_all, "::", 80) == "http://10.0.0.9:80/retrieve or http://[fd00::9]:80/retrieve"
    assert retriever.urls("http://0.0.0.0:80/retrieve", "0.0.0.0", 80) == "http://10.0.0.9:80/retrieve"
    assert retriever.urls("http://[::1]:80/retrieve", "::1", 80) == "http://[::1]:80/retrieve"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        (["--port", "x"], "argument --port: invalid int value: 'x'"),
        (["--workers", "-1"], "--workers must be from 0 to 1024, got -1"),
        (["--topk", "0"], "--topk must be from 1 to 100, got 0"),
        (["--learner.lr", "1"], "takes no options of the configuration"),
        ([], "none.jsonl is not here; name a JSONL file of passages"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert main(["retriever", str(tmp_path / "none.jsonl"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def started(corpus: Path) -> tuple[subprocess.Popen[str], str, list[str]]:
    """A server of one worker; its URL; the lines that it said until it answered."""
    command = [sys.executable, "-m", "atpo_async.cli", "retriever", str(corpus), "--port", "0", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line.strip())
        if " answers with " in line:
            return process, line.split()[1], said
    raise AssertionError("\n".join(said))


async def test_the_command_serves_from_a_worker_process_that_it_replaces_and_takes_with_it(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    process, url, said = started(corpus)
    assert said[0].startswith("retriever: making the index of")
    assert f"answers with 6 passages of {corpus}; index {corpus}.bm25 (" in said[-1]
    client = RetrievalClient(url, cache_entries=0)
    try:
        assert [p.title for p in (await client.search(["salt"]))[0]] == ["Esk"]
        (worker,) = [child for child in psutil.Process(process.pid).children() if "spawn_main" in str(child.cmdline())]
        worker.kill()
        psutil.wait_procs([worker], timeout=DEADLINE_S)
        assert [p.title for p in (await client.search(["salt"]))[0]] == ["Esk"]
        await client.close()
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
        assert "a worker process ended by itself" in rest
        assert rest.endswith("retriever: stopped; 2 queries in 2 requests, 0 refused\n")
    finally:
        process.kill()


def test_a_server_that_is_killed_leaves_no_worker(tmp_path: Path) -> None:
    process, _, said = started(write_corpus(tmp_path))
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    _, alive = psutil.wait_procs(workers, timeout=DEADLINE_S)
    assert not alive
    assert len(workers) >= 1, said


def test_a_small_run_of_the_benchmark_measures_each_part_and_finds_the_same_everywhere(tmp_path: Path) -> None:
    args = argparse.Namespace(passages=300, queries=60, made_words=400, seed=1, workers=[0])
    records = list(measured(args, tmp_path))
    assert [record["part"] for record in records] == ["making", "library", "index", *["http"] * 4]
    assert records[0]["passages"] == 300
    assert [record["requests"] for record in records[3:]][-2:] == [60, 60]
    assert all(record["queries_per_s"] > 0 for record in records[1:])
