"""Credit modes of a user's own: in the buffer, in the learner, and what is refused of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpo_async.config import CreditConfig
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.credit import TreeArrays
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.priorities import tree_priority
from buffer.pool.pool import ReplayPool
from learner.packing.credited import CreditedTree
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.buffer_peers_support import configured, grown, stateful, take
from tests.learner_support import in_double, make_batch, make_config, make_model

EXAMPLE = '''
import numpy as np

from atpo_async.core.credit import TreeArrays, reads_ratio


def best_leaf(arrays: TreeArrays, ratio, *, discount=1.0):
    """V(n) is that of the best leaf below, times ``discount`` for each turn on the way to it."""
    best = np.full(len(arrays) + 1, -np.inf)
    for turn in range(len(arrays) - 1, -1, -1):  # children come after their parents
        if arrays.is_leaf[turn]:
            best[turn] = arrays.reward[turn]
        parent = arrays.parent[turn]  # -1, the last place, for first turns
        best[parent] = max(best[parent], discount * best[turn])
    return best[:-1], float(best[-1])


@reads_ratio
def best_leaf_of_fresh_turns(arrays: TreeArrays, ratio):
    """The same; a turn that the policy would hardly take any more is worth nothing."""
    values, root = best_leaf(arrays, None)
    return (values, root) if ratio is None else (np.where(ratio < 0.5, 0.0, values), root)


def rank(arrays: TreeArrays, values, root_value):
    """A(n) is the share of turns that are worth less."""
    return (values[None, :] < values[:, None]).mean(axis=1)
'''
"""As in docs/extending.md."""

BAD = """
import numpy as np

def fails(arrays, ratio):
    raise KeyError("depth")

def nothing(arrays, ratio):
    pass

def short(arrays, ratio):
    return np.zeros(len(arrays) - 1), 0.0

def nan(arrays, ratio):
    return np.full(len(arrays), np.nan), 0.0

def no_root(arrays, ratio):
    return np.zeros(len(arrays)), float("inf")

def words(arrays, ratio):
    return ["much"] * len(arrays), 0.0

def of_one(arrays):
    return np.zeros(len(arrays)), 0.0

