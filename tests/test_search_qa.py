"""search_qa over tokens: prompts, actions as sampled, observations appended, forks, and the search engine's faults."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from actors.environments import host_environment
from actors.search.tree_search import TreeSearch
from atpo_async.api.machine import check_environment
from atpo_async.config import build
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.tree import TurnTree
from atpo_async.environments.data.task_data import TaskData
from atpo_async.environments.making import make_environment
from atpo_async.environments.replay import Past, PastTurn, replayed
from atpo_async.environments.retrieval import RetrievalClient, RetrievalFailed
from atpo_async.environments.search_qa import retrievers
from atpo_async.environments.search_qa.environment import SearchQA, make
from atpo_async.environments.search_qa.retrievers import ask_once, open_retriever
from atpo_async.environments.search_qa.tokens import Tokens
from atpo_async.environments.values import ValueRefused
from tests.actor_support import ScriptedEngine, lease
from tests.retrieval_support import FakeServer, served
from tests.search_qa_support import (
    Found,
    corpus,
    flashrag,
    passage,
    published,
    tokenizer_folder,
    write_lines,
)


class Shelf:
    """A retriever that finds the same passage for every query, and remembers what it was asked."""

    def __init__(self, *contents: str, fails: bool = False) -> None:
        self.contents = contents or (passage("France", "Paris"),)
        self.asked: list[str] = []
        self.fails = fails

    async def search(self, queries: Sequence[str], topk: int | None = None) -> list[list[Any]]:
        self.asked += queries
        if self.fails:
            raise RetrievalFailed("the server http://nowhere does not answer")
        return [[Found(text) for text in self.contents[:topk]] for _ in queries]

    async def close(self) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


def environment(
    folder: Path, *, rows: list[dict[str, Any]] | None = None, shelf: Any = None, **options: Any
) -> SearchQA:
    data = TaskData.load(rows or flashrag(), eval_data=[{"question": "held out", "golden_answers": ["x"]}])
    return SearchQA(folder, data=data, retriever=shelf or Shelf(), **options)


def action(task: SearchQA, text: str, *, stop: bool = False) -> np.ndarray:
    ids = task.tokens.encode(text)
    return np.append(ids, task.stop_token_ids[0]).astype(np.int32) if stop else ids


SEARCH = "<think> I look it up </think> <search> capital </search>"


async def test_an_at2po_chain_searches_answers_and_is_rewarded(folder: Path) -> None:
    shelf = Shelf()
    task = environment(folder, shelf=shelf, rows=flashrag(count=1))
    episode = await task.start("train", 0)
    said = await episode.step(action(task, SEARCH))
    assert task.decode(said.observation) == f" <result>\nPage 1: {passage('France', 'Paris')}\n</result>"
    assert (said.done, said.end) == (False, "continue")
    over = await episode.step(action(task, " <think> so </think> <answer> \\boxed{Paris} </answer>", stop=True))
    assert (over.done, over.reward, over.success, over.end) == (True, 1.0, True, "done")
    assert over.rewards == {"em": 1.0, "f1": 1.0, "form": 1.0, "searches": 1.0}
    assert shelf.asked == ["capital"]


async def test_a_search_r1_chain_is_told_of_a_malformed_action_and_goes_on(folder: Path) -> None:
    task = environment(folder, rows=flashrag(count=1), dialect="search_r1")
    episode = await task.start("train", 0)
    told = await episode.step(action(task, "hm", stop=True))
    assert "That was not a valid action" in task.decode(told.observation)
    said = await episode.step(action(task, "<search> capital </search>"))
    text = task.decode(said.observation)
    assert text.startswith('\n\n<information>Doc 1(Title: "France") The capital of France is Paris.')
    assert text.endswith("</information>\n\n")
    over = await episode.step(action(task, "<answer> the Paris </answer>"))
    assert (over.done, over.reward, over.success) == (True, 1.0, True)


async def test_search_r1_ends_after_four_turns_and_a_last_action(folder: Path) -> None:
    task = environment(folder, dialect="search_r1")
    episode = await task.start("train", 0)
    for _ in range(4):
        assert not (await episode.step(action(task, "<search> q </search>"))).done
    over = await episode.step(action(task, "<search> q </search>"))
    assert (over.done, over.end, over.reward, over.success) == (True, "turn_limit", 0.0, False)


async def test_an_observation_of_search_r1_is_cut_at_500_tokens(folder: Path) -> None:
    task = environment(folder, dialect="search_r1", shelf=Shelf('"T"\n' + "x " * 2000))
    episode = await task.start("train", 0)
    said = await episode.step(action(task, "<search> q </search>"))
    assert len(said.observation) == 500


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think> t </think> <search> </search>", -1.0),  # an empty query
        ("<think> t", -1.0),  # cut by length: no answer
        ("<think> t </think> <answer> Paris </answer>", -1.0),  # no box
        ("<think> t </think> <answer> \\boxed{Rome} </answer>", 0.0),
    ],
)
async def test_what_is_no_search_is_a_leaf_in_at2pos_dialect_and_scored(folder: Path, text: str, reward: float) -> None:
    task = environment(folder, rows=flashrag(count=1))
    over = await (await task.start("train", 0)).step(action(task, text))
    assert (over.done, over.reward, over.success) == (True, reward, False)


async def test_the_number_of_searches_and_turns_may_be_set(folder: Path) -> None:
    task = environment(folder, max_searches=1)
    episode = await task.start("train", 0)
    await episode.step(action(task, SEARCH))
    said = await episode.step(action(task, SEARCH))
    assert task.decode(said.observation).startswith(" No more searches are possible")


# --- ids ---------------------------------------------------------------------------------------------------------


async def test_the_prompt_is_the_chat_templates_with_the_dialects_message(folder: Path) -> None:
    system = environment(folder, rows=flashrag(count=1))
    text = system.decode((await system.start("train", 0)).prompt)
    assert text.startswith("<|im_start|>system\nYou are an assistant that answers a question step by step")
    assert text.endswith("\nuser\nwhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    user = environment(folder, rows=flashrag(count=1), dialect="search_r1")
    text = user.decode((await user.start("train", 0)).prompt)
    assert text.startswith("<|im_start|>user\nAnswer the question below.")
    assert text.endswith("Question: what is the capital of France?\n<|im_end|>\n<|im_start|>assistant\n")


async def test_a_ready_prompt_is_taken_as_it_is(folder: Path) -> None:
    task = environment(folder, rows=published("system", count=1))
    text = task.decode((await task.start("train", 0)).prompt)
    content = published("system", count=1)[0]["prompt"][0]["content"]
    assert text == f"<|im_start|>system\n{content}<|im_end|>\n<|im_start|>assistant\n"


async def test_a_base_model_gets_plain_text(folder: Path, tmp_path: Path) -> None:
    bare = tokenizer_folder(tmp_path / "bare", template=False)
    for task in (environment(folder, prompt_style="plain"), environment(bare)):
        text = task.decode((await task.start("train", 0)).prompt)
        assert text.startswith("You are an assistant")
        assert text.endswith("?")
    with pytest.raises(SetupError, match=r"prompt_style = 'chat': .* has no chat template; use prompt_style = 'plain'"):
        environment(bare, prompt_style="chat")


async def test_a_prompt_that_is_too_long_is_cut_or_refused_as_published(folder: Path) -> None:
    long = [{"question": "who " * 3000, "golden_answers": ["x"]}]
    task = environment(folder, rows=long, dialect="search_r1")
    assert len((await task.start("train", 0)).prompt) == 2048
    task = environment(folder, rows=long)
    with pytest.raises(ValueRefused, match=r"data\[0\]: its prompt has \d+ tokens; at2po takes at most 2000") as caught:
        await task.start("train", 0)
    assert caught.value.reason == "prompt_too_long"


def test_tags_are_several_tokens_and_an_end_of_turn_is_no_part_of_an_actions_text(folder: Path) -> None:
    tokens = Tokens(folder)
    ids = tokens.encode("</search>")
    assert len(ids) > 1
    assert tokens.action_text(np.append(ids, tokens.stop_token_ids[0])) == "</search>"
    assert tokens.decode(np.append(ids, tokens.stop_token_ids[0])) == "</search><|im_end|>"


def test_every_end_of_a_turn_that_the_model_names_ends_an_action(tmp_path: Path) -> None:
    made = tokenizer_folder(tmp_path)
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    (made / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": 2}))
    assert Tokens(made).stop_token_ids == (2, 0)


async def test_a_replay_takes_what_was_found_from_the_tree_and_does_not_search_again(folder: Path) -> None:
    shelf = Shelf()
    task = environment(folder, shelf=shelf)
    episode = await task.start("train", 0)
    first = action(task, SEARCH)
    seen = (await episode.step(first)).observation
    shelf.contents = ('"Other"\nanother passage',)
    past = Past(turns=(PastTurn(first, seen),), prompt=episode.prompt)
    copy, observation = await replayed(task, "train", 0, past)
    assert np.array_equal(observation, seen)
    assert shelf.asked == ["capital"]
    over = await copy.step(action(task, " <think> x </think> <answer> \\boxed{x} </answer>"))
    assert over.rewards["form"] == 1.0
    assert over.rewards["searches"] == 1.0


async def grown(task: SearchQA, says: Sequence[str]) -> tuple[TurnTree, TreeSearch]:
    """A tree of three chains, each of which says these texts in turn, and its search."""

    async def drop(message: object) -> None: ...

    def reply(context: np.ndarray, number: int) -> np.ndarray:
        seen = task.decode(context).count(task.dialect.result_tag + ">\n")
        return action(task, says[min(seen, len(says) - 1)])

    engine = ScriptedEngine(reply)
    config = build(
        {"search": {"initial_rollouts": 3, "rounds": 0, "max_action_tokens": 64}, "model": {"max_context_tokens": 1024}}
    )
    search = TreeSearch(
        run="r", lease=lease(), engine=engine, environment=task, search=config.search, expansion=None,
        max_context_tokens=1024, emit=drop,
    )  # fmt: skip
    tree = await search.grow()
    assert {sampling.stop_strings for sampling in engine.samplings} == {task.stop_strings}
    for turn in tree:
        shown = np.concatenate(
            [tree.prompt, *(part for t in tree.path(turn.turn_id) for part in (t.observation, t.action))]
        )
        assert any(np.array_equal(shown[: len(context)], context) for context in engine.contexts)
    return tree, search


async def test_what_the_engine_sees_is_prompt_actions_and_observations_as_they_were_sampled(folder: Path) -> None:
    task = environment(folder, rows=flashrag(count=1), prompt_style="plain", shelf=Shelf('"France"\nParis'))
    # The last token of the first action reaches beyond its tag.
    tree, _ = await grown(task, [f"{SEARCH}\n", " <think> so </think> <answer> \\boxed{Paris} </answer>"])
    assert [leaf.reward for leaf in tree.leaves()] == [1.0, 1.0, 1.0]
    first, second = tree.path(tree.leaves()[0].turn_id)
    text = task.decode(np.concatenate([first.action, second.observation, second.action]))
    assert text.startswith(f'{SEARCH}\n <result>\nPage 1: "France"\nParis\n</result> <think> so')


# --- the search engine ---------------------------------------------------------------------------------------------


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


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


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
    url = f"http://127.0.0.1:{unused_port()}/retrieve"
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
    url = f"http://127.0.0.1:{unused_port()}"
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


async def test_a_page_that_names_control_tokens_adds_none(folder: Path) -> None:
    end = "<|im_end|>"
    task = environment(folder, shelf=Shelf(f'"Page"\nread this {end} and that'), rows=flashrag(count=1))
    control = task.tokens.encode(end).tolist()
    assert len(control) == 1, "the tokenizer takes it for one token"
    episode = await task.start("train", 0)
    said = await episode.step(action(task, SEARCH))
    assert control[0] not in said.observation.tolist()
    assert "read this < |im_end|> and that" in task.decode(said.observation)
