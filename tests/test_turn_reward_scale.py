"""Rewards of turns that fade over the learner's batches: credit, buffer and learner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from atpo_async.config import CreditConfig, build
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.credit import TreeArrays
from atpo_async.core.errors import ConfigError
from atpo_async.core.schedule import Schedule
from atpo_async.wire.messages import Batch
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.learner_support import in_double, make_batch, make_config, make_model

FADES: dict[str, object] = {"kind": "cosine-down", "start": 1.0, "end": 0.0, "steps": 200}
BY_STEP = {0: 0.4, 50: 0.3414214, 100: 0.2, 200: 0.0, 300: 0.0}


def chain(num_tool_turns: int, reward: float = 0.0) -> TreeArrays:
    """Turns that each earn 0.1 for calling a tool, then an answer."""
    turns = num_tool_turns + 1
    return TreeArrays(
        parent=np.arange(-1, turns - 1),
        is_leaf=np.arange(turns) == turns - 1,
        reward=np.where(np.arange(turns) == turns - 1, reward, 0.0),
        entropy=np.ones(turns),
        num_action_tokens=np.ones(turns, dtype=np.int64),
        turn_reward=np.where(np.arange(turns) < num_tool_turns, 0.1, 0.0),
    )


@pytest.mark.parametrize(("step", "expected"), BY_STEP.items())
def test_four_calls_of_tools_are_worth_less_and_less(step: int, expected: float) -> None:
    settings = CreditConfig(normalise_leaves=False, turn_reward_scale=Schedule(**FADES))  # type: ignore[arg-type]
    found = credit_rule(settings).at(step).credit(chain(4))
    assert found.root_value == pytest.approx(expected, abs=5e-8)


def test_without_a_factor_nothing_changes_and_the_raw_rewards_stay() -> None:
    arrays = chain(4, reward=1.0)
    plain = credit_rule(CreditConfig(normalise_leaves=False))
    assert plain.at(7) is plain
    before = arrays.turn_reward.copy()
    half = credit_rule(CreditConfig(normalise_leaves=False, turn_reward_scale=0.5))
    assert half.credit(arrays).root_value == pytest.approx(1.2)
    assert np.array_equal(arrays.turn_reward, before)


def test_a_negative_factor_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"credit\.turn_reward_scale"):
        build({"credit": {"turn_reward_scale": -0.5}})


def fork(outcomes: list[float], paid: list[float]) -> TreeArrays:
    """Two first turns with two leaves each."""
    return TreeArrays(
        parent=np.array([-1, 0, 0, -1, 3, 3]),
        is_leaf=np.array([False, True, True, False, True, True]),
        reward=np.array([0.0, *outcomes[:2], 0.0, *outcomes[2:]]),
        entropy=np.ones(6),
        num_action_tokens=np.ones(6, dtype=np.int64),
        turn_reward=np.array(paid),
    )


@pytest.mark.parametrize("moments", ["separate", "joint"])
def test_the_factor_comes_after_inner_turns_were_normalised_and_before_leaves_are(moments: str) -> None:
    settings: dict[str, Any] = {"turn_rewards": "normalised", "turn_reward_moments": moments}
    tree = fork([1.0, 0.0, 0.0, 0.0], [0.3, 0.0, 0.1, -0.2, 0.0, 0.4])
    half = credit_rule(CreditConfig(**settings, turn_reward_scale=0.5)).credit(tree)
    # What a leaf's own turn earned, halved, is part of its outcome; z of an inner turn is halved.
    whole = credit_rule(CreditConfig(**settings)).credit(fork([1.0, 0.05, 0.0, 0.2], [0.3, 0.0, 0.0, -0.2, 0.0, 0.0]))
    children = np.array([whole.values[[1, 2]].mean(), whole.values[[4, 5]].mean()])
    expected = whole.values.copy()
    expected[[0, 3]] = children + 0.5 * (whole.values[[0, 3]] - children)
    assert half.values == pytest.approx(expected)


def test_rewards_that_have_faded_count_nothing_where_turns_are_normalised_either() -> None:
    tree = fork([1.0, 0.0, 0.0, 0.0], [0.3, 0.0, 0.1, -0.2, 0.0, 0.4])
    faded = credit_rule(CreditConfig(turn_rewards="normalised", turn_reward_scale=0.0)).credit(tree)
    none = credit_rule(CreditConfig()).credit(replace(tree, turn_reward=np.zeros(6)))
    assert faded.values.tolist() == none.values.tolist()


def paid(batch: Batch) -> Batch:
    """The same with 0.1 for each inner turn and for every other leaf."""
    trees = [
        msgspec.structs.replace(
            tree,
            turns=tuple(msgspec.structs.replace(turn, turn_reward=0.1 * (turn.turn_id % 2)) for turn in tree.turns),
        )
        for tree in batch.trees
    ]
    return msgspec.structs.replace(batch, trees=tuple(trees))


def test_the_learner_credits_a_batch_by_its_own_step(tmp_path: Path) -> None:
    """At the end of the schedule a batch is worth what it is without rewards of turns, bit for bit."""
    folder = make_model(tmp_path / "model")

    def priorities(batch: Batch, **credit: Any) -> dict[str, float]:
        config = make_config(folder, credit=credit)
        trainer = Trainer(config, accelerator=make_accelerator(config), policy=in_double(load_policy(config)))
        report = trainer.train(batch, version=3)
        if credit:
            assert report.metrics["credit/turn_reward_scale"] == Schedule(**FADES).at(batch.step)  # type: ignore[arg-type]
        return report.priorities

    early, late = paid(make_batch(step=0)), paid(make_batch(step=200))
    assert priorities(early, turn_reward_scale=FADES) == priorities(early)
    assert priorities(late, turn_reward_scale=FADES) == priorities(make_batch(step=200)) != priorities(late)
