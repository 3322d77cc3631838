"""search_qa and its search engine: one that fails, is down, or is another server; and options that cannot be."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from actors.environments import host_environment
from atpo_async.api.machine import check_environment
from atpo_async.config import build
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.environments.making import make_environment
from atpo_async.environments.retrieval import RetrievalClient, RetrievalFailed
from atpo_async.environments.search_qa import retrievers
from atpo_async.environments.search_qa.environment import make
from atpo_async.environments.search_qa.retrievers import ask_once, open_retriever
from tests.links_support import reserved_port
from tests.retrieval_support import FakeServer, served
from tests.search_qa_support import (
    SEARCH,
    Shelf,
    action,
    corpus,
    environment,
    flashrag,
    grown,
    passage,
    published,
    tokenizer_folder,
    write_lines,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


async def test_a_search_that_fails_costs_its_branch_or_ends_the_chain_as_published(folder: Path) -> None:
    episode = await environment(folder, shelf=Shelf(fails=True)).start("train", 0)
    with pytest.raises(RetrievalFailed, match="nowhere does not answer"):
        await episode.step(action(environment(folder), SEARCH))
    task = environment(folder, shelf=Shelf(fails=True), failed_search="leaf")
    over = await (await task.start("train", 0)).step(action(task, SEARCH))
    assert (over.done, over.reward) == (True, -1.0)


async def test_a_quotation_mark_is_no_part_of_at2pos_query_and_a_long_one_is_cut(folder: Path) -> None:
    for dialect, query in (("at2po", "a b"), ("search_r1", '"a" b')):
        shelf = Shelf()
        task = environment(folder, shelf=shelf, dialect=dialect)
        await (await task.start("train", 0)).step(action(task, '<search> "a" b </search>'))
        await (await task.start("train", 0)).step(action(task, f"<search> {'x' * 30000} </search>"))
        assert shelf.asked[0] == query
        assert len(shelf.asked[1]) == 20_000


@pytest.fixture
def server() -> Iterator[Any]:
    """An HTTP server whose answer is ``server.says``, a (status, body); it keeps what it was sent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            listening.sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))  # type: ignore[attr-defined]
            status, body = listening.says  # type: ignore[attr-defined]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.sent, listening.says = [], (200, b"{}")  # type: ignore[attr-defined]
    listening.url = f"http://127.0.0.1:{listening.server_port}/retrieve"  # type: ignore[attr-defined]
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield listening
    listening.shutdown()
    thread.join()
    listening.server_close()
    retrievers._answered.clear()


def test_a_server_that_is_down_is_named_with_the_way_out_before_the_run(folder: Path) -> None:
    url = f"http://127.0.0.1:{reserved_port()}/retrieve"
    with pytest.raises(
        SetupError, match=rf"server {url} .*does not answer after 0 s: .*refused.*atpo retriever CORPUS"
    ):
        ask_once(url, topk=3)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, b"", "answers with HTTP 404 Not Found; check the path"),
        (200, b"<html>", "answers, and not as a retrieval server does .*JSONDecodeError"),
        (200, b'{"result": []}', "answers, and not as a retrieval server does"),
        (200, b"[]", "answers, and not as a retrieval server does"),
    ],
)
def test_a_server_of_another_kind_is_told_from_a_retrieval_server(
    server: Any, status: int, body: bytes, said: str
) -> None:
    server.says = (status, body)
    with pytest.raises(SetupError, match=said):
        ask_once(server.url, topk=3)


