"""Where a server's queries are computed: processes that map the same index, or threads of the server's own process.

A query of BM25 holds Python's lock nearly all the time, so threads use one core.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from atpo_async.environments.retrieval.index import PassageIndex

log = logging.getLogger("atpo.retriever")

Item = tuple[str, int, bool]
"""(query, topk, with scores)."""


def answers(index: PassageIndex, items: Sequence[Item]) -> list[bytes]:
    """For each item the JSON list of its documents (``protocol.py``).  Raises SetupError if the corpus changed."""
    written = []
    for query, topk, with_scores in items:
        found = [(index.corpus.document(number), score) for number, score in index.search(query, topk)]
        entries = [{"document": document, "score": score} if with_scores else document for document, score in found]
        written.append(json.dumps(entries).encode())
    return written


class Workers:
    """Answers batches.

    Args:
        index: open; processes map its files again.
        count: of processes; 0: threads of this one.
    """

    def __init__(self, index: PassageIndex, count: int) -> None:
        self.count = count
        self.restarts = 0
        self._index = index
        self._pool: ProcessPoolExecutor | None = None

    async def start(self) -> None:
        """Waits for: every process to have the index open."""
        if self.count:
            self._pool = self._new_pool()
            loop = asyncio.get_running_loop()
            await asyncio.gather(*(loop.run_in_executor(self._pool, _opened) for _ in range(self.count)))

    async def answer(self, items: list[Item]) -> list[bytes]:
        """``answers`` of one batch; it is computed once more if a process ended meanwhile.

        Raises:
            BrokenProcessPool: it ended again.
        """
        pool = self._pool
        if pool is None:
            return await asyncio.to_thread(answers, self._index, items)
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(pool, _answers, items)
        except BrokenProcessPool:
            if self._pool is pool:  # else another batch has seen it first
                self.restarts += 1
                log.warning("a worker process ended by itself (killed, or out of memory); the workers are started anew")
                self._pool = self._new_pool()
            return await loop.run_in_executor(self._pool, _answers, items)

    def close(self) -> None:
        """End the processes; batches that no process has taken are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.count,
            mp_context=multiprocessing.get_context("spawn"),  # a fork would copy the threads' locks as they are
            initializer=_open,
            initargs=(self._index.corpus.path, self._index.folder),
        )


_INDICES: list[PassageIndex] = []
"""Of this process, where it is a worker: one."""


def _open(corpus: Path, folder: Path) -> None:
    """What a worker process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole group; the server ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    _INDICES.append(PassageIndex(corpus, folder))


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """A server that is killed leaves no workers behind."""
    parent.join()
    os._exit(1)


def _opened() -> int:
    return len(_INDICES[0])


def _answers(items: list[Item]) -> list[bytes]:
    return answers(_INDICES[0], items)
