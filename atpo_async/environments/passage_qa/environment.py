"""passage_qa as a task: the search tool, the reward, and what the policy is shown.

The retriever is a real server (``environment.options.retriever``), by default one that the environment starts on a
free port of this machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.texts import of_value
from atpo_async.environments.passage_qa.hosted import HostedRetriever
from atpo_async.environments.passage_qa.world import Question, Towns
from atpo_async.environments.retrieval.protocol import BadRequest, Passage
from atpo_async.environments.tools.faults import ToolError
from atpo_async.environments.tools.task import ToolTask
from atpo_async.environments.tools.tool import Tool, tool
from atpo_async.run import files

if TYPE_CHECKING:
    from atpo_async.environments.retrieval import Retriever

SYSTEM = "Answer with a name alone. Search one fact at a time."
RENDERER = "qwen3"
OPTIONS: dict[str, int] = {
    "seed": 0,
    "num_towns": 8,
    "min_hops": 2,
    "max_hops": 3,
    "num_names": 64,
    "num_relations": 10,
    "turn_limit": 0,
    "train_tasks": 4096,
    "eval_tasks": 200,
    "topk": 1,
}
"""Whole numbers that may be set, with their defaults."""

RETRIEVER = "retriever"


def correct(answer: str, row: dict[str, Any]) -> float:
    """1 for the right name and nothing else."""
    return float(answer == row["answer"])


def search_tool(retriever: Retriever | None) -> Tool:
    """The tool that the policy is shown; one without a retriever has its schema alone."""

    @tool(read_only=True)
    async def search(query: str) -> str:
        """Search the passages."""
        if retriever is None:
            raise ToolError("there is no retriever")
        try:
            (found,) = await retriever.search([query])
        except BadRequest as exc:
            raise ToolError(str(exc)) from exc
        return shown(found)

    return search


def shown(passages: Sequence[Passage]) -> str:
    """What the policy reads of them, a line each."""
    return "\n".join(f"{passage.title}: {passage.text}" for passage in passages) or "Nothing was found."


class PassageQA(ToolTask):
    """Questions over the passages of ``Towns``.

    Args:
        tokenizer: folder of the policy.
        retriever: over the passages.
        questions: to train on, at least one.
        held_out: to evaluate on; none: there is no such split.
        max_turns: actions of one conversation.

    Raises:
        SetupError, ConfigError: as of ``ToolTask``.
    """

    def __init__(
        self,
        tokenizer: Path | str,
        retriever: Retriever,
        questions: Sequence[Question],
        *,
        held_out: Sequence[Question] = (),
        max_turns: int,
    ) -> None:
        super().__init__(
            tokenizer,
            data=rows(questions),
            eval_data=rows(held_out) if held_out else None,
            system=SYSTEM,
            tools=[search_tool(retriever)],
            rewards=[correct],
            max_turns=max_turns,
            renderer=RENDERER,
        )


def rows(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """As data of a ``ToolTask``."""
    return [
        {"question": q.text, "answer": q.answer, "hops": len(q.relations), "number": number}
        for number, q in enumerate(questions)
    ]


def default_turn_limit(towns: Towns) -> int:
    """One turn for each search of the longest question, one to answer, one to spare."""
    return towns.max_hops + 2


def corpus_of(folder: Path, towns: Towns) -> Path:
    """The corpus as a file in ``folder``, written where it is not there yet.  Raises SetupError."""
    lines = [
        json.dumps({"id": str(number), "title": passage.title, "text": passage.text})
        for number, passage in enumerate(towns.passages())
    ]
    text = "\n".join(lines) + "\n"
    path = folder / f"passages-{hashlib.sha256(text.encode()).hexdigest()[:8]}.jsonl"
    if not path.is_file():
        try:
            files.write_atomic(path, text)
        except OSError as exc:
            raise SetupError(f"the corpus {path} cannot be written: {exc.strerror or exc}") from exc
    return path


def make(tokenizer: Path | str, **options: bool | int | float | str) -> PassageQA:
    """The factory behind ``environment.name = "passage_qa"``.

    Args:
        tokenizer: folder of the policy; the corpus and its index are kept in it.
        options: ``OPTIONS``, and ``retriever``: the URL of a server that has this corpus; ``""``: a server of its own.

    Raises:
        ConfigError: an option that passage_qa does not have, or a value out of its range.
        SetupError: the tokenizer or the retriever cannot be had.
    """
    url = options.pop(RETRIEVER, "")
    chosen = OPTIONS | _checked(options)
    for key in ("train_tasks", "eval_tasks", "topk"):
        if chosen[key] < 1:
            raise ConfigError(f"environment.options.{key} must be at least 1, got {chosen[key]}")
    if chosen["turn_limit"] < 0:
        raise ConfigError(f"environment.options.turn_limit must be >= 0 (0: hops + 2), got {chosen['turn_limit']}")
    towns = Towns(
        seed=chosen["seed"], num_towns=chosen["num_towns"], min_hops=chosen["min_hops"], max_hops=chosen["max_hops"],
        num_names=chosen["num_names"], num_relations=chosen["num_relations"],
    )  # fmt: skip
    return PassageQA(
        tokenizer,
        _retriever(url, Path(tokenizer), towns, topk=chosen["topk"]),
        [towns.question("train", index) for index in range(chosen["train_tasks"])],
        held_out=[towns.question("eval", index) for index in range(chosen["eval_tasks"])],
        max_turns=chosen["turn_limit"] or default_turn_limit(towns),
    )


def _checked(options: dict[str, Any]) -> dict[str, int]:
    for key, value in options.items():
        if key not in OPTIONS:
            known = ", ".join((*OPTIONS, RETRIEVER))
            raise ConfigError(
                f"environment.options.{key}: passage_qa has no such option (value {value!r}); known: {known}"
            )
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"environment.options.{key} must be a whole number, got {value!r}")
    return options


def _retriever(url: object, folder: Path, towns: Towns, *, topk: int) -> Retriever:
    if url == "":
        if not folder.is_dir():
            raise SetupError(f"tokenizer {folder}: there is no such folder; expected the policy's model folder")
        return HostedRetriever(corpus_of(folder, towns), topk=topk)
    if not isinstance(url, str):
        raise ConfigError(f"environment.options.{RETRIEVER} is {of_value(url)}; expected a URL, or ''")
    from atpo_async.environments.search_qa.retrievers import open_retriever

    return open_retriever(url, topk=topk)
