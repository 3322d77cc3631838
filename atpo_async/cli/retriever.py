"""``atpo retriever CORPUS``: a BM25 retrieval server for search tasks, until it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from pathlib import Path

from atpo_async.cli.common import EXIT_DONE, Asked, note
from atpo_async.core import texts
from atpo_async.core.errors import ConfigError
from atpo_async.environments.retrieval.protocol import (
    DEFAULT_TOPK,
    MAX_CHARACTERS,
    MAX_QUERIES,
    MAX_TOPK,
)
from atpo_async.links import addresses
from atpo_async.links.advertised import to_join

LOOPBACK = "127.0.0.1"
PORT = 8000

ABOUT = f"""\
A corpus is a JSONL file: {{"id", "contents"}} a line, where contents is a title in quotes, a line break and the text,
as in wiki-18; or {{"title", "text"}}.  Its index is made once, into CORPUS.bm25 or --index, and mapped ever after.

  POST /retrieve  {{"queries": ["…"], "topk": {DEFAULT_TOPK}, "return_scores": true}}
              ->  {{"result": [[{{"document": {{"id", "contents"}}, "score"}}, …]]}}
  GET /health

A request has at most {MAX_QUERIES:,} queries, a query {MAX_CHARACTERS:,} characters, and topk is at most {MAX_TOPK}.

The server knows no keys: each client that reaches its address may search the corpus and keep the server busy.  So it
listens on loopback unless --host names another address; open that to a network of your own machines only.
"""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ABOUT
    parser.add_argument("corpus", metavar="CORPUS", help="a JSONL file of passages")
    parser.add_argument("--host", default=LOOPBACK, help=f"address to listen on ({LOOPBACK})")
    parser.add_argument("--port", type=int, default=PORT, help=f"({PORT}); 0: one that is free")
    parser.add_argument("--index", metavar="DIR", help="folder of the index (CORPUS.bm25)")
    text = f"passages a query, where a request names no other number ({DEFAULT_TOPK})"
    parser.add_argument("--topk", type=int, default=DEFAULT_TOPK, help=text)
    text = "processes that compute; 0: threads of the server's own (one for each core)"
    parser.add_argument("--workers", type=int, default=None, help=text)


def run(asked: Asked) -> int:
    """Serves until SIGTERM or ctrl-C."""
    args = asked.args
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    for name, number, most in (("port", args.port, 65_535), ("workers", workers, 1024)):
        if not 0 <= number <= most:
            raise ConfigError(f"--{name} must be from 0 to {most}, got {number}")
    if not 1 <= args.topk <= MAX_TOPK:
        raise ConfigError(f"--topk must be from 1 to {MAX_TOPK}, got {args.topk}")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    # It would log a traceback of each client that speaks no HTTP; what fails here is logged by the server itself.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    if not addresses.is_loopback(args.host):
        note(f"--host {args.host}: the server knows no keys; each host that reaches this address may search the corpus")
    return _serve(Path(args.corpus), args.index, host=args.host, port=args.port, topk=args.topk, workers=workers)


def _serve(corpus: Path, index_folder: str | None, *, host: str, port: int, topk: int, workers: int) -> int:
    from atpo_async.environments.retrieval.corpus import state_of
    from atpo_async.environments.retrieval.index import PassageIndex
    from atpo_async.environments.retrieval.server import RetrievalServer, bind, serve_until_stopped, url_of
    from atpo_async.environments.retrieval.workers import Workers

    state_of(corpus)
    bound = bind(host, port)  # before the index, which may take long
    with bound:
        index = PassageIndex.open(corpus, index_folder, say=_say)
        server = RetrievalServer(index, Workers(index, workers), topk=topk)

        def ready() -> None:
            where = urls(url_of(bound), host, bound.getsockname()[1])
            _say(
                f"{where} answers with {len(index):,} passages of {corpus}; "
                f"index {index.folder.parent} ({index.mapped_bytes / 1e6:.0f} MB, mapped), {memory()}"
            )

        asyncio.run(serve_until_stopped(server, bound, ready=ready))
    served = server.served
    _say(f"stopped; {served.queries:,} queries in {served.requests:,} requests, {served.refused:,} refused")
    return EXIT_DONE


def urls(url: str, host: str, port: int) -> str:
    """``url``, or where others reach a server that listens at every address."""
    if not addresses.is_wildcard(host):
        return url
    return " or ".join(f"http://{where}/retrieve" for where in to_join(addresses.endpoint_of(host, port)))


def memory() -> str:
    """What this process and its workers hold of their own, mapped files apart."""
    import psutil

    here = psutil.Process()
    processes = [here, *here.children()]
    held = sum(process.memory_full_info().uss for process in processes)
    return f"{held / 1e6:.0f} MB of its own in {texts.counted(len(processes), 'process', 'processes')}"


def _say(line: str) -> None:
    print(f"retriever: {line}", flush=True)
