"""Configuration files: TOML or a run's config.json, laid over one another, and the resolved result written back.

A later file's value goes over an earlier one's, key by key; one with a ``[recipe]`` sets the algorithm as a whole
(``recipes``).  "none" stands for no value, which TOML lacks.
"""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from atpo_async.config import faults, options, recipes
from atpo_async.config.schema import Config, fields
from atpo_async.config.sections.base import Section, door_of
from atpo_async.config.sections.environments import WeightedEnvironment
from atpo_async.core.errors import ConfigError
from atpo_async.core.schedule import Schedule

CALL = "the call"
"""Where a value comes from that a program gave."""


def load(files: Path | str | Sequence[Path | str], overrides: Mapping[str, str] | None = None) -> Config:
    """Read TOML files (or the config.json of a run folder), later ones over earlier ones, and put overrides on top.

    Args:
        files: one file or several; tables are merged key by key, and a recipe takes the algorithm's fields out of those
            before it.  None of them: the defaults.
        overrides: dotted path -> text: as it is for a field of text; else parsed as a TOML value where it is one.

    Raises:
        ConfigError: a file is missing or no TOML; a key is unknown; a value is out of range; values contradict.  Of
            several files it names the one that holds the value.
    """
    data, holders, _ = _layered(files)
    for key, text in (overrides or {}).items():
        options.put(data, key, text)
        holders[key] = f"--{key}"
    names = _paths(files)
    return build(data, source=str(names[-1]) if names else "configuration", holders=holders if len(names) > 1 else {})


def resolved(config: Config | Path | str | Sequence[Path | str], values: Mapping[str, Any]) -> Config:
    """A configuration, or that of some files, with a program's own values on top.

    Args:
        config: what the values go over; files as for ``load``.
        values: section -> its fields (``{"learner": {"lr": 1e-5}}``), or dotted path -> value.

    Raises:
        ConfigError: as ``load`` does; or a value is given by a name that is neither.
    """
    if isinstance(config, Config):
        if not values:
            return config
        data: dict[str, Any] = config.model_dump(exclude_unset=True)
        holders: dict[str, str] = {}
    else:
        data, holders, _ = _layered(config)
    given: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for name, value in values.items():
        if options.is_entry(name):
            entries[name] = value
        elif name == options.ENTRIES and isinstance(value, list | tuple):
            given[name] = [each.model_dump() if isinstance(each, WeightedEnvironment) else each for each in value]
        elif "." in name:
            _lay(given, options.nested(name, value), CALL, {})
        elif name in Config.model_fields and isinstance(value, Mapping):
            _lay(given, {name: value}, CALL, {})
        else:
            raise ConfigError(faults.no_section(name, value))
    _lay(data, given, CALL, holders)
    for name, value in entries.items():
        options.put_in_entry(data, name, value)
        holders[name] = CALL
    return build(data, source=CALL, holders=holders)


def read_tables(files: Path | str | Sequence[Path | str]) -> list[dict[str, Any]]:
    """The content of each file as it stands, ``[recipe]`` included, for ``laid``.  Raises ConfigError.

    Nothing in it is validated: that is done once it has been laid over what it is for (``build``).
    """
    return [_read(file) for file in _paths(files)]


def laid(tables: Sequence[Mapping[str, Any]], source: str) -> dict[str, Any]:
    """Nested fields of several tables, laid over one another as files are.  Raises ConfigError.

    Args:
        source: where they come from, for an error.
    """
    data: dict[str, Any] = {}
    holders: dict[str, str] = {}
    for table in tables:
        own = copy.deepcopy(dict(table))
        if recipes.taken_from(own, source) is not None:
            recipes.begin_anew(data, holders)
        _lay(data, own, source, holders)
    return data


def as_options(files: Path | str | Sequence[Path | str]) -> dict[str, str]:
    """What ``files`` set, as dotted path -> text: overrides with which ``load`` makes the same of another file."""
    data, _, recipe = _layered(files)
    found = {key: as_option(key, value) for key, value in _leaves(data)}
    if recipe is None:
        return found
    defaults = {name: as_option(name, _default(field)) for name, field in recipes.algorithm().items()}
    return {**defaults, **found}


def recipe_of(file: Path | str) -> recipes.Recipe | None:
    """What a file says of itself in ``[recipe]``; None where it is no recipe.  Raises ConfigError."""
    return _layered(file)[2]


