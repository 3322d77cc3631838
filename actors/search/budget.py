"""How many chains and branches a tree gets, and how its actions are sampled."""

from __future__ import annotations

from dataclasses import dataclass

from actors.engines.base import Sampling
from atpo_async.config import SearchConfig
from atpo_async.core.vocabulary import Split


@dataclass(frozen=True, slots=True)
class Budget:
    """How a tree of this kind is grown."""

    initial_rollouts: int
    rounds: int
    branches: int
    sampling: Sampling
    max_leaves: int
    """Of the whole tree."""


def budget_of(
    search: SearchConfig, *, kind: Split, stop_token_ids: tuple[int, ...], stop_strings: tuple[str, ...] = ()
) -> Budget:
    """Training trees as configured; evaluation is one greedy chain."""
    greedy = kind == "eval"
    sampling = Sampling(
        temperature=0.0 if greedy else search.temperature,
        top_p=1.0 if greedy else search.top_p,
        top_k=0 if greedy else search.top_k,
        max_tokens=search.max_action_tokens,
        stop_token_ids=stop_token_ids,
        stop_strings=stop_strings,
    )
    if greedy:
        return Budget(1, 0, 0, sampling, 1)
    return Budget(search.initial_rollouts, search.rounds, search.branches, sampling, search.max_leaves)
