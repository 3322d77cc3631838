"""Whole trees in one pass: where each token stands, what it sees, what is scored."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.wire.messages import BatchTree
from atpo_async.wire.records import TurnRecords
from learner.packing.rows import MicroBatch, micro_batches
from learner.packing.tree import attention_pairs, flops, lay_out, tree_micro_batches
from tests.learner_support import make_batch
from tests.tree_support import (
    FORESTS,
    VERSION,
    Sketch,
    forest,
    grow,
    rows_of,
    scored_in_passes,
    scored_in_rows,
    seen_from,
)

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "at2po_vectors.json").read_text())
REFERENCE = VECTORS["packing"]


def reference_tree() -> BatchTree:
    nodes = VECTORS["tree"]["nodes"][1:]
    assert [node["id"] for node in nodes] == list(range(1, 10))
    return grow("t", VECTORS["tree"]["prompt_len"], [Sketch(n["parent"], n["n_obs"], n["n_act"]) for n in nodes])


def pack(
    trees: list[BatchTree], *, max_tokens: int = 1000, pack_tokens: int | None = None, **kwargs: Any
) -> list[MicroBatch]:
    return tree_micro_batches(rows_of(trees, **kwargs), max_tokens=max_tokens, pack_tokens=pack_tokens, version=VERSION)


def filled(packed: MicroBatch) -> np.ndarray:
    """bool[B, T]: places that hold a token.  Padding stands at depth 0 and is seen by itself alone."""
    assert packed.layout is not None
    exits, depth = packed.layout.exit, packed.layout.position_ids
    alone = (exits == np.arange(1, exits.shape[1] + 1)) & (depth == 0)
    # Only what stands at the end of a row is padding.
    return np.logical_or.accumulate(~alone[:, ::-1], axis=1)[:, ::-1]


def test_a_whole_tree_is_laid_out_as_the_reference_has_it() -> None:
    laid = lay_out(rows_of([reference_tree()]))
    assert laid.position_ids.tolist() == REFERENCE["position_ids"]
    assert laid.exit.tolist() == REFERENCE["exit"]
    assert laid.predictor.tolist() == REFERENCE["pred_index"]
    assert [n if n < 0 else n + 1 for n in laid.turn.tolist()] == REFERENCE["node_of_token"]
    key = np.arange(len(laid.exit))
    for query, allowed in enumerate(REFERENCE["attention_rows_as_allowed_keys"]):
        assert np.flatnonzero((key <= query) & (query < laid.exit)).tolist() == allowed


def test_the_tokens_of_a_layout_are_those_of_the_rows() -> None:
    rows = rows_of([reference_tree()])
    laid = lay_out(rows)
    starts = REFERENCE["seg_start"]
    for start, stop, segment in zip(starts[:-1], starts[1:], REFERENCE["segments"], strict=True):
        assert stop - start == segment["length"]
    paths = {tuple(row.tokens.tolist()) for row in rows}
    ends = np.flatnonzero(laid.exit == np.arange(len(laid.exit)) + 1)
    key = np.arange(len(laid.exit))
    assert {tuple(laid.tokens[(key <= end) & (end < laid.exit)].tolist()) for end in ends} == paths


def test_tokens_and_pairs_are_counted_as_in_the_reference() -> None:
    rows = rows_of([reference_tree()])
    laid = lay_out(rows)
    assert len(laid.tokens) == REFERENCE["tokens_tree"]
    assert sum(len(row.tokens) for row in rows) == REFERENCE["tokens_flat"]
    assert len(laid.tokens) / sum(len(row.tokens) for row in rows) == pytest.approx(REFERENCE["token_ratio"])
    assert attention_pairs(laid.position_ids) == REFERENCE["attn_pairs_tree"]
    flat = sum(attention_pairs(np.arange(len(row.tokens))) for row in rows)
    assert flat == REFERENCE["attn_pairs_flat"]


@pytest.mark.parametrize(
    ("case", "prompt", "chains", "branches"),
    [
        ("default_M10_LK12", 300, 10, 12),
        ("M2_LK20", 300, 2, 20),
        ("long_prompt_4k", 4000, 10, 12),
        ("M2_LK20_long_prompt_4k", 4000, 2, 20),
    ],
)
def test_the_cost_model_gives_the_speed_ups_of_the_reference(
    case: str, prompt: int, chains: int, branches: int
) -> None:
    # A model of 4e9 parameters, 36 layers, 32 heads of 128; a branch leaves its chain half way; half a square of pairs.
    expected = REFERENCE["cost_model_example"][case]
    length = expected["seq"]
    half_way = (prompt + length) / 2

    def cost(tokens: float, pairs: float) -> float:
        return flops(tokens, pairs, parameters=4e9, layers=36, width=32 * 128)

    flat_tokens = (chains + branches) * length
    tree_tokens = prompt + chains * (length - prompt) + branches * (length - half_way)
    tree_pairs = prompt**2 + chains * (length**2 - prompt**2) + branches * (length**2 - half_way**2)
    assert (flat_tokens, tree_tokens) == (expected["flat_tokens"], expected["tree_tokens"])
    assert flat_tokens / tree_tokens == pytest.approx(expected["token_speedup"], rel=1e-9)
    flat_pairs = (chains + branches) * length**2
    assert cost(flat_tokens, flat_pairs / 2) / cost(tree_tokens, tree_pairs / 2) == pytest.approx(
        expected["flops_speedup"], rel=1e-9
    )


def test_every_scored_token_sees_what_stands_before_it_in_its_row() -> None:
    rows = rows_of([reference_tree()])
    packed = tree_micro_batches(rows, max_tokens=1000, pack_tokens=None, version=VERSION)
    assert scored_in_passes(packed) == scored_in_rows(rows)


def test_the_last_token_of_a_leaf_takes_no_place_and_is_predicted_all_the_same() -> None:
    (packed,) = pack([reference_tree()])
    assert packed.layout is not None
    assert packed.tokens.shape == (1, REFERENCE["tokens_tree"] - 6)
    assert packed.num_targets == sum(node["n_act"] for node in VECTORS["tree"]["nodes"])


def test_a_turn_that_rows_share_is_scored_once_and_occurs_in_each() -> None:
    (packed,) = pack([reference_tree()])
    assert packed.occurrence is not None
    count = Counter(packed.occurrence.tolist())
    assert set(count) == set(range(packed.num_targets))
    of_turn = {int(n): count[int(i)] for i, n in zip(packed.occurrence, packed.number, strict=True)}
    assert of_turn == {0: 3, 1: 1, 2: 2, 3: 1, 4: 2, 5: 1, 6: 1, 7: 1, 8: 1}


def test_siblings_are_predicted_from_the_observation_they_share() -> None:
    (packed,) = pack([grow("t", 3, [Sketch(0, 0, 2), Sketch(1, 3, 2), Sketch(1, 3, 4)])])
    assert packed.predictor.tolist() == [2, 3, 7, 8, 7, 9, 10, 11]


def test_siblings_with_other_observations_have_each_their_own() -> None:
    together = grow("t", 3, [Sketch(0, 0, 2), Sketch(1, 3, 2), Sketch(1, 3, 2), Sketch(1, 3, 2)])
    apart = grow("t", 3, [Sketch(0, 0, 2), Sketch(1, 3, 2), Sketch(1, 2, 2, own_observation=True), Sketch(1, 3, 2)])
    assert lay_out(rows_of([together])).position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 9, 8, 9]
    laid = lay_out(rows_of([apart]))
    # The third turn comes after the fourth: that one stands with the second, whose observation it shares.
    assert laid.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 9, 5, 6, 7, 8]
    assert laid.turn.tolist() == [-1, -1, -1, 0, 0, -1, -1, -1, 1, 1, 3, 3, -1, -1, 2, 2]
    rows = rows_of([apart])
    packed = tree_micro_batches(rows, max_tokens=1000, pack_tokens=None, version=VERSION)
    assert scored_in_passes(packed) == scored_in_rows(rows)


def test_an_observation_that_begins_as_anothers_is_not_shared() -> None:
    tree = grow("t", 2, [Sketch(0, 0, 1), Sketch(1, 2, 2), Sketch(1, 3, 2, own_observation=True)])
    longer = np.append(tree.turns[1].observation, np.int32(5))
    turns = (*tree.turns[:2], msgspec.structs.replace(tree.turns[2], observation=longer))
    (packed,) = pack([BatchTree(
        tree_id="t", task_index=0, prompt=tree.prompt, turns=TurnRecords.of(turns), failed_branches=0, probability=1.0,
        weight=1.0, uses=1,
    )])  # fmt: skip
    assert packed.layout is not None
    assert packed.layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5, 6]]


def test_turns_under_which_nothing_is_scored_are_left_out() -> None:
    sketches = [Sketch(0, 0, 3), Sketch(1, 2, 2, stale=True), Sketch(2, 1, 4, stale=True), Sketch(1, 2, 2)]
    (packed,) = pack([grow("t", 4, sketches)])
    # The stale branch is gone: prompt, first turn, observation, one token of the last turn.
    assert packed.tokens.shape == (1, 4 + 3 + 2 + 1)
    rows = rows_of([grow("t", 4, sketches)])
    assert scored_in_passes([packed]) == scored_in_rows(rows)
    assert len(set(packed.row.tolist())) == 2


def test_a_stale_turn_is_context_for_what_is_below_it() -> None:
    sketches = [Sketch(0, 0, 3, stale=True), Sketch(1, 2, 2)]
    (packed,) = pack([grow("t", 4, sketches)])
    assert packed.tokens.shape == (1, 4 + 3 + 2 + 1)
    assert packed.num_targets == 2
    assert len(seen_from(packed, int(packed.predictor[0]))) == 4 + 3 + 2


def test_a_tree_without_anything_to_score_makes_no_pass() -> None:
    assert pack([grow("t", 4, [Sketch(0, 0, 3, stale=True)])]) == []
    assert tree_micro_batches([], max_tokens=100, pack_tokens=None, version=VERSION) == []


def test_a_tree_over_the_budget_is_split_between_leaves_with_its_weights_unchanged() -> None:
    tree = grow("t", 6, [Sketch(0, 0, 3), *(Sketch(1, 2, 4) for _ in range(6))])
    rows = rows_of([tree])
    whole = tree_micro_batches(rows, max_tokens=1000, pack_tokens=None, version=VERSION)
    split = tree_micro_batches(rows, max_tokens=20, pack_tokens=None, version=VERSION)
    assert [p.tokens.shape for p in whole] == [(1, 6 + 3 + 2 + 6 * 3)]
    assert [p.tokens.shape for p in split] == [(1, 6 + 3 + 2 + 3 * 3)] * 2
    assert scored_in_passes(split) == scored_in_passes(whole) == scored_in_rows(rows)
    assert sum(float(p.weight.sum()) for p in split) == pytest.approx(sum(float(p.weight.sum()) for p in whole))
    # A turn of both halves counts once in what is reported.
    assert sum(int(p.counted.sum()) for p in split) == 3 + 6 * 4


def test_a_path_over_the_budget_goes_alone() -> None:
    long = grow("long", 40, [Sketch(0, 0, 3), Sketch(0, 0, 5)])
    short = grow("short", 4, [Sketch(0, 0, 3)])
    rows = rows_of([long, short])
    packed = tree_micro_batches(rows, max_tokens=16, pack_tokens=None, version=VERSION)
    assert sorted(p.tokens.shape for p in packed) == [(1, 6), (1, 42), (1, 44)]
    assert scored_in_passes(packed) == scored_in_rows(rows)


def test_trees_share_rows_up_to_pack_tokens_and_rows_share_a_pass_up_to_max_tokens() -> None:
    trees = [grow(f"t{i}", 5, [Sketch(0, 0, 2), Sketch(0, 0, 3 + i)], seed=i) for i in range(6)]
    sizes = [5 + 1 + 2 + i for i in range(6)]
    rows = rows_of(trees)
    packed = tree_micro_batches(rows, max_tokens=48, pack_tokens=24, version=VERSION)
    assert all(p.tokens.shape[1] <= 24 and p.tokens.size <= 48 for p in packed)
    assert sum(int(filled(p).sum()) for p in packed) == sum(sizes)
    # 13 + 11, 12 + 10 and 9 + 8 tokens: the largest first, each into the first row where it fits.
    assert [p.tokens.shape for p in packed] == [(2, 24), (1, 17)]
    assert scored_in_passes(packed) == scored_in_rows(rows)


def test_without_pack_tokens_a_pass_is_one_row_without_padding() -> None:
    trees = [grow(f"t{i}", 5, [Sketch(0, 0, 2), Sketch(0, 0, 3 + i)], seed=i) for i in range(6)]
    packed = pack(trees, max_tokens=48)
    assert all(len(p.tokens) == 1 and filled(p).all() for p in packed)
    assert len(packed) == 2


def test_packing_is_the_same_every_time() -> None:
    rows = rows_of(list(make_batch(num_trees=9, version=VERSION).trees))
    one, two = (tree_micro_batches(rows, max_tokens=128, pack_tokens=64, version=VERSION) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert a.layout is not None
        assert b.layout is not None
        for name in ("tokens", "predictor", "target", "occurrence", "mu", "weight", "turn", "row", "number"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
        assert np.array_equal(a.layout.exit, b.layout.exit)
        assert np.array_equal(a.layout.position_ids, b.layout.position_ids)


def test_adjacent_turns_without_observations_stay_two_turns() -> None:
    tree = grow("t", 3, [Sketch(0, 0, 2), Sketch(1, 0, 3), Sketch(1, 0, 1), Sketch(2, 0, 2)])
    rows = rows_of([tree])
    packed = tree_micro_batches(rows, max_tokens=100, pack_tokens=None, version=VERSION)
    assert scored_in_passes(packed) == scored_in_rows(rows)
    assert len(np.unique(packed[0].turn)) == 5


def test_a_first_token_with_nothing_before_it_is_refused() -> None:
    tree = grow("t", 0, [Sketch(0, 0, 2), Sketch(0, 0, 3)])
    with pytest.raises(ValueError, match="turn 0 of the batch has no token before its first: its prompt is empty"):
        pack([tree])


def test_rows_of_two_trees_are_no_tree() -> None:
    rows = rows_of(forest([(3, [Sketch(0, 0, 2)]), (3, [Sketch(0, 0, 2)])]))
    with pytest.raises(ValueError, match="rows of 2 trees"):
        lay_out(rows)


@settings(max_examples=150)
@given(FORESTS, st.sampled_from([12, 40, 300]), st.sampled_from([None, 8, 24, 100]))
def test_any_forest_is_packed_so_that_each_row_finds_its_tokens(
    sketches: list[tuple[int, list[Sketch]]], max_tokens: int, pack_tokens: int | None
) -> None:
    rows = rows_of(forest(sketches))
    packed = tree_micro_batches(rows, max_tokens=max_tokens, pack_tokens=pack_tokens, version=VERSION)
    assert scored_in_passes(packed) == scored_in_rows(rows)
    longest = max((len(row.tokens) for row in rows), default=0) - 1
    for one in packed:
        assert one.layout is not None
        assert one.tokens.size <= max(max_tokens, longest)
        if pack_tokens is not None:
            assert one.tokens.shape[1] <= max(pack_tokens, longest)
        # No place sees nothing, and padding sees itself.
        assert (one.layout.exit > np.arange(one.tokens.shape[1])).all()
        # What is laid out is looked at: every place is scored from, or seen by one that is.
        width = one.tokens.shape[1]
        used = np.zeros(one.tokens.size, dtype=bool)
        for place in one.predictor.tolist():
            row, query = divmod(place, width)
            key = np.arange(width)
            used[row * width + key[(key <= query) & (query < one.layout.exit[row])]] = True
        assert (used.reshape(one.tokens.shape) | ~filled(one)).all()


@settings(max_examples=50)
@given(FORESTS)
def test_what_belongs_to_the_loss_is_what_flat_rows_have(sketches: list[tuple[int, list[Sketch]]]) -> None:
    rows = rows_of(forest(sketches))
    flat = micro_batches(rows, max_tokens=100_000, version=VERSION)
    packed = tree_micro_batches(rows, max_tokens=100_000, pack_tokens=None, version=VERSION)
    assert len(flat) == len(packed) == (1 if rows else 0)
    for a, b in zip(flat, packed, strict=True):
        assert a.turn.max() == b.turn.max()
        assert a.row.max() == b.row.max()
        assert int(a.counted.sum()) == int(b.counted.sum()) == b.num_targets
        for name in ("mu", "weight", "advantage", "number", "lag"):
            assert sorted(getattr(a, name).tolist()) == sorted(getattr(b, name).tolist())
