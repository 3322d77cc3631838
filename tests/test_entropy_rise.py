"""ARPO and AEPO after the fact: where entropy rose, how likely a branch is, and what a round chooses."""

from __future__ import annotations

import itertools
import math

import msgspec
import numpy as np
import pytest

from actors.expansion.expansion import Expansion, ExpansionFailed
from actors.expansion.facts import Facts
from actors.expansion.rise import branches, chains_of, copies, surprise
from atpo_async.config import SearchConfig, build
from atpo_async.core.errors import ConfigError
from atpo_async.core.tree import ROOT, Turn, TurnTree
from tests.actor_support import ints, leaf, turn
from tests.expansion_support import VOCAB, content, search_of, settings, surprising

GRID = (np.arange(200_000) + 0.5) / 200_000


def tree_of(*turns: Turn) -> TurnTree:
    return TurnTree("t0", 0, ints(1, 2), turns)


def chosen(tree: TurnTree, config: SearchConfig, *, count: int = 8, round_number: int = 1) -> tuple[int, ...]:
    expansion = Expansion.of(config, policy_tokens=VOCAB)
    rng = np.random.default_rng(0)
    return expansion.choose(tree, count=count, rng=rng, facts=expansion.facts(5), round_number=round_number)


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((0.7, 0.3), (0.9, 0.1), 0.1354922), ((0.5, 0.3, 0.2), (0.6, 0.4), 0.2464860)],
)
def test_the_surprise_of_a_turn_is_on_average_its_entropy_in_units_of_the_vocabulary(
    first: tuple[float, ...], second: tuple[float, ...], expected: float
) -> None:
    found = 0.0
    for one, other in itertools.product(first, second):
        said = turn(1, ROOT, logprobs=np.log(np.array([one, other])))
        found += one * other * surprise(said, tokens=20, vocab_size=1000)
    assert found == pytest.approx(expected, abs=5e-8)


def test_only_the_first_tokens_of_a_turn_count() -> None:
    said = turn(1, ROOT, logprobs=np.array([-1.0, -2.0, -4.0]))
    assert surprise(said, tokens=2, vocab_size=1000) == pytest.approx(3.0 / math.log(1000))


@pytest.mark.parametrize(("rise", "likely", "at_055"), [(0.5, 0.60, True), (-0.3, 0.44, False), (3.0, 1.0, True)])
def test_a_branch_is_as_likely_as_arpo_has_it(rise: float, likely: float, at_055: bool) -> None:
    assert branches(0.55, rise, prob=0.5, weight=0.2) is at_055
    share = np.mean([branches(draw, rise, prob=0.5, weight=0.2) for draw in GRID[::20].tolist()])
    assert share == pytest.approx(likely, abs=1e-4)


@pytest.mark.parametrize(
    ("in_a_row", "likely", "q", "at_055"),
    [(0, 0.56, 0.61, True), (2, 0.5044444, 0.549, True), (4, 0.435, 0.488, False)],
)
def test_branches_in_a_row_make_another_one_less_likely_as_aepo_has_it(
    in_a_row: int, likely: float, q: float, at_055: bool
) -> None:
    for prob, made_by_q in ((1 - q + 1e-12, True), (1 - q - 1e-12, False)):
        assert branches(0.55, 0.3, prob=prob, weight=0.2, penalty=0.05, in_a_row=in_a_row) is made_by_q

    def made(draw: float) -> bool:
        return branches(draw, 0.3, prob=0.5, weight=0.2, penalty=0.05, in_a_row=in_a_row)

    assert made(0.55) is at_055
    # Of growing draws those from some point on make a branch: that point to seven digits.
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if made(middle) else (middle, high)
    assert 1.0 - high == pytest.approx(likely, abs=5e-8)


def test_a_penalty_that_leaves_nothing_makes_no_branch() -> None:
    assert not branches(0.999, 5.0, prob=0.5, weight=1.0, penalty=0.5, in_a_row=2)


@pytest.mark.parametrize(
    ("first", "later", "share", "chains"), [(1.2, 0.8, 0.5498340, 9), (0.8, 1.2, 0.4501660, 8), (1.0, 1.0, 0.5, 9)]
)
def test_a_first_chain_divides_the_leaves_as_aepo_has_it(first: float, later: float, share: float, chains: int) -> None:
    assert 1 / (1 + math.exp(-0.5 * (first - later))) == pytest.approx(share, abs=5e-8)
    assert chains_of(16, first=first, later=later, slope=0.5) == chains


