"""hopqa: multi-hop questions over a world of random facts, answered through a look-up tool.

The prompt is ``Find : boss of mother of friend of Ada .``; an action is ``look friend of Ada <end>`` or
``answer Bob <end>``; an observation is ``<obs> Bob </obs>`` or ``<obs> error : malformed </obs>``.  Reward 1 for the
right answer, else 0, also when the turns run out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.environments.base import Episode, ReplayFork, Split, StepResult
from atpo_async.environments.hopqa.world import (
    ANSWER,
    CLOSE,
    END,
    OPEN,
    UNK,
    Answer,
    Task,
    World,
    read_action,
    turn_limit,
)
from atpo_async.environments.reference import Reference

NOTHING = np.zeros(0, dtype=np.int32)

TASKS_KEPT = 1024
"""Of the tasks that were asked for last."""


class HopQA(ReplayFork):
    """The tasks of one world under one tokenizer.

    Args:
        tokenizer: a folder with the policy's ``tokenizer.json``; every word of the world must be one token of it.
        seed: other seeds have other questions and facts.
        hops: look-ups a question needs, 1 to 4; ``min_hops`` and ``max_hops`` for a mixture.
        num_names: size of the world, at most 128.
        num_relations: at most 12.
        turn_limit: actions of one chain; 0 for two more than the question has hops.
        eval_tasks: how many held-out tasks there are.

    Raises:
        ConfigError: an option is out of range.
        SetupError: the tokenizer is missing or lacks words.
    """

    def __init__(
        self,
        tokenizer: Path | str,
        *,
        seed: int = 0,
        hops: int = 3,
        min_hops: int | None = None,
        max_hops: int | None = None,
        num_names: int = 64,
        num_relations: int = 10,
        turn_limit: int = 0,
        eval_tasks: int = 200,
    ) -> None:
        if turn_limit < 0:
            raise ConfigError(f"environment.options.turn_limit must be >= 0 (0: hops + 2), got {turn_limit}")
        if eval_tasks < 1:
            raise ConfigError(f"environment.options.eval_tasks must be >= 1, got {eval_tasks}")
        self.world = World(
            seed=seed,
            min_hops=hops if min_hops is None else min_hops,
            max_hops=hops if max_hops is None else max_hops,
            num_names=num_names,
            num_relations=num_relations,
        )
        # A tree asks for its task once for each of its chains.
        self._task = functools.lru_cache(maxsize=TASKS_KEPT)(self.world.task)
        self._turn_limit = turn_limit
        self._eval_tasks = eval_tasks
        hint = f"num_names = {num_names} and num_relations = {num_relations}"
        self._id_of = vocabulary(Path(tokenizer), self.world.words, "hopqa", hint)
        self._word_of = {i: word for word, i in self._id_of.items()}

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return (self._id_of[END],)

    def num_tasks(self, split: Split) -> int | None:
        return self._eval_tasks if split == "eval" else None

    async def start(self, split: Split, task_index: int) -> HopQAEpisode:
        """Raises ConfigError if the split has no such task."""
        if task_index < 0 or (split == "eval" and task_index >= self._eval_tasks):
            raise ConfigError(
                f"hopqa has no task {task_index} in split {split!r}: eval has {self._eval_tasks} "
                "(environment.options.eval_tasks), train has no end"
            )
        return self._episode(split, task_index)

    def cue(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> np.ndarray | None:
        """Of a team's proposer: the name that it answered; None where it did not."""
        said = read_action(self.decode(actions[-1]))
        return self.encode((said.name,)) if isinstance(said, Answer) and said.name in self._id_of else None

    async def start_synthesizer(self, split: Split, task_index: int, cues: tuple[np.ndarray, ...]) -> HopQAEpisode:
        """The same task, and after the question the names that proposers answered, as the tool names them."""
        notes = tuple(word for cue in cues if len(cue) for word in (OPEN, *self.decode(cue), CLOSE))
        return self._episode(split, task_index, notes)

    def _episode(self, split: Split, task_index: int, notes: tuple[str, ...] = ()) -> HopQAEpisode:
        task = self._task(split, task_index)
        return HopQAEpisode(self, task, self._turn_limit or turn_limit(len(task.relations)), notes)

    def reference(self, split: Split, task_index: int) -> Reference:
        """The name, behind the word that opens an answer."""
        task = self._task(split, task_index)
        return Reference(self.encode((task.answer,)), self.encode((ANSWER,)))

    def encode(self, words: tuple[str, ...]) -> np.ndarray:
        """int32[len(words)]."""
        return np.array([self._id_of[word] for word in words], dtype=np.int32)

    def decode(self, token_ids: np.ndarray) -> tuple[str, ...]:
        """One word per token; tokens that this world does not know become the unknown word."""
        return tuple(self._word_of.get(int(i), UNK) for i in token_ids)


