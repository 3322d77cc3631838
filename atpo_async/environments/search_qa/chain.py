"""One chain of a search episode: what follows an action, by the rules of its dialect.  Texts in, decisions out."""

from __future__ import annotations

from dataclasses import dataclass

from atpo_async.environments.search_qa import actions
from atpo_async.environments.search_qa.dialects import Dialect


@dataclass(frozen=True, slots=True)
class Search:
    """The search engine is to be asked, and what it found inserted (``Chain.found``)."""

    query: str


@dataclass(frozen=True, slots=True)
class Insert:
    """A text is to be inserted, and the policy goes on."""

    text: str


@dataclass(frozen=True, slots=True)
class Over:
    """The chain ended, and is to be judged."""

    turn_limit: bool = False


class Chain:
    """The state of one chain: its response so far, and what it has used up."""

    def __init__(self, dialect: Dialect, *, max_searches: int, max_turns: int) -> None:
        self._dialect = dialect
        self._max_searches, self._max_turns = max_searches, max_turns
        self._parts: list[str] = []
        self.turns = 0
        self.searches = 0
        """Queries that the search engine was asked."""

    @property
    def response(self) -> str:
        """Actions, and between them the tags of what was found, without its text: a passage that happens to hold a tag
        says nothing about the policy."""
        return "".join(self._parts)

    def take(self, action: str) -> Search | Insert | Over:
        """What follows an action."""
        self._parts.append(action)
        self.turns += 1
        return self._at2po(action) if self._dialect.name == "at2po" else self._search_r1(action)

    def found(self, observation: str) -> None:
        """What was inserted after a search: its tags become part of the response."""
        tag = self._dialect.result_tag
        self._parts.append(f" <{tag}>\n</{tag}>" if observation else "")

    def _at2po(self, action: str) -> Search | Insert | Over:
        asked = actions.read_at2po(action)
        if asked.kind != "search":
            return Over()
        if self._max_searches and self.searches >= self._max_searches:
            self._parts.append(self._dialect.limit_notice)
            return Insert(self._dialect.limit_notice)
        self.searches += 1
        return Search(asked.text) if asked.text else Over()

    def _search_r1(self, action: str) -> Search | Insert | Over:
        asked = actions.read_search_r1(action)
        if asked.kind == "answer":
            return Over()
        if self._max_turns and self.turns > self._max_turns:
            return Over(turn_limit=True)
        if asked.kind == "search":
            self.searches += 1
            return Search(asked.text)
        return Insert(self._dialect.retry_notice)
