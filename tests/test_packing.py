"""Trees to rows to micro-batches: what counts, what is masked, and with which weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import atpo_async.wire.codec  # noqa: F401  TurnRecords.of encodes with it
from atpo_async.config import CreditConfig
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire.messages import BatchTree
from atpo_async.wire.records import TurnRecords
from learner.packing.credited import CreditedTree, Normaliser
from learner.packing.rows import MicroBatch, Row, idle_micro_batch, leaf_rows, micro_batches
from learner.packing.staleness import Staleness

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "at2po_vectors.json").read_text())


def turn(
    turn_id: int, parent: int, n_obs: int, n_act: int, reward: float | None, spans: list[tuple[int, int, int]]
) -> Turn:
    rng = np.random.default_rng(turn_id)
    return Turn(
        run="r", tree_id="t", turn_id=turn_id, parent_id=parent, lease_epoch=0, expansion_round=0,
        observation=rng.integers(1, 50, n_obs).astype(np.int32), action=rng.integers(1, 50, n_act).astype(np.int32),
        logprobs=-rng.random(n_act).astype(np.float32), spans=tuple(VersionSpan(*s) for s in spans),
        end="continue" if reward is None else "done", reward=reward, success=None, generate_s=0.0, environment_s=0.0,
    )  # fmt: skip


def reference_tree(*, versions: dict[int, int] | None = None, weight: float = 1.0) -> BatchTree:
    nodes = VECTORS["tree"]["nodes"][1:]
    turns = tuple(
        turn(
            n["id"],
            n["parent"],
            n["n_obs"],
            n["n_act"],
            n["reward"],
            [((versions or {}).get(n["id"], 5), 0, n["n_act"])],
        )
        for n in nodes
    )
    return BatchTree(
        tree_id="t", task_index=0, prompt=np.arange(1, 5, dtype=np.int32), turns=TurnRecords.of(turns),
        failed_branches=0, probability=1.0, weight=weight, uses=1,
    )  # fmt: skip


CREDIT = credit_rule(CreditConfig())


def rows_of(*sampled: BatchTree, max_lag: int = 8, aggregation: Any = "seq-mean-token-mean") -> list[Row]:
    trees = [CreditedTree.of(s, CREDIT) for s in sampled]
    return leaf_rows(trees, version=6, max_lag=max_lag, aggregation=aggregation, normaliser=Normaliser.of(trees))


@pytest.mark.parametrize(
    ("aggregation", "name"),
    [
        ("seq-mean-token-mean", "seq_mean_token_mean"),
        ("seq-mean-token-sum", "seq_mean_token_sum"),
        ("token-mean", "token_mean"),
        ("unique-token-mean", "unique_token_mean"),
        ("branch-prob", "branch_prob_token_mean"),
        ("branch-prob-token-sum", "branch_prob_token_sum"),
    ],
)
def test_row_weights_add_up_to_the_turn_weights_of_the_reference(aggregation: str, name: str) -> None:
    total: dict[int, float] = {}
    for row in rows_of(reference_tree(), aggregation=aggregation):
        for number in np.unique(row.turn).tolist():
            weight = row.weight[row.turn == number]
            assert np.all(weight == weight[0])
            total[number + 1] = total.get(number + 1, 0.0) + float(weight[0])
    assert total == pytest.approx({int(k): v for k, v in VECTORS["tree"]["node_weight"][name].items()}, abs=1e-9)


def test_a_row_is_a_leafs_path_with_the_credit_of_each_turn() -> None:
    sampled = reference_tree()
    rows = rows_of(sampled)
    assert [len(row.tokens) for row in rows] == [6, 12, 14, 17, 13, 12]
    row = rows[2]  # leaf 6, by way of turns 1 and 5
    by_id = {t.turn_id: t for t in sampled.turns}
    parts = [sampled.prompt]
    for i in (1, 5, 6):
        parts += [by_id[i].observation, by_id[i].action]
    assert row.tokens.tolist() == np.concatenate(parts).tolist()
    assert row.tokens[row.at].tolist() == np.concatenate([by_id[i].action for i in (1, 5, 6)]).tolist()
    value = VECTORS["tree"]["V"]["child_mean"]
    expected = np.repeat([value["1"], value["5"], value["6"]], [3, 2, 2])
    np.testing.assert_allclose(row.advantage, expected, atol=1e-9)


def test_a_stale_turn_is_masked_and_its_tree_stays() -> None:
    rows = rows_of(reference_tree(versions={1: 3}), max_lag=2)
    assert len(rows) == 6
    assert not any(0 in row.turn for row in rows)  # turn 1 is number 0
    assert [len(row.at) for row in rows] == [2, 3, 4, 7, 6, 5]
    # A masked turn stays in the mean: the weights of the others are what they were.
    assert [r.weight[0] for r in rows] == [r.weight[0] for r in rows_of(reference_tree())]


def test_rows_without_anything_to_learn_are_left_out() -> None:
    flat = reference_tree()
    equal = BatchTree(
        tree_id="e", task_index=0, prompt=flat.prompt, failed_branches=0, probability=1.0, weight=1.0, uses=1,
        turns=TurnRecords.of(turn(i, 0, 0, 2, 1.0, [(5, 0, 2)]) for i in (1, 2)),
    )  # fmt: skip
    assert rows_of(equal) == []
    assert len(rows_of(flat, equal)) == 6
    assert rows_of(flat, max_lag=0) == []


def test_rows_without_an_advantage_stay_where_the_loss_has_other_terms() -> None:
    equal = [CreditedTree.of(reference_tree(), CREDIT).recredited(np.ones(9), CREDIT)]
    equal[0].advantages[:] = 0
    rows = leaf_rows(
        equal, version=6, max_lag=8, aggregation="token-mean", normaliser=Normaliser.of(equal), keep_idle=True
    )
    assert len(rows) == 6
    assert not leaf_rows(
        equal, version=6, max_lag=0, aggregation="token-mean", normaliser=Normaliser.of(equal), keep_idle=True
    )


def test_a_rows_parts_say_where_each_turn_stands() -> None:
    row = rows_of(reference_tree(versions={1: 3}), max_lag=2)[3]  # leaf 7, by way of the stale turn 1 and turn 5
    assert row.parts.tolist() == [[0, 4, 4], [4, 7, 9], [6, 11, 12]]
    assert row.at.tolist() == [9, 10, 12, 13, 14, 15, 16]


def test_unfinished_chains_are_pruned() -> None:
    whole = reference_tree()
    cut = BatchTree(
        tree_id="t", task_index=0, prompt=whole.prompt, failed_branches=2, probability=1.0, weight=1.0, uses=1,
        turns=TurnRecords.of(t for t in whole.turns if t.turn_id not in (8, 9)),
    )  # fmt: skip
    assert len(rows_of(cut)) == 4
    assert CreditedTree.of(cut, CREDIT).num_leaves == 4


def test_the_tree_weight_multiplies_every_row() -> None:
    whole = np.concatenate([r.weight for r in rows_of(reference_tree())])
    np.testing.assert_allclose(np.concatenate([r.weight for r in rows_of(reference_tree(weight=0.25))]), 0.25 * whole)


@pytest.mark.parametrize("max_tokens", [16, 40, 1000])
def test_micro_batches_hold_every_row_within_the_token_budget(max_tokens: int) -> None:
    rows = rows_of(reference_tree(), reference_tree())
    packed = micro_batches(rows, max_tokens=max_tokens, version=6)
    assert sum(len(mb.tokens) for mb in packed) == 12
    assert all(mb.tokens.size <= max_tokens for mb in packed)
    found = sorted(tuple(group) for mb in packed for group in targets_by_row(mb))
    assert found == sorted(tuple(row.tokens[row.at].tolist()) for row in rows)


def targets_by_row(mb: MicroBatch) -> list[list[int]]:
    return [mb.target[mb.row == i].tolist() for i in range(len(mb.tokens))]


def test_the_place_before_predicts_the_token() -> None:
    (mb,) = micro_batches(rows_of(reference_tree()), max_tokens=1000, version=6)
    row, column = np.divmod(mb.predictor, mb.tokens.shape[1])
    assert (row == mb.row).all()
    inside = column + 1 < mb.tokens.shape[1]
    last_of_row = mb.tokens[row[inside], column[inside] + 1] == 0  # the row's last token takes no place
    assert (mb.tokens[row[inside], column[inside] + 1][~last_of_row] == mb.target[inside][~last_of_row]).all()


def test_a_shared_turn_counts_once_in_diagnostics_over_all_micro_batches() -> None:
    for max_tokens in (16, 1000):
        packed = micro_batches(rows_of(reference_tree()), max_tokens=max_tokens, version=6)
        assert sum(int(mb.counted.sum()) for mb in packed) == sum(n["n_act"] for n in VECTORS["tree"]["nodes"])


def test_turn_occurrences_are_told_apart_by_row() -> None:
    (mb,) = micro_batches(rows_of(reference_tree()), max_tokens=1000, version=6)
    assert (
        len(np.unique(mb.turn)) == len({(r, t) for r, t in zip(mb.row.tolist(), mb.turn.tolist(), strict=True)}) == 13
    )


def test_a_row_longer_than_the_budget_goes_alone() -> None:
    packed = micro_batches(rows_of(reference_tree()), max_tokens=5, version=6)
    assert [len(mb.tokens) for mb in packed] == [1] * 6


def test_an_idle_micro_batch_has_no_targets() -> None:
    assert idle_micro_batch().num_targets == 0


def test_staleness_is_counted_by_turn_and_adds_up_over_ranks() -> None:
    sampled = reference_tree(versions={1: 2, 2: 6})
    mixed = turn(4, 1, 2, 3, 1.0, [(4, 0, 1), (6, 1, 3)])
    sampled = BatchTree(
        tree_id="t", task_index=0, prompt=sampled.prompt, failed_branches=0, probability=1.0, weight=1.0, uses=1,
        turns=TurnRecords.of(mixed if t.turn_id == 4 else t for t in sampled.turns),
    )  # fmt: skip
    one = Staleness.of([CreditedTree.of(sampled, CREDIT)], version=6, max_lag=3)
    assert (one.by_lag.tolist(), one.stale, one.multi_version, one.stale_tokens) == ([1, 6, 1, 0], 1, 1, 3)
    both = Staleness.from_vector(one.to_vector() + one.to_vector()).metrics()
    assert both["lag/mean"] == pytest.approx(1.0)
    assert (both["lag/max"], both["lag/p95"]) == (2, 2)
    assert both["turns/multi_version_share"] == pytest.approx(1 / 8)
    assert both["turns/stale_share"] == pytest.approx(1 / 9)
    assert (both["lag/turns_0"], both["lag/turns_1"], both["lag/turns_2"]) == (2, 12, 2)
