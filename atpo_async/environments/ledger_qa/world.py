"""The world of ledger_qa: ledgers of names and digits, questions about them, what members say, demonstrations.

"Ledger ada4 cy2 bob7 . most of cy ?" is what a proposer reads: one ledger, and the question, which asks for the
largest digit that a name has in any ledger.  Its action may think first: "cy2 note 2 <end>" notes 2.  The
synthesizer reads the notes and no ledger, "Notes 2 . 9 . most of cy ?", and answers "9 <end>".  Ledgers are drawn anew
for every task, so nothing can be learnt by heart.

Pure: tasks follow from (seed, stream, index) alone; demonstrations draw from a generator passed in.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from random import Random
from typing import Literal

from atpo_async.core.errors import ConfigError
from atpo_async.environments.hopqa.world import END, PAD, SPECIAL_WORDS

Stream = Literal["train", "eval", "demo"]
"""``demo`` is what the warm start sees.  Each has ledgers of its own."""

LEDGER, NOTES, NOTE, STOP, MOST, OF, ASK = "Ledger", "Notes", "note", ".", "most", "of", "?"
DIGITS = tuple("0123456789")
NAMES = ("ada", "bob", "cy", "dora", "eve", "finn", "gus", "hal", "ivy", "jon", "kit", "lee")
MOST_LEDGERS = 8

__all__ = ["END", "PAD", "Habits", "Ledgers", "Stream", "Task"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledgers:
    """All tasks of one seed.  Raises ConfigError for sizes out of range."""

    seed: int = 0
    ledgers: int = 2
    """Of a task: one for each proposer of a team."""
    entries: int = 4
    """Of a ledger, each one token: a name and its digit."""
    num_names: int = 6

    def __post_init__(self) -> None:
        for name, least, most in (
            ("ledgers", 1, MOST_LEDGERS), ("num_names", 2, len(NAMES)), ("entries", 2, self.num_names),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"ledger_qa: {name} must be {least} to {most}, got {getattr(self, name)}")

    @property
    def names(self) -> tuple[str, ...]:
        return NAMES[: self.num_names]

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary, in the order of token ids."""
        return (
            *SPECIAL_WORDS,
            LEDGER,
            NOTES,
            NOTE,
            STOP,
            MOST,
            OF,
            ASK,
            *DIGITS,
            *self.names,
            *map("".join, itertools.product(self.names, DIGITS)),
        )

    def task(self, stream: Stream, index: int) -> Task:
        rng = Random(f"ledger_qa {self.seed} {stream} {index}")
        asked = rng.choice(self.names)
        others = [name for name in self.names if name != asked]
        pages = []
        for _ in range(self.ledgers):
            page = [asked, *rng.sample(others, self.entries - 1)]
            rng.shuffle(page)
            pages.append(tuple((name, rng.choice(DIGITS)) for name in page))
        return Task(asked=asked, pages=tuple(pages))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One question and its ledgers."""

    asked: str
    pages: tuple[tuple[tuple[str, str], ...], ...]
    """(name, digit) of each entry, of each ledger."""

    @property
    def question(self) -> tuple[str, ...]:
        return MOST, OF, self.asked, ASK

    def digit(self, ledger: int) -> str:
        """What the ledger has of the name that is asked for."""
        return dict(self.pages[ledger])[self.asked]

    @property
    def answer(self) -> str:
        return max(self.digit(ledger) for ledger in range(len(self.pages)))

    def read_by(self, ledger: int) -> tuple[str, ...]:
        """A proposer's prompt."""
        return (LEDGER, *map("".join, self.pages[ledger]), STOP, *self.question)

    def read_from(self, notes: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
        """The synthesizer's prompt."""
        return (NOTES, *(word for note in notes for word in (*note, STOP)), *self.question)


def noted(action: tuple[str, ...]) -> tuple[str, ...] | None:
    """What an action notes for the synthesizer: what follows the last ``note``; None where it notes nothing."""
    said = action[:-1] if action and action[-1] == END else action
    if NOTE not in said:
        return None
    at = len(said) - said[::-1].index(NOTE)
    return said[at:] or None


def answered(action: tuple[str, ...]) -> str | None:
    """The one word of an answer; None where it is not one."""
    said = action[:-1] if action and action[-1] == END else action
    return said[0] if len(said) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """The mistakes of the demonstrator that the warm start imitates.

    Slips are random: sampling repeats them, greedy decoding does not.  The others are systematic: greedy decoding
    repeats them too, so that there is something to learn either way, for both roles.
    """

    noise: float = 0.25
    """Share of actions with a slip: another digit than the one thought of."""
    mixed_up: int = 2
    """Of so many names, the first ones, the digit of the entry beside them is often noted."""
    hasty: bool = True
    """The first note is often taken for the largest."""
    rate: float = 0.65
    """Share of the times that a systematic mistake is made."""

    def proposal(self, task: Task, ledger: int, rng: Random) -> tuple[str, ...]:
        page = task.pages[ledger]
        at = [name for name, _ in page].index(task.asked)
        if task.asked in NAMES[: self.mixed_up] and rng.random() < self.rate:
            at = (at + 1) % len(page)
        name, digit = page[at]
        return name + digit, NOTE, (rng.choice(DIGITS) if rng.random() < self.noise else digit), END

    def synthesis(self, task: Task, rng: Random) -> tuple[str, ...]:
        hasty = self.hasty and rng.random() < self.rate
        said = task.digit(0) if hasty else task.answer
        return (rng.choice(DIGITS) if rng.random() < self.noise else said), END