def test_everything_that_is_missing_is_said_at_once_before_anything_starts(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{reserved_port()}"
    options: dict[str, Any] = {"data": str(tmp_path / "trian.jsonl"), "eval_data": "owner/name", "retriever": url}
    write_lines(tmp_path / "train.jsonl", flashrag(count=1))
    with pytest.raises(SetupError) as caught:
        check_environment(build({"environment": {"name": "search_qa", "options": options}}))
    said = str(caught.value)
    assert "environment.options.data = " in said
    assert "did you mean 'train.jsonl'?" in said
    assert f"the retrieval server {url}/retrieve (environment.options.retriever) does not answer" in said
    by_hand = {"environment": {"name": "search_qa", "options": options}, "actor": {"count": 0}}
    check_environment(build(by_hand))  # actors of other machines have their own server
    there = {"data": str(tmp_path / "train.jsonl"), "retriever": f"local:{tmp_path / 'train.jsonl'}"}
    check_environment(build({"environment": {"name": "search_qa", "options": there}}))


async def test_a_whole_episode_over_http(server: Any, folder: Path, tmp_path: Path) -> None:
    found = {"result": [[{"document": {"id": "7", "contents": passage("France", "Paris")}, "score": 3.5}]]}
    server.says = (200, json.dumps(found).encode())
    task = make(folder, data=str(write_lines(tmp_path / "train.jsonl", flashrag(count=1))), retriever=server.url)
    episode = await task.start("train", 0)
    said = await episode.step(action(task, SEARCH))
    assert task.decode(said.observation) == f" <result>\nPage 1: {passage('France', 'Paris')}\n</result>"
    assert server.sent[-1]["queries"] == ["capital"]
    assert server.sent[-1]["topk"] == 3
    assert server.sent[-1]["return_scores"] is True
    await task.retriever.close()


async def test_an_index_in_this_process_searches_fifty_passages(folder: Path, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "corpus.jsonl", corpus())
    data = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(published("system", count=2)), data)
    task = make(folder, data=str(data), retriever=f"local:{lines}", seed=1)
    episode = await task.start("train", 0)
    said = await episode.step(action(task, "<search> capital of Peru </search>"))
    assert f"Page 1: {passage('Peru', 'Lima')}" in task.decode(said.observation)


async def test_a_server_that_goes_down_in_mid_run_costs_branches_and_is_named(folder: Path) -> None:
    server = FakeServer(always=lambda body: 503)
    async with served(server):
        client = RetrievalClient(server.url, attempts=2, backoff_s=0.0)
        tree, search = await grown(environment(folder, shelf=client), [SEARCH])
        await client.close()
    assert not len(tree)
    assert search.growth.failures == {"environment_failed": 3}
    assert f"{server.url} answered 503 Service Unavailable" in search.growth.last_detail
    assert len(server.bodies) >= 2  # it was asked again


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "environment.options.data is missing"),
        ({"data": "x.jsonl", "retreiver": "y"}, "no such option; did you mean retriever"),
        ({"data": "x.jsonl", "dialect": "r1"}, "dialect must be one of at2po, search_r1"),
        ({"data": "x.jsonl", "topk": 0}, "topk must be 1 to 100, got 0"),
    ],
)
def test_options_that_cannot_be_are_refused(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(folder, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reward": "bleu"}, "reward must be one of em, f1; got 'bleu'"),
        ({"max_searches": -1}, r"max_searches must be a whole number >= 0 \(0: no limit\), got -1"),
        ({"failed_search": "skip"}, "failed_search must be one of branch, leaf"),
        ({"prompt_style": "raw"}, "prompt_style must be one of auto, chat, plain"),
    ],
)
def test_values_that_cannot_be_are_refused(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        environment(folder, **options)


@pytest.mark.parametrize("name", ["", "127.0.0.1:8000", "local:", 5, None])
def test_a_retriever_is_a_url_or_a_corpus(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"environment.options.retriever is .*expected the URL .* or 'local:CORPUS"):
        open_retriever(name, topk=3)


def test_a_corpus_that_is_not_there_is_named() -> None:
    with pytest.raises(SetupError, match=r"retriever = 'local:nowhere.jsonl': there is no file nowhere.jsonl"):
        open_retriever("local:nowhere.jsonl", topk=3)


async def test_the_built_in_environment_goes_through_the_border(folder: Path, tmp_path: Path) -> None:
    rows = [*flashrag(count=2), {"question": "who?", "golden_answers": []}]
    options = {
        "data": str(write_lines(tmp_path / "train.jsonl", rows)),
        "retriever": f"local:{write_lines(tmp_path / 'corpus.jsonl', corpus())}",
    }
    config = build(
        {"environment": {"name": "search_qa", "options": options}, "model": {"max_context_tokens": 1024}}
    )  # fmt: skip
    assert make_environment(config, folder).stop_strings == ("</search>",)
    async with host_environment(config, folder) as hosted:
        assert hosted.stop_strings == ("</search>",)
        assert hosted.num_tasks("train") == 3
        faults = []
        for index in range(3):
            try:
                episode = await hosted.start("train", index)
                assert len(episode.prompt)
                await episode.close()
            except Exception as exc:
                faults.append(str(exc))
        assert len(faults) == 1
        assert "train.jsonl, line 3: golden_answers is [] (list); expected at least one answer" in faults[0]
