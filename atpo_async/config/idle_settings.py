"""Settings that were changed and have no effect, because another setting switches off what they configure.

They are reported and never refused: recipes are laid over one another, and one may switch off what another sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from atpo_async import config as configuration
from atpo_async.config import Config, loss_rules
from atpo_async.config.credit_rule import credit_rule
from atpo_async.config.doors import DOORS, SINK
from atpo_async.config.sections.base import door_of
from atpo_async.config.sections.expansion import CHAINS_ONLY
from atpo_async.config.sections.generation import TeamConfig


@dataclass(frozen=True, slots=True)
class Condition:
    """What another setting must be, where that is no list of values."""

    words: str
    """As it ends ``it has with …``."""
    holds: Callable[[Config, Any], bool]
    """Of the configuration and the other setting's value."""


NONZERO = Condition("anything but 0", lambda config, value: bool(value))
ON = Condition("anything but false", lambda config, value: bool(value))
BELOW_ONE = Condition("anything below 1", lambda config, value: value < 1)
NOT_NONE = Condition("anything but 'none'", lambda config, value: value != "none")
READS_RATIO = Condition(
    "a mode that weighs turns by their ratios",
    lambda config, value: credit_rule(config.credit, reads_files=False).reads_ratio,
)
BRANCHES = Condition("a strategy that adds branches", lambda config, value: value not in CHAINS_ONLY)
LOOKS_FOR_DUPLICATES = Condition(
    "'diverse', or with search.prune_duplicates = true",
    lambda config, value: value == "diverse" or config.search.prune_duplicates,
)
READS_RISE = Condition(
    "'entropy-rise', or with search.probe_budget above 0",
    lambda config, value: value == "entropy-rise" or config.search.probe_budget > 0,
)
WEIGHS_LEAVES = Condition(
    "anything but false, or with imitation.rows above 0", lambda config, value: bool(value) or config.imitation.rows > 0
)

Needs = tuple[tuple[str, tuple[Any, ...] | Condition], ...]
"""(another setting, the values it may have)."""

_CORRECTS = ("correction.action", loss_rules.corrections_that_correct())
_NO_TEAM = ("team.proposers", (0,))
_TEAM = (("team.proposers", NONZERO),)
_BRANCHES = (_NO_TEAM, ("search.strategy", NOT_NONE), ("search.rounds", NONZERO))
_ADDED = (_NO_TEAM, ("search.strategy", BRANCHES), ("search.rounds", NONZERO))
_RISE = ("branch_prob", "entropy_weight", "rise_of", "max_copies", "branch_penalty")
_PRIORITIZED = ("buffer.sampling", ("prioritized",))
_PRIORITIES = (_PRIORITIZED, ("buffer.priority_exponent", NONZERO))
_IMITATES = (("imitation.rows", NONZERO),)
_IMITATION = ("max_lag", "max_uses", "per_batch", "coef", "history", "bytes_share", "clip_cov")
_LORA = (("learner.lora.rank", NONZERO),)
_VLLM = (("actor.engine", ("auto", "vllm")),)


def _by(*strategies: str) -> Needs:
    """Read by these strategies alone."""
    return (_NO_TEAM, ("search.strategy", strategies), ("search.rounds", NONZERO))


