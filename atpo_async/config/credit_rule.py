"""The credit rule that a configuration names: its value mode and its advantage mode loaded, their files read."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from atpo_async.config.doors import ADVANTAGE_MODE, VALUE_MODE
from atpo_async.config.sections.learning import CreditConfig
from atpo_async.core.credit import AdvantageMode, CreditRule, TreeArrays
from atpo_async.core.credit.marks import mark_of
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.texts import of_value


def rewards_file(settings: CreditConfig) -> tuple[str, Path] | None:
    """The setting of a built-in advantage mode that names a file of the first policy's rewards, and the file; None
    where none is named.  A user's own mode is not imported here."""
    if settings.advantage_mode not in ADVANTAGE_MODE.names():
        return None
    option = mark_of(ADVANTAGE_MODE.load(settings.advantage_mode), "reads_tasks_rewards")
    if option not in settings.advantage_options:
        return None
    return f"credit.advantage_options.{option}", Path(str(settings.advantage_options[option]))


def check_rewards(settings: CreditConfig) -> None:
    """Raises ConfigError where such a file is not as it is to be."""
    if (found := rewards_file(settings)) is not None:
        tasks_rewards(found[1], found[0])


def credit_rule(settings: CreditConfig, *, reads_files: bool = True) -> CreditRule:
    """Buffer and learner make it once, when they start: a user's own mode is imported here.

    Args:
        settings: of the run.
        reads_files: read the files that options name; else the modes are as without these options.

    Raises:
        ConfigError: there is no such mode, or it cannot be called as one; a file that an option names is not as it is
            to be.
        SetupError: its module cannot be imported.
    """
    return CreditRule(
        value_mode=VALUE_MODE.load(settings.value_mode, settings.value_options),
        advantage_mode=_advantage_mode(settings, reads_files),
        normalise=settings.normalise_leaves,
        leaf_weights=settings.leaf_weights,
        discount=settings.discount,
        normalise_returns=settings.normalise_returns,
        turn_rewards=settings.turn_rewards,
        turn_reward_moments=settings.turn_reward_moments,
        turn_reward_scale=settings.turn_reward_scale,
        scale=settings.advantage_scale,
        whiten=settings.whiten_advantages,
        trace_cap=settings.trace_cap,
        value_setting=f"credit.value_mode = {settings.value_mode!r}",
        advantage_setting=f"credit.advantage_mode = {settings.advantage_mode!r}",
    )


def reads_reference(settings: CreditConfig) -> bool:
    """Whether a built-in mode of credit needs the log-probs of the first policy; a user's own is not imported here."""
    chosen = ((VALUE_MODE, settings.value_mode), (ADVANTAGE_MODE, settings.advantage_mode))
    return any(name in door.names() and mark_of(door.load(name), "reads_reference") for door, name in chosen)


def _advantage_mode(settings: CreditConfig, reads_files: bool) -> AdvantageMode:
    options: dict[str, Any] = dict(settings.advantage_options)
    mode: AdvantageMode = ADVANTAGE_MODE.load(settings.advantage_mode, options)
    named = mark_of(mode, "reads_tasks_rewards")
    if named not in options or not isinstance(mode, functools.partial):
        return mode
    name = f"credit.advantage_options.{named}"
    file = options.pop(named)
    if reads_files:
        options[named] = tasks_rewards(Path(str(file)), name)
    return functools.partial(mode.func, **options)


def tasks_rewards(file: Path, name: str) -> dict[int, tuple[float, ...]]:
    """Task index -> what chains of it earned, from a JSON file ``{"rewards": {"0": [1.0, 0.0], …}}``.

    Args:
        file: as ``atpo eval --rewards`` writes it.
        name: of the setting that names it, for messages.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    made = "atpo eval MODEL --rewards FILE makes one"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{name} = {str(file)!r} cannot be read ({exc.strerror}); {made}") from None
    except ValueError as exc:
        raise ConfigError(f"{name} = {str(file)!r} is no JSON ({exc}); {made}") from None
    rewards = found.get("rewards") if isinstance(found, dict) else None
    if not isinstance(rewards, dict) or not rewards:
        raise ConfigError(f"{name} = {str(file)!r} has no 'rewards' by task; {made}")
    for task, earned in rewards.items():
        fine = isinstance(earned, list) and earned and all(_is_number(each) for each in earned)
        if not task.isdecimal() or not fine:
            raise ConfigError(
                f"{name} = {str(file)!r} has for task {task!r} {of_value(earned)}: expected the index of a task and a "
                "list of finite numbers"
            )
    period = found.get("period")
    if period is not None and not (isinstance(period, int) and period == len(rewards)):
        raise ConfigError(
            f"{name} = {str(file)!r} has the period {period!r} with {len(rewards)} tasks: a set that is gone through "
            f"again and again has as many; {made}"
        )
    known = {int(task): tuple(map(float, earned)) for task, earned in rewards.items()}
    return known if period is None else _AgainAndAgain(known)


class _AgainAndAgain(dict[int, tuple[float, ...]]):
    """Rewards of a finite set of tasks, whose numbers go on counting while a run goes through it again."""

    def get(self, task: int, default: Any = None) -> Any:
        return super().get(task % len(self), default)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def try_credit(settings: CreditConfig, *, reads_files: bool = True) -> None:
    """Once before a run, for what would fail on every tree.  Raises as ``credit_rule``, and SetupError where what a
    mode returns for a small tree is no credit."""
    rule = credit_rule(settings, reads_files=reads_files)
    # Two first turns, of which one forks into two leaves.
    tree = TreeArrays(
        parent=np.array([-1, -1, 0, 0]),
        is_leaf=np.array([False, True, True, True]),
        reward=np.array([0.0, 0.0, 1.0, 0.0]),
        entropy=np.array([0.5, 0.25, 0.125, 0.125]),
        num_action_tokens=np.array([3, 2, 1, 2]),
        task_index=_a_task(rule),
    )
    try:
        rule.credit(tree, ratio=np.ones(len(tree)))
        rule.credit(tree)
    except SetupError as exc:
        raise SetupError(f"{exc} (in a trial before the run)") from exc


def _a_task(rule: CreditRule) -> int:
    """One that the advantage mode knows, where it knows some only."""
    named = mark_of(rule.advantage_mode, "reads_tasks_rewards")
    known = rule.advantage_mode.keywords.get(named) if isinstance(rule.advantage_mode, functools.partial) else None
    return next(iter(known)) if known else -1
