"""search_qa: questions answered through a search engine, in the dialect of AT2PO or of Search-R1.

An action ends at ``</search>`` (Search-R1: or ``</answer>``) or with the tokenizer's end of a turn.  What the search
engine found is encoded alone and follows the sampled ids directly, without a turn of the chat template between.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from atpo_async.core.errors import ConfigError
from atpo_async.environments.base import Episode, ReplayFork, Split, StepResult
from atpo_async.environments.fingerprints import fingerprint_of
from atpo_async.environments.reference import AnswerTemplate, Reference
from atpo_async.environments.search_qa.actions import query_of
from atpo_async.environments.search_qa.chain import Chain, Insert, Over, Search
from atpo_async.environments.search_qa.dialects import dialect_of
from atpo_async.environments.search_qa.held_out import HeldOut
from atpo_async.environments.search_qa.observations import Text, observation_of
from atpo_async.environments.search_qa.prompts import messages_of, read_instructions
from atpo_async.environments.search_qa.retrievers import open_retriever
from atpo_async.environments.search_qa.rows import Question, question_of
from atpo_async.environments.search_qa.scoring import score
from atpo_async.environments.search_qa.tokens import Tokens
from atpo_async.environments.values import PROMPT_TOO_LONG, ValueRefused

if TYPE_CHECKING:
    from atpo_async.environments.retrieval import Retriever

NOTHING = np.zeros(0, dtype=np.int32)


class DataRow(Protocol):
    """One row, and its place for messages."""

    @property
    def row(self) -> dict[str, Any]: ...
    @property
    def where(self) -> str: ...


class Data(Protocol):
    """Rows by split and index."""

    def num_tasks(self, split: Split) -> int: ...
    def task(self, split: Split, index: int) -> DataRow: ...


class SearchQA(ReplayFork):
    """Questions of one data set.

    Args:
        tokenizer: folder of the policy.
        data: questions, by index.
        retriever: what searches.
        dialect: ``at2po`` or ``search_r1``.
        topk: passages for a query.
        reward: ``em`` or ``f1``, where the form is right.
        max_searches: later searches get a notice; None: the dialect's.
        max_turns: one last action comes after so many; None: the dialect's.
        failed_search: ``branch``: a search that fails for good ends its branch, which is left out and counted;
            ``leaf``: it ends the chain there, which is judged, as AT2PO's code does.
        prompt_style: ``auto``, ``chat`` or ``plain``.
        enable_thinking: passed to the chat template.
        instructions: file with the words before a question; empty: the dialect's own.
        reference: how the first golden answer is written where ``search.turn_reward`` asks how probable it is to the
            policy: a text with ``{answer}``, such as ``"</think><answer>{answer}"``; empty: the dialect's own.
    """

    def __init__(
        self,
        tokenizer: Path | str,
        *,
        data: Data,
        retriever: Retriever,
        dialect: str = "at2po",
        topk: int = 3,
        reward: str = "em",
        max_searches: int | None = None,
        max_turns: int | None = None,
        failed_search: str = "branch",
        prompt_style: str = "auto",
        enable_thinking: bool | None = None,
        instructions: str = "",
        reference: str = "",
    ) -> None:
        self.dialect = dialect_of(dialect)
        _one_of("reward", reward, ("em", "f1"))
        _one_of("failed_search", failed_search, ("branch", "leaf"))
        self.data, self.retriever, self.topk, self.reward = data, retriever, topk, reward
        self.ends_at_failure = failed_search == "leaf"
        self.max_searches = self.dialect.max_searches if max_searches is None else _count("max_searches", max_searches)
        self.max_turns = self.dialect.max_turns if max_turns is None else _count("max_turns", max_turns)
        self._instructions = read_instructions(instructions, self.dialect)
        options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.tokens = Tokens(Path(tokenizer), style=prompt_style, template_options=options)
        self.stop_strings = self.dialect.stop_strings
        self._answers = AnswerTemplate(reference or self.dialect.reference, field="environment.options.reference")

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self.tokens.stop_token_ids

    def num_tasks(self, split: Split) -> int:
        """Raises ConfigError for a split that has no data."""
        return self.data.num_tasks(split)

    def decode(self, ids: np.ndarray) -> str:
        return self.tokens.decode(ids)

    def reference(self, split: Split, task_index: int) -> Reference | None:
        """The first golden answer.  Raises ValueRefused as ``start``."""
        row = self.data.task(split, task_index)
        return self._answers.reference(question_of(row.row, row.where).golden[0], self.tokens.encode)

    async def start(self, split: Split, task_index: int) -> SearchEpisode:
        """Raises ValueRefused for a row without question or golden answer, and for a prompt that is too long."""
        row = self.data.task(split, task_index)
        question = question_of(row.row, row.where)
        return SearchEpisode(self, question, split, self._prompt(question))

    def _prompt(self, question: Question) -> np.ndarray:
        messages = question.prompt or messages_of(question.question, self._instructions, self.dialect)
        ids, most = self.tokens.prompt(messages), self.dialect.prompt_tokens
        if len(ids) <= most:
            return ids
        if self.dialect.cuts_prompt:
            return ids[-most:]
        raise ValueRefused(
            "prompt",
            f"{question.where}: its prompt has {len(ids)} tokens; {self.dialect.name} takes at most {most}",
            reason=PROMPT_TOO_LONG,
        )


class SearchEpisode:
    """One question being answered."""

    def __init__(self, environment: SearchQA, question: Question, split: Split, prompt: np.ndarray) -> None:
        self.prompt = prompt
        self._environment, self._question, self._split = environment, question, split
        self._chain = Chain(
            environment.dialect, max_searches=environment.max_searches, max_turns=environment.max_turns
        )  # fmt: skip

    async def step(self, action: np.ndarray) -> StepResult:
        """Raises RetrievalFailed where the search engine gives no answer."""
        environment = self._environment
        match self._chain.take(environment.tokens.action_text(action)):
            case Insert(text):
                return self._goes_on(self._cut(environment.tokens.encode(text)))
            case Over(turn_limit):
                return self._judged(turn_limit=turn_limit)
            case Search(query):
                return await self._search(query)

    async def replay_step(self, action: np.ndarray, observation: np.ndarray) -> StepResult:
        """As ``step``; what was found is what the tree has, and is not searched for again."""
        match self._chain.take(self._environment.tokens.action_text(action)):
            case Search():
                self._chain.found(self._environment.dialect.result_tag)
                return self._goes_on(observation)
            case Insert(text):
                return self._goes_on(self._cut(self._environment.tokens.encode(text)))
            case Over(turn_limit):
                return self._judged(turn_limit=turn_limit)

    async def close(self) -> None: ...

    async def _search(self, query: str) -> StepResult:
        from atpo_async.environments.retrieval import RetrievalFailed

        environment = self._environment
        try:
            asked = query_of(query, environment.dialect.name)
            [passages] = await environment.retriever.search([asked], environment.topk)
        except RetrievalFailed:
            if environment.ends_at_failure:
                return self._judged(turn_limit=False)
            raise
        # A page may hold the names of control tokens.
        shown = [Text(environment.tokens.controls.broken(passage.contents)) for passage in passages]
        text = observation_of(shown, environment.dialect)
        self._chain.found(text)
        found = fingerprint_of(passage.id or passage.contents for passage in passages)
        return self._goes_on(self._cut(environment.tokens.encode(text)), found)

    def _cut(self, ids: np.ndarray) -> np.ndarray:
        return ids[: self._environment.dialect.observation_tokens or None]

    def _goes_on(self, observation: np.ndarray, found: tuple[int, ...] = ()) -> StepResult:
        return StepResult(
            observation=observation, done=False, reward=None, success=None, end="continue", fingerprint=found
        )  # fmt: skip

    def _judged(self, *, turn_limit: bool) -> StepResult:
        environment = self._environment
        found = score(
            self._chain.response, self._question.golden, dialect=environment.dialect, split=self._split,
            by=environment.reward,
        )  # fmt: skip
        return StepResult(
            observation=NOTHING,
            done=True,
            reward=found.reward,
            success=found.em == 1.0,
            end="turn_limit" if turn_limit else "done",
            rewards={
                "em": found.em, "f1": found.f1, "form": float(not found.fault), "searches": float(self._chain.searches)
            },
        )  # fmt: skip


def make(
    tokenizer: Path | str,
    *,
    data: str = "",
    retriever: str = "",
    eval_data: str = "",
    eval_share: float = 0.0,
    split: str = "",
    held_out: str = "",
    source: str = "",
    seed: int = 0,
    topk: int = 3,
    **options: Any,
) -> SearchQA:
    """The factory behind ``environment.name = "search_qa"``.

    Args:
        tokenizer: folder of the policy.
        data: questions to train on: a JSONL or parquet file, or a Hugging Face data set (``environments/data``).
        retriever: URL of a retrieval server, or ``local:CORPUS.jsonl``.
        eval_data: held-out questions.
        eval_share: this share of ``data`` is held out in place of ``eval_data``.
        split: of a Hugging Face data set.
        held_out: a file whose every row is held out, in place of all of these: there is nothing to train on.
        source: of ``held_out``, the rows with this ``data_source``; empty for all.
        seed: of the order of questions.
        topk: passages for a query.
        options: of ``SearchQA``.

    Raises:
        ConfigError: an option is unknown or out of range.
        SetupError: the tokenizer, the data or the search engine is missing.
    """
    known = {**(SearchQA.__init__.__kwdefaults__ or {}), **(make.__kwdefaults__ or {})}
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"environment.options.{key}: search_qa has no such option{meant}; known: {', '.join(sorted(known))}"
            )
    dialect_of(options.get("dialect", "at2po"))
    if not 1 <= topk <= MOST_PASSAGES:
        raise ConfigError(f"environment.options.topk must be 1 to {MOST_PASSAGES}, got {topk}")
    rows: Data
    if held_out:
        rows = HeldOut(held_out, source=source)
    else:
        rows = _rows(data, eval_data=eval_data, eval_share=eval_share, split=split, seed=seed)
    return SearchQA(tokenizer, data=rows, retriever=open_retriever(retriever, topk=topk), topk=topk, **options)


def _rows(data: str, *, eval_data: str, eval_share: float, split: str, seed: int) -> Data:
    """Raises what ``TaskData.load`` raises; ConfigError where no data are named."""
    from atpo_async.environments.data.task_data import TaskData

    if not data:
        raise ConfigError(
            "environment.options.data is missing: search_qa needs a file of questions (JSONL with question and "
            "golden_answers, or parquet of AT2PO or Search-R1), or a Hugging Face data set"
        )
    return TaskData.load(
        data, eval_data=eval_data or None, eval_share=eval_share or None, seed=seed, split=split or None
    )  # fmt: skip


MOST_PASSAGES = 100


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"environment.options.{name} must be one of {', '.join(known)}; got {value!r}")


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"environment.options.{name} must be a whole number >= 0 (0: no limit), got {value!r}")
    return value


_: type[Episode] = SearchEpisode
