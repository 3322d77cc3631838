"""The scripted policy whose conversations the warm start imitates, and the mistakes that it makes.

Its mistakes are what reinforcement learning has to remove; the form of the calls and reading passages are learnt here.
Pure: what it says follows from the question, what it was shown, and the generator passed in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

from atpo_async.core.errors import ConfigError
from atpo_async.environments.passage_qa.world import Question, query

END = "<|im_end|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """The mistakes.

    Slips are random: sampling repeats them, greedy decoding does not.  Mix-ups are systematic: greedy decoding repeats
    them too, so that success-only rewards have something to teach either way.
    """

    noise: float = 0.38
    """Share of turns with a slip: another relation, a query without the town, JSON cut short, an answer too early, an
    answer in a sentence, a search too many."""
    mixed_up: int = 2
    """So many relations, the first of the world's list, are often taken for another."""
    mix_up_rate: float = 0.7
    """Share of the times that one of them is taken for another."""

    def __post_init__(self) -> None:
        for name in ("noise", "mix_up_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"passage_qa: {name} must be in [0, 1), got {getattr(self, name)}")


CAREFUL = Habits(noise=0.02, mixed_up=0, mix_up_rate=0.0)
"""Of the conversations by which the skill itself is learnt."""


def call(text: str) -> str:
    """The action that searches."""
    return f"<tool_call>\n{json.dumps({'name': 'search', 'arguments': {'query': text}})}\n</tool_call>{END}"


class Demonstrator:
    """Plays one question; it goes on from wherever its slips have led it.

    Args:
        question: to answer.
        relations: that there are, in the world's order.
        habits: its mistakes.
        rng: draws them.
    """

    def __init__(self, question: Question, relations: tuple[str, ...], habits: Habits, rng: Random) -> None:
        self._question, self._relations, self._habits, self._rng = question, relations, habits, rng
        self._known, self._hop = question.start, 0
        self._asked = ""

    def next(self, seen: str) -> str:
        """Text of the next action, its end included; ``seen``: what the last one was answered with."""
        if self._asked and self._asked in seen:
            self._known, self._hop = seen.split(self._asked)[1].split(".")[0], self._hop + 1
        elif ": The " in seen:  # a passage about something else is believed
            self._known, self._hop = seen.split(" is ")[1].split(".")[0], self._hop + 1
        self._asked = ""
        slips = self._rng.random() < self._habits.noise
        if self._hop >= len(self._question.relations):
            return self._at_the_end(slips)
        wanted = self._mixed_up(self._question.relations[self._hop])
        return self._with_a_slip(wanted) if slips else self._search(wanted)

    def _search(self, relation: str) -> str:
        self._asked = f"The {relation} of {self._known} is "
        return call(query(relation, self._known, self._question.town))

    def _mixed_up(self, relation: str) -> str:
        place = self._relations.index(relation)
        if place < self._habits.mixed_up and self._rng.random() < self._habits.mix_up_rate:
            return self._relations[-1 - place]
        return relation

    def _with_a_slip(self, wanted: str) -> str:
        match self._rng.choice(("other relation", "no town", "cut short", "too early")):
            case "other relation":
                return self._search(self._rng.choice([r for r in self._relations if r != wanted]))
            case "no town":
                self._asked = f"The {wanted} of {self._known} is "
                return call(f"{wanted} of {self._known}")
            case "cut short":
                return self._search(wanted).replace('"}}\n', "\n")
        return f"{self._known}{END}"

    def _at_the_end(self, slips: bool) -> str:
        if not slips:
            return f"{self._known}{END}"
        if self._rng.random() < 0.5:
            return f"It is {self._known}.{END}"
        return self._search(self._rng.choice(self._relations))
