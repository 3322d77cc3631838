"""The sum tree against a naive one; sampling and weights against the reference vectors; what leaves, and why."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.core.priorities import tree_priority
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.core.vocabulary import WeightsOver
from buffer.batches.shares import split_by_tokens
from buffer.pool.pool import ReplayPool
from buffer.pool.sum_tree import WHOLE_LEVEL, SumTree, stratified
from buffer.pool.weights import PRIORITY_FLOOR, annealed_beta, importance_weights, probabilities
from buffer.trees.index import MemoryStore, TreeEntry, entry_from_turns

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "at2po_vectors.json").read_text())["per"]
CASES = VECTORS["cases"].items()


def exponents(name: str) -> tuple[float, float]:
    alpha, beta = name.removeprefix("alpha").split("_beta")
    return float(alpha), float(beta)


def tree(tree_id: str, *versions: int, tokens: int = 2) -> TreeEntry:
    """One first turn per version, each a leaf."""
    turns = tuple(
        Turn(
            run="r", tree_id=tree_id, turn_id=i, parent_id=0, lease_epoch=0, expansion_round=0,
            observation=np.zeros(0, dtype=np.int32), action=np.zeros(tokens, dtype=np.int32),
            logprobs=np.zeros(tokens, dtype=np.float32), spans=(VersionSpan(version, 0, tokens),),
            end="done", reward=float(i % 2), success=None, generate_s=0.0, environment_s=0.0,
        )
        for i, version in enumerate(versions or (0,), start=1)
    )  # fmt: skip
    return entry_from_turns(tree_id, 0, np.zeros(1, dtype=np.int32), turns, MemoryStore())


def pool(**settings: Any) -> ReplayPool:
    return ReplayPool(**({"max_uses": 1, "max_lag": 8, "exponent": 0.6} | settings))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def ids(drawn: list[Any]) -> list[str]:
    return sorted(d.tree.tree_id for d in drawn)


# --- against the vectors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), CASES)
def test_probabilities_and_weights_are_those_of_the_reference(name: str, case: dict[str, Any]) -> None:
    alpha, beta = exponents(name)
    p = probabilities(np.array(VECTORS["raw_priority"]), exponent=alpha, floor=VECTORS["eps"])
    np.testing.assert_allclose(p, case["P"], rtol=1e-9)
    overs: dict[str, WeightsOver] = {"w_raw": "none", "w_over_max": "max", "w_over_mean_P": "mean"}
    for key, over in overs.items():
        w = importance_weights(p, num_trees=len(p), beta=beta, over=over)
        np.testing.assert_allclose(w, case[key], rtol=1e-9)
    drawn = case["stratified_idx"]
    batch = importance_weights(p[drawn], num_trees=len(p), beta=beta, over="max")
    np.testing.assert_allclose(batch, case["w_batch_max_norm"], rtol=1e-9)
    # Over the mean under P of all trees, not of those that happened to be drawn.
    batch = importance_weights(p[drawn], num_trees=len(p), beta=beta, over="mean", ready=p)
    np.testing.assert_allclose(batch, np.array(case["w_over_mean_P"])[drawn], rtol=1e-9)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_stratified_draws_are_those_of_the_reference(name: str, case: dict[str, Any]) -> None:
    p = probabilities(np.array(VECTORS["raw_priority"]), exponent=exponents(name)[0], floor=VECTORS["eps"])
    sums = SumTree(len(p))
    sums.set(np.arange(len(p)), p)
    assert stratified(sums, np.array(case["stratified_u"])).tolist() == case["stratified_idx"]


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize(("over", "key"), [("none", "w_raw"), ("mean", "w_over_mean_P"), ("max", "w_raw")])
def test_what_the_pool_draws_weighs_as_in_the_reference(
    name: str, case: dict[str, Any], over: WeightsOver, key: str
) -> None:
    alpha, beta = exponents(name)
    assert VECTORS["eps"] == PRIORITY_FLOOR
    replay = pool(max_uses=9, exponent=alpha, weights_over=over)
    names = [f"t{i}" for i in range(len(case["P"]))]
    for each in names:
        replay.add(tree(each), priority=1.0)
    replay.draw(len(names), rng=rng(), beta=beta)
    replay.confirm(names, dict(zip(names, VECTORS["raw_priority"], strict=True)))
    drawn = replay.draw(4, rng=rng(), beta=beta)
    where = [names.index(each.tree.tree_id) for each in drawn]
    expected = np.array(case[key])[where]
    if over == "max":
        expected /= expected.max()
    np.testing.assert_allclose([each.probability for each in drawn], np.array(case["P"])[where], rtol=1e-9)
    np.testing.assert_allclose([each.weight for each in drawn], expected, rtol=1e-9)


def test_over_the_mean_a_tree_drawn_by_priority_weighs_one_on_average() -> None:
    p = probabilities(np.array(VECTORS["raw_priority"]), exponent=0.6)
    weights = importance_weights(p, num_trees=len(p), beta=0.4, over="mean")
    assert np.sum(p * weights) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("over", ["max", "mean", "none"])
def test_an_empty_batch_has_no_weights(over: WeightsOver) -> None:
    assert len(importance_weights(np.zeros(0), num_trees=0, beta=0.4, over=over)) == 0


def test_every_number_of_the_reference_is_checked_here() -> None:
    assert set(VECTORS) == {"raw_priority", "eps", "cases", "r2d2_tree_priority"}
    checked = {"P", "w_raw", "w_over_max", "w_over_mean_P", "stratified_u", "stratified_idx", "w_batch_max_norm"}
    assert all(set(case) == checked for case in VECTORS["cases"].values())


def test_tree_priority_is_that_of_the_reference() -> None:
    case = VECTORS["r2d2_tree_priority"]
    found = tree_priority(-np.array(case["abs_adv"]), max_share=case["eta"])
    assert found == pytest.approx(case["priority"], abs=1e-9)
    assert tree_priority(np.zeros(0), max_share=0.9) == 0


def test_beta_goes_to_one_in_a_straight_line() -> None:
    assert [annealed_beta(s, start=0.4, num_steps=10) for s in (0, 5, 10, 20)] == pytest.approx([0.4, 0.7, 1.0, 1.0])


# --- the sum tree --------------------------------------------------------------------------------------------------

VALUES = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
WRITES = st.lists(st.dictionaries(st.integers(0, 60), VALUES, min_size=1, max_size=20), min_size=1, max_size=8)


@settings(max_examples=150)
@given(WRITES, st.lists(st.floats(0, 1, exclude_max=True), max_size=20))
def test_the_sum_tree_agrees_with_a_naive_one(writes: list[dict[int, float]], uniform: list[float]) -> None:
    sums, naive = SumTree(4), np.zeros(64)
    for write in writes:
        indices = np.array(list(write))
        sums.grow(int(indices.max()) + 1)
        sums.set(indices, np.array(list(write.values())))
        naive[indices] = list(write.values())
    np.testing.assert_array_equal(sums.values(), naive[: sums.capacity])
    assert sums.total == pytest.approx(naive.sum(), rel=1e-12)
    if sums.total == 0:
        return
    targets = np.array(uniform) * sums.total
    prefix = np.append(0.0, np.cumsum(naive))
    for target, index in zip(targets, sums.find(targets), strict=True):
        slack = 1e-9 * sums.total
        assert prefix[index] - slack <= target <= prefix[index + 1] + slack
        assert naive[index] > 0


def test_a_sum_tree_of_many_numbers_agrees_with_a_naive_one() -> None:
    """Large enough that of its lowest level only the groups that changed are summed."""
    generator, size = rng(), 10 * WHOLE_LEVEL
    sums, naive = SumTree(size), np.zeros(size)
    for count in (1, 2, 300, size, 300):
        # Neighbours too, so that a group is written more than once.
        indices = np.unique(np.append(generator.integers(0, size, count), np.arange(min(count, 5))))
        values = generator.random(len(indices)) * (generator.random(len(indices)) < 0.8)
        sums.set(generator.permutation(indices), np.zeros(len(indices)))
        sums.set(indices, values)
        naive[indices] = values
        assert sums.total == pytest.approx(naive.sum(), rel=1e-12)
        targets = np.sort(generator.random(200)) * sums.total
        expected = np.searchsorted(np.cumsum(naive), targets, side="right")
        np.testing.assert_array_equal(sums.find(targets), expected)


def test_a_target_at_the_very_end_does_not_fall_on_an_empty_place() -> None:
    sums = SumTree(8)
    sums.set(np.array([0, 1]), np.array([0.1, 0.2]))
    assert sums.find(np.array([sums.total, 10.0])).tolist() == [1, 1]


# --- sampling ------------------------------------------------------------------------------------------------------


def test_a_batch_never_holds_a_tree_twice() -> None:
    replay = pool(max_uses=5)
    for i in range(20):
        replay.add(tree(f"t{i}"), priority=1.0)
    drawn = replay.draw(15, rng=rng(), beta=0.4)
    assert len(set(ids(drawn))) == 15
    assert len(replay) == 5
    assert not set(ids(drawn)) & set(replay.ready_ids())


@pytest.mark.parametrize("by_name", [False, True])
def test_trees_with_the_learner_take_no_part_in_a_draw(by_name: bool) -> None:
    replay = pool()
    for i in range(4):
        replay.add(tree(f"out{i}"), priority=1.0)
    if by_name:
        replay.take([f"out{i}" for i in range(4)])
    else:
        replay.draw(4, rng=rng(), beta=0.4)
    for i in range(3):
        replay.add(tree(f"in{i}"), priority=1.0)
    drawn = replay.draw(2, rng=rng(), beta=0.4)
    assert {each.tree.tree_id[:2] for each in drawn} == {"in"}
    assert [each.probability for each in drawn] == pytest.approx([1 / 3] * 2)


def test_trees_are_drawn_in_proportion_to_priority_to_the_exponent() -> None:
    replay = pool(max_uses=10**6, exponent=1.0)
    for i in range(3):
        replay.add(tree(f"t{i}"), priority=1.0)
    replay.draw(3, rng=rng(), beta=0.0)
    replay.confirm(["t0", "t1", "t2"], {"t0": 0.09, "t1": 0.19, "t2": 0.69})
    counts: dict[str, int] = dict.fromkeys(["t0", "t1", "t2"], 0)
    generator = rng()
    for _ in range(1000):
        (one,) = replay.draw(1, rng=generator, beta=1.0)
        counts[one.tree.tree_id] += 1
        assert one.probability == pytest.approx({"t0": 0.1, "t1": 0.2, "t2": 0.7}[one.tree.tree_id])
        replay.give_back([one.tree.tree_id])
    assert counts["t0"] == pytest.approx(100, abs=40)
    assert counts["t1"] == pytest.approx(200, abs=50)


def test_when_all_ready_trees_are_taken_the_weights_are_one() -> None:
    replay = pool(max_uses=3)
    for i in range(4):
        replay.add(tree(f"t{i}"), priority=1.0)
    replay.draw(4, rng=rng(), beta=1.0)
    replay.confirm([f"t{i}" for i in range(4)], {"t0": 0.1, "t1": 5.0})
    drawn = replay.draw(8, rng=rng(), beta=1.0)
    assert [(d.probability, d.weight, d.uses) for d in drawn] == [(0.25, 1.0, 2)] * 4


def test_a_new_tree_enters_at_the_highest_priority_confirmed() -> None:
    replay = pool(max_uses=2, exponent=1.0, weights_over="none")
    replay.add(tree("old"), priority=0.5)
    replay.draw(1, rng=rng(), beta=0.4)
    replay.confirm(["old"], {"old": 3.0})
    replay.add(tree("new"), priority=0.2)
    (one,) = replay.draw(1, rng=rng(), beta=1.0)
    assert one.probability == pytest.approx(0.5)
    assert one.weight == pytest.approx(1.0)


def test_freshness_lowers_the_priority_with_the_lag() -> None:
    replay = pool(exponent=1.0, freshness=0.5)
    replay.add(tree("old", 0), priority=1.0)
    replay.add(tree("new", 2), priority=1.0)
    replay.advance(2)
    assert replay.mean_priority == pytest.approx((0.25 + 1.0) / 2)


def test_the_lag_of_a_tree_is_that_of_its_oldest_turn_that_is_trained_on() -> None:
    replay = pool(exponent=1.0, freshness=0.5, max_lag=2)
    replay.add(tree("t", 0, 1, 3), priority=1.0)
    found = {}
    for version in (1, 2, 3, 4, 5):
        replay.advance(version)
        found[version] = replay.mean_priority
    # At 3 the first turn, at 4 the second one is over max_lag and only context from then on.
    assert found == {1: 0.5, 2: 0.25, 3: 0.25, 4: 0.5, 5: 0.25}
    assert ids(replay.draw(1, rng=rng(), beta=0.4)) == ["t"]
    replay.confirm(["t"], {})
    replay.add(tree("later", 5), priority=1.0)
    assert replay.mean_priority == 1.0


@dataclass
class Plain:
    """A tree as the formula sees it."""

    versions: list[int]
    own: float
    uses: int = 0


def plain_probabilities(
    trees: list[Plain], *, version: int, max_lag: int, freshness: float, exponent: float, highest: float
) -> Any:
    """float64[N]: P as docs/ALGORITHM.md, section 4, has it."""
    found = []
    for each in trees:
        fresh = [v for v in each.versions if version - v <= max_lag]
        lag = max(version - (min(fresh) if fresh else max(each.versions)), 0)
        found.append((each.own if each.uses else highest) * freshness**lag)
    return probabilities(np.array(found), exponent=exponent)


@settings(max_examples=60)
@given(
    max_lag=st.integers(0, 5),
    freshness=st.sampled_from([0.5, 0.9, 0.999, 1.0]),
    exponent=st.sampled_from([0.6, 1.0, 2.0]),
    first=st.sampled_from([0, 10**6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_pool_draws_with_the_probabilities_of_the_plain_formula(
    max_lag: int, freshness: float, exponent: float, first: int, seed: int
) -> None:
    replay = pool(max_uses=4, max_lag=max_lag, freshness=freshness, exponent=exponent)
    generator, plain, version, highest = np.random.default_rng(seed), dict[str, Plain](), first, 1.0
    replay.advance(version)
    for i in range(40):
        name = f"t{generator.integers(0, i + 1)}"
        # Also ahead of the learner, and so old that only the newest turn is trained on.
        versions = version + generator.integers(-max_lag - 2, 2, generator.integers(1, 5))
        before, own = plain.get(name, Plain([], 0.0)), float(generator.random()) + 0.01
        replay.add(tree(name, *versions.tolist()), priority=own, uses=before.uses)
        plain[name] = Plain(versions.tolist(), own, before.uses)
        if generator.random() < 0.5:
            version += int(generator.integers(1, 3))
            replay.advance(version)
        plain = {name: plain[name] for name in replay.ready_ids()}
        if len(plain) < 2:
            continue
        expected = plain_probabilities(
            list(plain.values()), version=version, max_lag=max_lag, freshness=freshness, exponent=exponent,
            highest=highest,
        )  # fmt: skip
        expected = dict(zip(plain, expected, strict=True))
        drawn = replay.draw(int(generator.integers(1, len(plain))), rng=generator, beta=0.4)
        assert {each.tree.tree_id: each.probability for each in drawn} == pytest.approx(
            {each.tree.tree_id: expected[each.tree.tree_id] for each in drawn}, rel=1e-9
        )
        if generator.random() < 0.5:
            replay.give_back(ids(drawn))
            continue
        new = {name: float(generator.random() * 2) for name in ids(drawn)}
        replay.confirm(ids(drawn), new)
        highest = max(highest, *new.values())
        for name, priority in new.items():
            plain[name] = Plain(plain[name].versions, priority, plain[name].uses + 1)


def test_probabilities_are_those_of_the_formula_after_a_million_versions() -> None:
    """One tree and another that comes later are in the pool at any time."""
    replay = pool(max_uses=10**9, max_lag=2, freshness=0.9, exponent=1.0)
    aged = np.array([0.81, 0.9, 1.0]) + PRIORITY_FLOOR
    for version in (*range(20), *range(10**6 - 20, 10**6)):
        replay.advance(version)
        replay.add(tree(f"t{version}", version), priority=1.0)
        if len(replay) < 3:
            continue
        (one,) = replay.draw(1, rng=rng(), beta=0.4)
        assert one.probability == pytest.approx(aged[2 - (version - int(one.tree.tree_id[1:]))] / aged.sum(), rel=1e-12)
        replay.give_back([one.tree.tree_id])


def test_versions_between_draws_weigh_no_tree_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = pool(max_lag=10**6, freshness=0.999)
    for i in range(50):
        replay.add(tree(f"t{i}", 0), priority=1.0)
    written: list[int] = []
    put = SumTree.set

    def counted(self: SumTree, indices: Any, values: Any) -> None:
        written.append(len(indices))
        put(self, indices, values)

    monkeypatch.setattr(SumTree, "set", counted)
    for version in range(1, 1000):
        replay.advance(version)
    assert not written
    replay.give_back(ids(replay.draw(2, rng=rng(), beta=0.4)))
    assert written.count(50) == 1
    replay.give_back(ids(replay.draw(2, rng=rng(), beta=0.4)))
    assert written.count(50) == 1


def test_what_would_expire_unserved_is_served_first() -> None:
    replay = pool(max_lag=1)
    for i in range(4):
        replay.add(tree(f"old{i}", 0), priority=1.0)
    for i in range(4):
        replay.add(tree(f"new{i}", 1), priority=1.0)
    replay.advance(1)
    assert ids(replay.draw(4, rng=rng(), beta=0.4)) == [f"old{i}" for i in range(4)]


@settings(max_examples=60)
@given(st.integers(0, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_pool_that_holds_what_admission_allows_discards_nothing(max_lag: int, count: int, seed: int) -> None:
    """As many as fit until they expire, drawn a version at a time: not one is lost."""
    replay, generator = pool(max_lag=max_lag), np.random.default_rng(seed)
    added = 0
    for version in range(12):
        while len(replay) < count * (max_lag + 1):
            # The one after n others is served n // count versions from now: it may be that much older than fresh.
            replay.add(tree(f"t{added}", max(version + len(replay) // count - max_lag, 0)), priority=1.0)
            added += 1
        replay.advance(version)
        drawn = replay.draw(count, rng=generator, beta=0.4)
        assert len(drawn) == count
        replay.confirm(ids(drawn), {})
    assert replay.left["stale"] == 0


# --- what leaves ---------------------------------------------------------------------------------------------------


def test_a_tree_leaves_after_its_last_confirmed_use() -> None:
    replay = pool(max_uses=2)
    replay.add(tree("t"), priority=1.0)
    for uses in (1, 2):
        (one,) = replay.draw(4, rng=rng(), beta=0.4)
        assert one.uses == uses
        assert replay.num_returning == (1 if uses == 1 else 0)
        replay.confirm(["t"], {"t": 0.5})
    assert "t" not in replay
    assert (replay.left["used"], replay.nbytes) == (1, 0)


def test_an_unconfirmed_use_is_not_counted() -> None:
    replay = pool()
    replay.add(tree("t"), priority=1.0)
    replay.draw(1, rng=rng(), beta=0.4)
    replay.give_back(["t"])
    assert [d.uses for d in replay.draw(1, rng=rng(), beta=0.4)] == [1]


def test_confirming_twice_counts_once() -> None:
    replay = pool(max_uses=3)
    replay.add(tree("t"), priority=1.0)
    replay.draw(1, rng=rng(), beta=0.4)
    replay.confirm(["t", "unknown", "t"], {})
    replay.confirm(["t"], {})
    assert len(replay) == 1
    assert [d.uses for d in replay.draw(1, rng=rng(), beta=0.4)] == [2]


def test_a_tree_given_back_twice_is_there_once() -> None:
    replay = pool()
    replay.add(tree("t"), priority=1.0)
    replay.draw(1, rng=rng(), beta=0.4)
    replay.give_back(["t", "t", "unknown"])
    replay.give_back(["t"])
    assert (len(replay), replay.num_out, replay.is_out("t")) == (1, 0, False)


def test_a_tree_is_stale_only_when_all_its_turns_are() -> None:
    replay = pool(max_lag=2)
    replay.add(tree("mixed", 0, 3), priority=1.0)
    replay.add(tree("old", 0, 0), priority=1.0)
    assert not replay.advance(2)
    assert [gone.tree.tree_id for gone in replay.advance(3)] == ["old"]
    assert replay.ready_ids() == ["mixed"]
    assert replay.left["stale"] == 1


def test_bytes_push_out_the_oldest_ready_trees() -> None:
    replay = pool()
    size = tree("x").nbytes
    for name in ("a", "b", "c"):
        replay.add(tree(name), priority=1.0)
    assert replay.nbytes == 3 * size
    assert [gone.tree.tree_id for gone in replay.shrink(2 * size)] == ["a"]
    assert replay.ready_ids() == ["b", "c"]
    assert replay.left["bytes"] == 1


def test_a_later_state_of_a_tree_replaces_the_earlier_one() -> None:
    replay = pool()
    replay.add(tree("t", 0), priority=1.0)
    later = tree("t", 0, 1)
    replay.add(later, priority=1.0)
    assert (len(replay), replay.nbytes) == (1, later.nbytes)
    (one,) = replay.draw(1, rng=rng(), beta=0.4)
    assert len(one.tree) == 2
    replay.confirm(["t"], {})
    replay.add(tree("t", 0, 1, 1), priority=0.7, uses=1)
    assert replay.mean_priority == pytest.approx(0.7)
    assert [d.uses for d in replay.draw(1, rng=rng(), beta=0.4)] == [2]


def test_places_are_used_again_and_the_pool_grows() -> None:
    replay = pool()
    for i in range(100):
        replay.add(tree(f"t{i}"), priority=1.0)
    replay.confirm(ids(replay.draw(90, rng=rng(), beta=0.4)), {})
    for i in range(100, 180):
        replay.add(tree(f"t{i}"), priority=1.0)
    assert len(replay) == 90
    assert len(set(ids(replay.draw(90, rng=rng(), beta=0.4)))) == 90


def test_shares_are_split_by_tokens_longest_first() -> None:
    assert split_by_tokens([5, 9, 4, 1], 2) == [[1, 3], [0, 2]]
    assert split_by_tokens([7], 2) == [[0], []]
    assert split_by_tokens([1, 2, 3], 1) == [[0, 1, 2]]
