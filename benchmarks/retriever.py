"""Queries a second of the retriever, over passages like Wikipedia's: in one process, and over HTTP with the client.

  library   bm25s as its own documentation has it: ``retrieve`` for one query after another, the index mapped.
  index     ``PassageIndex.passages`` in the same loop: the same scores, the passages read from the corpus as well.
  http      ``atpo retriever`` in processes of its own and ``RetrievalClient`` in this one, without its cache: so many
            callers at a time with one query each, gathered into requests of up to 64, or each a request of its own.

The corpus is made by seed: passages of 100 words, drawn by Zipf's law from English stop words and 300,000 made words;
a query has a question's words and five words of one passage.

    .venv/bin/python benchmarks/retriever.py [--passages 100000] [--queries 10000] [--workers 2] [--markdown]

Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from atpo_async.environments.retrieval.client import RetrievalClient
from atpo_async.environments.retrieval.index import PassageIndex, library
from benchmarks.script import machine, options, say, scratch, table

TOPK = 3
WORDS_PER_PASSAGE, WORDS_PER_QUERY = 100, 5
MADE_WORDS = 300_000
LOOP_QUERIES = 1000
"""Of the library's own loop, which is the slowest."""

Record = dict[str, Any]


def vocabulary(rng: np.random.Generator, made: int) -> tuple[list[str], int]:
    """Words by rank, and how many of them are stop words: the most frequent ones, as in English."""
    stop = list(library().stopwords.STOPWORDS_EN)
    onsets, vowels = list("bcdfghjklmnprstvwz"), list("aeiou")
    words = dict.fromkeys(stop)
    while len(words) < made + len(stop):
        syllables = 2 + (len(words) > 500) + (len(words) > 20_000)
        drawn = zip(rng.choice(onsets, syllables), rng.choice(vowels, syllables), strict=True)
        words["".join(a + b for a, b in drawn) + str(rng.choice(["", "n", "r", "s"]))] = None
    return list(words), len(stop)


def write_corpus(path: Path, *, passages: int, queries: int, made: int, seed: int) -> list[str]:
    """Passages of wiki-18's form into ``path``; returns the queries."""
    rng = np.random.default_rng(seed)
    words, num_stop = vocabulary(rng, made)
    weights = 1 / (np.arange(1, len(words) + 1) + 2.7)
    steps = np.cumsum(weights / weights.sum())
    ranks: NDArray[np.int64] = np.searchsorted(steps, rng.random((passages, WORDS_PER_PASSAGE)))
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(ranks):
            text = " ".join(words[rank] for rank in row)
            file.write(json.dumps({"id": str(number), "contents": f'"{words[row[0]]} {words[row[1]]}"\n{text}'}) + "\n")
    asked = []
    for row in ranks[rng.integers(passages, size=queries)]:
        content = row[row >= num_stop]
        picked = rng.choice(content, min(WORDS_PER_QUERY, len(content)), replace=False)
        asked.append(" ".join(["what", "is", "the", *(words[rank] for rank in picked)]))
    return asked


def rate(count: int, began: float) -> float:
    return count / (time.perf_counter() - began)


def in_process(index: PassageIndex, queries: list[str]) -> Iterator[Record]:
    """The library's own loop and the index's, on one core."""
    bm25s = library()
    bm25 = bm25s.BM25.load(index.folder, mmap=True, show_progress=False)
    few = queries[:LOOP_QUERIES]
    for warm in (True, False):
        began = time.perf_counter()
        for query in few[:50] if warm else few:
            words = bm25s.tokenize(query, return_ids=False, show_progress=False)
            bm25.retrieve(words, k=TOPK, show_progress=False)
    yield {"part": "library", "queries": len(few), "queries_per_s": rate(len(few), began)}
    for warm in (True, False):
        began = time.perf_counter()
        for query in queries[:50] if warm else queries:
            index.passages([query], TOPK)
    yield {"part": "index", "queries": len(queries), "queries_per_s": rate(len(queries), began)}


@contextmanager
def served(corpus: Path, workers: int) -> Iterator[tuple[str, str]]:
    """A server of the corpus; (URL, its line on what it holds)."""
    command = [sys.executable, "-m", "atpo_async.cli", "retriever", str(corpus), "--port", "0"]
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if " answers with " in line)
        yield line.split()[1], line.strip()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


async def over_http(url: str, queries: list[str], *, callers: int, max_batch: int) -> Record:
    """``callers`` ask one query after another each, all of them at the same time."""
    client = RetrievalClient(url, topk=TOPK, max_batch=max_batch, max_requests=max(8, 64 // max_batch), cache_entries=0)
    left = iter(queries)

    async def caller() -> None:
        for query in left:
            await client.search([query])

    await client.search(queries[:50])
    before = client.counters
    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    per_s = rate(len(queries), began)
    counters = client.counters
    await client.close()
    assert counters.failures == 0
    requests = counters.requests - before.requests
    record = {"part": "http", "callers": callers, "max_batch": max_batch, "queries": len(queries)}
    return record | {"requests": requests, "queries_per_s": per_s}


async def same_answers(url: str, index: PassageIndex, queries: list[str]) -> bool:
    client = RetrievalClient(url, topk=TOPK)
    found = await client.search(queries)
    await client.close()
    return found == index.passages(queries, TOPK)


def measured(args: argparse.Namespace, folder: Path) -> Iterator[Record]:
    corpus = folder / "corpus.jsonl"
    queries = write_corpus(corpus, passages=args.passages, queries=args.queries, made=args.made_words, seed=args.seed)
    began = time.perf_counter()
    PassageIndex.open(corpus)
    made_s = time.perf_counter() - began
    began = time.perf_counter()
    index = PassageIndex.open(corpus)
    opened_s = time.perf_counter() - began
    about = {"part": "making", "passages": len(index), "corpus_mb": corpus.stat().st_size / 1e6}
    yield about | {"index_mb": index.mapped_bytes / 1e6, "made_s": made_s, "opened_s": opened_s}
    yield from in_process(index, queries)
    for workers in args.workers:
        with served(corpus, workers) as (url, line):
            assert asyncio.run(same_answers(url, index, queries[:200])), "the server finds other passages"
            for callers, max_batch in ((64, 64), (256, 64), (64, 1), (1, 1)):
                some = queries if callers > 1 else queries[:LOOP_QUERIES]
                record = asyncio.run(over_http(url, some, callers=callers, max_batch=max_batch))
                yield record | {"workers": workers, "memory": line.rpartition(", ")[2]}


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--made-words", type=int, default=MADE_WORDS, help="words besides the stop words")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="processes of the server; 0: threads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    say(machine())
    records = []
    with scratch(args.dir) as folder:
        for record in measured(args, folder):
            say(record)
            records.append(record)
    rates = [record for record in records if "queries_per_s" in record]
    for record in rates:
        record["of the library's loop"] = record["queries_per_s"] / rates[0]["queries_per_s"]
    if args.markdown:
        names = ("part", "workers", "callers", "max_batch", "requests", "queries_per_s", "of the library's loop")
        print(table(names, [[record.get(name, "") for name in names] for record in rates]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
