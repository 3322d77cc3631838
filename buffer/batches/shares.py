"""How a batch is split among the learner's ranks.  Pure."""

from __future__ import annotations

from collections.abc import Sequence


def split_by_tokens(tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Positions for each rank: longest first, each to the rank with the least so far; deterministic.

    Every rank gets at least one as long as there are enough.
    """
    loads = [0] * num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for position in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], len(shares[r]), r))
        shares[rank].append(position)
        loads[rank] += tokens[position]
    return [sorted(share) for share in shares]
