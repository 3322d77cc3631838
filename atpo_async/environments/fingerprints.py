"""Fingerprints of turns: ids of what an action brought to light, made of numbers and texts.  Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from atpo_async.core.bounds import MAX_FINGERPRINT, MAX_SIZE


def fingerprint_of(found: Iterable[int | str]) -> tuple[int, ...]:
    """Ids of what was found, each once and at most ``MAX_FINGERPRINT`` of them, in the order given.

    A whole number within 0 to 2**63 - 1 is its own id, and so is a text of such a number's digits; of any other text it
    is 63 bits of its hash.
    """
    ids: dict[int, None] = {}
    for item in found:
        if len(ids) == MAX_FINGERPRINT:
            break
        ids[_id_of(item)] = None
    return tuple(ids)


def _id_of(item: int | str) -> int:
    text = str(item)
    if text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= MAX_SIZE:
        return int(text)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1
