"""The retrieval client against a server that behaves as the published ones do, and as they do on a bad day."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from atpo_async.core.errors import ConfigError
from atpo_async.environments.retrieval import Passage, RetrievalClient, RetrievalFailed
from atpo_async.environments.retrieval.batching import Batcher
from atpo_async.environments.retrieval.cache import AnswerCache
from atpo_async.environments.retrieval.posting import Patience, checked_url
from atpo_async.environments.retrieval.protocol import BadRequest, parse_answer
from tests.retrieval_support import FakeServer, served, theirs


@contextlib.asynccontextmanager
async def client_of(server: FakeServer, **options: Any) -> AsyncIterator[RetrievalClient]:
    client = RetrievalClient(server.url, **{"backoff_s": 0.0, "gather_s": 0.0} | options)
    try:
        yield client
    finally:
        await client.close()


async def settled() -> None:
    """Until every callback that is ready now, and what it makes ready, has run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_request_has_the_published_shape_and_its_answer_is_read() -> None:
    async with served(FakeServer()) as server, client_of(server, topk=2) as client:
        found = await client.search(["who", "where"])
    assert server.bodies == [{"queries": ["who", "where"], "topk": 2, "return_scores": True}]
    assert found[1] == [Passage("0", "Page 0", "about where", 10.0), Passage("1", "Page 1", "about where", 9.0)]
    assert [p.text for p in found[0]] == ["about who"] * 2


