"""Small stories in which each sentence from the fifth on follows from those before it; the laptop's corpus.  Pure.

Three facts, then what comes of a request: "Ada keeps the coin in the attic. …  Dan asks Ada for the coin. Ada goes to
the attic. Ada takes the coin. Ada gives the coin to Dan. Dan thanks Ada. Now Dan keeps the coin."
"""

from __future__ import annotations

from random import Random

from atpo_async.environments.hopqa.world import NAMES

PEOPLE = NAMES[:24]
_ITEMS = "coin ring key lamp rope map bell drum flag harp mask pipe"
ITEMS = tuple(_ITEMS.split())
_PLACES = "attic barn cellar garden harbour kitchen library mill orchard stable tower workshop"
PLACES = tuple(_PLACES.split())

NUM_FACTS = 3
MIN_CONTEXT = NUM_FACTS + 1
"""Sentences that follow from nothing: the facts, and who asks."""
LENGTH = MIN_CONTEXT + 5
"""Sentences of a story."""
HELD_OUT_PART = 8
"""One request in so many, of an owner, an item and a place, is told in held-out stories, and in them only."""


def story(seed: int, stream: str, index: int) -> list[str]:
    """Its ``LENGTH`` sentences.  ``eval`` has requests that no other stream has."""
    rng = Random(f"next_text/{seed}/{stream}/{index}")  # texts seed alike on every machine
    while True:
        asker, *owners = rng.sample(PEOPLE, NUM_FACTS + 1)
        told = list(zip(owners, rng.sample(ITEMS, NUM_FACTS), rng.sample(PLACES, NUM_FACTS), strict=True))
        owner, item, place = rng.choice(told)
        if is_held_out(owner, item, place) == (stream == "eval"):
            break
    return [
        *(fact(*each) for each in told),
        f"{asker} asks {owner} for the {item}.",
        f"{owner} goes to the {place}.",
        f"{owner} takes the {item}.",
        f"{owner} gives the {item} to {asker}.",
        f"{asker} thanks {owner}.",
        f"Now {asker} keeps the {item}.",
    ]


def fact(owner: str, item: str, place: str) -> str:
    """A sentence that others go by."""
    return f"{owner} keeps the {item} in the {place}."


def is_held_out(owner: str, item: str, place: str) -> bool:
    """Whether a request belongs to ``eval``, whatever the seed."""
    return (5 * PEOPLE.index(owner) + ITEMS.index(item) + 3 * PLACES.index(place)) % HELD_OUT_PART == 0
