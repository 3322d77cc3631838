"""The store of leaves worth imitating: which are kept, what they are worth, what is served, and that no crash loses or
repeats any of it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.config import Config, build
from atpo_async.core.errors import ConfigError
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from buffer.imitation.moments import BLOCK, GroupMoments
from buffer.journal import entries
from buffer.state import BufferState
from tests.buffer_support import Disk
from tests.test_buffer_restore import Life
from tests.test_buffer_restore import snapshot as snapshot_of

ON: dict[str, Any] = {"rows": 6, "max_lag": 30, "per_batch": 2, "bytes_share": 0.5}


# --- what a leaf is worth ---------------------------------------------------------------------------------------


def test_a_leaf_is_worth_what_it_earned_above_the_median_of_the_means() -> None:
    moments = GroupMoments(10240)
    for mean, std in zip((0.2, 0.4, 0.5, 0.6, 0.9), (0.3, 0.4, 0.5, 0.4, 0.4), strict=True):
        moments.add("", (mean, std))
    baseline = moments.baseline("")
    assert baseline is not None
    assert (baseline.mean, baseline.std) == (0.5, 0.4)
    worth = [baseline.advantage(reward, normalise=False) for reward in (1.0, 0.3, 0.5)]
    assert worth == pytest.approx([0.5, -0.2, 0.0], abs=1e-15)
    assert baseline.advantage(1.0, normalise=True) == pytest.approx(1.2499969, abs=5e-8)
    assert moments.baseline("another environment") is None


@settings(max_examples=30)
@given(st.integers(1, 3 * BLOCK), st.integers(0, 6 * BLOCK), st.integers(0, 2**32 - 1))
def test_the_medians_are_those_of_the_last_trees_whenever_the_buffer_starts_again(
    history: int, count: int, seed: int
) -> None:
    rng = random.Random(seed)
    moments, written, found = GroupMoments(history), dict[tuple[str, int], list[tuple[float, float]]](), []
    for _ in range(count):
        found.append((rng.random(), rng.random()))
        moments.add("a", found[-1])
        if rng.random() < 0.1:
            for key, numbers in moments.drain_changes().items():
                if numbers is None:
                    del written[key]
                else:
                    written[key] = list(numbers)
            moments = GroupMoments(history)
            moments.restore(written)
            assert len(written) <= history // BLOCK + 2
    if count:
        expected = np.median(np.array(found[-history:]), axis=0).tolist()
        assert moments.baseline("a") == pytest.approx(tuple(expected))


# --- one buffer, by hand ----------------------------------------------------------------------------------------


class Run:
    """A buffer that is told of whole trees, and its learner."""

    def __init__(self, *, trees: int = 1, imitation: dict[str, Any] = ON, **sections: dict[str, Any]) -> None:
        self.config = config_of(trees=trees, imitation=imitation, **sections)
        self.disk = Disk()
        self.state = self.disk.open(self.config)
        self.step = 0
        self.version = 1
        self.publish()

    def publish(self) -> None:
        message = m.VersionPublished(run="r", version=self.version, weights_endpoint="w", announce_endpoint="n")
        self.state.publish(message)

    def grow(self, rewards: list[float], *, shared: bool = True) -> str:
        """A tree whose chains share a first turn and end with these rewards."""
        (lease,) = self.state.lease("a", 1, 0.0).leases
        messages: list[Any] = [
            m.TreeOpened(run="r", tree_id=lease.tree_id, lease_epoch=lease.epoch, prompt=np.array([1, 2], np.int32)),
            turn(lease, 1, 0, None, version=self.version),
            *(
                turn(lease, 2 + i, 1 if shared or i else 0, reward, version=self.version)
                for i, reward in enumerate(rewards)
            ),
            m.TreeClosed(
                run="r", tree_id=lease.tree_id, lease_epoch=lease.epoch, num_turns=1 + len(rewards), failed_branches=0,
                failures={},
            ),
        ]  # fmt: skip
        for message in messages:
            self.state.take(message, 0.0)
        self.disk.commit()
        return lease.tree_id

    def sample(self, *, rank: int = 0, num_ranks: int = 1) -> m.Batch:
        request = m.SampleRequest(
            run="r", rank=rank, num_ranks=num_ranks, step=self.step, version=self.version,
            num_trees=self.config.staleness.trees_per_batch, wait_s=0.0,
        )  # fmt: skip
        batch = self.state.sample(request, 0.0)
        self.disk.commit()
        assert isinstance(batch, m.Batch), self.state.waiting_for(request, 0.0)
        return batch

    def train(self) -> m.Batch:
        batch = self.sample()
        self.step, self.version = self.step + 1, self.version + 1
        self.publish()
        self.state.trained(
            m.Trained(
                run="r", batch_id=batch.batch_id, version=self.version,
                priorities=dict.fromkeys((tree.tree_id for tree in batch.trees), 1.0),
            )
        )  # fmt: skip
        self.disk.commit()
        return batch

    def save(self) -> None:
        self.state.checkpointed(m.Checkpointed(run="r", step=self.step, version=self.version))
        self.disk.commit()

    def start_again(self) -> None:
        self.state = self.disk.open(self.config)

    @property
    def rows(self) -> list[tuple[str, int]]:
        return [tuple(row.key) for row in self.state.trees.registry.imitation.ready()]  # type: ignore[misc]


def config_of(*, trees: int = 1, imitation: dict[str, Any] = ON, **sections: dict[str, Any]) -> Config:
    data: dict[str, dict[str, Any]] = {
        "staleness": {"trees_per_batch": trees, "max_lag": 4},
        "search": {"initial_rollouts": 4, "rounds": 0},
        "imitation": imitation,
    }
    return build({name: {**data.get(name, {}), **sections.get(name, {})} for name in {*data, *sections}})


def turn(lease: m.Lease, number: int, parent: int, reward: float | None, *, version: int) -> Turn:
    return Turn(
        run="r", tree_id=lease.tree_id, turn_id=number, parent_id=parent, lease_epoch=lease.epoch, expansion_round=0,
        observation=np.zeros(0, np.int32), action=np.full(3, lease.task_index, np.int32),
        logprobs=np.full(3, -0.5, np.float32), spans=(VersionSpan(version, 0, 3),),
        end="continue" if reward is None else "done", reward=reward, success=None, generate_s=0.0, environment_s=0.0,
    )  # fmt: skip


def test_leaves_above_their_trees_mean_are_kept_past_the_tree_with_the_turns_on_their_paths_only() -> None:
    run = Run()
    tree = run.grow([1.0, 0.0, 0.5, 0.0])
    assert run.rows == [(tree, 2), (tree, 4)]
    before = run.state.nbytes
    assert run.train().rows == ()  # beside its own tree a leaf is not imitated
    run.save()
    assert run.rows == [(tree, 2), (tree, 4)]
    # Of four leaves two are left, with the prompt and the turn before them: nothing else is held.
    assert 0 < run.state.trees.registry.imitation.nbytes == run.state.nbytes == run.disk.nbytes < before
    kept = run.state.trees.registry.imitation.find(tree)
    assert kept is not None
    assert kept.rows["turn_id"].tolist() == [1, 2, 4]
    run.grow([1.0, 0.0])
    batch = run.sample()
    assert {(row.tree_id, row.leaf) for row in batch.rows} == {(tree, 2), (tree, 4)}
    best = next(row for row in batch.rows if row.leaf == 2)
    assert [t.turn_id for t in best.turns] == [1, 2]
    assert best.prompt.tolist() == [1, 2]
    assert (batch.num_rows, batch.num_row_tokens, best.uses) == (2, 12, 1)


def test_what_it_earned_is_judged_by_the_medians_of_when_it_is_served() -> None:
    run = Run(credit={"normalise_leaves": False})
    run.grow([0.6, 0.0])
    run.train()
    for _ in range(4):
        run.grow([1.0, 0.8])
    batch = run.sample()
    # The medians: 0.9 of 0.3 and four times 0.9.  What once was good is below it now, what came since is not.
    assert [row.advantage for row in batch.rows] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("credit", [{}, {"normalise_leaves": False, "whiten_advantages": True}], ids=["tree", "batch"])
def test_a_run_that_normalises_divides_by_the_median_deviation(credit: dict[str, Any]) -> None:
    run = Run(credit=credit)
    run.grow([1.0, 0.0])
    run.train()
    run.grow([1.0, 0.0, 0.0, 0.0])
    mean, std = np.median([[0.5, 0.5], [0.25, np.sqrt(3) / 4]], axis=0)
    assert [row.advantage for row in run.sample().rows] == pytest.approx([(1.0 - mean) / (std + 1e-6)])


def test_a_row_is_used_up_after_its_uses_and_comes_back_where_the_learner_loses_them() -> None:
    run = Run(imitation={**ON, "rows": 20, "per_batch": 8, "max_uses": 2})
    tree = run.grow([1.0, 0.0])
    run.train()
    run.save()
    uses = []
    for _ in range(3):
        run.grow([1.0, 0.0])
        uses.append([row.uses for row in run.train().rows if row.tree_id == tree])
    assert uses == [[1], [2], []]
    run.start_again()
    run.step, run.version = 2, run.version + 1  # the learner falls back behind the second use
    (again,) = (row for row in run.sample().rows if row.tree_id == tree)
    assert again.uses == 2
    # Once a checkpoint covers its last use it is gone, and its turns with it.
    run.train()
    run.save()
    assert tree not in {tree_id for tree_id, _ in run.rows}
    assert run.state.trees.registry.find(tree) is None
    assert run.state.nbytes == run.disk.nbytes


def test_a_batch_that_is_asked_for_again_has_the_same_rows_though_the_buffer_started_again() -> None:
    run = Run(imitation={**ON, "rows": 20, "per_batch": 3, "max_uses": 9})
    for _ in range(4):
        run.grow([1.0, 0.0, 0.0])
        run.train()
    run.grow([1.0, 0.0])
    first = run.sample(num_ranks=2)
    run.grow([1.0, 1.0, 0.0])  # moves the medians
    run.start_again()
    shares = [run.sample(rank=rank, num_ranks=2) for rank in (0, 1)]
    assert shares[0].num_rows == shares[1].num_rows == first.num_rows == 3
    assert sum(len(share.rows) for share in shares) == 3
    assert [(r.tree_id, r.leaf, r.advantage) for r in shares[0].rows] == [
        (r.tree_id, r.leaf, r.advantage) for r in first.rows
    ]
    assert all(len(share.rows) for share in shares)  # shared out by tokens, as trees are


def test_rows_leave_by_age_by_number_and_by_bytes_the_oldest_first() -> None:
    run = Run(imitation={**ON, "max_lag": 3, "rows": 3, "per_batch": 1})
    trees = [run.grow([1.0, 0.0]) for _ in range(4)]
    assert run.rows == [(tree, 2) for tree in trees[1:]]
    metrics = run.train().metrics
    assert (metrics["imitation/kept"], metrics["imitation/entered"], metrics["imitation/left_rows"]) == (3, 4, 1)
    run.version += 4
    run.publish()
    run.disk.commit()
    # One of them was served, and is held for a learner that may fall back; it is too old as well.
    assert run.rows == []
    assert len(run.state.trees.registry.imitation) == 0
    small = Run(imitation={**ON, "rows": 5000}, buffer={"max_bytes": 1 << 20})
    small.state.trees.imitation._max_bytes = 600
    for _ in range(8):
        small.grow([1.0, 0.0])
        small.train()
        small.save()
    assert 0 < small.state.trees.registry.imitation.nbytes <= 600 + 300
    assert small.state.trees.registry.imitation.left["bytes"] > 0
    assert small.state.nbytes == small.disk.nbytes


def test_rows_make_way_for_trees() -> None:
    run = Run(imitation={**ON, "rows": 500, "per_batch": 1}, buffer={"max_bytes": 1 << 20})
    for _ in range(6):
        run.grow([1.0, 0.0])
        run.train()
        run.save()
    imitation = run.state.trees.registry.imitation
    assert imitation.nbytes > 0
    run.state.trees.imitation.make_space(0)
    assert imitation.nbytes == 0
    assert imitation.left["bytes"] > 0


def test_older_rows_go_with_a_batch_whose_trees_are_exactly_as_old_as_they_must_be() -> None:
    run = Run(staleness={"exact_lag": 0})
    for _ in range(3):
        request = m.SampleRequest(
            run="r", rank=0, num_ranks=1, step=run.step, version=run.version, num_trees=1, wait_s=0.0
        )
        run.state.sample(request, 0.0)  # the line learns what the learner is at
        run.grow([1.0, 0.0, 0.0, 0.0])
        batch = run.train()
    (tree,) = batch.trees
    assert {span.version for turn in tree.turns for span in turn.spans} == {run.version - 1}
    (row,) = batch.rows
    assert row.tree_id != tree.tree_id
    assert max(int(span.version) for turn in row.turns for span in turn.spans) < run.version - 1


def test_where_the_rows_count_nothing_none_is_used_for_it() -> None:
    # Up along a cosine from the first batch on, where they count nothing.
    run = Run(imitation={**ON, "coef": {"kind": "cosine-up", "start": 0.0, "end": 1.0, "steps": 2}})
    run.grow([1.0, 0.0])
    run.grow([1.0, 0.0])
    assert run.train().rows == ()
    assert len(run.rows) == 2
    assert len(run.train().rows) == 1


def test_without_imitation_nothing_is_kept_drawn_or_written() -> None:
    run = Run(imitation={})
    run.grow([1.0, 0.0])
    batch = run.train()
    run.save()
    assert (batch.rows, batch.num_rows) == ((), 0)
    assert run.state.nbytes == 0
    assert not [key for key in run.disk.state if key.startswith(entries.MOMENTS)]
    assert not [name for name in batch.metrics if name.startswith("imitation")]


def test_a_run_that_goes_on_without_imitation_lets_its_rows_go() -> None:
    run = Run()
    run.grow([1.0, 0.0])
    run.train()
    run.save()
    assert run.rows
    run.config = config_of(imitation={})
    run.start_again()
    assert run.rows == []
    assert run.state.nbytes == run.disk.nbytes == 0


def test_first_priorities_are_by_the_credit_of_the_step_that_the_learner_asked_for() -> None:
    fades = {"kind": "linear", "start": 1.0, "end": 0.0, "steps": 2}
    run = Run(credit={"turn_reward_scale": fades, "normalise_leaves": False})
    assert run.state.trees._credit.at(run.state.trees.step).step == 0
    run.grow([1.0, 0.0])
    run.train()
    run.grow([1.0, 0.0])
    run.train()
    assert run.state.trees.step == 1
    run.start_again()
    assert run.state.trees._credit.at(run.state.trees.step).step == 1


def test_a_row_travels_with_its_batch() -> None:
    run = Run()
    run.grow([1.0, 0.0])
    run.train()
    run.grow([1.0, 0.0])
    batch = run.sample()
    read = codec.decode(codec.encode(batch), m.BufferToLearner)
    (row,), (sent,) = read.rows, batch.rows
    assert (row.tree_id, row.leaf, row.advantage) == (sent.tree_id, sent.leaf, sent.advantage)
    assert [t.action.tolist() for t in row.turns] == [t.action.tolist() for t in sent.turns]


# --- whatever happens -------------------------------------------------------------------------------------------


class ImitatingLife(Life):
    """The same, with rows; the lineage of what was imitated is checked as the learner goes."""

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__(config, seed)
        self.rows: list[Counter[tuple[str, int]]] = []

    def learn(self) -> None:
        batch = self.in_hand
        super().learn()
        if batch is None or self.in_hand is not None:
            return
        keys = [(row.tree_id, row.leaf) for row in batch.rows]
        assert len(set(keys)) == len(keys) <= 2
        assert not {tree_id for tree_id, _ in keys} & {tree.tree_id for tree in batch.trees}
        for row in batch.rows:
            # Its own turns, every byte of them, from the first to the leaf.
            assert {int(token) for turn in row.turns for token in turn.action} == {row.task_index}
            assert row.turns[-1].turn_id == row.leaf
            assert [turn.parent_id for turn in row.turns] == [0, *(turn.turn_id for turn in row.turns)][:-1]
            assert row.advantage >= 0
            assert self.version - min(turn.oldest_version for turn in row.turns) <= self.config.imitation.max_lag + 1
        self.rows.append(Counter(keys))
        used: Counter[tuple[str, int]] = sum(self.rows, Counter())
        assert max(used.values(), default=0) <= self.config.imitation.max_uses

    def fall_back(self) -> None:
        super().fall_back()
        del self.rows[self.saved :]

    def crash(self) -> None:
        rows = rows_of(self.state)
        super().crash()
        assert rows_of(self.state) == rows


def rows_of(state: BufferState) -> Any:
    store = state.trees.registry.imitation
    return {
        "rows": [(row.key, row.reward, row.oldest, row.uses, row.is_out, row.spent_at) for row in store._rows.values()],
        "bytes": store.nbytes,
        "baseline": state.trees.imitation.moments.baseline(""),
    }


@settings(max_examples=15)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 2), st.booleans(), st.sampled_from([4, 200]),
    st.integers(1, 8),
)  # fmt: skip
def test_no_row_is_lost_or_used_too_often_whoever_starts_again(
    seed: int, max_uses: int, row_uses: int, partial: bool, max_lag: int, rows: int
) -> None:
    config = build(
        {
            "run": {"max_tasks": 14},
            "staleness": {"trees_per_batch": 3, "max_lag": 200, "max_uses": max_uses},
            "search": {"initial_rollouts": 5, "rounds": 0},
            "buffer": {"ready": "partial" if partial else "complete", "max_reissues": 50},
            "imitation": {"rows": max(rows, 2), "max_lag": max_lag, "max_uses": row_uses, "per_batch": 2},
        }
    )
    life = ImitatingLife(config, seed)
    life.live(400).finish()
    store = life.state.trees.registry.imitation
    assert len(store) <= max(rows, 2) + 2
    # Every byte on the disk has its owner; once all is used up, only rows are left.
    assert life.state.nbytes == life.disk.nbytes
    before = snapshot_of(life.state, life.disk, partial=partial)
    assert before["ready"] == []
    life.crash()
    life.save()
    life.state.trees.heard(life.version + 1000)
    life.state.trees.advance()
    life.disk.commit()
    assert life.state.nbytes == life.disk.nbytes == life.state.assembly.nbytes
    assert len(life.state.trees.registry.imitation) == 0  # every row is older than it may be


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"buffer": {"shards": 2}}, r"imitation.rows = 6 with buffer.shards = 2.*--buffer.shards 1"),
        ({"imitation": {"rows": 6, "per_batch": 7}}, r"imitation.per_batch = 7 exceeds imitation.rows = 6"),
        (
            {"imitation": {"rows": 6, "clip_cov": 0.02}, "correction": {"prox": "interpolate"}},
            r"prox = 'interpolate' has no log-probs before the first step, and imitation.clip_cov = 0.02 needs them",
        ),
        ({"imitation": {"rows": 6, "clip_cov_low": 50}}, r"imitation.clip_cov_low = 50 must be below"),
        ({"imitation": {"rows": 6, "per_batch": 1.5}}, r"imitation.per_batch: from 1 on a whole number.*got 1.5"),
        (
            {"correction": {"action": "none"}, "staleness": {"max_lag": 0}},
            r"correction.action = 'none' with imitation.rows = 6 imitates rows of up to imitation.max_lag = 30",
        ),
    ],
)
def test_where_it_cannot_work_it_is_refused_by_name(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(**{"imitation": ON, **sections})


def test_a_share_is_one_of_the_batchs_leaves_and_one_row_at_least() -> None:
    share = config_of(imitation={"rows": 10, "per_batch": 0.25}).imitation
    assert [share.wanted(leaves) for leaves in (0, 1, 6, 8, 100)] == [0, 1, 2, 2, 25]
    number = config_of(imitation={"rows": 10, "per_batch": 4}).imitation
    assert [number.wanted(leaves) for leaves in (0, 1, 100)] == [0, 4, 4]
