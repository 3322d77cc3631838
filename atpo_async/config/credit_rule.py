"""The credit rule that a configuration names, with its value mode and its advantage mode loaded."""

from __future__ import annotations

from atpo_async.config.doors import ADVANTAGE_MODE, VALUE_MODE
from atpo_async.config.sections.learning import CreditConfig
from atpo_async.core.credit import CreditRule


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
        trace_cap=settings.trace_cap,
        value_setting=f"credit.value_mode = {settings.value_mode!r}",
        advantage_setting=f"credit.advantage_mode = {settings.advantage_mode!r}",
    )
