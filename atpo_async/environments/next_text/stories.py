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
"""One pair of an item and a place in so many occurs in held-out stories, and in them only."""


def story(seed: int, stream: str, index: int) -> list[str]:
    """Its ``LENGTH`` sentences.  ``eval`` has pairs of items and places that no other stream has."""
    rng = Random(f"next_text/{seed}/{stream}/{index}")  # texts seed alike on every machine
    asker, *owners = rng.sample(PEOPLE, NUM_FACTS + 1)
    items, places = _pairs(rng, held_out=stream == "eval")
    facts = [fact(owner, item, place) for owner, item, place in zip(owners, items, places, strict=True)]
    owner, item, place = rng.choice(list(zip(owners, items, places, strict=True)))
    return [
        *facts,
        f"{asker} asks {owner} for the {item}.",
        f"{owner} goes to the {place}.",
        f"{owner} takes the {item}.",
        f"{owner} gives the {item} to {asker}.",
        f"{asker} thanks {owner}.",
        f"Now {asker} keeps the {item}.",
    ]


def fact(owner: str, item: str, place: str) -> str:
    return f"{owner} keeps the {item} in the {place}."


def _pairs(rng: Random, *, held_out: bool) -> tuple[list[str], list[str]]:
    while True:
        items, places = rng.sample(ITEMS, NUM_FACTS), rng.sample(PLACES, NUM_FACTS)
        if all(is_held_out(*pair) == held_out for pair in zip(items, places, strict=True)):
            return items, places


def is_held_out(item: str, place: str) -> bool:
    """Whether a pair belongs to ``eval``, whatever the seed."""
    return (ITEMS.index(item) + 3 * PLACES.index(place)) % HELD_OUT_PART == 0
