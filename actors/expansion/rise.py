"""Where entropy rose: the rule by which a turn gets siblings, and how a first chain divides a tree's leaves.  Pure.

Sources: ARPO (arXiv 2507.19849) and its released code; AEPO (arXiv 2510.14545) and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from actors.expansion.facts import Facts
from actors.expansion.growing_tree import Tree
from atpo_async.config import SearchConfig
from atpo_async.core.tree import Turn


def surprise(turn: Turn, *, tokens: int, vocab_size: int) -> float:
    """``sum over the first tokens of -log mu / log |V|``: a sum, not a mean.

    Its expectation is the entropy of the distribution that sampled them, which the publication takes from the ten most
    likely tokens.
    """
    return -float(np.sum(turn.logprobs[:tokens], dtype=np.float64)) / math.log(vocab_size)


def branches(draw: float, rise: float, *, prob: float, weight: float, penalty: float = 0.0, in_a_row: int = 0) -> bool:
    """Whether a draw from [0, 1) makes a branch.

    Without a penalty as in ARPO's code, ``clip(U - w * rise, 0, 1) <= p``; with one as in AEPO's,
    ``clip((U + w * rise) * max(0, 1 - penalty * l), 0, 1) >= 1 - p``.

    Args:
        draw: U.
        rise: in units of log |V|.
        prob, weight: p and w.
        penalty: for each of
        in_a_row: l, branches in a row on the way.
    """
    if penalty == 0.0:
        return min(1.0, max(0.0, draw - weight * rise)) <= prob
    return min(1.0, max(0.0, (draw + weight * rise) * max(0.0, 1.0 - penalty * in_a_row))) >= 1.0 - prob


def copies(tree: Tree, turn_id: int, settings: SearchConfig, facts: Facts) -> int:
    """Siblings that a turn gets by its rise: 0 for a first turn, up to ``search.max_copies``.

    With ``search.rise_of = "parent"`` rise and draws are the parent's, and only the turn that goes on the parent's own
    chain gets siblings: a chain is decided on once before each of its turns.
    """
    path = tree.path(turn_id)
    if len(path) < 2 or (settings.rise_of == "parent" and _is_branch(path, len(path) - 1)):
        return 0
    return _copies(tree, path, len(path) - 1, settings, facts)


def copies_after(tree: Tree, turn_id: int, settings: SearchConfig, facts: Facts) -> int:
    """With ``search.rise_of = "parent"``, what ``copies`` gives to the turn that will follow: known before it is."""
    path = tree.path(turn_id)
    return _copies(tree, path, len(path), settings, facts)


def _copies(tree: Tree, path: Sequence[Turn], at: int, settings: SearchConfig, facts: Facts) -> int:
    """Of the turn in place ``at`` of a path, which may be the next one."""
    in_a_row = 0
    if settings.branch_penalty:
        for above in range(1, at):
            branched = _is_branch(path, above) or _drawn(tree, path, above, in_a_row, settings, facts)
            in_a_row = in_a_row + 1 if branched else 0
    return _drawn(tree, path, at, in_a_row, settings, facts)


def _is_branch(path: Sequence[Turn], at: int) -> bool:
    return path[at].expansion_round != path[at - 1].expansion_round


def _drawn(tree: Tree, path: Sequence[Turn], at: int, in_a_row: int, settings: SearchConfig, facts: Facts) -> int:
    decides = path[at - (settings.rise_of == "parent")]
    tokens, vocab_size = settings.rise_tokens, facts.vocab_size
    rise = surprise(decides, tokens=tokens, vocab_size=vocab_size) - surprise(
        path[0], tokens=tokens, vocab_size=vocab_size
    )
    return sum(
        branches(
            draw, rise, prob=settings.branch_prob, weight=settings.entropy_weight, penalty=settings.branch_penalty,
            in_a_row=in_a_row,
        )
        for draw in facts.rng(tree, decides.turn_id).random(settings.max_copies).tolist()
    )  # fmt: skip


def chains_of(leaves: int, *, first: float, later: float, slope: float) -> int:
    """How many of a tree's leaves are chains from the prompt: ``clip(int(N * sigma(b * (first - later))) + 1, 1, N)``.

    Args:
        leaves: N.
        first: entropy of the first turn of the first chain.
        later: mean entropy of its later turns.
        slope: b.
    """
    share = 1.0 / (1.0 + math.exp(-min(700.0, max(-700.0, slope * (first - later)))))
    return max(1, min(leaves, int(leaves * share) + 1))


def chains_after(probe: Sequence[Turn], settings: SearchConfig, facts: Facts) -> int:
    """``chains_of`` by a first chain that has ended; a chain of one turn says nothing, as if entropies were equal."""
    found = [surprise(t, tokens=settings.rise_tokens, vocab_size=facts.vocab_size) for t in probe]
    later = sum(found[1:]) / len(found[1:]) if len(found) > 1 else found[0]
    return chains_of(settings.max_leaves, first=found[0], later=later, slope=settings.probe_budget)