@pytest.mark.parametrize(("first", "chains"), [(1e6, 16), (-1e6, 1)])
def test_a_tree_has_at_least_one_chain_and_at_most_its_leaves(first: float, chains: int) -> None:
    assert chains_of(16, first=first, later=0.0, slope=1.0) == chains


# --- what a round chooses -------------------------------------------------------------------------------------------

CHAIN = (turn(1, ROOT), turn(2, 1), leaf(3, 2))
SURE, HOT = {"branch_prob": 1.0, "entropy_weight": 0.0}, {"branch_prob": 0.0, "entropy_weight": 1e3}


def test_first_turns_are_no_candidates_leaves_are_and_the_rest_are_fresh_chains() -> None:
    assert chosen(tree_of(*CHAIN), settings(strategy="entropy-rise", **SURE), count=4) == (2, 3, ROOT, ROOT)
    no_leaves = settings(strategy="entropy-rise", include_leaves=False, **SURE)
    assert chosen(tree_of(*CHAIN), no_leaves, count=4) == (2, ROOT, ROOT, ROOT)
    assert chosen(tree_of(*CHAIN), settings(strategy="entropy-rise", max_copies=3, **SURE), count=5) == (2, 2, 2, 3, 3)


def test_entropy_that_rose_since_the_first_turn_makes_a_branch() -> None:
    tree = tree_of(surprising(CHAIN[0], 2.0), surprising(CHAIN[1], 1.0), surprising(CHAIN[2], 3.0))
    assert chosen(tree, settings(strategy="entropy-rise", **HOT), count=2) == (3, ROOT)
    of_parent = settings(strategy="entropy-rise", rise_of="parent", **HOT)
    assert chosen(tree, of_parent, count=2) == (ROOT, ROOT)
    tree = tree_of(surprising(CHAIN[0], 2.0), surprising(CHAIN[1], 3.0), surprising(CHAIN[2], 1.0))
    assert chosen(tree, of_parent, count=2) == (3, ROOT)


def test_each_turn_is_decided_on_once_in_the_round_after_its_own() -> None:
    tree = tree_of(*CHAIN, turn(4, 1, expansion_round=1), leaf(5, 4, expansion_round=1))
    config = settings(strategy="entropy-rise", **SURE)
    assert chosen(tree, config, count=6, round_number=2) == (4, 5, ROOT, ROOT, ROOT, ROOT)
    of_parent = settings(strategy="entropy-rise", rise_of="parent", **SURE)
    assert chosen(tree, of_parent, count=3, round_number=2) == (5, ROOT, ROOT), "4 is a branch: its chain had its coin"


def test_a_draw_belongs_to_its_turn_and_not_to_the_order_of_arrival() -> None:
    """The same chains with other numbers, and a sibling of the same words between."""
    config = settings(strategy="entropy-rise", branch_prob=0.5, entropy_weight=0.0, max_copies=8)
    words = [ints(7, n) for n in range(12)]
    first = tree_of(*(turn(n + 1, n, action=word) for n, word in enumerate(words)))
    other = tree_of(
        turn(1, ROOT, action=ints(3)), *(turn(n + 2, n + 1 if n else ROOT, action=word) for n, word in enumerate(words))
    )
    facts = Facts(seed=9, policy_tokens=VOCAB)
    ours = [copies(first, n + 1, config, facts) for n in range(12)]
    assert ours == [copies(other, n + 2, config, facts) for n in range(12)]
    assert len(set(ours)) > 2
    assert ours != [copies(first, n + 1, config, Facts(seed=10, policy_tokens=VOCAB)) for n in range(12)]
    twins = tree_of(turn(1, ROOT), turn(2, 1), turn(3, 1), turn(4, 1), turn(5, 1))
    assert len({facts.rng(twins, n).random() for n in (2, 3, 4, 5)}) == 4, (
        "siblings of the same words draw for themselves"
    )


def test_branches_in_a_row_are_counted_up_the_path() -> None:
    long = [turn(1, ROOT, action=ints(0)), *(turn(n, n - 1, action=ints(n)) for n in range(2, 30))]
    tree, facts = tree_of(*long), Facts(seed=1, policy_tokens=VOCAB)

    def made(penalty: float) -> list[int]:
        config = settings(
            strategy="entropy-rise", branch_prob=0.9, entropy_weight=0.0, branch_penalty=penalty
        )  # fmt: skip
        return [copies(tree, n, config, facts) for n in range(2, 30)]

    assert sum(made(0.9)) < sum(made(1e-9))
    assert (1, 1, 1) not in set(zip(made(1.0), made(1.0)[1:], made(1.0)[2:], strict=False))
    for above, below in itertools.pairwise(made(1.0)):
        assert not (above and below), "after one branch the whole draw is taken away"