@pytest.mark.parametrize(
    "entry",
    [
        {"document": {"id": "7", "contents": '"Esk"\nsalt'}, "score": 1.5},
        {"document": {"id": 7, "title": "Esk", "text": "salt"}, "score": "1.5"},
        {"document": '"Esk"\nsalt', "score": 1.5},
        {"id": "7", "contents": '"Esk"\nsalt'},
        {"id": "7", "contents": "Esk\nsalt"},
        {"title": "Esk", "text": "salt"},
    ],
)
def test_the_documents_of_the_published_servers_are_read(entry: dict[str, Any]) -> None:
    (passage,) = parse_answer({"result": [[entry]]}, num_queries=1)[0]
    assert (passage.title, passage.text) == ("Esk", "salt")
    assert passage.score == (1.5 if "score" in entry else None)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"results": []}, 'it has no list "result"'),
        ([], 'it has no list "result"'),
        ({"result": [[]]}, "result has 1 entries for 2 queries"),
        ({"result": [[], {"a": 1}]}, r"result\[1\] is {'a': 1}: it must be a list"),
        ({"result": [[], [3]]}, r"result\[1\]\[0\] is 3: it holds no document"),
        ({"result": [[{"document": {"id": "1", "passage": "x"}}], []]}, r"result\[0\]\[0\] has neither .*'passage'"),
        ({"result": [[{"document": "x", "score": "high"}], []]}, r"result\[0\]\[0\].score is 'high'"),
        (b"<html>", "it is no JSON; it begins <html>"),
        (b"\xff\xfe", "it is no JSON"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
async def test_an_answer_that_cannot_be_read_is_named_with_its_url_and_not_asked_again(
    answer: object, said: str
) -> None:
    async with served(FakeServer(answer)) as server, client_of(server) as client:
        with pytest.raises(RetrievalFailed, match=f"{server.url} gave an answer that cannot be read: .*{said}|{said}"):
            await client.search(["a", "b"])
        assert len(server.bodies) == 1
        assert (client.counters.failures, client.counters.retries) == (2, 0)


async def test_concurrent_queries_share_requests_and_the_connection() -> None:
    async with served(FakeServer()) as server, client_of(server, max_batch=4, max_requests=1) as client:
        await asyncio.gather(*(client.search([f"q{n}"]) for n in range(10)))
        assert [len(queries) for queries in server.asked] == [4, 4, 2]
        assert len(server.peers) == 1
        assert client.counters.requests == 3


async def test_what_is_asked_while_a_request_is_under_way_goes_into_the_next_one() -> None:
    async with served(FakeServer()) as server, client_of(server, max_requests=1) as client:
        server.open = asyncio.Event()
        first = asyncio.create_task(client.search(["first"]))
        await server.arrived.wait()
        later = [asyncio.create_task(client.search([f"later {n}"])) for n in range(5)]
        await settled()
        assert len(server.bodies) == 1
        server.open.set()
        await asyncio.gather(first, *later)
        assert [len(queries) for queries in server.asked] == [1, 5]


async def test_the_same_query_is_asked_once_while_it_is_under_way_and_never_again_once_it_is_cached() -> None:
    async with served(FakeServer()) as server, client_of(server) as client:
        several = await asyncio.gather(*(client.search(["same"]) for _ in range(5)), client.search(["same", "same"]))
        again = await client.search(["same"])
        assert server.asked == [["same"]]
        assert all(found[0] == again[0] for found in several)
        counters = client.counters
        assert (counters.queries, counters.shared, counters.cache_hits) == (8, 6, 1)
        again[0].clear()  # the caller's own list
        assert await client.search(["same"]) == [several[0][0]]
        await client.search(["same"], 1)
        assert [body["topk"] for body in server.bodies] == [3, 1]


async def test_a_cancelled_waiter_takes_nothing_from_the_others() -> None:
    async with served(FakeServer()) as server, client_of(server) as client:
        server.open = asyncio.Event()
        waiters = [asyncio.create_task(client.search([query])) for query in ("same", "same", "other")]
        await server.arrived.wait()
        waiters[0].cancel()
        waiters[2].cancel()
        await settled()
        server.open.set()
        assert [p.text for p in (await waiters[1])[0]] == ["about same"] * 3
        assert await asyncio.gather(waiters[0], waiters[2], return_exceptions=True)
        assert await client.search(["other"])
        assert server.asked == [["same", "other"]]  # cached, though no waiter was left


async def test_a_query_that_fails_with_no_waiter_left_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    async with served(FakeServer()) as server, client_of(server) as client:
        server.open = asyncio.Event()
        waiter = asyncio.create_task(client.search(["lost"]))
        await server.arrived.wait()
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        await client.close()
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_a_server_that_is_unavailable_twice_is_asked_a_third_time() -> None:
    async with served(FakeServer(503, 503)) as server, client_of(server) as client:
        assert await client.search(["q"])
        assert (client.counters.requests, client.counters.retries, client.counters.failures) == (3, 2, 0)


async def test_attempts_are_bounded_and_the_error_says_how_many_there_were() -> None:
    async with served(FakeServer(*[502] * 3)) as server, client_of(server, attempts=3) as client:
        with pytest.raises(RetrievalFailed, match=rf"{server.url} answered 502 Bad Gateway: Internal.*; 3 attempts in"):
            await client.search(["a", "b"])
        assert len(server.bodies) == 3
        assert await client.search(["a"])  # a failure is not cached


async def test_a_refusal_is_not_tried_again() -> None:
    gone = web.Response(status=404, text='{"detail":"Not Found"}')
    async with served(FakeServer(gone)) as server, client_of(server) as client:
        with pytest.raises(RetrievalFailed, match=r'answered 404 Not Found: {"detail":"Not Found"}$'):
            await client.search(["a", "b"])
        assert len(server.bodies) == 1
        server.plan = [web.Response(status=307, headers={"Location": "http://elsewhere/retrieve"})]
        with pytest.raises(RetrievalFailed, match="it names http://elsewhere/retrieve: use that URL"):
            await client.search(["a"])


@pytest.mark.parametrize("status", [422, 500])
async def test_one_query_that_the_server_stumbles_over_does_not_take_the_others_of_its_request_with_it(
    status: int,
) -> None:
    def stumbles(body: dict[str, Any]) -> Any:
        return status if "bad" in body["queries"] else theirs(body)

    async with served(FakeServer(always=stumbles)) as server, client_of(server, attempts=2) as client:
        queries = ["a", "b", "bad", "c", "d"]
        found = await asyncio.gather(*(client.search([query]) for query in queries), return_exceptions=True)
    assert [isinstance(answer, RetrievalFailed) for answer in found] == [query == "bad" for query in queries]
    assert client.counters.failures == 1
    assert server.asked[0] == queries


async def test_a_server_that_hangs_is_given_up_after_the_time_limit() -> None:
    async with served(FakeServer()) as server, client_of(server, timeout_s=0.05, attempts=2) as client:
        server.open = asyncio.Event()
        with pytest.raises(RetrievalFailed, match=rf"{server.url} did not answer within 0.05 s; 2 attempts in"):
            await client.search(["q"])
        server.open.set()
        server.open = None
        assert await client.search(["q"])


async def test_the_total_time_bounds_the_attempts() -> None:
    async with served(FakeServer(always=lambda body: 503)) as server:
        async with client_of(server, attempts=1000, total_s=0.05, backoff_s=0.02) as client:
            with pytest.raises(RetrievalFailed, match=r"503 .*; \d+ attempts? in"):
                await client.search(["q"])
        assert len(server.bodies) < 1000


def test_pauses_grow_to_a_bound_and_are_spread() -> None:
    patience = Patience(timeout_s=1, total_s=1, attempts=9, backoff_s=0.5)
    assert [patience.pause_s(n, 0.0) for n in range(1, 7)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert patience.pause_s(1, 0.5) == 0.625


async def test_a_server_that_is_not_there_is_named_with_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        client = RetrievalClient(url, attempts=2, backoff_s=0)
        with pytest.raises(RetrievalFailed, match=rf"{url}/retrieve cannot be reached .*`atpo retriever CORPUS.jsonl`"):
            await client.search(["q"])
        await client.close()


async def test_a_blank_query_finds_nothing_and_is_not_asked() -> None:
    async with served(FakeServer()) as server, client_of(server) as client:
        assert await client.search(["", "  \n"]) == [[], []]
        assert await client.search([]) == []
        assert not server.bodies


async def test_what_is_no_query_is_refused_before_anything_is_asked() -> None:
    async with served(FakeServer()) as server, client_of(server) as client:
        for queries, topk, said in (([None], None, "None"), ("text", None, "a list"), (["q"], 1000, "topk is 1000")):
            with pytest.raises(BadRequest, match=said):
                await client.search(queries, topk)  # type: ignore[arg-type]
        assert not server.bodies
        assert client.counters.queries == 0


async def test_closing_ends_the_searches_under_way_with_an_error_of_theirs() -> None:
    async with served(FakeServer()) as server, client_of(server, max_requests=1) as client:
        server.open = asyncio.Event()
        running = asyncio.create_task(client.search(["running"]))
        await server.arrived.wait()
        waiting = asyncio.create_task(client.search(["waiting"]))
        await settled()
        await client.close()
        for search in (running, waiting):
            with pytest.raises(RetrievalFailed, match="was closed"):
                await search
        server.open.set()
        assert await client.search(["again"])


def test_a_client_made_without_a_loop_is_used_on_one_loop_after_another(caplog: pytest.LogCaptureFixture) -> None:
    answered: list[object] = []

    async def use(client: RetrievalClient) -> None:
        async with served(FakeServer()) as server:
            client.url = server.url
            answered.append(await client.search([f"q{len(answered)}"]))

    def use_on_two_loops() -> None:
        made = RetrievalClient("http://127.0.0.1:1", backoff_s=0)
        asyncio.run(use(made))
        thread = threading.Thread(target=lambda: asyncio.run(use(made)))
        thread.start()
        thread.join()

    with caplog.at_level(logging.DEBUG):
        use_on_two_loops()
        gc.collect()
    assert len(answered) == 2
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("127.0.0.1:8000/retrieve", "write http://127.0.0.1:8000/retrieve"),
        ("localhost:8000", "write http://localhost:8000"),
        ("ftp://host/x", "write http://host/x"),
        ("http://host:99999", "Port out of range"),
        ("http://host:port", "Port could not be cast"),
        ("http://", "write http://HOST:PORT/retrieve"),
        ("", "write http://HOST:PORT/retrieve"),
        (None, "the retrieval URL is None"),
    ],
)
def test_a_url_that_is_none_is_refused_with_what_to_write(url: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RetrievalClient(url)


def test_a_url_without_a_path_means_retrieve_and_others_stay() -> None:
    assert checked_url("http://h:1") == checked_url("http://h:1/") == "http://h:1/retrieve"
    assert checked_url("https://h/api/search?k=1") == "https://h/api/search?k=1"


def test_an_option_outside_its_range_is_named() -> None:
    wrong: dict[str, Any] = {"timeout_s": 0, "attempts": 0, "max_batch": 20_000, "total_s": float("nan")}
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=rf"{name} of the retrieval client must be .*, got {value}"):
            RetrievalClient("http://h", **{name: value})


