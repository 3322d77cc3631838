"""The widths that rows of a forward pass are padded to, so that few shapes are compiled.  Pure.

A width that a kernel is compiled for should come again; every place of padding is computed in vain.
"""

from __future__ import annotations

from collections.abc import Callable

Width = Callable[[int], int]
"""Tokens of a pass's longest row -> tokens that its rows are padded to."""

ALIGNED = 64
BLOCK = 128
STEPS = 8
"""Widths between a power of two and the next: at most an eighth is padding, a sixteenth on average."""


def exact(tokens: int) -> int:
    """No padding: where nothing is compiled."""
    return tokens


def aligned(limit: int) -> Width:
    """Multiples of ``ALIGNED``, for code that is compiled once for any length.  None above ``limit`` for less."""
    return lambda tokens: _within(tokens, -(-tokens // ALIGNED) * ALIGNED, limit)


def few(limit: int) -> Width:
    """Multiples of ``BLOCK``, ``STEPS`` of them to a power of two, for code that is compiled for each.

    Args:
        limit: a pass's most tokens: what fits in is not padded beyond it.
    """

    def width(tokens: int) -> int:
        step = max(BLOCK, (1 << max(0, tokens - 1).bit_length()) // (2 * STEPS))
        return _within(tokens, -(-tokens // step) * step, limit)

    return width


def _within(tokens: int, padded: int, limit: int) -> int:
    return limit if tokens <= limit < padded else padded
