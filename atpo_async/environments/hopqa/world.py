"""The world of hopqa: random facts behind a look-up tool, questions, demonstrations, vocabulary.

"Find : boss of mother of friend of Ada ." is answered right to left: look up the friend of Ada, the mother of whom
the tool named, the boss of that one, and answer.  Every task has a world of its own, so nothing can be learnt by heart.

Pure: facts and questions follow from (seed, stream, index) alone; demonstrations draw from a generator passed in.  The
environment (actors) and the warm start (learner) both build on this.  Only ``save_tokenizer`` does I/O.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol

from atpo_async.core.errors import ConfigError

Stream = Literal["train", "eval", "demo"]
"""``demo`` is what the warm start sees.  ``eval`` holds questions that neither of the others ever asks."""

FIND, COLON, OF, STOP_QUESTION = "Find", ":", "of", "."
LOOK, ANSWER, END = "look", "answer", "<end>"
OPEN, CLOSE = "<obs>", "</obs>"
ERROR, MALFORMED, UNKNOWN = "error", "malformed", "unknown"
PAD, UNK = "<pad>", "<unk>"

SPECIAL_WORDS = (PAD, UNK, END)
FIXED_WORDS = (FIND, COLON, OF, STOP_QUESTION, LOOK, ANSWER, OPEN, CLOSE, ERROR, MALFORMED, UNKNOWN)

_RELATIONS = "friend mother boss teacher brother doctor neighbour aunt partner cousin tutor uncle"
RELATIONS = tuple(_RELATIONS.split())

_NAMES = (
    "Ada Bob Cleo Dan Eva Finn Gus Hana Ivan Jade Kai Lena Max Nora Otto Pia Quin Rosa Sam Tess Uma Vera Wim Xena "
    "Yuri Zoe Abel Bea Carl Dora Emil Faye Gina Hugo Iris Jack Kira Liam Mona Nils Olga Paul Rhea Sven Tara Udo "
    "Vito Wanda Xavi Yara Zeno Amy Boris Cora Dirk Elsa Fritz Gwen Hank Inga Joel Kate Luis Mia Ned Opal Pete Ruth "
    "Saul Thea Ulla Vida Walt Ximena Yves Zara Alma Bart Chloe Duke Edna Ford Greta Hedy Igor Jana Kurt Lola Mick "
    "Nina Omar Petra Rolf Sara Theo Ursa Viola Wade Xeno Yoko Zack Anton Bella Cyril Della Ernst Flora Glen Heidi "
    "Ines Jonas Klara Leo Marta Noel Otis Paula Ralf Selma Tim Ute Viktor Willa Yvonne Zelda Arlo Birgit Casper"
)
NAMES = tuple(_NAMES.split())


HELD_OUT_PART = 8
"""One question in so many is held out for ``eval``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The action ``look RELATION of NAME <end>``."""

    relation: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The action ``answer NAME <end>``."""

    name: str


def read_action(words: Sequence[str]) -> Look | Answer | None:
    """The call or answer in an action; None when it is malformed (one that lacks its ``<end>`` is)."""
    match tuple(words):
        case ("look", relation, "of", name, "<end>") if END not in (relation, name):
            return Look(relation=relation, name=name)
        case ("answer", name, "<end>") if name != END:
            return Answer(name=name)
    return None


def write_action(action: Look | Answer) -> tuple[str, ...]:
    if isinstance(action, Look):
        return (LOOK, action.relation, OF, action.name, END)
    return (ANSWER, action.name, END)


