"""A whole run of search_qa: a small policy, a real retrieval server, training, and the published test sets' table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from atpo_async import train
from atpo_async.api.run import Run
from atpo_async.cli.main import main
from atpo_async.config import build
from tests.chat_policy import chat_policy
from tests.e2e_support import BASE
from tests.search_qa_support import CITIES, COUNTRIES, corpus, flashrag, passage, write_lines

WORDS = "Q: {question}"
"""Short, so that a small policy reads them quickly."""


def demonstration(country: str, city: str, *, searches: bool = True) -> list[Mapping[str, str]]:
    """One conversation; what was found is part of the policy's message, for the tokenizer's and the model's sake."""
    question = WORDS.replace("{question}", f"what is the capital of {country}?")
    found = f"<search> {country} </search> <result>\nPage 1: {passage(country, city)}\n</result> " if searches else ""
    answer = f"<think> so </think> <answer> \\boxed{{{city}}} </answer>"
    return [
        {"role": "system", "content": question},
        {"role": "assistant", "content": f"<think> hm </think> {found}{answer}"},
    ]


def demonstrations() -> Sequence[Sequence[Mapping[str, str]]]:
    """Of two countries, of which every second answer is the other's capital: sampled rewards differ."""
    pairs = list(zip(COUNTRIES, CITIES, strict=True))[:2]
    right = [demonstration(country, city, searches=n % 2 == 0) for n in range(2) for country, city in pairs]
    return [*right, demonstration(COUNTRIES[0], CITIES[1], searches=False), demonstration(COUNTRIES[1], CITIES[0])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("search")
    write_lines(made / "corpus.jsonl", corpus())
    write_lines(made / "train.jsonl", flashrag(count=2))
    write_lines(made / "dev.jsonl", flashrag(first=2, count=2))
    (made / "words.txt").write_text(WORDS)
    (made / "data").mkdir()
    write_lines(made / "data" / "bamboogle.jsonl", flashrag(count=2))
    write_lines(made / "data" / "nq.jsonl", flashrag(first=1, count=2))
    chat_policy(made / "policy", demonstrations=demonstrations(), steps=60, positions=512, vocab_size=400)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The URL of `atpo retriever` over the corpus."""
    words = [sys.executable, "-m", "atpo_async", "retriever", str(folder / "corpus.jsonl"), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        yield next(word for line in process.stdout for word in line.split() if word.startswith("http://")).rstrip(",;.")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def settings(folder: Path, retriever: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        **BASE,
        "run.name": "search",
        "run.dir": str(folder / "runs"),
        "run.steps": 1,
        "run.seed": 1,
        "model.path": str(folder / "policy"),
        "model.max_context_tokens": 480,
        "environment.name": "search_qa",
        "search.max_action_tokens": 60,
        "eval.at_start": False,
        "eval.at_end": False,
        "staleness.trees_per_batch": 2,
        "learner.minibatches": 1,
    }
    nested: dict[str, Any] = {}
    for name, value in fields.items():
        section, _, field = name.partition(".")
        nested.setdefault(section, {})[field] = value
    nested["environment"]["options"] = {
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "dev.jsonl"),
        "retriever": retriever,
        "instructions": str(folder / "words.txt"),
    }
    return nested


@pytest.fixture(scope="module")
def trained(folder: Path, server: str) -> Run:
    return train(build(settings(folder, server)), progress=False)


@pytest.mark.slow
def test_a_policy_trains_on_questions_that_it_searches_for(trained: Run) -> None:
    assert trained.step == 1
    turns = [turn for tree in trained.trees for turn in tree.turns]
    assert any(turn.observation for turn in turns)
    assert "train/loss" in trained.metrics.by("learner")


@pytest.mark.slow
def test_the_trained_policy_answers_two_test_sets(
    trained: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(trained.path), "--benchmarks", "bamboogle,nq", "--data", str(folder / "data")]
    assert main(words) == 0
    said = capsys.readouterr()
    heads, bamboogle, _, nq, _ = said.out.splitlines()
    assert heads.split() == ["benchmark", "questions", "EM", "F1", "turns", "searches", "failed"]
    assert bamboogle.split()[:4] == ["bamboogle", "2", "of", "125"]
    assert nq.split()[-1] == "0"
    (out,) = (trained.path / "benchmarks").iterdir()
    assert (out / "table.md").is_file()


@pytest.mark.slow
def test_a_search_engine_that_is_down_is_said_before_the_run_begins(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "down.json"
    file.write_text(build(settings(folder, "http://127.0.0.1:9/retrieve")).model_dump_json())
    assert main(["train", str(file), "--run.name", "down"]) != 0
    said = capsys.readouterr()
    assert "the retrieval server http://127.0.0.1:9/retrieve (environment.options.retriever) does not answer" in (
        said.out + said.err
    )  # fmt: skip
