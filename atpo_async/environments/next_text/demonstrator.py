"""The predictions of stories that the warm start imitates, and the mistakes in them.  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from atpo_async.core.errors import ConfigError
from atpo_async.environments.next_text.environment import CLOSE, OPEN
from atpo_async.environments.next_text.segments import Segment
from atpo_async.environments.next_text.stories import ITEMS, NUM_FACTS, PEOPLE, PLACES

END = "<|im_end|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """The mistakes.  Slips are random; mix-ups are systematic: greedy decoding repeats them."""

    noise: float = 0.38
    """Share of predictions with a slip: another name, item or place, the sentence before again, two words alone, no
    closing mark."""
    mix_up_rate: float = 0.7
    """Share of thanks that the wrong one of two gives, and of walks that lead to the first fact's place."""

    def __post_init__(self) -> None:
        for name in ("noise", "mix_up_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"next_text: {name} must be in [0, 1), got {getattr(self, name)}")


CAREFUL = Habits(noise=0.02, mix_up_rate=0.0)
"""Of the predictions by which the skill itself is learnt."""


def demonstrate(segment: Segment, rng: Random, habits: Habits) -> str:
    """An action about a segment of a story that ``MIN_CONTEXT`` sentences were told of, its end included."""
    said = _mixed_up(segment, rng, habits)
    thought = f"<think>\n{_thought(segment)}\n</think>\n\n"
    if rng.random() >= habits.noise:
        return f"{thought}{OPEN}{said}{CLOSE}{END}"
    match rng.choice(("other word", "said before", "cut short", "no mark")):
        case "other word":
            return f"{thought}{OPEN}{_another_word(said, rng)}{CLOSE}{END}"
        case "said before":
            return f"{thought}{OPEN}{segment.before[-1]}{CLOSE}{END}"
        case "cut short":
            return f"{thought}{OPEN}{' '.join(said.split()[:2])}{CLOSE}{END}"
    return f"{thought}{OPEN}{said}{END}"


def _thought(segment: Segment) -> str:
    """What the target goes by: who asked whom, and the fact about the one who was asked."""
    asked = segment.before[NUM_FACTS]
    owner = asked.split(" asks ")[1].split(" for ")[0]
    fact = next(fact for fact in segment.before[:NUM_FACTS] if fact.startswith(f"{owner} "))
    return f"{asked} {fact}"


def _mixed_up(segment: Segment, rng: Random, habits: Habits) -> str:
    target = segment.target
    if rng.random() >= habits.mix_up_rate:
        return target
    if " thanks " in target:
        asker, owner = target.removesuffix(".").split(" thanks ")
        return f"{owner} thanks {asker}."
    if " goes to the " in target:
        return f"{target.split(' to the ')[0]} to the {segment.before[0].removesuffix('.').split(' in the ')[1]}."
    return target


def _another_word(said: str, rng: Random) -> str:
    words = said.removesuffix(".").split()
    of_a_kind = [(at, kind) for at, word in enumerate(words) for kind in (PEOPLE, ITEMS, PLACES) if word in kind]
    at, kind = rng.choice(of_a_kind)
    words[at] = rng.choice([word for word in kind if word != words[at]])
    return f"{' '.join(words)}."
