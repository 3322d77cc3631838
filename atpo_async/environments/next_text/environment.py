"""next_text as a task: what the policy is shown, how its prediction is read, and its reward.

Source: RLPT (arXiv 2509.19249): the policy reasons, then writes a prediction between two marks; it earns 1 where the
judge takes the prediction for a prefix of what the text really says, else 0.  One turn.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_value
from atpo_async.core.vocabulary import Split
from atpo_async.environments.messages.task import MessageTask
from atpo_async.environments.messages.types import Action, Message, MessageEpisode, Reply
from atpo_async.environments.next_text.documents import STORIES, Corpus, Documents, Stories
from atpo_async.environments.next_text.prefix_judge import is_long_enough, is_prefix
from atpo_async.environments.next_text.segments import Cut, Segment
from atpo_async.environments.next_text.stories import LENGTH, MIN_CONTEXT
from atpo_async.environments.next_text.url_judge import UrlJudge

OPEN, CLOSE = "<prediction>", "</prediction>"
SYSTEM = f"You are shown a part of a text. Think, then write what it says next as {OPEN}text{CLOSE}."
GAP = "[...]"
NEXT, MIDDLE = "What comes next?", f"What stands at {GAP}?"
_PREDICTION = re.compile(re.escape(OPEN) + r"(.*?)" + re.escape(CLOSE), re.DOTALL)

Judge = Callable[[str, Segment], Awaitable[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``environment.options``.  Raises ConfigError naming one that cannot be."""

    seed: int = 0
    """Of the order of documents and of what is predicted of them."""
    corpus: str | list[str] = STORIES
    """``stories``: the built-in ones; a ``.txt`` file or a pattern of such, a document each; or data with a column."""
    column: str = "text"
    eval_share: float = 0.05
    """Of the documents that are held out."""
    eval_tasks: int = 200
    """Held-out predictions; of few held-out documents several each."""
    min_chars: int = 20
    """A shorter sentence is joined to its neighbour (not in stories)."""
    min_context: int = 0
    """As of ``Cut``; 0: 1 for a corpus, 4 for stories."""
    context_sentences: int = 0
    target_sentences: int = 3
    middle_share: float = 0.25
    judge: str = "prefix"
    """``prefix`` (no model) or ``url``."""
    min_words: int = 3
    min_f1: float = 0.0
    """As of ``is_prefix``; 0: none."""
    judge_url: str = ""
    judge_model: str = ""
    judge_key: str = ""
    """Environment variable that holds the endpoint's key."""
    judge_timeout_s: float = 20.0
    judge_attempts: int = 3
    judge_max_tokens: int = 16
    renderer: str = "auto"
    renderer_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: dict[str, Any]) -> Options:
        """From what a configuration says."""
        hints = get_type_hints(cls)
        for name, value in given.items():
            if name not in hints:
                raise ConfigError(
                    f"environment.options.{name}: next_text has no such option (value {value!r}); known: "
                    f"{', '.join(hints)}"
                )
            _check_type(name, value, hints[name])
        found = cls(**given)
        found._check()
        return found

    def _check(self) -> None:
        whole = {
            "eval_tasks": 1, "min_chars": 1, "min_context": 0, "context_sentences": 0, "target_sentences": 1,
            "min_words": 1,
        }  # fmt: skip
        for name, least in whole.items():
            if getattr(self, name) < least:
                raise ConfigError(f"environment.options.{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("middle_share", "min_f1"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"environment.options.{name} must be from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.eval_share < 1:
            raise ConfigError(f"environment.options.eval_share must be from 0 to below 1, got {self.eval_share}")
        if not self.corpus:
            raise ConfigError("environment.options.corpus names nothing: name files, or leave it out for the stories")
        if self.judge not in ("prefix", "url"):
            raise ConfigError(f"environment.options.judge = {self.judge!r} is unknown; known: prefix, url")
        named = [name for name in ("judge_url", "judge_model", "judge_key") if getattr(self, name)]
        if self.judge == "prefix" and named:
            raise ConfigError(
                f"environment.options.{named[0]} does nothing with judge = 'prefix': set judge = 'url', or leave it out"
            )
        if self.judge == "url" and self.min_f1:
            raise ConfigError(
                f"environment.options.min_f1 = {self.min_f1:g} does nothing with judge = 'url', whose model says "
                "itself what is near enough: leave it out, or set judge = 'prefix'"
            )
        if self.corpus == STORIES and self.min_context not in (0, *range(MIN_CONTEXT, LENGTH)):
            raise ConfigError(
                f"environment.options.min_context must be {MIN_CONTEXT} to {LENGTH - 1} in stories, or 0 for "
                f"{MIN_CONTEXT}: their first sentences follow from nothing; got {self.min_context}"
            )

    @property
    def cut(self) -> Cut:
        return Cut(
            min_context=self.min_context or (MIN_CONTEXT if self.corpus == STORIES else 1),
            context_sentences=self.context_sentences,
            target_sentences=self.target_sentences,
            middle_share=self.middle_share,
        )

    def documents(self) -> Documents:
        """Raises ConfigError or SetupError as ``Corpus``."""
        if self.corpus == STORIES:
            return Stories(self.seed, self.eval_tasks)
        return Corpus(
            self.corpus, column=self.column, eval_share=self.eval_share, seed=self.seed,
            least=self.cut.least_sentences, min_chars=self.min_chars,
        )  # fmt: skip

    def judged(self) -> Judge:
        """The judge that they name."""
        if self.judge == "url":
            model = UrlJudge(
                url=self.judge_url, model=self.judge_model, key_variable=self.judge_key,
                timeout_s=self.judge_timeout_s, attempts=self.judge_attempts, max_tokens=self.judge_max_tokens,
            )  # fmt: skip

            async def by_model(prediction: str, segment: Segment) -> bool:
                following = segment.following
                return is_long_enough(prediction, following, min_words=self.min_words) and await model.judge(
                    prediction, following
                )

            return by_model

        async def by_prefix(prediction: str, segment: Segment) -> bool:
            return is_prefix(
                prediction, segment.following, min_words=self.min_words, min_f1=self.min_f1 or None
            )  # fmt: skip

        return by_prefix


def _check_type(name: str, value: object, hint: Any) -> None:
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as exc:
        raise ConfigError(f"environment.options.{name} = {of_value(value)}: {exc.errors()[0]['msg']}") from None


class NextText(MessageTask):
    """Predictions of what documents say.

    Args:
        tokenizer: folder of the policy.
        options: as a configuration names them.

    Raises:
        ConfigError, SetupError: an option, the corpus or the chat format cannot be.
    """

    def __init__(self, tokenizer: Path | str, options: Options) -> None:
        super().__init__(tokenizer, renderer=options.renderer, **options.renderer_options)
        self._options = options
        self._cut, self._documents, self._judge = options.cut, options.documents(), options.judged()

    def num_tasks(self, split: Split) -> int | None:
        """Training goes through the documents again and again, and predicts other sentences each time."""
        if split == "train":
            return None
        return self._options.eval_tasks if self._documents.num_eval else 0

    def segment(self, split: Split, index: int) -> Segment:
        """What task ``index`` asks for.  Raises ValueError where the documents have none."""
        return self._cut.segment(
            self._documents.sentences(split, index), seed=self._options.seed + (split == "eval"), index=index
        )

    async def begin(self, split: Split, index: int) -> MessageEpisode:
        """Raises ValueError as ``segment``."""
        return Prediction(self.segment(split, index), self._judge)


class Prediction:
    """One prediction being made."""

    def __init__(self, segment: Segment, judge: Judge) -> None:
        self._segment, self._judge = segment, judge
        self.messages: Sequence[Message] = prompt(segment)

    async def reply(self, action: Action) -> Reply:
        """Raises NotJudged where the judge has no verdict."""
        said = prediction_in(action.content) if action.complete else ""
        right = bool(said) and await self._judge(said, self._segment)
        return Reply(done=True, reward=float(right), success=right, rewards={self._segment.kind: float(right)})

    async def close(self) -> None:
        """Nothing is held."""


def prompt(segment: Segment) -> list[Message]:
    """What the policy is shown."""
    shown = " ".join(segment.before)
    asked = f"{shown} {GAP} {segment.after}\n\n{MIDDLE}" if segment.kind == "middle" else f"{shown}\n\n{NEXT}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]


def prediction_in(content: str) -> str:
    """The text between the marks of an answer; empty where there is none, or more than one."""
    found = _PREDICTION.findall(content)
    return found[0].strip() if len(found) == 1 and content.count(OPEN) == 1 else ""


def check_needs(options: dict[str, Any]) -> None:
    """What can be told of the options without a policy: before one is made for them.  Reads no data but ``.txt`` files'
    names.

    Raises:
        ConfigError, SetupError: an option, the judge or the corpus cannot be.
    """
    found = Options.of(options)
    found.judged()
    if isinstance(found.corpus, str) and found.corpus.lower().endswith(".txt"):
        found.documents()


def make(tokenizer: Path | str, **options: Any) -> NextText:
    """The factory behind ``environment.name = "next_text"``."""
    return NextText(tokenizer, Options.of(options))
