"""A small world for search_qa: a policy, fifty passages, and questions as the published files have them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.search.tree_search import TreeSearch
from atpo_async.config import build
from atpo_async.core.tree import TurnTree
from atpo_async.environments.data.task_data import TaskData
from atpo_async.environments.retrieval import RetrievalFailed
from atpo_async.environments.search_qa.environment import SearchQA
from atpo_async.environments.search_qa.prompts import AT2PO, SEARCH_R1
from tests.actor_support import ScriptedEngine, lease
from tests.chat_policy import chat_policy, chat_tokenizer

CITIES = ("Paris", "Rome", "Lima", "Oslo", "Cairo", "Quito", "Delhi", "Hanoi", "Accra", "Minsk")
COUNTRIES = ("France", "Italy", "Peru", "Norway", "Egypt", "Ecuador", "India", "Vietnam", "Ghana", "Belarus")

TEXTS = (AT2PO, SEARCH_R1, "<think> </think> <search> </search> <result> </result> <information> <answer> \\boxed{}")


@dataclass(frozen=True)
class Found:
    """A passage."""

    contents: str
    id: str = ""


def passage(country: str, city: str) -> str:
    return f'"{country}"\nThe capital of {country} is {city}. Its people meet on the square of {city}.'


def corpus() -> list[dict[str, str]]:
    """Fifty passages: the ten countries, and forty about other things."""
    rows = [passage(country, city) for country, city in zip(COUNTRIES, CITIES, strict=True)]
    rows += [f'"River {n}"\nRiver {n} runs for {n + 10} miles through the hills.' for n in range(40)]
    return [{"id": str(number), "contents": text} for number, text in enumerate(rows)]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flashrag(first: int = 0, count: int = 10) -> list[dict[str, Any]]:
    """Rows as of FlashRAG's JSONL."""
    pairs = list(zip(COUNTRIES, CITIES, strict=True))[first : first + count]
    return [
        {
            "id": f"test_{n}",
            "question": f"what is the capital of {country}",
            "golden_answers": [city, f"{city} city"],
            "metadata": {"type": "comparison"},
        }
        for n, (country, city) in enumerate(pairs)
    ]


def published(role: str, *, source: str = "hotpotqa", count: int = 10) -> list[dict[str, Any]]:
    """Rows as of the parquet files of AT2PO (``system``) and Search-R1 (``user``)."""
    return [
        {
            "data_source": source,
            "prompt": [{"role": role, "content": f"Search, then answer. {row['question']}?"}],
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": row["golden_answers"]}},
            "extra_info": {"split": "train", "index": n},
        }
        for n, row in enumerate(flashrag(count=count))
    ]


def policy_folder(folder: Path, *, positions: int = 1024) -> Path:
    """A random policy whose tokenizer writes tags in several tokens."""
    return chat_policy(folder, positions=positions, vocab_size=400)


def tokenizer_folder(folder: Path, *, template: bool = True) -> Path:
    made = chat_tokenizer(vocab_size=400)
    if not template:
        made.chat_template = None
    made.save_pretrained(folder)
    return folder


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


def environment(
    folder: Path, *, rows: list[dict[str, Any]] | None = None, shelf: Any = None, **options: Any
) -> SearchQA:
    data = TaskData.load(rows or flashrag(), eval_data=[{"question": "held out", "golden_answers": ["x"]}])
    return SearchQA(folder, data=data, retriever=shelf or Shelf(), **options)


def action(task: SearchQA, text: str, *, stop: bool = False) -> np.ndarray:
    ids = task.tokens.encode(text)
    return np.append(ids, task.stop_token_ids[0]).astype(np.int32) if stop else ids


SEARCH = "<think> I look it up </think> <search> capital </search>"


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
