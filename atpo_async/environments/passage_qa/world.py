"""The towns of passage_qa: what their passages say, and the questions asked about them.

A town is a world of hopqa with a name: "In Ambleton, who is the boss of the mother of Ada?".  A passage holds one fact:
title "Ada of Ambleton", text "The mother of Ada is Bea."  The same people live in every town and know others there.

Pure: everything follows from (seed, split, index) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from atpo_async.core.errors import ConfigError
from atpo_async.environments.hopqa.world import Stream, Task, World, is_held_out

TOWNS = (
    "Ambleton", "Brackley", "Corrow", "Dunmere", "Eastwold", "Farley", "Glenholm", "Harwick",
    "Inverby", "Jarrow", "Kelsey", "Lynton", "Marfield", "Norby", "Oakham", "Penrose",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One fact, as the corpus has it."""

    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question and what it takes to answer it."""

    town: str
    start: str
    relations: tuple[str, ...]
    """In the order of the searches: the question's, right to left."""
    names: tuple[str, ...]
    """Whom each search leads to; the last one is the answer."""

    @property
    def text(self) -> str:
        chain = "".join(f"the {relation} of " for relation in reversed(self.relations))
        return f"In {self.town}, who is {chain}{self.start}?"

    @property
    def answer(self) -> str:
        return self.names[-1]

    @property
    def queries(self) -> tuple[str, ...]:
        """The searches that answer it, in their order."""
        known = (self.start, *self.names)
        return tuple(
            query(relation, name, self.town) for relation, name in zip(self.relations, known[:-1], strict=True)
        )


def query(relation: str, name: str, town: str) -> str:
    """A search that finds one fact."""
    return f"{relation} of {name} in {town}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Towns:
    """All towns of one seed."""

    seed: int = 0
    num_towns: int = 8
    min_hops: int = 2
    max_hops: int = 3
    num_names: int = 64
    num_relations: int = 10
    rehearsal: bool = False
    """Whether these are the towns that the warm start plays in: the same names, other facts."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_towns <= len(TOWNS):
            raise ConfigError(f"passage_qa: num_towns must be 1 to {len(TOWNS)}, got {self.num_towns}")
        _ = self.world

    @property
    def world(self) -> World:
        return World(
            seed=self.seed, min_hops=self.min_hops, max_hops=self.max_hops,
            num_names=self.num_names, num_relations=self.num_relations,
        )  # fmt: skip

    @property
    def towns(self) -> tuple[str, ...]:
        return TOWNS[: self.num_towns]

    def fact(self, town: str, relation: str, name: str) -> str:
        """The name that a relation leads to from ``name``; never ``name`` itself."""
        stream: Stream = "demo" if self.rehearsal else "train"
        place = Task(world=self.world, stream=stream, index=TOWNS.index(town), start=name, relations=(relation,))
        return place.look_up(relation, name)

    def passages(self) -> Iterator[Passage]:
        """Every fact of every town."""
        world = self.world
        for town in self.towns:
            for name in world.names:
                for relation in world.relations:
                    yield self.passage(town, relation, name)

    def passage(self, town: str, relation: str, name: str) -> Passage:
        other = self.fact(town, relation, name)
        return Passage(title=f"{name} of {town}", text=f"The {relation} of {name} is {other}.")

    def question(self, stream: Stream, index: int) -> Question:
        """The question ``index`` >= 0 of ``stream``.  Those of ``eval`` are asked nowhere else."""
        world = self.world
        rng = Random(f"passage_qa/{self.seed}/{stream}/{index}")  # texts seed alike on every machine
        town = rng.choice(self.towns)
        relations = tuple(rng.sample(world.relations, rng.randint(self.min_hops, self.max_hops)))
        held_out = stream == "eval"
        start = rng.choice([name for name in world.names if is_held_out(name, relations) == held_out])
        names, known = [], start
        for relation in relations:
            known = self.fact(town, relation, known)
            names.append(known)
        return Question(town=town, start=start, relations=relations, names=tuple(names))
