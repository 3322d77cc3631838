"""The rules between surrogates, corrections, rewards of turns and other settings.

Most follow from the traits that surrogates and corrections declare.

The built-in ones are checked when a configuration is made; a user's own when the learner imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from atpo_async.config.doors import ADVANTAGE_MODE, CORRECTION, SURROGATE, TERM, TOKEN_WEIGHT
from atpo_async.core.doors import Door, Option
from atpo_async.core.errors import ConfigError
from atpo_async.core.loss_traits import (
    CorrectionTraits,
    Needs,
    PartTraits,
    SurrogateTraits,
    TermTraits,
    TokenWeightTraits,
    Traits,
    declared,
)
from atpo_async.core.schedule import Schedule

if TYPE_CHECKING:
    from atpo_async.config.schema import Config
    from atpo_async.config.sections.learning import CorrectionConfig, ObjectiveConfig


def surrogate_traits(name: str) -> SurrogateTraits | None:
    """Of a built-in one; None for a user's own, whose module is imported by the learner only."""
    return _built_in_traits(SURROGATE, name, SurrogateTraits())


def correction_traits(name: str) -> CorrectionTraits | None:
    """Of a built-in one; None for a user's own, whose module is imported by the learner only."""
    return _built_in_traits(CORRECTION, name, CorrectionTraits())


def _built_in_traits(door: Door[object], name: str, default: Traits) -> Traits | None:
    # A built-in one's module loads no torch.
    return declared(door.load(name), default) if name in door.names() else None  # type: ignore[arg-type]


def readers_of_objective() -> dict[str, tuple[str, ...]]:
    """Field of ``[objective]`` that decides something in some surrogates only -> the built-in ones of these."""
    return _readers({name: surrogate_traits(name) for name in SURROGATE.names()})


def readers_of_correction() -> dict[str, tuple[str, ...]]:
    """Field of ``[correction]`` that decides something in some corrections only -> the built-in ones of these."""
    return _readers(dict(_corrections()))


