"""Judges a prediction without a model: whether it is a prefix, word by word, of what the text really says.  Pure.

The publication (RLPT, arXiv 2509.19249) asks a generative model whether the prediction is a *semantic* prefix
(``url_judge``); this is the strict form of it, for text that follows from what stands before it, and for tests.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_MARKS = re.compile(r"[^\w\s]|_")


def words(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return _MARKS.sub("", text.lower()).split()


def is_long_enough(prediction: str, following: Sequence[str], *, min_words: int) -> bool:
    """Whether a prediction says enough to be judged: one word would often be right and says nothing.

    Args:
        prediction: what the policy wrote.
        following: sentences of the text, the target first.
        min_words: of a prediction that counts; a target with fewer has to be said in full.
    """
    said = words(prediction)
    return bool(said) and len(said) >= min(min_words, len(words(following[0])))


def is_prefix(prediction: str, following: Sequence[str], *, min_words: int = 3, min_f1: float | None = None) -> bool:
    """Whether ``prediction`` is so.

    Args:
        prediction: what the policy wrote.
        following: sentences of the text, the target first.
        min_words: of a prediction that counts; a target with fewer has to be said in full.
        min_f1: a prediction whose first words, as many as the target has, agree with the target's by at least this F1
            over words counts too; None: none does.
    """
    if not is_long_enough(prediction, following, min_words=min_words):
        return False
    said, true, target = words(prediction), words(" ".join(following)), words(following[0])
    if said == true[: len(said)]:
        return True
    return min_f1 is not None and f1(said[: len(target)], target) >= min_f1


def f1(said: Sequence[str], true: Sequence[str]) -> float:
    """Of words as often as they occur."""
    common = sum((Counter(said) & Counter(true)).values())
    return 2 * common / (len(said) + len(true)) if common else 0.0
