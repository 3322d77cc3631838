"""ledger_qa as teams solve it: a proposer for each ledger, a synthesizer that reads their notes alone.

Reward 1 for the right note, 1 for the right answer, else 0.  ``configs/demo_team.toml`` trains it on a laptop.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from atpo_async.core.errors import ConfigError
from atpo_async.environments.base import Episode, ReplayFork, Split, StepResult
from atpo_async.environments.hopqa.environment import NOTHING, vocabulary
from atpo_async.environments.ledger_qa.world import END, Ledgers, answered, noted

UNK = "<unk>"


class LedgerQA(ReplayFork):
    """The tasks of one seed under one tokenizer.

    Args:
        tokenizer: a folder with the policy's ``tokenizer.json``; every word of the world must be one token of it.
        seed: other seeds have other ledgers.
        ledgers: of a task; ``team.proposers`` must be as many.
        entries: of a ledger.
        num_names: that ledgers are about, at most 12.
        blind: the synthesizer is shown no note: what it can do without its proposers.
        eval_tasks: how many held-out tasks there are.

    Raises:
        ConfigError: an option is out of range.
        SetupError: the tokenizer is missing or lacks words.
    """

    def __init__(
        self, tokenizer: Path | str, *, seed: int = 0, ledgers: int = 2, entries: int = 4, num_names: int = 6,
        blind: bool = False, eval_tasks: int = 200,
    ) -> None:  # fmt: skip
        if eval_tasks < 1:
            raise ConfigError(f"environment.options.eval_tasks must be >= 1, got {eval_tasks}")
        self.world = Ledgers(seed=seed, ledgers=ledgers, entries=entries, num_names=num_names)
        self._blind, self._eval_tasks = blind, eval_tasks
        self._id_of = vocabulary(Path(tokenizer), self.world.words, "ledger_qa")
        self._word_of = {i: word for word, i in self._id_of.items()}

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return (self._id_of[END],)

    def num_tasks(self, split: Split) -> int | None:
        return self._eval_tasks if split == "eval" else None

    async def start(self, split: Split, task_index: int) -> Reader:
        """The first proposer's episode."""
        return await self.start_proposer(split, task_index, 0)

    async def start_proposer(self, split: Split, task_index: int, seat: int) -> Reader:
        """Raises ConfigError for a seat that has no ledger."""
        if seat >= self.world.ledgers:
            raise ConfigError(
                f"ledger_qa has environment.options.ledgers = {self.world.ledgers}, one for each proposer, and "
                f"team.proposers asks for more: set both to the same number"
            )
        task = self.world.task(split, task_index)
        return Reader(self, task.read_by(seat), (task.digit(seat),), notes=True)

    def cue(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> np.ndarray | None:
        """What the last action notes, without what it thinks."""
        found = noted(self.decode(actions[-1]))
        return None if found is None else self.encode(found)

    async def start_synthesizer(self, split: Split, task_index: int, cues: tuple[np.ndarray, ...]) -> Reader:
        task = self.world.task(split, task_index)
        notes = tuple(() if self._blind else self.decode(cue) for cue in cues)
        return Reader(self, task.read_from(notes), (task.answer,), notes=False)

    def encode(self, words: tuple[str, ...]) -> np.ndarray:
        """int32[len(words)]; a word that this world does not know becomes the unknown one."""
        return np.array([self._id_of.get(word, self._id_of[UNK]) for word in words], dtype=np.int32)

    def decode(self, token_ids: np.ndarray) -> tuple[str, ...]:
        """One word per token; tokens that this world does not know become the unknown word."""
        return tuple(self._word_of.get(int(i), UNK) for i in token_ids)


class Reader:
    """One member's only turn."""

    def __init__(self, environment: LedgerQA, prompt: tuple[str, ...], right: tuple[str, ...], *, notes: bool) -> None:
        self._environment, self._right, self._notes = environment, right, notes
        self.prompt = environment.encode(prompt)

    async def step(self, action: np.ndarray) -> StepResult:
        words = self._environment.decode(action)
        said = noted(words) if self._notes else (answered(words),)
        right = said == self._right
        return StepResult(observation=NOTHING, done=True, reward=float(right), success=right, end="done")

    async def close(self) -> None: ...


def make(tokenizer: Path | str, **options: bool | int | float | str) -> LedgerQA:
    """The factory behind ``environment.name = "ledger_qa"``.  Raises ConfigError for options that it does not have."""
    known = LedgerQA.__init__.__kwdefaults__ or {}
    for key, value in options.items():
        if key not in known:
            raise ConfigError(
                f"environment.options.{key}: ledger_qa has no such option (value {value!r}); known: {', '.join(known)}"
            )
        if type(value) is not type(known[key]):
            expected = "true or false" if isinstance(known[key], bool) else "a whole number"
            raise ConfigError(f"environment.options.{key} must be {expected}, got {value!r}")
    return LedgerQA(tokenizer, **options)  # type: ignore[arg-type]


_: type[Episode] = Reader