def as_option(key: str, value: Any) -> str:
    """The text of an option that sets field ``key`` to ``value``."""
    return value if isinstance(value, str) and key in fields() else _toml_value(value)


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _paths(files: Path | str | Sequence[Path | str]) -> list[Path]:
    return [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]


def _layered(
    files: Path | str | Sequence[Path | str],
) -> tuple[dict[str, Any], dict[str, str], recipes.Recipe | None]:
    """The files' content, later ones over earlier ones; dotted path -> the file that holds it; the last recipe."""
    data: dict[str, Any] = {}
    holders: dict[str, str] = {}
    last = None
    for file in _paths(files):
        table = _read(file)
        if (recipe := recipes.taken_from(table, str(file))) is not None:
            recipes.begin_anew(data, holders)
            last = recipe
        _lay(data, table, str(file), holders)
    return data, holders, last


def _lay(onto: dict[str, Any], table: Mapping[str, Any], file: str, holders: dict[str, str], prefix: str = "") -> None:
    """Put ``table`` over ``onto``, key by key, and note in ``holders`` which file each key comes from."""
    for key, value in table.items():
        dotted = f"{prefix}{key}"
        is_table = options.is_table(dotted, value)
        if key in onto and options.is_table(dotted, onto[key]) != is_table:
            kinds = ("a section", "a value") if is_table else ("a value", "a section")
            raise ConfigError(f"{dotted} is {kinds[0]} in {file}, but {kinds[1]} in {holders[dotted]}: make them agree")
        holders[dotted] = file
        if is_table:
            _lay(onto.setdefault(key, {}), value, file, holders, f"{dotted}.")
        else:
            onto[key] = str(value) if isinstance(value, Path) else value  # `model.path` is text


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in a nested mapping that is no table, or is the value of one field."""
    for key, value in table.items():
        dotted = f"{prefix}{key}"
        field = fields().get(dotted)
        if options.is_table(dotted, value) and (field is None or get_origin(field.annotation) is dict):
            yield from _leaves(value, f"{dotted}.")
        else:
            yield dotted, value


def _read(file: Path) -> dict[str, Any]:
    """One file as it is.  Raises ConfigError."""
    try:
        text = file.read_text(encoding="utf-8")
        data = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"configuration {file} does not exist; configs/demo.toml is one to start from") from None
    except IsADirectoryError:
        raise ConfigError(f"configuration {file} is a folder; name a TOML file") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"configuration {file} is no valid {'JSON' if file.suffix == '.json' else 'TOML'}: {exc}"
        ) from None
    except OSError as exc:
        raise ConfigError(f"configuration {file} cannot be read: {exc.strerror}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"configuration {file} holds a {type(data).__name__}, no sections; name a run's config.json")
    return data


def build(
    data: Mapping[str, Any], *, source: str = "configuration", holders: Mapping[str, str] | None = None
) -> Config:
    """Validate a nested mapping.  Raises ConfigError with one line per fault, each with its dotted path.

    Args:
        data: sections and their fields.
        source: where all of it comes from.
        holders: dotted path -> where this one comes from, for the error to name; needed if there are several.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as exc:
        raise ConfigError("\n".join(faults.line(e, source, holders or {}) for e in exc.errors())) from None


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML, each field with its description."""
    lines: list[str] = []
    for name, section in _sections(config):
        lines.append(name)
        for field, about in type(section).model_fields.items():
            if isinstance(getattr(section, field), Section):
                continue  # has a header of its own
            text = f"{field} = {_toml_value(getattr(section, field))}"
            meaning = "; ".join(filter(None, (about.description, _choices(about))))
            lines.append(f"{text}  # {meaning}" if meaning else text)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _sections(config: Config) -> Iterator[tuple[str, Section]]:
    """(header, section) of all that decides something: ``[[environments]]`` stand in place of ``[environment]``, and
    ``[learner.lora]`` after ``[learner]``."""
    for name in Config.model_fields:
        section = getattr(config, name)
        if name == options.ENTRIES:
            yield from ((f"[[{name}]]", entry) for entry in section)
        elif name != "environment" or not config.environments:
            yield f"[{name}]", section
            for inner in type(section).model_fields:
                if isinstance(value := getattr(section, inner), Section):
                    yield f"[{name}.{inner}]", value


def _choices(field: FieldInfo) -> str:
    """The names that a field takes, where it also takes ``package.module:name``."""
    door = door_of(field)
    return f"{', '.join(door.choices())}, or package.module:name" if door is not None else ""


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, Schedule):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    return _quoted(str(value))


def _quoted(text: str) -> str:
    """As JSON, except that TOML wants the control character DEL escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
