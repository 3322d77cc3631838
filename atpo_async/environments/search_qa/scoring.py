r"""How an answer is judged: exact match and F1 on normalised texts, the form of the whole response, ``\boxed{}``.

Normalisation is SQuAD's: lower case; ASCII punctuation, a, an and the dropped; blanks squeezed.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from atpo_async.core.vocabulary import Split
from atpo_async.environments.search_qa.dialects import Dialect

BAD_FORMAT = -1.0
"""AT2PO's reward where the form is wrong (in training) or nothing is in the box."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ALL_OR_NOTHING = ("yes", "no", "noanswer")
"""Such an answer has no part that could be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of one response."""

    reward: float
    em: float
    """1 where the answer is one of the golden ones, else 0."""
    f1: float
    """Of the golden answer that fits best, 0 to 1."""
    fault: str = ""
    """What is wrong with the form of the response; empty where nothing is, or nothing is asked for."""
    answer: str | None = None
    """As the response has it; None where it has none."""


def normalised(text: str) -> str:
    """As two answers are compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golden: Sequence[str]) -> float:
    """1 where ``answer`` is one of ``golden``, normalised, else 0."""
    return float(normalised(answer) in {normalised(each) for each in golden})


def f1(answer: str, golden: Sequence[str]) -> float:
    """The largest F1 of words with one of ``golden``."""
    return max((_f1(normalised(answer), normalised(each)) for each in golden), default=0.0)


def _f1(answer: str, golden: str) -> float:
    if answer != golden and (answer in _ALL_OR_NOTHING or golden in _ALL_OR_NOTHING):
        return 0.0
    words, wanted = answer.split(), golden.split()
    same = (Counter(words) & Counter(wanted)).total()
    return 2 * same / (len(words) + len(wanted)) if same else 0.0


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{…}`` holds, braces balanced; of ``\boxed x``, what follows up to a ``$``.  None where
    there is neither, or the box is not closed."""
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    begin = text.rfind("\\boxed{")
    depth = 0
    for at in range(begin + len("\\boxed"), len(text)) if begin >= 0 else ():
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[begin + len("\\boxed{") : at]
    return None


def fault_of(response: str) -> str:
    """What is wrong with the form of a response in AT2PO's dialect, results included; empty where nothing is.

    Thoughts that are closed, one at least; one answer with a box; after every search, closed, a result, closed.
    """
    count = response.count
    if not count("<think>") or count("<think>") != count("</think>"):
        return f"{count('<think>')} <think> and {count('</think>')} </think>"
    if count("<answer>") != 1 or count("</answer>") != 1:
        return f"{count('<answer>')} <answer> and {count('</answer>')} </answer>"
    if (fault := _fault_of_searches(response)) or response.find("<answer>") > response.find("</answer>"):
        return fault or "</answer> before <answer>"
    answer = response.partition("<answer>")[2].partition("</answer>")[0]
    return "" if "\\boxed{" in answer and "}" in answer else "no \\boxed{} in the answer"


def _fault_of_searches(response: str) -> str:
    at = response.find("<search>")
    while at >= 0:
        end = response.find("</search>", at)
        result = response.find("<result>", at)
        result_end = response.find("</result>", max(result, 0))
        if -1 in (end, result, result_end) or not at < end < result < result_end:
            return "a <search> without its </search>, <result> and </result> in this order"
        at = response.find("<search>", result_end)
    return ""


def answer_of(response: str, dialect: Dialect) -> str | None:
    """The answer of a response; None where it has none.

    Of several, AT2PO's code takes the first, of which only the box counts; Search-R1's takes the last.
    """
    answers: list[str] = _ANSWER.findall(response)
    if not answers:
        return None
    return boxed(answers[0]) if dialect.boxed else answers[-1].strip()


def score(response: str, golden: Sequence[str], *, dialect: Dialect, split: Split, by: str = "em") -> Score:
    """Judge a whole response.

    Args:
        response: actions, and what was inserted between them.
        golden: answers, each of which is right.
        dialect: AT2PO gives -1 for a wrong form in training, and for an answer without a box in both splits.
        split: in evaluation the form is not looked at.
        by: ``em`` or ``f1``, what the reward is where the form is right.
    """
    fault = fault_of(response) if dialect.boxed and split == "train" else ""
    answer = answer_of(response, dialect)
    if answer is None:
        return Score(reward=BAD_FORMAT if dialect.boxed else 0.0, em=0.0, f1=0.0, fault=fault or "no answer")
    em, part = exact_match(answer, golden), f1(answer, golden)
    reward = em if by == "em" else part
    if fault:
        # A right answer in a wrong form counts for nothing, as published.
        return Score(reward=BAD_FORMAT, em=0.0, f1=0.0, fault=fault, answer=answer)
    return Score(reward=reward, em=em, f1=part, answer=answer)
