"""The tasks of a run: one environment, or several by weight."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from atpo_async.config import doors
from atpo_async.config.sections.base import Options, Section, named

MOST_ENVIRONMENTS = 32


class EnvironmentConfig(Section):
    """The task."""

    name: Annotated[str, named(doors.ENVIRONMENT)] = "hopqa"
    options: Options = Field(default_factory=dict, description="passed to the environment")


class WeightedEnvironment(Section):
    """One of several environments of a run: an entry of ``[[environments]]``."""

    name: Annotated[str, named(doors.ONE_OF_ENVIRONMENTS)]
    options: Options = Field(default_factory=dict, description="passed to the environment")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="of training tasks, in proportion to the others")
    label: str = Field(
        "",
        max_length=40,
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
        description="in metrics; by default from the name",
    )

    @field_validator("label", mode="after")
    @classmethod
    def _by_default_from_the_name(cls, label: str, info: ValidationInfo) -> str:
        module = str(info.data.get("name", "")).partition(":")[0].rpartition(".")[2]
        return label or re.sub(r"[^A-Za-z0-9._-]", "-", module)[:40]

    def __str__(self) -> str:
        options = ", ".join(f"{name} = {value}" for name, value in self.options.items())
        return f"{self.label}: {self.name}{f' ({options})' if options else ''}, weight {self.weight:g}"

    __repr__ = __str__
