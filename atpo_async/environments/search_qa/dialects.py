"""The two published ways to lay out a search episode: tags, limits, stop strings, what is inserted into the text.

Sources: AT2PO (arXiv 2601.04767) and its code, Search-R1 (arXiv 2503.09516) and its code.  docs/search_qa.md lists what
differs from them here.  The sentences that are inserted say what the published ones say, in words of our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atpo_async.core.errors import ConfigError

DialectName = Literal["at2po", "search_r1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One layout."""

    name: DialectName
    stop_strings: tuple[str, ...]
    """Texts that end an action; the tokenizer's ends of a turn do so too."""
    result_tag: str
    """Of what the search engine found."""
    prompt_role: Literal["system", "user"]
    max_searches: int
    """Later ones get ``limit_notice`` in place of passages; 0 for no limit."""
    max_turns: int
    """Turns after which one last action is taken, without a search; 0 for no limit."""
    passage_characters: int
    """A passage is cut there; 0 for no limit."""
    observation_tokens: int
    """What is inserted is cut there; 0 for no limit."""
    prompt_tokens: int
    """Longest prompt."""
    cuts_prompt: bool
    """A longer prompt loses its beginning; otherwise it is refused."""
    reference: str
    """How a golden answer is written where its probability is asked for."""
    boxed: bool
    r"""The answer is what ``\boxed{}`` holds."""
    limit_notice: str = ""
    retry_notice: str = ""
    """What follows an action that neither searches nor answers; empty where such an action is a leaf."""


AT2PO = Dialect(
    name="at2po",
    stop_strings=("</search>",),
    result_tag="result",
    prompt_role="system",
    max_searches=6,
    max_turns=0,
    passage_characters=1000,
    observation_tokens=0,
    prompt_tokens=2000,
    cuts_prompt=False,
    reference=r"<answer>\boxed{{answer}}</answer>",
    boxed=True,
    limit_notice=(
        " No more searches are possible: I have used all of them. I now give my final answer, based on what I have "
        "found so far. \n\n"
    ),
)

SEARCH_R1 = Dialect(
    name="search_r1",
    stop_strings=("</search>", "</answer>"),
    result_tag="information",
    prompt_role="user",
    max_searches=0,
    max_turns=4,
    passage_characters=0,
    observation_tokens=500,
    prompt_tokens=2048,
    cuts_prompt=True,
    reference="<answer>{answer}</answer>",
    boxed=False,
    retry_notice=(
        "\nThat was not a valid action. To search, I must write the query between <search> and </search>. "
        "To answer, I must write the final answer between <answer> and </answer>. I try again.\n"
    ),
)

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (AT2PO, SEARCH_R1)}


def dialect_of(name: object) -> Dialect:
    """Raises ConfigError for a name that is none."""
    if isinstance(name, str) and name in DIALECTS:
        return DIALECTS[name]
    raise ConfigError(f"environment.options.dialect must be one of {', '.join(DIALECTS)}; got {name!r}")
