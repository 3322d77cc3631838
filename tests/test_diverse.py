"""Branches by what turns have found: the score of ``diverse``, and branches that are closed as duplicates."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from actors.expansion.expansion import Expansion
from actors.expansion.overlap import found_before, is_duplicate, mean_overlap, overlap
from actors.expansion.strategies.diverse import score
from atpo_async.config import CreditConfig
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.credit import TreeArrays, has_signal
from atpo_async.core.tree import ROOT, Turn, TurnTree
from atpo_async.environments.base import Split, StepResult
from buffer.trees.index import MemoryStore, entry_from_turns
from tests.actor_support import CountingEnvironment, CountingEpisode, ints, leaf, turn
from tests.expansion_support import ByContext, Uneven, content, search_of, settings, surprising
from tests.test_search import Sink

A, B, C = (1, 2, 3), (1, 2, 4), (7, 8, 9)


def tree_of(*turns: Turn) -> TurnTree:
    return TurnTree("t0", 0, ints(1), turns)


def chosen(tree: TurnTree, count: int, **fields: object) -> tuple[int, ...]:
    config = settings(strategy="diverse", **fields)
    return Expansion.of(config).choose(tree, count=count, rng=np.random.default_rng(0))


def test_overlap_is_the_jaccard_index_and_says_nothing_of_what_found_nothing() -> None:
    assert overlap(A, B) == 0.5
    assert overlap(A, A[::-1]) == 1.0
    assert overlap((), ()) == overlap(A, ()) == 0.0


def test_siblings_are_alike_as_the_mean_over_their_pairs() -> None:
    tree = tree_of(
        turn(1, ROOT, fingerprint=A), turn(2, ROOT, fingerprint=B), turn(3, ROOT, fingerprint=C), turn(4, ROOT)
    )
    assert mean_overlap(tree, (1, 2, 3, 4)) == pytest.approx(0.5 / 3)
    assert mean_overlap(tree, (1, 4)) == 0.0


def test_the_score_is_the_entropy_less_siblings_less_what_they_have_in_common() -> None:
    tree = tree_of(surprising(turn(1, ROOT), 1.6, fingerprint=A), turn(2, ROOT, fingerprint=B))
    config = settings(strategy="diverse", sibling_penalty=0.05, diversity_penalty=0.4)
    assert score(tree, 1, config) == pytest.approx(0.8 - 0.05 - 0.4 * 0.5)
    assert score(tree, ROOT, config) == pytest.approx(-0.05 - 0.4 * 0.5)


def test_another_try_goes_where_the_tries_so_far_found_different_things() -> None:
    same = (
        turn(1, ROOT, action=ints(5), fingerprint=C),
        turn(2, 1, fingerprint=A),
        turn(3, 1, fingerprint=B),
        leaf(4, 2),
    )
    other = (turn(5, ROOT), turn(6, 5, fingerprint=A), turn(7, 5, fingerprint=C), leaf(8, 6))
    tree = tree_of(*same, *other)
    assert chosen(tree, 2, sibling_penalty=0.0) == (1, 5)
    assert set(chosen(tree, 4, sibling_penalty=0.0)[2:]) == {6, 7}
    assert chosen(tree, 3, sibling_penalty=0.0, diversity_penalty=0.0) == (1, 2, 3)


def test_below_a_turn_that_found_what_an_earlier_sibling_had_there_is_no_branch() -> None:
    tree = tree_of(
        turn(1, ROOT, fingerprint=A), turn(2, 1), turn(3, ROOT, fingerprint=A), turn(4, 3), turn(5, 4), leaf(6, 5),
        leaf(7, 2),
    )  # fmt: skip
    assert is_duplicate(tree, tree[3], at=0.9)
    assert not is_duplicate(tree, tree[1], at=0.9), "of two that are alike the later one is the duplicate"
    assert sorted(set(chosen(tree, 20))) == [1, 2, 3]
    assert sorted(set(chosen(tree, 20, include_leaves=True))) == [1, 2, 3, 7]
    assert found_before(tree, ROOT, B, at=0.5)
    assert not found_before(tree, ROOT, B, at=0.51)


# --- pruning --------------------------------------------------------------------------------------------------------


class FindsTheSame(CountingEnvironment):
    """Three turns a chain; a first turn finds its own things, all others of one depth the same."""

    async def start(self, split: Split, task_index: int) -> CountingEpisode:
        self.started += 1
        return Same(self, task_index)


class Same(CountingEpisode):
    first = 0

    async def step(self, action: np.ndarray) -> StepResult:
        result = await super().step(action)
        self.first = self.first or int(action[1])
        return replace(result, fingerprint=(self.first,) if self._actions == 1 else (1000 + self._actions,))


PRUNING = {"initial_rollouts": 2, "rounds": 2, "branches": 3, "prune_duplicates": True}


async def test_a_branch_that_found_what_a_sibling_had_is_closed_at_once_and_is_no_failure() -> None:
    sink = Sink()
    ended: list[object] = []
    search = search_of(settings(strategy="random", **PRUNING), sink=sink, environment=FindsTheSame(turns=3))
    search._chain_ended = lambda place, fault: ended.append(fault)
    tree = await search.grow()
    pruned = [t for t in sink.turns if t.end == "pruned"]
    assert pruned
    for each in pruned:
        assert each.reward is None
        assert each.expansion_round > 0
        assert not tree.children(each.turn_id)
        assert any(s < each.turn_id and tree[s].fingerprint == each.fingerprint for s in tree.siblings(each.turn_id))
    assert search.growth.pruned == len(pruned)
    assert sink.closed.failures == {}
    assert (sink.closed.failed_branches, ended.count(None)) == (0, len(ended))
    assert len(tree.leaves()) == 2 + 6 - len(pruned)
    assert not any(t.end == "pruned" and t.expansion_round == 0 for t in tree), "first chains are not compared"


async def test_without_the_setting_nothing_is_closed() -> None:
    config = settings(strategy="random", **{**PRUNING, "prune_duplicates": False})
    tree = await search_of(config, environment=FindsTheSame(turns=3)).grow()
    assert len(tree.leaves()) == 8


async def test_pruned_branches_leave_the_tree_in_the_buffer_as_failed_ones_do() -> None:
    tree = await search_of(settings(strategy="random", **PRUNING), environment=FindsTheSame(turns=3)).grow()
    entry = entry_from_turns("t0", 0, tree.prompt, tree.turns, MemoryStore()).pruned()
    kept = {t.turn_id for t in tree.pruned()}
    assert set(entry.rows["turn_id"].tolist()) == kept
    assert not any(tree[turn_id].end == "pruned" for turn_id in kept)
    credited = credit_rule(CreditConfig()).credit(entry.arrays())
    assert len(credited.advantages) == len(kept)


def test_a_tree_that_has_lost_all_but_one_chain_has_no_signal() -> None:
    tree = tree_of(turn(1, ROOT), leaf(2, 1), turn(3, ROOT, end="pruned", fingerprint=A), turn(4, 1, end="pruned"))
    assert [t.turn_id for t in tree.pruned()] == [1, 2]
    assert not has_signal(TreeArrays.of(tree.pruned()))


@pytest.mark.parametrize("expand", ["rounds", "online"])
async def test_a_tree_with_pruned_branches_that_is_taken_over_does_not_go_on_with_them(expand: str) -> None:
    strategy = "entropy-rise" if expand == "online" else "random"
    config = settings(strategy=strategy, expand=expand, branch_prob=1.0, entropy_weight=0.0, **PRUNING)
    whole = await search_of(config, environment=FindsTheSame(turns=3)).grow()
    assert any(t.end == "pruned" for t in whole)
    for number in range(1, len(whole) + 1):
        resumed = await search_of(
            config, committed=whole.turns[:number], environment=FindsTheSame(turns=3),
            engine=ByContext(whole.turns[:number]),
        ).grow()  # fmt: skip
        pruned = {t.turn_id for t in resumed if t.end == "pruned"}
        assert not [t for t in resumed if t.parent_id in pruned]
        assert len(resumed.leaves()) + len(pruned) == config.max_leaves


async def test_diverse_grows_the_same_tree_when_it_is_taken_over() -> None:
    config = settings(strategy="diverse", initial_rollouts=3, rounds=2, branches=3)
    whole = await search_of(config, environment=Uneven(turns=4)).grow()
    for number in range(1, len(whole) + 1):
        resumed = await search_of(config, committed=whole.turns[:number], environment=Uneven(turns=4)).grow()
        assert len(resumed.leaves()) == config.max_leaves
        assert {t.turn_id for t in resumed if t.turn_id <= number} == set(range(1, number + 1))
    assert content(await search_of(config, committed=whole.turns, environment=Uneven(turns=4)).grow()) == content(whole)


def test_the_wire_takes_no_child_of_its_own_reward_on_a_pruned_turn() -> None:
    closed = msgspec.structs.replace(turn(2, 1, end="pruned"), success=True)
    from atpo_async.wire.rules import turn_faults

    assert [fault.fact for fault in turn_faults(closed)] == ["success is set on a turn that is no leaf"]