def test_without_the_size_of_the_vocabulary_the_strategy_says_so() -> None:
    expansion = Expansion.of(settings(strategy="entropy-rise"))
    with pytest.raises(
        ExpansionFailed, match=r"vocabulary is None; expected 2 or more, as vocab_size in the config\.json"
    ):
        expansion.choose(tree_of(*CHAIN), count=1, rng=np.random.default_rng(0))


# --- through the search ---------------------------------------------------------------------------------------------


async def test_one_round_after_the_fact_reproduces_one_pass_and_branches_at_leaves_too() -> None:
    config = settings(strategy="entropy-rise", initial_rollouts=4, rounds=1, branches=16, **SURE)
    tree = await search_of(config).grow()
    assert len(tree.leaves()) == 20
    grown = [
        t for t in tree if t.expansion_round == 1 and (t.parent_id == ROOT or tree[t.parent_id].expansion_round == 0)
    ]
    assert len(grown) == 16
    beside_leaves = [t for t in grown if t.parent_id and all(tree[s].is_leaf for s in tree.siblings(t.turn_id))]
    assert beside_leaves


@pytest.mark.parametrize("rise_of", ["turn", "parent"])
async def test_a_tree_taken_over_at_any_turn_comes_out_the_same(rise_of: str) -> None:
    config = settings(
        strategy="entropy-rise", initial_rollouts=3, rounds=2, branches=4, rise_of=rise_of, branch_penalty=0.05
    )
    whole = await search_of(config).grow()
    for number in range(1, len(whole) + 1):
        resumed = await search_of(config, committed=whole.turns[:number]).grow()
        assert content(resumed) == content(whole), number


async def test_a_first_chain_decides_how_many_there_are_and_the_rounds_share_the_rest() -> None:
    config = settings(strategy="entropy-rise", initial_rollouts=4, rounds=3, branches=4, probe_budget=30.0)
    seen = set()
    for seed in range(4):
        whole = await search_of(config, seed=seed).grow()
        chains = sum(t.parent_id == ROOT and t.expansion_round == 0 for t in whole)
        per_round = [sum(t.is_leaf and t.expansion_round == r for t in whole) for r in range(1, 4)]
        assert chains + sum(per_round) == config.max_leaves
        assert max(per_round) - min(per_round) <= 1
        first = whole.path(next(t.turn_id for t in whole if t.is_leaf))
        hot = [surprise(t, tokens=20, vocab_size=VOCAB) for t in first]
        later = sum(hot[1:]) / len(hot[1:]) if len(hot) > 1 else hot[0]
        assert chains == chains_of(16, first=hot[0], later=later, slope=30.0)
        seen.add(chains)
        for number in range(1, len(whole) + 1, 3):
            assert content(await search_of(config, committed=whole.turns[:number], seed=seed).grow()) == content(whole)
    assert seen != {4}


async def test_an_evaluation_is_one_chain_whatever_the_probe_would_say() -> None:
    config = settings(strategy="entropy-rise", probe_budget=0.5)
    assert len((await search_of(config, kind="eval").grow()).leaves()) == 1


# --- the configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "said"),
    [
        (
            {"strategy": "entropy", "expand": "online"},
            "search.expand = 'online' with search.strategy = 'entropy', which",
        ),
        ({"strategy": "none", "probe_budget": 0.5}, "search.probe_budget = 0.5 with search.strategy = 'none': it"),
        ({"strategy": "resample", "expand": "online"}, "search.strategy = 'resample'"),
        ({"branch_prob": 1.5}, "search.branch_prob must be <= 1, got 1.5"),
        ({"rise_tokens": 0}, "search.rise_tokens must be >= 1, got 0"),
        ({"duplicate_at": 0.0}, "search.duplicate_at must be > 0, got 0"),
        ({"rise_of": "leaf"}, "search.rise_of"),
    ],
)
def test_settings_that_contradict_are_refused_with_the_way_out(search: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build({"search": search})
    assert said in str(refused.value)
    build({"search": {"strategy": "mine:rule", "expand": "online"}})


def test_pruned_turns_are_no_candidates() -> None:
    closed = msgspec.structs.replace(CHAIN[1], end="pruned")
    assert chosen(tree_of(CHAIN[0], closed), settings(strategy="entropy-rise", **SURE), count=1) == (ROOT,)
    assert chosen(tree_of(CHAIN[0], closed), settings(strategy="entropy", include_leaves=True), count=2) == (1, 1)