def observation(*words: str) -> tuple[str, ...]:
    """The tool's words as an observation, delimited."""
    return (OPEN, *words, CLOSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All tasks of one seed.  The same (seed, stream, index) is the same task, whatever else was asked before."""

    seed: int = 0
    min_hops: int = 3
    max_hops: int = 3
    num_names: int = 64
    num_relations: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.min_hops <= self.max_hops <= 4:
            raise ConfigError(
                f"hopqa: hops must satisfy 1 <= min_hops <= max_hops <= 4, got {self.min_hops} to {self.max_hops}"
            )
        if not HELD_OUT_PART <= self.num_names <= len(NAMES):
            raise ConfigError(f"hopqa: num_names must be {HELD_OUT_PART} to {len(NAMES)}, got {self.num_names}")
        if not max(2, self.max_hops) <= self.num_relations <= len(RELATIONS):
            raise ConfigError(
                f"hopqa: num_relations must be {max(2, self.max_hops)} to {len(RELATIONS)} (a question of "
                f"{self.max_hops} hops names each relation once), got {self.num_relations}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return NAMES[: self.num_names]

    @property
    def relations(self) -> tuple[str, ...]:
        return RELATIONS[: self.num_relations]

    @property
    def words(self) -> tuple[str, ...]:
        """Every word a task of this world may use."""
        return (*SPECIAL_WORDS, *FIXED_WORDS, *self.relations, *self.names)

    def task(self, stream: Stream, index: int) -> Task:
        """The task ``index`` >= 0 of ``stream``."""
        rng = Random(_digest("question", self.seed, stream, index))
        hops = rng.randint(self.min_hops, self.max_hops)
        relations = tuple(rng.sample(self.relations, hops))
        held_out = stream == "eval"
        first = _digest("held-out", *relations)
        start = rng.choice(
            [name for i, name in enumerate(self.names) if ((i + first) % HELD_OUT_PART == 0) == held_out]
        )
        return Task(world=self, stream=stream, index=index, start=start, relations=relations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One question and the facts it is asked about."""

    world: World
    stream: Stream
    index: int
    start: str
    relations: tuple[str, ...]
    """In the order of the look-ups: the question's, right to left."""

    @property
    def question(self) -> tuple[str, ...]:
        chain = [word for relation in reversed(self.relations) for word in (relation, OF)]
        return (FIND, COLON, *chain, self.start, STOP_QUESTION)

    @property
    def answer(self) -> str:
        name = self.start
        for relation in self.relations:
            name = self.look_up(relation, name)
        return name

    def look_up(self, relation: str, name: str) -> str:
        """The name that a relation leads to from ``name``; never ``name`` itself."""
        names = self.world.names
        others = _digest("fact", self.world.seed, self.stream, self.index, relation, name) % (len(names) - 1)
        return names[others + (others >= names.index(name))]

    def reply(self, action: Look | None) -> tuple[str, ...]:
        """The tool's observation; a malformed call (None) and unknown words get one that says so."""
        if action is None:
            return observation(ERROR, COLON, MALFORMED)
        if action.relation not in self.world.relations or action.name not in self.world.names:
            return observation(ERROR, COLON, UNKNOWN)
        return observation(self.look_up(action.relation, action.name))


def is_held_out(start: str, relations: Sequence[str]) -> bool:
    """Whether a question belongs to ``eval``.  Independent of seed and world size, so no run trains on another's."""
    return (NAMES.index(start) + _digest("held-out", *relations)) % HELD_OUT_PART == 0


def turn_limit(hops: int) -> int:
    """The default: one turn for each look-up, one to answer, one to spare."""
    return hops + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """The mistakes of the demonstrator that the warm start imitates.

    Slips are random: sampling repeats them, greedy decoding does not.  Mix-ups are systematic: greedy decoding repeats
    them too, so that success-only rewards have something to teach either way.
    """

    noise: float = 0.33
    """Share of turns with a slip: another relation, a call cut short, an answer too early, a look-up too many."""
    mixed_up: int = 2
    """So many relations, the first of the world's list, are often taken for another."""
    mix_up_rate: float = 0.7
    """Share of the times that one of them is taken for another."""

    def __post_init__(self) -> None:
        for name in ("noise", "mix_up_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"hopqa: {name} must be in [0, 1), got {getattr(self, name)}")


def demonstrate(task: Task, rng: Random, habits: Habits) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(observation, action) turns of one demonstration; it goes on from wherever its slips have led it."""
    known, hop = task.start, 0
    seen: tuple[str, ...] = ()
    turns: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for _ in range(turn_limit(len(task.relations))):
        action = _demonstrated_action(task, known, hop, rng, habits)
        turns.append((seen, action))
        said = read_action(action)
        if isinstance(said, Answer):
            break
        seen = task.reply(said)
        if len(seen) == 3:
            known, hop = seen[1], hop + 1
    return turns


def _demonstrated_action(task: Task, known: str, hop: int, rng: Random, habits: Habits) -> tuple[str, ...]:
    relations = task.world.relations
    slips = rng.random() < habits.noise
    if hop >= len(task.relations):
        if slips:
            return write_action(Look(relation=rng.choice(relations), name=known))
        return write_action(Answer(name=known))
    wanted = task.relations[hop]
    place = relations.index(wanted)
    if place < habits.mixed_up and rng.random() < habits.mix_up_rate:
        wanted = relations[-1 - place]
    if not slips:
        return write_action(Look(relation=wanted, name=known))
    match rng.choice(("other relation", "cut short", "too early")):
        case "other relation":
            return write_action(Look(relation=rng.choice([r for r in relations if r != wanted]), name=known))
        case "cut short":
            return (LOOK, wanted, END)
    return write_action(Answer(name=known))


def _digest(*key: object) -> int:
    """64 bits that depend on the key alone, on every machine and in every process."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class HasWords(Protocol):
    """A task with a vocabulary of its own."""

    @property
    def words(self) -> tuple[str, ...]:
        """In the order of token ids."""


def build_tokenizer(world: HasWords) -> Any:
    """A word-level ``PreTrainedTokenizerFast`` over the world's words; needs tokenizers and transformers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(world.words)}
    words = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, unk_token=UNK, eos_token=END, clean_up_tokenization_spaces=False
    )


def save_tokenizer(world: HasWords, folder: Path) -> None:
    """Write the tokenizer as an ordinary Hugging Face folder."""
    build_tokenizer(world).save_pretrained(folder)
