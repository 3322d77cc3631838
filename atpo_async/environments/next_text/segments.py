"""Chooses what of a text is predicted: the next sentence, or one in the middle.  Pure.

Source: RLPT (arXiv 2509.19249): of a text's sentences s_1 … s_n, autoregressive segment reasoning (ASR) predicts s_i
from those before it, middle segment reasoning (MSR) from those before it and s_(i+1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from atpo_async.core.shuffling import mixed

Kind = Literal["next", "middle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One prediction that is asked for."""

    kind: Kind
    before: tuple[str, ...]
    """Sentences that are shown."""
    after: str
    """The sentence after the target, shown in a ``middle`` one; else empty."""
    target: str
    following: tuple[str, ...]
    """What the text really says from the target on, the target first: what a prediction is judged by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How segments are taken out of a text."""

    min_context: int = 1
    """Sentences before the first one that is ever predicted."""
    context_sentences: int = 0
    """Shown before the target at most, the nearest; 0: all."""
    target_sentences: int = 3
    """That a prediction is judged by: one longer or shorter than the target is not punished for its end."""
    middle_share: float = 0.0
    """Of the segments that are ``middle`` ones; lambda / (1 + lambda) for a weight lambda of their objective."""

    @property
    def least_sentences(self) -> int:
        """Of a text that a segment can be taken from."""
        return self.min_context + 1

    def segment(self, sentences: Sequence[str], *, seed: int, index: int) -> Segment:
        """The segment that (seed, index) draws from a text of ``least_sentences`` at least; from one of no more it is a
        ``next`` one, for nothing follows."""
        place, chance = (int(number) for number in mixed(np.array([2 * index, 2 * index + 1]), seed))
        places = len(sentences) - self.min_context
        # Before the place: else the last sentences, which nothing follows, would take their share from the middle ones.
        is_middle = places > 1 and chance < int(self.middle_share * 2**64)
        at = self.min_context + place % (places - 1 if is_middle else places)
        begin = max(0, at - self.context_sentences) if self.context_sentences else 0
        return Segment(
            kind="middle" if is_middle else "next",
            before=tuple(sentences[begin:at]),
            after=sentences[at + 1] if is_middle else "",
            target=sentences[at],
            following=tuple(sentences[at : at + self.target_sentences]),
        )
