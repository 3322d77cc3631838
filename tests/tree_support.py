"""Turn trees of any shape, and what a packed layout says about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

import atpo_async.wire.codec  # noqa: F401  TurnRecords.of encodes with it
from atpo_async.config import CreditConfig
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.tree import Turn, spans_of
from atpo_async.core.vocabulary import Aggregation
from atpo_async.wire.messages import BatchTree
from atpo_async.wire.records import TurnRecords
from learner.packing.credited import CreditedTree, Normaliser
from learner.packing.rows import MicroBatch, Row, leaf_rows
from tests.learner_support import VOCAB

VERSION = 9
MAX_LAG = 3


@dataclass(frozen=True)
class Sketch:
    """A turn to be: its parent is turn ``parent`` modulo the turns there are so far, 0 the prompt."""

    parent: int
    observation: int
    action: int
    own_observation: bool = False
    """Not its siblings'."""
    stale: bool = False


SKETCHES = st.lists(
    st.builds(
        Sketch,
        parent=st.integers(0, 30),
        observation=st.integers(0, 4),
        action=st.integers(1, 5),
        own_observation=st.booleans(),
        stale=st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=14,
)
FORESTS = st.lists(st.tuples(st.integers(1, 7), SKETCHES), min_size=1, max_size=4)


def grow(tree_id: str, prompt: int, sketches: Sequence[Sketch], *, seed: int = 0) -> BatchTree:
    """A tree with random tokens and unequal rewards.  Siblings have the observation of the first, or their own."""
    rng = np.random.default_rng(seed)
    parents = [s.parent % (i + 1) for i, s in enumerate(sketches)]
    shared: dict[int, np.ndarray] = {}
    turns = []
    for i, (sketch, parent) in enumerate(zip(sketches, parents, strict=True), start=1):
        fresh = rng.integers(0, VOCAB, sketch.observation).astype(np.int32)
        observation = fresh if sketch.own_observation else shared.setdefault(parent, fresh)
        newest = VERSION - (MAX_LAG + 1 if sketch.stale else 0)
        leaf = i not in parents
        turns.append(
            Turn(
                run="run", tree_id=tree_id, turn_id=i, parent_id=parent, lease_epoch=0, expansion_round=0,
                observation=observation, action=rng.integers(0, VOCAB, sketch.action).astype(np.int32),
                logprobs=-rng.uniform(0.5, 5.0, sketch.action).astype(np.float32),
                spans=spans_of(np.sort(rng.integers(newest - 2, newest + 1, sketch.action))),
                end="done" if leaf else "continue", reward=float(rng.normal()) if leaf else None, success=None,
                generate_s=0.0, environment_s=0.0,
            )
        )  # fmt: skip
    return BatchTree(
        tree_id=tree_id, task_index=0, prompt=rng.integers(0, VOCAB, prompt).astype(np.int32),
        turns=TurnRecords.of(turns), failed_branches=0, probability=0.1, weight=float(rng.uniform(0.3, 1.0)), uses=1,
    )  # fmt: skip


def forest(sketches: Sequence[tuple[int, Sequence[Sketch]]], *, seed: int = 0) -> list[BatchTree]:
    """A tree for each (length of the prompt, turns)."""
    return [grow(f"tree-{i}", prompt, turns, seed=seed + i) for i, (prompt, turns) in enumerate(sketches)]


def rows_of(trees: Sequence[BatchTree], *, aggregation: Aggregation = "seq-mean-token-mean") -> list[Row]:
    credited = [CreditedTree.of(tree, credit_rule(CreditConfig())) for tree in trees]
    return leaf_rows(
        credited, version=VERSION, max_lag=MAX_LAG, aggregation=aggregation, normaliser=Normaliser.of(credited),
        keep_idle=True,
    )  # fmt: skip


def seen_from(packed: MicroBatch, place: int) -> list[int]:
    """Tokens that a place of the flattened B * T sees, itself included; checks that their depths count from 0."""
    assert packed.layout is not None
    row, query = divmod(place, packed.tokens.shape[1])
    key = np.arange(packed.tokens.shape[1])
    seen = (key <= query) & (query < packed.layout.exit[row])
    assert packed.layout.position_ids[row][seen].tolist() == list(range(int(seen.sum())))
    return [int(token) for token in packed.tokens[row][seen]]


Scored = tuple[tuple[int, ...], int, float, float, float, int, int]
"""Of a token in a row: what stands before it, itself, mu, advantage, weight, turn of the batch, lag."""


def scored_in_rows(rows: Sequence[Row]) -> list[list[Scored]]:
    """Of each row with anything to score; in no particular order."""
    return sorted(
        [
            (
                tuple(row.tokens[:at].tolist()), int(row.tokens[at]), float(row.mu[i]), float(row.advantage[i]),
                float(row.weight[i]), int(row.turn[i]), VERSION - int(row.version[i]),
            )
            for i, at in enumerate(row.at.tolist())
        ]
        for row in rows
    )  # fmt: skip


def scored_in_passes(passes: Sequence[MicroBatch]) -> list[list[Scored]]:
    """The same of packed rows: what each scored token sees is read off the layout."""
    found: list[list[Scored]] = []
    for packed in passes:
        assert packed.occurrence is not None
        contexts = [tuple(seen_from(packed, place)) for place in packed.predictor.tolist()]
        rows: dict[int, list[Scored]] = {}
        for i, scored in enumerate(packed.occurrence.tolist()):
            rows.setdefault(int(packed.row[i]), []).append(
                (
                    contexts[scored], int(packed.target[scored]), float(packed.mu[i]), float(packed.advantage[i]),
                    float(packed.weight[i]), int(packed.number[i]), int(packed.lag[i]),
                )
            )  # fmt: skip
        found += rows.values()
    return sorted(found)
