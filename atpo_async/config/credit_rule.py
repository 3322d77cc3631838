"""The credit rule that a configuration names, with its value mode and its advantage mode loaded."""

from __future__ import annotations

import numpy as np

from atpo_async.config.doors import ADVANTAGE_MODE, VALUE_MODE
from atpo_async.config.sections.learning import CreditConfig
from atpo_async.core.credit import CreditRule, TreeArrays
from atpo_async.core.errors import SetupError


def credit_rule(settings: CreditConfig) -> CreditRule:
    """Buffer and learner make it once, when they start: a user's own mode is imported here.

    Raises:
        ConfigError: there is no such mode, or it cannot be called as one.
        SetupError: its module cannot be imported.
    """
    return CreditRule(
        value_mode=VALUE_MODE.load(settings.value_mode, settings.value_options),
        advantage_mode=ADVANTAGE_MODE.load(settings.advantage_mode, settings.advantage_options),
        normalise=settings.normalise_leaves,
        leaf_weights=settings.leaf_weights,
        discount=settings.discount,
        normalise_returns=settings.normalise_returns,
        turn_rewards=settings.turn_rewards,
        turn_reward_moments=settings.turn_reward_moments,
        trace_cap=settings.trace_cap,
        value_setting=f"credit.value_mode = {settings.value_mode!r}",
        advantage_setting=f"credit.advantage_mode = {settings.advantage_mode!r}",
    )


def try_credit(settings: CreditConfig) -> None:
    """Once before a run, for what would fail on every tree.  Raises as ``credit_rule``, and SetupError where what a
    mode returns for a small tree is no credit."""
    rule = credit_rule(settings)
    # Two first turns, of which one forks into two leaves.
    tree = TreeArrays(
        parent=np.array([-1, -1, 0, 0]),
        is_leaf=np.array([False, True, True, True]),
        reward=np.array([0.0, 0.0, 1.0, 0.0]),
        entropy=np.array([0.5, 0.25, 0.125, 0.125]),
        num_action_tokens=np.array([3, 2, 1, 2]),
    )
    try:
        rule.credit(tree, ratio=np.ones(len(tree)))
        rule.credit(tree)
    except SetupError as exc:
        raise SetupError(f"{exc} (in a trial before the run)") from exc