def _readers(traits: Mapping[str, SurrogateTraits | CorrectionTraits | None]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, own in traits.items():
        for setting in own.reads if own is not None else ():
            found[setting] = (*found.get(setting, ()), name)
    return found


def corrections_that_correct(*, measuring: bool = True) -> tuple[str, ...]:
    """Built-in ones whose weights are not all 1; with ``measuring`` false without those that measure the batch."""
    return tuple(name for name, traits in _corrections() if traits.corrects and (measuring or traits.measure is None))


def _corrections() -> list[tuple[str, CorrectionTraits]]:
    found = ((name, correction_traits(name)) for name in CORRECTION.names())
    return [(name, traits) for name, traits in found if traits is not None]


def learns_from_one_chain(advantage_mode: str) -> bool:
    """Whether trees of one leaf may have a signal; of a user's own mode that is not known here."""
    if advantage_mode not in ADVANTAGE_MODE.names():
        return True
    from atpo_async.core.credit.marks import mark_of  # needs numpy, which the command line does without

    return bool(mark_of(ADVANTAGE_MODE.load(advantage_mode), "needs_no_comparison"))


def check_surrogate(config: Config) -> None:
    """Raises ValueError where the ratio to prox would be counted in the surrogate and in the correction."""
    name = config.objective.surrogate
    traits = surrogate_traits(name)  # a user's own surrogate decides itself what it multiplies
    if config.correction.numerator == "policy" and traits is not None and "ratio_level" in traits.reads:
        fit = [other for other in SURROGATE.names() if other not in readers_of_objective()["ratio_level"]]
        raise ValueError(
            f"correction.numerator = 'policy' with objective.surrogate = {name!r} would count the policy's drift from "
            f"prox twice: use --correction.numerator prox, or --objective.surrogate {' or '.join(fit)}"
        )


def check_bias(config: Config, traits: CorrectionTraits) -> None:
    """Raises ValueError where off-policy data would be trained on uncorrected without ``accept_bias``."""
    s, c = config.staleness, config.correction
    if s.max_lag > 0 and s.exact_lag != 0 and not traits.corrects and not c.accept_bias:
        raise ValueError(
            f"correction.action = {c.action!r} with staleness.max_lag = {s.max_lag} trains off-policy uncorrected: "
            "set --correction.action truncate, or --correction.accept_bias true if the bias is what you study"
        )


def check_correction(c: CorrectionConfig, traits: CorrectionTraits) -> None:
    """Raises ValueError where ``[correction]`` contradicts what its action declares."""
    if traits.corrects and c.floor >= c.cap:
        raise ValueError(f"correction.floor = {c.floor} must be below correction.cap = {c.cap}")
    if traits.masks_outside and not c.floor < 1 < c.cap:
        raise ValueError(
            f"correction.action = {c.action!r} with correction.floor = {c.floor} and correction.cap = {c.cap} "
            "would mask data that is not off-policy at all: ratios of 1 must lie between them"
        )
    if traits.levels and c.level not in traits.levels:
        raise ValueError(
            f"correction.action = {c.action!r} works by {' or '.join(traits.levels)}, but correction.level = "
            f"{c.level!r}: set --correction.level {traits.levels[0]}"
        )
    if traits.measure is not None and c.exponent == "ess":
        raise ValueError(
            f"correction.action = {c.action!r} bounds the batch by its own measure, correction.exponent = 'ess' by "
            "another: use --correction.exponent fixed"
        )
    idle = "exponent = 'ess'" if c.exponent == "ess" else f"gate = {c.gate}"
    if not traits.corrects and (c.exponent == "ess" or c.gate is not None):
        raise ValueError(
            f"correction.{idle} does nothing with correction.action = {c.action!r}: leave it out, or name another "
            "action"
        )
    of_the_batch = measured_first(c, traits)
    if of_the_batch and c.numerator == "policy":
        raise ValueError(
            f"{of_the_batch} is measured over the whole batch before its first step: correction.numerator = "
            "'policy' has no such number; use prox"
        )
    if of_the_batch and c.prox == "interpolate":
        raise ValueError(needs_log_probs(of_the_batch))


def measured_first(c: CorrectionConfig, traits: CorrectionTraits) -> str | None:
    """The part of the correction that the whole batch decides before its first step; None where there is none."""
    return c.action if traits.measure is not None else "ess" if c.exponent == "ess" else None


def needs_log_probs(what: str) -> str:
    """Why ``what`` cannot be had together with ``correction.prox = "interpolate"``."""
    return (
        f"correction.prox = 'interpolate' has no log-probs before the first step, and {what} needs them: use recompute"
    )


# --- loss terms and token weights


def label_of(name: str) -> str:
    """What a term or a token weight is called in metrics and checkpoints: its own name, without its module's."""
    return name.rpartition(":")[2]


def part_options(settings: ObjectiveConfig, door: Door[object], name: str) -> Mapping[str, Option | Schedule]:
    """Options of an entry of ``objective.terms`` or ``objective.token_weights``."""
    tables = settings.term_options if door is TERM else settings.token_weight_options
    return tables.get(name, {})


def check_parts(config: Config) -> None:
    """Raises ValueError where loss terms and token weights contradict one another or other settings.

    What a user's own declares is checked by the learner, which imports it.
    """
    seen: dict[str, str] = {}
    needs: dict[str, Needs] = {}
    for door, names, default in _parts(config.objective):
        for name in names:
            if (label := label_of(name)) in seen:
                raise ValueError(
                    f"{door.field}: {name!r} and {seen[label]!r} would both be {label!r} in metrics and checkpoints: "
                    "name each once, and give one of your own another name"
                )
            seen[label] = name
            if name in door.names():
                try:
                    function = door.load(name, _ends(part_options(config.objective, door, name))[0])
                except ConfigError as exc:
                    raise ValueError(str(exc)) from None
                traits = declared(function, default)  # type: ignore[arg-type]
                check_part(config, door, name, traits)
                needs[f"{door.field}, {name}"] = _needs(config.objective, door, name, traits)
    united(needs)


def _parts(settings: ObjectiveConfig) -> tuple[tuple[Door[object], tuple[str, ...], PartTraits], ...]:
    return ((TERM, settings.terms, TermTraits()), (TOKEN_WEIGHT, settings.token_weights, TokenWeightTraits()))


def check_part(config: Config, door: Door[object], name: str, traits: PartTraits) -> None:
    """Raises ValueError where one term or token weight contradicts its options or other settings."""
    settings = config.objective
    options = part_options(settings, door, name)
    for each in _ends(options):
        try:
            if traits.check is not None:
                traits.check(settings, **each)
        except ValueError as exc:
            raise ValueError(f"{door.options_by_name}.{name}: {exc}") from None
    needs = _needs(settings, door, name, traits)
    if door is TOKEN_WEIGHT and (needs.own_entropy or needs.own_min_p is not None):
        raise ValueError(
            f"{door.field}: {name!r} declares that it needs numbers of the weights being trained (Needs.own_entropy, "
            "own_min_p), and a token weight is fixed before the first step: it may need those of the batch's start"
        )
    first = needs.at_start or traits.measure is not None or door is TOKEN_WEIGHT
    if first and config.correction.prox == "interpolate":
        raise ValueError(needs_log_probs(f"{door.field}, {name!r},"))


def _needs(settings: ObjectiveConfig, door: Door[object], name: str, traits: PartTraits) -> Needs:
    first, last = (traits.needs_of(each) for each in _ends(part_options(settings, door, name)))
    if first != last:
        raise ValueError(
            f"{door.options_by_name}.{name}: an option that decides what is measured of each token cannot be a "
            "schedule: give a number"
        )
    return first


def _ends(options: Mapping[str, Option | Schedule]) -> tuple[dict[str, Option], dict[str, Option]]:
    """The options with the first and with the last values of those that are schedules."""
    first = {name: value.start if isinstance(value, Schedule) else value for name, value in options.items()}
    last = {name: value.end if isinstance(value, Schedule) else value for name, value in options.items()}
    return first, last


def united(needs: Mapping[str, Needs]) -> Needs:
    """What several parts need together.  Raises ValueError where two need the min-p numbers of different shares."""
    shares: dict[str, float | None] = {}
    for field in ("min_p", "own_min_p"):
        asked = {who: value for who, each in needs.items() if (value := getattr(each, field)) is not None}
        if len(set(asked.values())) > 1:
            said = " and ".join(f"{value:g} ({who})" for who, value in asked.items())
            raise ValueError(f"min-p numbers are measured for one share of the largest probability, not for {said}")
        shares[field] = next(iter(asked.values()), None)
    every = needs.values()
    return Needs(
        entropy=any(each.entropy for each in every),
        own_entropy=any(each.own_entropy for each in every),
        reference=any(each.reference for each in every),
        random=any(each.random for each in every),
        min_p=shares["min_p"],
        own_min_p=shares["own_min_p"],
    )


def needs_of_parts(config: Config) -> Needs:
    """What the built-in terms and token weights of a configuration need; a user's own are left out."""
    found = {}
    for door, names, default in _parts(config.objective):
        for name in (name for name in names if name in door.names()):
            traits = declared(door.load(name), default)  # type: ignore[arg-type]
            found[f"{door.field}, {name}"] = _needs(config.objective, door, name, traits)
    return united(found)


def word(value: bool | str) -> str:
    """As it is written in a configuration file."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def check_turn_rewards(config: Config) -> None:
    """Raises ValueError where settings contradict ``credit.turn_rewards = "normalised"``."""
    c = config.credit
    if c.turn_rewards != "normalised":
        return
    said = "credit.turn_rewards = 'normalised'"
    if c.normalise_returns:
        raise ValueError(
            f"{said} with credit.normalise_returns = {word(c.normalise_returns)} would normalise twice: returns are "
            "made of the rewards of turns; set --credit.normalise_returns false, or --credit.turn_rewards plain"
        )
    if c.normalise_leaves == "batch":
        raise ValueError(
            f"{said} with credit.normalise_leaves = 'batch': only leaf rewards have a deviation of the whole batch; "
            "set --credit.normalise_leaves true, or --credit.turn_rewards plain"
        )
    if not c.normalise_leaves:
        raise ValueError(
            f"{said} with credit.normalise_leaves = false would add rewards of turns in units of their deviation to "
            "raw leaf rewards; set --credit.normalise_leaves true, or --credit.turn_rewards plain"
        )
    if c.turn_reward_moments == "joint" and c.leaf_weights != "uniform":
        raise ValueError(
            f"{said} with credit.turn_reward_moments = 'joint' takes each turn and each leaf once, but "
            f"credit.leaf_weights = {c.leaf_weights!r} weighs leaves; set --credit.leaf_weights uniform, or "
            "--credit.turn_reward_moments separate"
        )


def check_implicit_reward(config: Config) -> None:
    """Raises ValueError where settings contradict the implicit reward model."""
    learner = config.learner
    if not config.implicit_reward.enabled:
        return
    said, off = "implicit_reward.enabled = true", "or --implicit_reward.enabled false"
    if learner.lora.rank:
        raise ValueError(
            f"{said} with learner.lora.rank = {learner.lora.rank}: the reward model is trained with all its weights, "
            f"which adapters are there to avoid; set --learner.lora.rank 0, {off}"
        )
    if learner.mixed_precision == "fp16":
        raise ValueError(
            f"{said} with learner.mixed_precision = 'fp16': one loss scale would serve two models; set "
            f"--learner.mixed_precision bf16 or no, {off}"
        )
    if config.correction.prox == "interpolate":
        raise ValueError(
            f"{said} with correction.prox = 'interpolate': its rewards are over the policy's own log-probs at the "
            f"batch's start, which are not measured then; set --correction.prox auto, {off}"
        )


def overlong_fault(config: Config) -> str | None:
    """Why the reward of long chains cannot be shaped so; None where it can."""
    from atpo_async.core.credit.overlong import overlong_range  # needs numpy, which the command line does without

    search = config.search
    if not search.overlong_buffer:
        return None
    found = overlong_range(search.overlong_buffer, search.overlong_tokens, config.model.max_context_tokens)
    if found is None:
        return None
    limit, buffer = found
    if buffer > limit:
        return (
            f"search.overlong_buffer = {buffer} exceeds search.overlong_tokens = {limit}: every chain would be "
            f"punished; lower it to {limit} at most, or give a share of it, as 0.2"
        )
    if limit > config.model.max_context_tokens:
        return (
            f"search.overlong_tokens = {limit} exceeds model.max_context_tokens = {config.model.max_context_tokens}, "
            "which no chain reaches: lower it, or leave it out for that length"
        )
    return None


def keep_share_fault(config: Config) -> str | None:
    """Why trees cannot be kept by their spread so; None where they can."""
    buffer, most = config.buffer, config.staleness.max_oversampling
    if buffer.keep_share >= 1.0:
        return None
    said = f"buffer.keep_share = {buffer.keep_share:g}"
    if buffer.ready == "partial":
        return (
            f"{said} with buffer.ready = 'partial': a tree is served before it is known how its chains differ; set "
            "--buffer.ready complete, or --buffer.keep_share 1"
        )
    if buffer.keep_by == "trees" and most * buffer.keep_share < 1.0:
        return (
            f"{said} with staleness.max_oversampling = {most:g} would make every batch short: of that many times "
            f"trees_per_batch trees too few are kept; set --staleness.max_oversampling {1 / buffer.keep_share:.3g} or "
            "more, or raise keep_share"
        )
    return None
