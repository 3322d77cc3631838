"""The type of a coefficient: a number, or a table { kind, start, end, steps } that moves it with the batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from atpo_async.config.sections.base import finite
from atpo_async.core.doors import Option
from atpo_async.core.schedule import FIELDS, Schedule, lowest, schedule_of


@dataclass(frozen=True)
class coefficient_type:
    """``Annotated[float | Schedule, coefficient_type(ge=0)]``: checks numbers, and makes schedules of tables."""

    ge: float | None = None
    """The lowest value that it may ever have."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._checked)

    def _checked(self, value: Any) -> float | Schedule:
        found = coefficient_of(value)
        if self.ge is not None and not lowest(found) >= self.ge:
            if isinstance(found, Schedule):
                raise _fault(f"a schedule from {found.start:g} to {found.end:g} must not fall below {self.ge:g}")
            raise PydanticCustomError("greater_than_equal", "must be >= {ge}", {"ge": self.ge})
        return found


def coefficient_of(value: Any) -> float | Schedule:
    """A number, or a schedule from its table.  Raises PydanticCustomError where it is neither."""
    if isinstance(value, Schedule):
        return value
    if isinstance(value, Mapping):
        try:
            return schedule_of(value)
        except ValueError as exc:
            raise _fault(str(exc)) from None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _fault("must be a number, or a table { kind, start, end, steps } for one that moves with the batches")
    return number


def _fault(reason: str) -> PydanticCustomError:
    return PydanticCustomError("coefficient", "{reason}", {"reason": reason})


Coefficient = Annotated[float | Schedule, coefficient_type()]
"""Of either sign; ``Annotated[float | Schedule, coefficient_type(ge=0)]`` is bounded below.  Its value for a batch is
``core.schedule.coefficient(value, step)``; ``bool(value)`` is whether it is ever anything but 0."""

NonNegative = Annotated[float | Schedule, coefficient_type(ge=0)]
"""A coefficient that never falls below 0."""


@dataclass(frozen=True)
class _option_type:
    """An option of a part: a scalar, or a schedule by its table."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._checked)

    def _checked(self, value: Any) -> Option | Schedule:
        if isinstance(value, Mapping | Schedule):
            return coefficient_of(value)
        if not isinstance(value, bool | int | float | str):
            raise _fault("must be a number, text, true or false, or a table { kind, start, end, steps }")
        return value


ScheduledOptions = Annotated[dict[str, Annotated[Option | Schedule, _option_type()]], AfterValidator(finite)]
"""Options of a part of the objective, by name; one that is a number may be a schedule.  The part is called with the
value for the batch."""


def looks_like_a_schedule(value: Any) -> bool:
    """Whether a table is one: its keys are a schedule's, ``kind`` among them."""
    return isinstance(value, Mapping) and "kind" in value and set(value) <= set(FIELDS)


def is_coefficient(field: FieldInfo) -> bool:
    """Whether a field takes a table in place of a number."""
    return any(isinstance(part, coefficient_type) for part in field.metadata)
