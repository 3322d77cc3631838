"""A tool's arguments: their JSON schema from the function's signature, and the check of those that a policy gave."""

from __future__ import annotations

import functools
import inspect
import typing
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import pydantic

from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_error, of_type, shortened
from atpo_async.environments.tools.docstrings import described

MOST_FAULTS = 3
"""Faults of one call that the policy reads."""

MOST_TEXT = 200
"""Characters of one of them."""


class Info(dict[str, Any]):
    """The episode's own dict.  A tool with a parameter annotated ``Info`` is given it; rewards get it as ``info``."""


class Row(dict[str, Any]):
    """The task's row of the data.  A tool with a parameter annotated ``Row`` is given it; not to be changed."""


GIVEN: tuple[type, ...] = (Info, Row)
"""Types of parameters that the episode fills, and that no policy sees."""

_LIKELY = {"info": "Info", "state": "Info", "row": "Row"}


class ArgumentsRefused(Exception):
    """The policy's arguments do not fit; the text is for the policy."""


class Arguments:
    """The arguments of one tool.

    Args:
        name: of the tool, for messages.
        function: what is called.

    Raises:
        ConfigError: a parameter without an annotation, or one that no JSON schema can express.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._who = f"tool {name!r}"
        texts = described(function).arguments
        hints = self._hints(function)
        self.given: dict[str, type] = {}
        """Parameter -> ``Info`` or ``Row``."""
        self._field_of: dict[str, str] = {}
        """Parameter -> its field of the model: some names are no field's."""
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(function).parameters.values():
            kind = self._annotation(parameter, hints)
            if kind in GIVEN:
                self.given[parameter.name] = kind
                continue
            default = ... if parameter.default is parameter.empty else parameter.default
            described_as = texts.get(parameter.name)
            self._field_of[parameter.name] = field = f"field_{len(fields)}"
            fields[field] = (
                Annotated[kind, pydantic.Field(description=described_as)] if described_as else kind,
                pydantic.Field(default, alias=parameter.name),
            )
        self._model = self._made(name, fields)
        self.schema = self._schema()
        """JSON schema of an object."""

    def _hints(self, function: Callable[..., Any]) -> dict[str, Any]:
        plain = function
        while isinstance(plain, functools.partial):
            plain = plain.func
        plain = inspect.unwrap(plain)
        if not (inspect.isfunction(plain) or inspect.ismethod(plain)):
            plain = type(plain).__call__
        try:
            return typing.get_type_hints(plain, include_extras=True)
        except Exception as exc:
            raise ConfigError(f"{self._who}: its annotations cannot be read: {of_error(exc)}") from exc

    def _annotation(self, parameter: inspect.Parameter, hints: Mapping[str, Any]) -> Any:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(
                f"{self._who}: parameter {str(parameter)!r} cannot be called by a name: a policy gives each argument "
                "by its name; write the parameters out"
            )
        if parameter.name not in hints:
            if parameter.name == "self":
                raise ConfigError(f"{self._who} is a method: leave @tool away, and pass tools=[tool(thing.method)]")
            raise ConfigError(
                f"{self._who}: parameter {parameter.name!r} has no annotation, from which the policy learns what to "
                f"give: write {parameter.name}: str, or int, float, bool, Literal[…], list[str], …"
            )
        kind = hints[parameter.name]
        meant = _LIKELY.get(parameter.name)
        if meant and (kind is dict or typing.get_origin(kind) is dict):
            raise ConfigError(
                f"{self._who}: parameter '{parameter.name}: dict' would be for the policy to give; to be given the "
                f"episode's own write {parameter.name}: {meant} (from atpo_async.environments import {meant}), else "
                "choose another name"
            )
        return kind

    def _made(self, name: str, fields: dict[str, Any]) -> type[pydantic.BaseModel]:
        # Numbers are taken for texts: policies write 2024 where "2024" is asked for.
        config = pydantic.ConfigDict(extra="forbid", coerce_numbers_to_str=True, arbitrary_types_allowed=False)
        try:
            return pydantic.create_model(name, __config__=config, **fields)
        except Exception as exc:
            raise self._no_schema(exc) from exc

    def _schema(self) -> dict[str, Any]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a default that JSON lacks is left out of the schema
                found = self._model.model_json_schema(by_alias=True)
        except Exception as exc:
            raise self._no_schema(exc) from exc
        untitled: dict[str, Any] = _untitled(found)
        untitled.setdefault("properties", {})
        untitled.setdefault("required", [])
        untitled.pop("additionalProperties", None)
        untitled.pop("description", None)
        return untitled

    def _no_schema(self, exc: Exception) -> ConfigError:
        return ConfigError(
            f"{self._who}: an annotation cannot be expressed as a JSON schema ({of_type(exc)}: "
            f"{shortened(str(exc), 160)}); use str, int, float, bool, Literal, list, dict, a dataclass or "
            "a TypedDict (of typing_extensions)"
        )

    def read(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call, converted.  Raises ArgumentsRefused, whose text is for the policy."""
        try:
            made = self._model.model_validate(dict(found))
        except pydantic.ValidationError as exc:
            raise ArgumentsRefused(self._faults(exc)) from None
        return {name: getattr(made, f) for name, f in self._field_of.items() if f in made.model_fields_set}

    def _faults(self, exc: pydantic.ValidationError) -> str:
        faults = []
        for error in exc.errors(include_url=False, include_context=False, include_input=False)[:MOST_FAULTS]:
            name = shortened(".".join(map(str, error["loc"])), 60)
            if error["type"] == "missing":
                faults.append(f"argument {name!r} is missing")
            elif error["type"] == "extra_forbidden":
                known = ", ".join(self._field_of) or "none"
                faults.append(f"there is no argument {name!r} (arguments: {known})")
            else:
                faults.append(f"argument {name!r}: {shortened(error['msg'], MOST_TEXT)}")
        return "; ".join(faults)


_NAMED = ("properties", "$defs")
_VALUES = ("default", "enum", "const", "examples")


def _untitled(schema: Any, *, names: bool = False) -> Any:
    """Without the titles that pydantic makes of names; ``names`` where the keys are parameters."""
    if isinstance(schema, list):
        return [_untitled(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: inner if key in _VALUES and not names else _untitled(inner, names=not names and key in _NAMED)
        for key, inner in schema.items()
        if names or key != "title" or not isinstance(inner, str)
    }
