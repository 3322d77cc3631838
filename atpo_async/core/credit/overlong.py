"""Shaping of a chain's reward by its length: DAPO's soft overlong punishment (arXiv 2503.14476, equation 13).  Pure."""

from __future__ import annotations

import math


def overlong_range(buffer: float, tokens: int, context: int) -> tuple[int, int] | None:
    """(L, B) in action tokens of a path; None where its length costs a chain nothing.

    Args:
        buffer: B in tokens, below 1 as a share of L; 0: off.
        tokens: L; 0: ``context``.
        context: tokens that a path may have at most.
    """
    if not buffer:
        return None
    limit = tokens or context
    return limit, math.ceil(buffer * limit if buffer < 1 else buffer)


def overlong_penalty(num_tokens: int, *, limit: int, buffer: int, factor: float = 1.0) -> float:
    """What is added to the reward of a chain of ``num_tokens`` action tokens: 0 up to limit - buffer, from there on
    linearly down to -factor at the limit, and -factor beyond.

    Args:
        num_tokens: T, over all turns of the path.
        limit: L.
        buffer: B, 1 to L.
        factor: the penalty at and beyond the limit.
    """
    over = num_tokens - (limit - buffer)
    return -factor * min(max(over / buffer, 0.0), 1.0) if over > 0 else 0.0
