"""What each turn adds to the policy's probability of the task's right answer: information gain as the turn's reward.

Source: IGPO (arXiv 2510.14967).  a is the right answer's tokens behind a forced prefix (``environments/reference.py``);
after the observation that follows turn t

    p_t = exp(mean_k log pi(a_k | prompt, turns <= t, prefix, a_<k))        g_t = p_t - p_(t-1)

with p_0 of the prompt alone, and the parent's p in a tree, each p computed once; leaves have no gain, they have the
outcome.  With ``search.information_gain = "log-prob"`` p is the mean of the log-probs.

A tree whose task has no right answer has no gains, and neither has a turn whose context leaves no space for the answer,
nor those below it: their rewards are the environment's own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from actors.search.calls import BranchCalls
from atpo_async.config import SearchConfig
from atpo_async.environments.reference import Reference


class Known(NamedTuple):
    """How probable the answer was at a place of the tree."""

    p: float
    """A probability, or its logarithm."""
    version: int
    """Of the weights that said so."""


class Gain(NamedTuple):
    """Of one turn."""

    reward: float
    after: Known | None
    """For the turns below it; None where the answer was not scored."""


NO_GAIN = Gain(0.0, None)


@dataclass(slots=True)
class GainCounts:
    """Of one tree."""

    turns: int = 0
    """That had a gain to be measured: inner turns of a tree whose task has an answer."""
    unscored: int = 0
    """Of those, the ones without space for the answer, and those below."""
    mixed: int = 0
    """Of those, the ones between whose two scores other weights were taken up."""
    scores: int = 0
    seconds: float = 0.0
    """In which a chain waited for its scores."""
    total: float = 0.0
    """The sum of the gains."""
    without_answer: bool = False
    """The task has none."""

    def means(self) -> list[tuple[str, float, float]]:
        """Metrics: name, mean, and the number of turns, or trees, that it is the mean of."""
        measured = self.turns - self.unscored
        return [
            ("igpo/gain", self.total / max(measured, 1), measured),
            ("igpo/mixed_version_share", self.mixed / max(measured, 1), measured),
            ("igpo/unscored_share", self.unscored / max(self.turns, 1), self.turns),
            ("igpo/without_answer_share", float(self.without_answer), 1.0),
        ]


class InformationGains:
    """The gains of one tree.

    Args:
        calls: of the tree, into engine and environment.
        search: its settings.
        most_tokens: of a context with prefix and answer.
        clock: seconds, monotonic.
    """

    def __init__(
        self, calls: BranchCalls, search: SearchConfig, *, most_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._calls = calls
        self._as_log = search.information_gain == "log-prob"
        self._one_version = search.one_version_gains
        self._most = most_tokens
        self._clock = clock
        self._reference: tuple[Reference | None] | None = None
        """What the task has said; None where it was not asked yet."""
        self._asking = asyncio.Lock()
        self._known: dict[int, Known | None] = {}
        self._scoring: dict[int, asyncio.Lock] = {}
        self.counts = GainCounts()

    async def of(self, parent_id: int, context: np.ndarray, action: np.ndarray, observation: np.ndarray) -> Gain:
        """The gain of an inner turn; its ``after`` is to be handed to ``remember`` once the turn has its number.

        Args:
            parent_id: of the turn.
            context: int32, all that the policy was shown before the action.
            action: int32[T].
            observation: int32[O], what followed it.

        Raises:
            BranchFailed: the engine or the environment failed.
        """
        began = self._clock()
        try:
            reference = await self._answer()
            if reference is None:
                self.counts.without_answer = True
                return NO_GAIN
            self.counts.turns += 1
            return await self._measured(reference, parent_id, context, np.concatenate([context, action, observation]))
        finally:
            self.counts.seconds += self._clock() - began

    def remember(self, turn_id: int, gain: Gain) -> None:
        """The turn has this number."""
        if gain is not NO_GAIN:
            self._known[turn_id] = gain.after

    async def _measured(self, reference: Reference, parent_id: int, before: np.ndarray, after: np.ndarray) -> Gain:
        earlier = await self._at(reference, parent_id, before)
        now = None if earlier is None else await self._score(reference, after)
        if earlier is None or now is None:
            self.counts.unscored += 1
            return Gain(0.0, None)
        if self._one_version and earlier.version != now.version:
            earlier = await self._at(reference, parent_id, before, version=now.version) or earlier
        self.counts.mixed += earlier.version != now.version
        self.counts.total += now.p - earlier.p
        return Gain(now.p - earlier.p, now)

    async def _at(
        self, reference: Reference, turn_id: int, context: np.ndarray, *, version: int | None = None
    ) -> Known | None:
        """The answer's probability after a turn, or after the prompt.  It is known, or is scored: of the prompt, and of
        turns that another actor has grown; and once again where ``version`` is another one.

        Waits for: another chain that scores the same.  Unblocked by: its answer.
        """
        async with self._scoring.setdefault(turn_id, asyncio.Lock()):
            known = self._known.get(turn_id)
            if turn_id not in self._known or (known is not None and version not in (None, known.version)):
                known = self._known[turn_id] = await self._score(reference, context)
            return known

    async def _score(self, reference: Reference, context: np.ndarray) -> Known | None:
        """None where the context leaves no space for the answer."""
        before = np.concatenate([context, reference.prefix])
        if len(before) + len(reference.answer) > self._most:
            return None
        self.counts.scores += 1
        scored = await self._calls.score(before, reference.answer)
        mean = float(np.mean(scored.logprobs, dtype=np.float64))
        return Known(mean if self._as_log else float(np.exp(mean)), scored.version)

    async def _answer(self) -> Reference | None:
        """The task's right answer, asked for once a tree.  Waits for: the environment, or another chain that asks."""
        async with self._asking:
            if self._reference is None:
                self._reference = (await self._calls.reference(),)
            return self._reference[0]