def advantage_fails(arrays, values, root_value):
    return values[1000]
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules that lie outside the packages."""
    (tmp_path / "credit_of_mine.py").write_text(EXAMPLE)
    (tmp_path / "bad_credit_of_mine.py").write_text(BAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("credit_of_mine", "bad_credit_of_mine"):
        sys.modules.pop(name, None)


MINE: dict[str, Any] = {
    "value_mode": "credit_of_mine:best_leaf",
    "value_options": {"discount": 0.5},
    "advantage_mode": "credit_of_mine:rank",
}


@pytest.fixture
def arrays() -> TreeArrays:
    """A chain of two turns that ends with 1, and a leaf that got 0."""
    return TreeArrays(
        parent=np.array([-1, 0, -1]),
        is_leaf=np.array([False, True, True]),
        reward=np.array([0.0, 1.0, 0.0]),
        entropy=np.ones(3),
        num_action_tokens=np.ones(3, dtype=np.int64),
    )


def test_a_tree_is_credited_by_the_modes_of_ones_own(arrays: TreeArrays) -> None:
    found = credit_rule(CreditConfig(**MINE, normalise_leaves=False)).credit(arrays)
    np.testing.assert_array_equal(found.values, [0.5, 1.0, 0.0])
    assert found.root_value == 0.25
    np.testing.assert_allclose(found.advantages, [1 / 3, 2 / 3, 0.0])


def test_a_mode_of_ones_own_says_itself_whether_it_reads_turn_ratios(arrays: TreeArrays) -> None:
    assert not credit_rule(CreditConfig(value_mode="credit_of_mine:best_leaf")).reads_ratio
    assert not credit_rule(CreditConfig(**MINE)).reads_ratio
    rule = credit_rule(CreditConfig(value_mode="credit_of_mine:best_leaf_of_fresh_turns", normalise_leaves=False))
    assert rule.reads_ratio
    assert rule.credit(arrays, ratio=np.array([1.0, 0.2, 1.0])).values.tolist() == [1.0, 0.0, 0.0]
    assert rule.credit(arrays).values.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("mode", ["tree_trace", "tree_trace_selfnorm"])
def test_of_the_built_in_modes_the_traces_read_turn_ratios(mode: str) -> None:
    assert credit_rule(CreditConfig(value_mode=mode)).reads_ratio
    assert not credit_rule(CreditConfig()).reads_ratio


def test_the_buffer_gives_a_tree_its_first_priority_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    add = ReplayPool.add

    def noting(pool: ReplayPool, *args: Any, priority: float, **named: Any) -> Any:
        given.append(priority)
        return add(pool, *args, priority=priority, **named)

    monkeypatch.setattr(ReplayPool, "add", noting)
    config = configured(credit=MINE)
    state = stateful(config)
    (lease,) = state.lease("a", 1, 0.0).leases
    take(state, grown(lease, (1.0, 0.0)))
    assert given == [tree_priority(np.array([0.5, 0.0]), max_share=config.buffer.priority_max_share)]


def test_the_learner_credits_a_batch_and_gives_new_priorities_by_them(tmp_path: Path) -> None:
    config = make_config(make_model(tmp_path / "model"), credit=MINE)
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=in_double(load_policy(config)))
    batch = make_batch(num_trees=2)
    report = trainer.train(batch, version=3)
    for tree in batch.trees:
        own = CreditedTree.of(tree, credit_rule(config.credit)).advantages
        assert set(own) <= {count / len(own) for count in range(len(own))}  # ranks
        expected = tree_priority(own, max_share=config.buffer.priority_max_share)
        assert report.priorities[tree.tree_id] == pytest.approx(expected)


def test_the_learner_refuses_a_mode_that_reads_ratios_where_there_are_none_in_time(tmp_path: Path) -> None:
    credit: dict[str, object] = {"value_mode": "credit_of_mine:best_leaf_of_fresh_turns"}
    config = make_config(make_model(tmp_path / "model"), credit=credit, correction={"prox": "interpolate"})
    said = "prox = 'interpolate' has no log-probs before the first step, and credit.value_mode = 'credit_of_mine:best"
    with pytest.raises(ConfigError, match=said):
        Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("fails", "failed on a tree of 3 turns: KeyError: 'depth'"),
        ("nothing", "returned NoneType; expected the values of the turns and the root's"),
        ("short", r"returned numbers of shape \(2,\); expected 3, one a turn"),
        ("nan", "returned nan for turn 0 of 3; expected finite numbers"),
        ("no_root", "returned inf as the root's value"),
        ("words", "returned list; expected 3 numbers, one a turn"),
    ],
)
def test_what_a_mode_returns_is_checked_under_the_name_of_its_setting(arrays: TreeArrays, mode: str, said: str) -> None:
    rule = credit_rule(CreditConfig(value_mode=f"bad_credit_of_mine:{mode}"))
    with pytest.raises(SetupError, match=f"^credit.value_mode = 'bad_credit_of_mine:{mode}' {said}"):
        rule.credit(arrays)


def test_an_advantage_mode_that_fails_is_named_too(arrays: TreeArrays) -> None:
    rule = credit_rule(CreditConfig(advantage_mode="bad_credit_of_mine:advantage_fails"))
    with pytest.raises(SetupError, match=r"^credit\.advantage_mode = 'bad_credit_of_mine:advantage_fails' failed on"):
        rule.credit(arrays)


def test_a_mode_that_cannot_be_called_as_one_is_refused_when_buffer_and_learner_start() -> None:
    config = configured(credit={"value_mode": "bad_credit_of_mine:of_one"})
    with pytest.raises(ConfigError, match=r"a value mode is called as \(arrays, ratio, \*\*options\)"):
        stateful(config)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'depth'"):
        credit_rule(CreditConfig(value_mode="child_mean", value_options={"depth": 2}))
