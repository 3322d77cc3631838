"""Which settings of a run may change when it is resumed, and the lines that report each change.  Pure.

The journal and the checkpoint of a run fit together only under the same tasks, the same search and the same reuse of
trees: the settings that these depend on must stay.  Every other setting may change, and is reported with both values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async import config as configuration
from atpo_async.config import Config
from atpo_async.config.sections.expansion import ExpansionConfig
from atpo_async.core.schedule import learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The policy that a run begins with, where another run made it (``atpo_async.api.other_run``)."""

    folder: Path
    """An ordinary model folder on the run's file system; it is moved into the run."""
    record: Mapping[str, Any]
    """Its origin, as recorded in ``run.json``."""


MUST_STAY: tuple[str, ...] = (
    "run.seed",
    "model.path",
    "environment.*",
    "environments",
    "search.strategy",
    "search.strategy_options",
    "search.initial_rollouts",
    "search.rounds",
    "search.branches",
    "search.include_root",
    *(f"search.{name}" for name in ExpansionConfig.model_fields),
    "search.temperature",
    "search.top_p",
    "search.top_k",
    "team.proposers",
    "team.teams",
    "team.pooled",
    "team.cue_tokens",
    "staleness.exact_lag",
    "staleness.max_uses",
    "buffer.ready",
    "buffer.shards",
    "learner.lora.rank",
    "learner.lora.alpha",
    "learner.lora.rslora",
    "learner.lora.targets",
    "learner.lora.init",
)
"""They decide which tasks there are, how trees are sampled and counted, and what the weights are made of; the journal
of each shard holds half-grown trees and their recorded log-probs, checkpoints adapters of one shape and scale."""

WITH_EXACT_LAG: tuple[str, ...] = ("staleness.trees_per_batch", "staleness.max_lag", "staleness.max_oversampling")
"""These must stay too where every batch has an exact lag: the journal then holds whole batches."""


def must_stay(path: str, old: Config, new: Config) -> bool:
    """Whether this field must stay as it was when the run is resumed."""
    if any(path == fixed or (fixed.endswith("*") and path.startswith(fixed[:-1])) for fixed in MUST_STAY):
        return True
    if path in WITH_EXACT_LAG:
        return old.staleness.exact_lag is not None
    if path == "run.max_tasks":
        # Tasks past a lower number may have been trained on already.
        before, after = old.run.max_tasks, new.run.max_tasks
        return after is not None and (before is None or after < before)
    if path == "model.max_context_tokens":
        # Turns in the journal may be as long as the old limit.
        return new.model.max_context_tokens < old.model.max_context_tokens
    return False


def changes(old: Config, new: Config) -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, old value, new value) of every field that differs, except the run's folder and name."""
    for path in configuration.fields():
        before, after = configuration.get(old, path), configuration.get(new, path)
        if before != after and path not in ("run.dir", "run.name"):
            yield path, before, after


def refused(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """The changes that a resumed run may not have."""
    return [change for change in changes(old, new) if must_stay(change[0], old, new)]


def describe_changes(old: Config, new: Config, *, updates: int, steps: int) -> list[str]:
    """A line for each change, and for each schedule that jumps because of one, with the option that avoids the jump.

    Args:
        old, new: configurations of the run, before and from now on.
        updates: optimizer steps taken so far.
        steps: batches trained so far; 0: there is nothing yet that could jump.
    """
    lines = [f"{path}: {_shown(before)} -> {_shown(after)}" for path, before, after in changes(old, new)]
    if steps:
        lines += [line for line in (_learning_rate(old, new, updates, steps), _exponent(old, new, steps)) if line]
    return lines


def rate_of(config: Config, update: int) -> float:
    """Learning rate of the ``update``-th optimizer step, from 0."""
    learner = config.learner
    return learning_rate(
        update,
        peak=learner.lr,
        warmup=learner.warmup_steps,
        total=(learner.schedule_steps or config.run.steps) * learner.minibatches * learner.epochs,
        schedule=learner.schedule,
    )


def _learning_rate(old: Config, new: Config, updates: int, steps: int) -> str:
    before, after = rate_of(old, updates), rate_of(new, updates)
    if abs(after - before) <= 1e-9 * max(before, after):
        return ""
    line = f"the learning rate of step {steps + 1} is {after:.3g}, with the settings before it would be {before:.3g}"
    was, now = old.learner, new.learner
    ends = was.schedule_steps or old.run.steps, now.schedule_steps or new.run.steps
    if was.schedule == now.schedule != "constant" and ends[0] != ends[1]:
        line += (
            f" (learner.schedule = {now.schedule!r} ended at step {ends[0]} and ends at step {ends[1]} now); "
            f"--learner.schedule_steps {ends[0]} keeps the old curve"
        )
        if before == 0:
            line += ", whose learning rate is 0 from here on"
    return line


def _exponent(old: Config, new: Config, steps: int) -> str:
    was, now = old.buffer, new.buffer
    ends = was.weight_exponent_steps or old.run.steps, now.weight_exponent_steps or new.run.steps
    if ends[0] == ends[1] or not (was.priority_exponent and now.priority_exponent):
        return ""
    before, after = (
        buffer.weight_exponent + (1 - buffer.weight_exponent) * min(steps / end, 1.0)
        for buffer, end in ((was, ends[0]), (now, ends[1]))
    )
    if abs(after - before) < 1e-9:
        return ""
    return (
        f"the exponent of the priority weights (buffer.weight_exponent, annealed to 1) is {after:.3g} now, before it "
        f"was {before:.3g}; --buffer.weight_exponent_steps {ends[0]} keeps the old curve"
    )


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
