"""The retrieval protocol: what a request may hold, what an answer holds, and how answers of published servers are read.

``POST /retrieve`` with ``{"queries": [str, …], "topk": int, "return_scores": bool}`` is answered, query by query, with
``{"result": [[{"document": {"id", "contents"}, "score"}, …], …]}``; without scores with ``{"result": [[{"id",
"contents"}, …], …]}``.  ``contents`` is ``"title"\\ntext``.  Source: the retrieval servers of Search-R1 and AT2PO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from atpo_async.core import texts
from atpo_async.core.errors import AtpoError

DEFAULT_TOPK = 3
MAX_TOPK = 100
MAX_QUERIES = 10_000
"""In one request.  Search-R1's client sends one with every chain of a batch: 2,560."""
MAX_CHARACTERS = 20_000
"""Of one query."""


class RetrievalFailed(AtpoError):
    """A query got no passages: the server refused it, or gave no answer in time, or none that can be read."""


class BadRequest(ValueError):
    """A request that the server cannot answer; the message names the field and its value."""


@dataclass(frozen=True, slots=True)
class Passage:
    """One passage that a query found."""

    id: str
    title: str
    text: str
    score: float | None = None
    """Higher is better; None where the server gave none."""

    @property
    def contents(self) -> str:
        """``"title"\\ntext``, as the corpora of the search tasks have it."""
        return contents_of(self.title, self.text)

    @property
    def size(self) -> int:
        """Characters."""
        return len(self.id) + len(self.title) + len(self.text)


class Retriever(Protocol):
    """What a search task asks: a client of a server, or an index in this process."""

    async def search(self, queries: Sequence[str], topk: int | None = None) -> list[list[Passage]]:
        """For every query its best passages, the best first; a blank query finds none.

        Raises:
            RetrievalFailed: at least one query got no answer.
        """

    async def close(self) -> None:
        """Let go of connections.  A later search opens them again."""


def contents_of(title: str, text: str) -> str:
    """``"title"\\ntext``."""
    return f'"{title}"\n{text}'


def split_contents(contents: str) -> tuple[str, str]:
    """(title without its quotes, text); the first line is the title."""
    title, _, text = contents.partition("\n")
    title = title.strip()
    if len(title) >= 2 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return title, text


@dataclass(frozen=True, slots=True)
class Request:
    """One request, checked."""

    queries: tuple[str, ...]
    topk: int
    return_scores: bool


def parse_request(body: object, *, default_topk: int = DEFAULT_TOPK) -> Request:
    """A request's JSON value, checked.

    Args:
        body: an object with ``queries``, or ``query``: one text or a list of them.  ``topk`` may be left out or null;
            ``return_scores`` is false where it is left out, as on Search-R1's server.

    Raises:
        BadRequest: names the field and its value.
    """
    if not isinstance(body, Mapping):
        raise BadRequest(f'the body is {texts.of_value(body)}: it must be an object, such as {{"queries": ["…"]}}')
    named = [name for name in ("queries", "query") if body.get(name) is not None]
    if len(named) != 1:
        raise BadRequest(
            'the body has both "queries" and "query"' if named else 'the body has no "queries", a list of texts'
        )
    asked = body[named[0]]
    queries = [asked] if isinstance(asked, str) and named == ["query"] else asked
    if not isinstance(queries, list):
        raise BadRequest(f"{named[0]} is {texts.of_value(queries)}: it must be a list of texts")
    if len(queries) > MAX_QUERIES:
        raise BadRequest(f"{named[0]} has {len(queries):,} entries; at most {MAX_QUERIES:,} fit in one request")
    checked_queries(queries, named[0])
    topk = body.get("topk")
    with_scores = body.get("return_scores", False)
    if not isinstance(with_scores, bool):
        raise BadRequest(f"return_scores is {texts.of_value(with_scores)}: it must be true or false")
    return Request(tuple(queries), default_topk if topk is None else checked_topk(topk), with_scores)


def checked_queries(queries: Sequence[str], name: str = "queries") -> tuple[str, ...]:
    """The queries as they were asked.  Raises BadRequest where one is no text or is too long."""
    if isinstance(queries, str):
        raise BadRequest(f"{name} is {texts.of_value(queries)}: it must be a list of texts")
    for number, query in enumerate(queries):
        if not isinstance(query, str):
            what = f"{texts.of_value(query)} ({texts.of_type(query)})"
            raise BadRequest(f"{name}[{number}] is {what}: it must be a text")
        if len(query) > MAX_CHARACTERS:
            raise BadRequest(f"{name}[{number}] has {len(query):,} characters; a query has at most {MAX_CHARACTERS:,}")
    return tuple(queries)


def checked_topk(topk: object) -> int:
    """``topk`` as it was asked.  Raises BadRequest outside 1 … MAX_TOPK."""
    if isinstance(topk, bool) or not isinstance(topk, int) or not 1 <= topk <= MAX_TOPK:
        raise BadRequest(f"topk is {texts.of_value(topk)}: it must be a whole number from 1 to {MAX_TOPK}")
    return topk


def parse_answer(answer: object, *, num_queries: int) -> list[list[Passage]]:
    """Passages by query from a server's JSON value, with or without scores.

    Raises:
        ValueError: says what is wrong where.
    """
    if not isinstance(answer, Mapping) or not isinstance(answer.get("result"), list):
        raise ValueError(f'it has no list "result": {texts.of_value(answer)}')
    result = answer["result"]
    if len(result) != num_queries:
        raise ValueError(f"result has {len(result)} entries for {texts.counted(num_queries, 'query', 'queries')}")
    found = []
    for number, entries in enumerate(result):
        if not isinstance(entries, list):
            raise ValueError(f"result[{number}] is {texts.of_value(entries)}: it must be a list of passages")
        found.append([_passage(entry, f"result[{number}][{rank}]") for rank, entry in enumerate(entries)])
    return found


def _passage(entry: object, where: str) -> Passage:
    score: object = None
    document = entry
    if isinstance(entry, Mapping) and "document" in entry:
        document, score = entry["document"], entry.get("score")
    if isinstance(document, str):
        document = {"contents": document}
    if not isinstance(document, Mapping):
        raise ValueError(f"{where} is {texts.of_value(entry)}: it holds no document")
    title, text = _title_and_text(document, where)
    name = document.get("id", "")
    return Passage(str(name) if isinstance(name, str | int) else "", title, text, _score(score, f"{where}.score"))


def _title_and_text(document: Mapping[object, object], where: str) -> tuple[str, str]:
    contents, title, text = (document.get(name) for name in ("contents", "title", "text"))
    if isinstance(contents, str):
        return split_contents(contents)
    if isinstance(text, str) and isinstance(title, str | None):
        return title or "", text
    has = texts.of_value(sorted(map(str, document)))
    raise ValueError(f'{where} has neither a text "contents" nor "title" and "text"; it has {has}')


def _score(score: object, where: str) -> float | None:
    if score is None:
        return None
    try:
        if isinstance(score, int | float | str):
            return float(score)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{where} is {texts.of_value(score)}: it must be a number")
