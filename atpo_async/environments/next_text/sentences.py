"""Cuts text into sentences.  Pure.

Rules and no model: a mark that ends a sentence, closing quotes, a blank, and then something that a sentence may begin
with; not after initials and common abbreviations.  A blank line ends a sentence too.
"""

from __future__ import annotations

import re

_WORDS = (
    "mr mrs ms dr prof sr jr st mt vs etc e.g i.e cf al fig eq no vol pp ca approx dept est inc ltd co gen col sen rep "
    "jan feb mar apr jun jul aug sep sept oct nov dec"
)
_ABBREVIATIONS = frozenset(_WORDS.split())
_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s+[\"'“‘(\[]*[^\W_a-z])|[。！？]+[」』”]*")
_LAST_WORD = re.compile(r"[^\s(\[\"'“‘]+$")


def sentences(text: str, *, min_chars: int = 1) -> list[str]:
    """The sentences of a text in order, runs of blanks collapsed.

    Args:
        text: any.
        min_chars: a shorter sentence is joined to the one after it, the last one to the one before.
    """
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        found += _of_paragraph(" ".join(paragraph.split()))
    return _joined(found, min_chars)


def _of_paragraph(text: str) -> list[str]:
    found, begin = [], 0
    for end in _END.finditer(text):
        if not _is_abbreviated(text[begin : end.start()], end.group()):
            found.append(text[begin : end.end()].strip())
            begin = end.end()
    return [sentence for sentence in (*found, text[begin:].strip()) if sentence]


def _is_abbreviated(before: str, mark: str) -> bool:
    word = _LAST_WORD.search(before)
    if mark != "." or word is None:
        return False
    last = word.group()
    return last.lower() in _ABBREVIATIONS or (len(last) == 1 and last.isupper() and last != "I")


def _joined(found: list[str], min_chars: int) -> list[str]:
    whole: list[str] = []
    short = ""
    for sentence in found:
        sentence = f"{short} {sentence}" if short else sentence
        short = sentence if len(sentence) < min_chars else ""
        if not short:
            whole.append(sentence)
    if short:
        whole[-1:] = [f"{whole[-1]} {short}"] if whole else [short]
    return whole
