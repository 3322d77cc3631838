"""The base of every section (frozen, unknown keys refused), and the types of fields whose value a door loads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from atpo_async.core.doors import Door, Option
from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_value


class Section(BaseModel):
    """One section of a configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read ``lr = true`` as 1; and ``dual_clip = "none"`` is none, in a file as in an option."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if value == "none" and type(None) in get_args(annotation):
            return None
        parts = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(part, bool) for part in parts) and not _takes(annotation, bool):
            raise PydanticCustomError("truth", "takes no truth value")
        return value


def _takes(annotation: Any, kind: type) -> bool:
    """Whether ``kind`` occurs in a field's annotation."""
    return annotation is kind or any(_takes(part, kind) for part in get_args(annotation))


def truth_or(*words: str) -> WrapValidator:
    """For a field that is true, false or one of ``words``: one error, where pydantic would give one for each type."""
    *others, last = [repr(word) for word in words]
    expected = f"{', '.join(['true', 'false', *others])} or {last}"

    def one_error(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("literal_error", "must be one of these", {"expected": expected}) from None

    return WrapValidator(one_error)


TruthOrAuto = Annotated[bool | Literal["auto"], truth_or("auto")]


@dataclass(frozen=True)
class named:
    """``Annotated[str, named(DOOR)]``: the name of a built-in one, or ``package.module:name``; nothing is imported."""

    door: Door[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Adds the check of the name to the check of the type."""
        known = core_schema.no_info_after_validator_function(self._known, handler(source))
        return core_schema.no_info_before_validator_function(self._is_no_object, known)

    def _is_no_object(self, value: Any) -> Any:
        """A program may give a function where its name belongs."""
        if value is None or isinstance(value, str | int | float | list | tuple | dict):
            return value
        module, name = (getattr(value, part, "") for part in ("__module__", "__qualname__"))
        there = module not in ("", "__main__") and str(name).isidentifier()
        way_out = f"give {f'{module}:{name}'!r}" if there else "put it into a module and give 'module:name'"
        reason = (
            f"{self.door.field} takes the name of {self.door.what} and no object ({of_value(value)}), which the "
            f"processes of a run could not see: {way_out}"
        )
        raise PydanticCustomError("door", "{reason}", {"reason": reason})

    def _known(self, name: str) -> str:
        try:
            self.door.check(name)
        except ConfigError as exc:
            raise PydanticCustomError("door", "{reason}", {"reason": str(exc)}) from None
        return name


def door_of(field: FieldInfo) -> Door[Any] | None:
    """The door whose names a field takes, or each item of its list."""
    items = (part for item in get_args(field.annotation) for part in getattr(item, "__metadata__", ()))
    return next((part.door for part in (*field.metadata, *items) if isinstance(part, named)), None)


def finite(options: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for a number that is not finite."""
    # NaN differs from itself: a resumed run's own options would count as changed.
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} = {value} is no finite number; where a word is meant, quote it: '\"{value}\"'")
    return options


Options = Annotated[dict[str, Option], AfterValidator(finite)]
"""Keyword arguments, by name, for the object that the field names."""