def test_the_cache_lets_the_least_recently_used_go_and_keeps_within_its_bounds() -> None:
    cache = AnswerCache(max_entries=2, max_bytes=10_000)
    answer = (Passage("1", "t", "x"),)
    for query in "ab":
        cache.put((query, 3), answer)
    assert cache.get(("a", 3)) == answer
    cache.put(("c", 3), answer)
    assert [cache.get((query, 3)) is not None for query in "abc"] == [True, False, True]
    assert cache.get(("a", 1)) is None
    cache.put(("large", 3), (Passage("1", "t", "x" * 2_000),))
    assert [cache.get((query, 3)) is not None for query in ("a", "c", "large")] == [False, True, True]
    cache.put(("too large", 3), (Passage("1", "t", "x" * 3_000),))
    assert len(cache) == 2
    none = AnswerCache(max_entries=0, max_bytes=10)
    none.put(("a", 3), ())
    assert len(none) == 0


async def test_a_batch_takes_back_what_was_cancelled_and_gives_each_item_its_own_error() -> None:
    batches: list[list[int]] = []

    async def handle(items: list[int]) -> list[int | Exception]:
        batches.append(items)
        return [ValueError(str(item)) if item % 2 else item * 10 for item in items]

    batcher: Batcher[int, int] = Batcher(handle, max_items=10, max_running=1)
    futures = [batcher.submit(item) for item in range(4)]
    futures[2].cancel()
    assert batcher.num_waiting == 4
    assert await futures[0] == 0
    with pytest.raises(ValueError, match="3"):
        await futures[3]
    with pytest.raises(ValueError, match="1"):
        await futures[1]
    assert batches == [[0, 1, 3]]


async def test_a_cancellation_inside_of_a_batch_is_an_error_of_its_items_and_cancels_no_caller() -> None:
    async def handle(items: list[int]) -> list[int | Exception]:
        raise asyncio.CancelledError

    batcher: Batcher[int, int] = Batcher(handle, max_items=10, max_running=1, name="retrieval")
    with pytest.raises(RuntimeError, match="the retrieval batch was cancelled"):
        await batcher.submit(1)
