"""The whole configuration of a run: its sections, and its fields by dotted path.

Every field is also a dotted option (``--learner.lr 1e-5``).  Derived bounds are properties.  Unknown keys are refused.
Durations are seconds, sizes bytes unless the name says otherwise, staleness is counted in learner versions only.
"""

from __future__ import annotations

import functools
from typing import Any, get_origin

from pydantic import BaseModel, Field, model_validator

from atpo_async.config import rules
from atpo_async.config.doors import environment_door
from atpo_async.config.sections.algorithm.imitation import ImitationConfig
from atpo_async.config.sections.base import Section
from atpo_async.config.sections.cluster import RayConfig
from atpo_async.config.sections.coefficients import is_coefficient
from atpo_async.config.sections.data import BufferConfig, StalenessConfig
from atpo_async.config.sections.environments import MOST_ENVIRONMENTS, EnvironmentConfig, WeightedEnvironment
from atpo_async.config.sections.generation import ActorConfig, ModelConfig, SearchConfig, TeamConfig
from atpo_async.config.sections.implicit import ImplicitRewardConfig
from atpo_async.config.sections.learning import CorrectionConfig, CreditConfig, LearnerConfig, ObjectiveConfig
from atpo_async.config.sections.run import EvalConfig, MetricsConfig, RunConfig, SupervisorConfig
from atpo_async.config.sections.transport import LinksConfig, WeightsConfig
from atpo_async.core.doors import Door, Option


class Config(Section):
    """The whole configuration.  ``atpo config CONFIG`` prints it resolved."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    environments: tuple[WeightedEnvironment, ...] = Field(
        (), max_length=MOST_ENVIRONMENTS, description="several by weight, in place of [environment]"
    )
    search: SearchConfig = SearchConfig()
    team: TeamConfig = TeamConfig()
    credit: CreditConfig = CreditConfig()
    staleness: StalenessConfig = StalenessConfig()
    buffer: BufferConfig = BufferConfig()
    imitation: ImitationConfig = ImitationConfig()
    correction: CorrectionConfig = CorrectionConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    implicit_reward: ImplicitRewardConfig = ImplicitRewardConfig()
    learner: LearnerConfig = LearnerConfig()
    actor: ActorConfig = ActorConfig()
    weights: WeightsConfig = WeightsConfig()
    links: LinksConfig = LinksConfig()
    eval: EvalConfig = EvalConfig()
    metrics: MetricsConfig = MetricsConfig()
    supervisor: SupervisorConfig = SupervisorConfig()
    ray: RayConfig = RayConfig()

    @property
    def max_leaves(self) -> int:
        """Of the tree that a training task is solved by, or of its group of trees."""
        return self.team.max_leaves if self.team.on else self.search.max_leaves

    @property
    def swap_timeout_s(self) -> float:
        """Seconds within which an engine must have loaded a new version."""
        return self.weights.swap_timeout_s or min(60.0, self.links.give_up_s / 2)

    @property
    def sinks(self) -> tuple[str, ...]:
        """Names of all metrics sinks, each once: ``jsonl`` always, ``tensorboard`` also by ``learner.tensorboard``."""
        more = ("tensorboard",) if self.learner.tensorboard else ()
        return tuple(dict.fromkeys(("jsonl", *self.metrics.sinks, *more)))

    @property
    def every_environment(self) -> tuple[WeightedEnvironment, ...]:
        """The environments of the run: the entries of ``[[environments]]``; else the one of ``[environment]``, whose
        label is its name."""
        one = self.environment
        return self.environments or (
            WeightedEnvironment.model_construct(name=one.name, options=one.options, weight=1.0, label=one.name),
        )

    def alone(self, number: int) -> Config:
        """The same with environment ``number`` as its only one."""
        each = self.every_environment[number]
        one = EnvironmentConfig(name=each.name, options=each.options)
        return self.model_copy(update={"environment": one, "environments": ()})

    def named_environments(self) -> list[tuple[Door[Any], str, dict[str, Option]]]:
        """(door, name, options) of each environment; the door says in which fields they stand."""
        return [
            (environment_door(number if self.environments else None), each.name, dict(each.options))
            for number, each in enumerate(self.every_environment)
        ]

    @property
    def task_name(self) -> str:
        """What the run's tasks are called: the environment's name, or the labels of several with their weights."""
        if not self.environments:
            return self.environment.name
        return " + ".join(f"{each.weight:g} {each.label}" for each in self.environments)

    @property
    def task_described(self) -> str:
        """The environments with their options, for people."""
        one = self.environment
        options = ", ".join(f"{name} = {value}" for name, value in one.options.items())
        return "; ".join(map(str, self.environments)) or f"{one.name} {options}".rstrip()

    @model_validator(mode="after")
    def _no_contradictions(self) -> Config:
        rules.check(self)
        return self


def options_table(dotted: str) -> str | None:
    """The table of options (``environment.options``) that a dotted path lies in; None if it lies in none."""
    head, _, rest = dotted.rpartition(".")
    known = fields()
    while head and rest:
        if head in known:
            return head if get_origin(known[head].annotation) is dict else None
        head, _, rest = head.rpartition(".")
    return None


def coefficient_field(dotted: str) -> str | None:
    """The coefficient that a dotted path names, or names a part of (``objective.kl_coef.start``); None for others."""
    candidates = (dotted, dotted.rpartition(".")[0])
    return next((name for name in candidates if name in _coefficients()), None)


@functools.cache
def _coefficients() -> frozenset[str]:
    return frozenset(name for name, field in fields().items() if is_coefficient(field))


def fields(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> pydantic FieldInfo of every leaf field."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.update(fields(annotation, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = info
    return found