class HopQAEpisode:
    """One question being answered."""

    def __init__(self, environment: HopQA, task: Task, max_turns: int, notes: tuple[str, ...] = ()) -> None:
        self._environment = environment
        self._max_turns = max_turns
        self._turns = 0
        self._over = False
        self._notes = notes
        self.task = task

    @property
    def prompt(self) -> np.ndarray:
        return self._environment.encode((*self.task.question, *self._notes))

    async def step(self, action: np.ndarray) -> StepResult:
        if self._over:
            raise RuntimeError(
                f"hopqa task {self.task.index} ({self.task.stream}) got an action after its end at turn {self._turns}"
            )
        self._turns += 1
        said = read_action(self._environment.decode(action))
        if isinstance(said, Answer):
            self._over = True
            right = said.name == self.task.answer
            return StepResult(observation=NOTHING, done=True, reward=float(right), success=right, end="done")
        if self._turns >= self._max_turns:
            self._over = True
            return StepResult(observation=NOTHING, done=True, reward=0.0, success=False, end="turn_limit")
        seen = self._environment.encode(self.task.reply(said))
        return StepResult(observation=seen, done=False, reward=None, success=None, end="continue")

    async def close(self) -> None:
        self._over = True


def vocabulary(folder: Path, words: Sequence[str], name: str, options: str = "these options") -> dict[str, int]:
    """Word -> token id of every word that a task needs, each one token of the policy's tokenizer.

    Args:
        folder: with ``tokenizer.json``.
        words: of the task.
        name: of the environment, for messages.
        options: which of its options decide the words, for messages.

    Raises:
        SetupError: the tokenizer is missing, cannot be read, or lacks words.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise SetupError(
            f"tokenizer {folder} has no tokenizer.json; {name} needs the policy that `atpo train` with "
            "model.warm_start = true makes, or another one with its words"
        )
    try:
        known: dict[str, int] = Tokenizer.from_file(str(file)).get_vocab()
    except Exception as exc:  # tokenizers raises bare Exception for every fault in the file
        raise SetupError(f"tokenizer {file} cannot be read: {exc}") from exc
    missing = [word for word in words if word not in known]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise SetupError(
            f"tokenizer {folder} lacks {len(missing)} of the {len(words)} tokens that {name} needs with {options}: "
            f"{shown}; use the model that the warm start made with the same options"
        )
    return {word: known[word] for word in words}


def make(tokenizer: Path | str, **options: bool | int | float | str) -> HopQA:
    """The factory behind ``environment.name = "hopqa"``.  Raises ConfigError for options that hopqa does not have."""
    known = HopQA.__init__.__kwdefaults__ or {}
    for key, value in options.items():
        if key not in known:
            raise ConfigError(
                f"environment.options.{key}: hopqa has no such option (value {value!r}); known: {', '.join(known)}"
            )
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"environment.options.{key} must be a whole number, got {value!r}")
    return HopQA(tokenizer, **options)  # type: ignore[arg-type]


_: type[Episode] = HopQAEpisode