WORKS_WITH: dict[str, Needs] = {
    "search.initial_rollouts": (_NO_TEAM,),
    "search.rounds": (_NO_TEAM, ("search.strategy", NOT_NONE)),
    "search.branches": _ADDED,
    "search.include_root": _by("entropy", "random", "diverse"),
    "search.rise_tokens": (*_BRANCHES, ("search.strategy", READS_RISE)),
    "search.strategy_options": _BRANCHES,
    "search.sibling_penalty": _by("entropy", "diverse"),
    "search.include_leaves": _by("entropy", "random", "diverse", "entropy-rise"),
    **{f"search.{name}": _by("entropy-rise") for name in _RISE},
    **{f"search.{name}": _BRANCHES for name in ("probe_budget", "prune_duplicates")},
    "search.tree_tokens": _ADDED,
    "search.diversity_penalty": _by("diverse"),
    "search.duplicate_at": (*_BRANCHES, ("search.strategy", LOOKS_FOR_DUPLICATES)),
    **{f"search.resample_{name}": _by("resample") for name in ("every", "decay", "weights", "value")},
    **{f"team.{name}": _TEAM for name in TeamConfig.model_fields if name != "proposers"},
    "credit.leaf_weights": (("credit.normalise_leaves", WEIGHS_LEAVES),),
    "search.information_gain": (("search.turn_reward", ("information-gain",)),),
    "search.one_version_gains": (("search.turn_reward", ("information-gain",)),),
    "credit.turn_reward_moments": (("credit.turn_rewards", ("normalised",)),),
    "credit.trace_cap": (("credit.value_mode", READS_RATIO),),
    "buffer.keep_by": (("buffer.keep_share", BELOW_ONE),),
    **{f"search.overlong_{name}": (("search.overlong_buffer", NONZERO),) for name in ("tokens", "penalty")},
    "buffer.partial_min_leaves": (("buffer.ready", ("partial",)),),
    "buffer.priority_exponent": (_PRIORITIZED,),
    "buffer.priority_max_share": _PRIORITIES,
    "buffer.freshness": _PRIORITIES,
    "buffer.weight_exponent": (_PRIORITIZED,),
    "buffer.weight_exponent_steps": (_PRIORITIZED,),
    "buffer.weights_over": (_PRIORITIZED,),
    **{f"imitation.{name}": _IMITATES for name in _IMITATION},
    **{f"imitation.clip_cov_{end}": (*_IMITATES, ("imitation.clip_cov", NONZERO)) for end in ("low", "high")},
    "correction.level": (_CORRECTS,),
    "correction.action_options": (("correction.action", NOT_NONE),),
    "correction.exponent": (_CORRECTS,),
    "correction.exponent_value": (_CORRECTS, ("correction.exponent", ("fixed",))),
    "correction.ess_target": (_CORRECTS, ("correction.exponent", ("ess",))),
    "correction.ess_floor": (
        ("correction.action", loss_rules.corrections_that_correct(measuring=False)),
        ("correction.exponent", ("fixed", "geometric")),
    ),
    "correction.numerator": (_CORRECTS,),
    **{f"correction.{name}": (("correction.action", by),) for name, by in loss_rules.readers_of_correction().items()},
    **{f"objective.{name}": (("objective.surrogate", by),) for name, by in loss_rules.readers_of_objective().items()},
    "objective.kl_estimator": (("objective.kl_coef", NONZERO),),
    **{
        f"implicit_reward.{name}": (("implicit_reward.enabled", (True,)),)
        for name in ("beta", "alpha", "lr", "betas", "weight_decay", "max_grad_norm")
    },
    "learner.schedule_steps": (("learner.schedule", ("linear", "cosine")),),
    **{f"learner.lora.{name}": _LORA for name in ("alpha", "rslora", "targets", "init", "publish")},
    "learner.pack_tokens": (("learner.packing", ("auto", "tree")),),
    "actor.kv_cache_gb": (*_VLLM, ("actor.device", ("auto", "cpu"))),
    "actor.gpu_memory_utilization": (*_VLLM, ("actor.device", ("auto", "cuda"))),
    "actor.clear_cache_on_swap": _VLLM,
    "weights.shared_memory": (("weights.transport", ("auto", "file")),),
    "weights.transport_options": (("weights.transport", ("file", "chunks")),),
    "model.warm_start_steps": (("model.warm_start", (True,)),),
}
"""Setting -> the values that other settings must have, all of them, for it to have an effect."""


def idle_settings(config: Config) -> list[str]:
    """One line for each setting that is not at its default and has no effect, with what it would need."""
    known = configuration.fields()
    found = []
    for name in WORKS_WITH:
        value = configuration.get(config, name)
        if not _was_set(config, name) or value == known[name].get_default(call_default_factory=True):
            continue
        if (why := without_effect(config, name)) is not None:
            found.append(f"{name} = {_shown(value)} {why}")
    return found + _options_of_none(config)


def without_effect(config: Config, name: str) -> str | None:
    """Why a setting has no effect whatever its value is, as it ends a line about it; None where it has one."""
    known = configuration.fields()
    for other, working in WORKS_WITH.get(name, ()):
        is_now = configuration.get(config, other)
        if _is_ones_own(known[other], is_now):
            continue  # it may read any setting
        if not _works(config, is_now, working):
            return (
                f"has no effect with {other} = {_shown(is_now)} (it has with "
                f"{working.words if isinstance(working, Condition) else ', '.join(map(_shown, working))})"
            )
    return None


def _options_of_none(config: Config) -> list[str]:
    """One line for each table of options whose part is not named."""
    found = []
    for door in (door for door in DOORS if door.options_by_name):
        names = config.sinks if door is SINK else configuration.get(config, door.field)
        found += [
            f"{door.options_by_name}.{name} has no effect with {door.field} = {list(names)} "
            f"(it has with {name!r} in it)"
            for name in configuration.get(config, door.options_by_name)
            if name not in names
        ]
    return found


def _works(config: Config, is_now: Any, working: tuple[Any, ...] | Condition) -> bool:
    """Whether a setting has an effect under this value of another one."""
    return working.holds(config, is_now) if isinstance(working, Condition) else is_now in working


def _is_ones_own(field: FieldInfo, value: Any) -> bool:
    """Whether a field names something of the user's own instead of a built-in one."""
    door = door_of(field)
    return door is not None and value not in door.choices()


def _was_set(config: Config, name: str) -> bool:
    section, _, leaf = name.rpartition(".")
    return leaf in configuration.get(config, section).model_fields_set


def _shown(value: object) -> str:
    """A value as it is written in a configuration file."""
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else repr(value)
