"""What the warm start learns from: the demonstrator plays the task itself, search engine and all, in other towns."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from atpo_async.environments.passage_qa.demonstrator import Demonstrator, Habits
from atpo_async.environments.passage_qa.environment import PassageQA, corpus_of, default_turn_limit
from atpo_async.environments.passage_qa.tokenizer import END, long_lines, save_tokenizer
from atpo_async.environments.passage_qa.world import Question, Towns
from atpo_async.environments.retrieval.local import LocalRetriever

TOKENIZER_CONVERSATIONS = 400
"""So many are played to train the tokenizer on."""


@dataclass(frozen=True, slots=True)
class Played:
    """One conversation of the demonstrator."""

    ids: np.ndarray
    """int32[L], from the prompt to the last action's end."""
    is_action: np.ndarray
    """bool[L]: whether the demonstrator said the token."""


class Rehearsal:
    """Plays questions of ``towns`` with a policy folder's tokenizer.

    Args:
        tokenizer: folder of the policy.
        towns: in which it is played.
        questions: of the conversations, in the order in which they are asked for.
        folder: takes the corpus and its index.
        topk: passages a query.
    """

    def __init__(
        self, tokenizer: Path, towns: Towns, questions: list[Question], *, folder: Path, topk: int = 1
    ) -> None:  # fmt: skip
        self._towns, self._questions = towns, questions
        retriever = LocalRetriever(corpus_of(folder, towns), topk=topk)
        self._task = PassageQA(tokenizer, retriever, questions, max_turns=default_turn_limit(towns))

    def play(self, indices: range, rng: Random, habits: Habits) -> list[Played]:
        """The conversations about training tasks ``indices``, one after another."""
        return asyncio.run(self._play(indices, rng, habits))

    def text(self, played: Played) -> str:
        """Special tokens kept."""
        return self._task.decode(played.ids)

    async def _play(self, indices: range, rng: Random, habits: Habits) -> list[Played]:
        return [await self._one(index, rng, habits) for index in indices]

    async def _one(self, index: int, rng: Random, habits: Habits) -> Played:
        question = self._questions[self._task.data.task("train", index).row["number"]]
        speaker = Demonstrator(question, self._towns.world.relations, habits, rng)
        episode = await self._task.start("train", index)
        parts, said, seen = [episode.prompt], [False], ""
        while True:
            action = self._task.format.encode(speaker.next(seen))
            parts.append(action)
            said.append(True)
            result = await episode.step(action)
            if result.done:
                break
            seen = self._task.decode(result.observation)
            parts.append(result.observation)
            said.append(False)
        await episode.close()
        return Played(np.concatenate(parts), np.repeat(said, [len(part) for part in parts]))


def make_tokenizer(folder: Path, towns: Towns, *, scratch: Path) -> None:
    """Train the policy's tokenizer on conversations and write it into ``folder``.

    The conversations are first played with a tokenizer of the alphabet alone.
    """
    questions = [towns.question("demo", index) for index in range(TOKENIZER_CONVERSATIONS)]
    words = " ".join((*towns.world.names, *towns.world.relations, *towns.towns))
    save_tokenizer(scratch, [words])
    rehearsal = Rehearsal(scratch, towns, questions, folder=scratch)
    texts = [rehearsal.text(each) for each in rehearsal.play(range(len(questions)), Random(0), Habits())]
    texts += [f"{passage.title}: {passage.text}\n" for passage in towns.passages()]
    system_message = texts[0][: texts[0].index(END)]
    save_tokenizer(folder, texts, long_lines(system_message))
