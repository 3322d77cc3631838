"""A small world for search_qa: a policy, fifty passages, and questions as the published files have them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async.environments.search_qa.prompts import AT2PO, SEARCH_R1
from tests.chat_policy import chat_policy, chat_tokenizer

CITIES = ("Paris", "Rome", "Lima", "Oslo", "Cairo", "Quito", "Delhi", "Hanoi", "Accra", "Minsk")
COUNTRIES = ("France", "Italy", "Peru", "Norway", "Egypt", "Ecuador", "India", "Vietnam", "Ghana", "Belarus")

TEXTS = (AT2PO, SEARCH_R1, "<think> </think> <search> </search> <result> </result> <information> <answer> \\boxed{}")


@dataclass(frozen=True)
class Found:
    """A passage."""

    contents: str


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
