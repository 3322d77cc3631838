"""Trees of equal cost: what a branch is likely to cost, and strategies that keep within one number of tokens."""

from __future__ import annotations

import pytest

from actors.expansion.token_budget import affordable, costs
from atpo_async.core.tree import ROOT, TurnTree
from tests.actor_support import ints, leaf, turn
from tests.expansion_support import Uneven, content, search_of, settings

TREE = TurnTree(
    "t0", 0, ints(1), (turn(1, ROOT), leaf(2, 1, action=ints(1, 2, 3)), leaf(3, 1), leaf(4, ROOT), turn(5, 1))
)
"""Actions of 2 tokens each, of turn 2 three."""


def test_a_branch_costs_what_the_chains_through_its_turn_cost_from_there_on() -> None:
    assert costs(TREE) == {ROOT: pytest.approx((5 + 4 + 2) / 3), 1: 4.5, 2: 3.0, 3: 2.0, 4: 2.0}


def test_the_first_choice_that_is_too_dear_ends_the_round() -> None:
    assert affordable(TREE, (2, 1, 3), limit=18) == (2,)
    assert affordable(TREE, (2, 1, 3), limit=100) == (2, 1, 3)
    assert affordable(TREE, (3, 3, 3), limit=15) == (3, 3)
    assert affordable(TREE, (2,), limit=11) == ()
    assert affordable(TREE, (5,), limit=14) == (), "what leads to no end is taken for a whole chain"


@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": "chains"},
        {"strategy": "random"},
        {"strategy": "entropy"},
        {"strategy": "entropy-rise"},
        {"strategy": "diverse"},
        {"strategy": "entropy-rise", "expand": "online", "branch_prob": 0.9},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
async def test_trees_of_every_strategy_cost_about_the_same(fields: dict[str, object]) -> None:
    limit, used = 150, []
    for seed in range(6):
        config = settings(**fields, initial_rollouts=4, rounds=12, branches=4, tree_tokens=limit)
        tree = await search_of(config, environment=Uneven(turns=5), seed=seed).grow()
        used.append(sum(len(t.action) for t in tree))
        assert len(tree.leaves()) < config.max_leaves
    # Online a chain's cost is judged by those that end first, which are the short ones.
    slack = 60 if "expand" in fields else 15
    assert limit - 20 <= sum(used) / len(used) <= limit + slack
    assert max(used) <= limit + slack, "a chain has up to 15 tokens"


@pytest.mark.parametrize("expand", ["rounds", "online"])
async def test_a_tree_within_a_budget_is_taken_over(expand: str) -> None:
    config = settings(
        strategy="entropy-rise",
        expand=expand,
        initial_rollouts=3,
        rounds=4,
        branches=4,
        tree_tokens=90,
        branch_prob=0.3,
    )
    whole = await search_of(config).grow()
    for number in range(1, len(whole) + 1):
        resumed = await search_of(config, committed=whole.turns[:number]).grow()
        assert sum(len(t.action) for t in resumed) <= 90 + 45
        if expand == "rounds":
            assert content(resumed) == content(whole)
