"""Dotted options of the command line: finds them among the arguments and parses their texts as values of fields."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from atpo_async.config import suggestions
from atpo_async.config.doors import DOORS, SINK, TERM, TOKEN_WEIGHT
from atpo_async.config.schema import Config, coefficient_field, fields, options_table
from atpo_async.config.sections.coefficients import looks_like_a_schedule
from atpo_async.config.sections.environments import WeightedEnvironment
from atpo_async.core.doors import Door
from atpo_async.core.errors import ConfigError

BY_NAME: dict[str, Door[Any]] = {door.options_by_name: door for door in DOORS if door.options_by_name}
"""Table that has a table of options for each name -> the door of these names."""
SCHEDULED = frozenset({TERM.options_by_name, TOKEN_WEIGHT.options_by_name})
"""Tables in which a number may be a schedule."""

_TRUTHS = frozenset({"true", "false", "yes", "no", "on", "off", "1", "0"})


def split_options(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take dotted options (``--a.b value``, ``--a.b=value``) out of a command line.

    Returns what is left, in order, and dotted path -> text.  A truth value may be left out: then it is true.  Raises
    ConfigError for an option that is no field, or lacks its value; and where a truth value is followed by a word that
    can neither be one nor a file.
    """
    rest: list[str] = []
    options: dict[str, str] = {}
    known = fields()
    i = 0
    while i < len(argv):
        word = argv[i]
        i += 1
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            rest.append(word)
            continue
        name = _with_underscores(name)
        if name not in known and not (options_table(name) or coefficient_field(name) or _entry_field(name)):
            raise ConfigError(unknown_option(name))
        if not equals:
            annotation = _annotation(name)
            given = i < len(argv) and not argv[i].startswith("--")
            truth = _is_truth(annotation)
            if truth:
                words = _TRUTHS | _words(annotation)
                # The next word may be the configuration file; the command usually comes before all options.
                if given and rest and argv[i].lower() not in words and not _may_be_a_path(argv[i]):
                    others = "".join(f", nor {word}" for word in sorted(_words(annotation)))
                    raise ConfigError(
                        f"--{name} {argv[i]}: {argv[i]!r} is neither true nor false{others}, nor a file here; --{name} "
                        f"alone is true, --{name} false is not"
                    )
                given = given and argv[i].lower() in words
            if given:
                value = argv[i]
                i += 1
            elif truth or annotation is None:
                value = "true"
            else:
                raise ConfigError(f"--{name} needs a value")
        options[name] = value
    return rest, options


def _with_underscores(name: str) -> str:
    """The dotted path of an option that may be spelt with hyphens; a label, and a part's own name, may have some."""
    if is_entry(name):
        return name
    plain = name.replace("-", "_")
    table = options_table(plain)
    if table not in BY_NAME:
        return plain
    part, dot, option = name[len(table) + 1 :].rpartition(".")
    return f"{table}.{part}{dot}{option.replace('-', '_')}"


def _may_be_a_path(word: str) -> bool:
    return any(sign in word for sign in "./\\") or Path(word).exists()


def put(data: dict[str, Any], dotted: str, text: str) -> None:
    """Put the value of one option into a nested mapping.  Raises ConfigError."""
    if is_entry(dotted):
        put_in_entry(data, dotted, _option_value(dotted, text))
        return
    if dotted == ENTRIES:
        data[ENTRIES] = parse_value(text)
        return
    *parents, leaf = _keys(dotted)
    if not parents:
        raise ConfigError(f"option --{dotted} names no field; use --section.field, for instance --learner.lr 1e-5")
    here: Any = data
    for number, part in enumerate(parents):
        if coefficient_field(".".join(parents[: number + 1])) and not isinstance(here.get(part), dict):
            here[part] = {}  # a number so far
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            raise ConfigError(f"option --{dotted}: {part} is a value, not a section")
    here[leaf] = _option_value(dotted, text)


ENTRIES = "environments"
"""The field that is a list of sections."""


def is_entry(dotted: str) -> bool:
    """Whether a dotted path leads into an entry of ``[[environments]]``: ``environments.0.weight``."""
    return dotted.startswith(f"{ENTRIES}.")


def _entry_field(dotted: str) -> str | None:
    """``weight`` of ``environments.0.weight``, ``options.hops`` of ``environments.easy.options.hops``; None for no
    field of an entry."""
    if not is_entry(dotted):
        return None
    _, _, field = dotted.removeprefix(f"{ENTRIES}.").rpartition(".options.")
    if field and "." not in field:
        return f"options.{field}"
    field = dotted.rpartition(".")[2]
    return field if dotted.count(".") > 1 and field in WeightedEnvironment.model_fields else None


def put_in_entry(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a field of an entry, which is named by its number from 0 or by its label.  Raises ConfigError."""
    field = _entry_field(dotted)
    if field is None:
        known = ", ".join(WeightedEnvironment.model_fields)
        raise ConfigError(f"--{dotted} names no field of an environment; as in --{ENTRIES}.0.weight 2: {known}")
    which = dotted.removeprefix(f"{ENTRIES}.").removesuffix(f".{field}")
    entries = [dict(each) for each in data.get(ENTRIES) or ()]
    labels = [_label(each) for each in entries]
    number = labels.index(which) if which in labels else int(which) if which.isdecimal() else -1
    if not 0 <= number < len(entries):
        there = ", ".join(f"{at} ({label})" for at, label in enumerate(labels))
        has = f"the configuration's are {there}" if there else "the configuration has no [[environments]]"
        raise ConfigError(f"--{dotted}: there is no environment {which!r}; {has}")
    if field.startswith("options."):
        entries[number]["options"] = dict(entries[number].get("options") or {}) | {field.partition(".")[2]: value}
    else:
        entries[number][field] = value
    data[ENTRIES] = entries


def _label(entry: dict[str, Any]) -> str:
    """Of an entry as a file has it, whatever is wrong with it."""
    try:
        return WeightedEnvironment.model_validate(entry).label
    except ValueError:
        return str(entry.get("label", ""))


def is_table(dotted: str, value: Any) -> bool:
    """Whether a value is a table whose keys are fields or options of their own, and no schedule, which is one value."""
    if not isinstance(value, Mapping) or coefficient_field(dotted) == dotted:
        return False
    return not (looks_like_a_schedule(value) and options_table(dotted) in SCHEDULED)


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """The nested mapping that holds one value."""
    for key in reversed(_keys(dotted)):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def _keys(dotted: str) -> list[str]:
    """The keys of a dotted path.  The name of a user's own metrics sink, or term, has dots, and is one key."""
    table = options_table(dotted)
    if table is None or (door := BY_NAME.get(table)) is None:
        return dotted.split(".")
    part, _, name = dotted.removeprefix(f"{table}.").rpartition(".")
    if not part:
        what = "a sink" if door is SINK else door.what
        raise ConfigError(f"option --{dotted} names no option of {what}: --{table}.{_word(table)}NAME VALUE")
    return [*table.split("."), part, name]


def _word(table: str) -> str:
    """``SINK.`` in ``--metrics.options.SINK.NAME``; empty for a table that holds the options of one part."""
    door = BY_NAME.get(table)
    return "" if door is None else f"{door.what.rpartition(' ')[2].upper()}."


def _option_value(dotted: str, text: str) -> Any:
    """The value that the text of an option stands for.  Raises ConfigError where it stands for none."""
    annotation = _annotation(dotted)
    value = parse_value(text)
    if value is None and type(None) in get_args(annotation):
        return None
    if _is_text(annotation):
        return text  # --run.name 7 is a name; "none" is a word of search.strategy
    if get_origin(annotation) is dict:
        if text == "{}":
            return {}
        raise ConfigError(_one_by_one(dotted, text))
    if annotation is None:  # an option inside a table of options: whatever TOML has for those
        scheduled = options_table(dotted) in SCHEDULED and looks_like_a_schedule(value)
        return value if scheduled or isinstance(value, bool | int | float | str) else text
    if not text:
        raise ConfigError(f"--{dotted} needs a value")
    return text if value is None else value


def _one_by_one(table: str, text: str) -> str:
    """The error for ``--environment.options TEXT``, with the options that were meant where TEXT can be read."""
    try:
        said = json.loads(text)
    except ValueError:
        said = parse_value(text)
    meant = f"--{table}.{_word(table)}NAME VALUE"
    if isinstance(said, dict) and said:
        meant = " ".join(
            f"--{table}.{name} {json.dumps(value) if isinstance(value, bool | int | float) else value}"
            for name, value in list(said.items())[:8]
        )
    return f"--{table} {text[:80]}: options are given one by one: {meant}"


def _annotation(dotted: str) -> Any:
    """The type of a field; None for an option inside a table of options, and for an unknown name."""
    if (field := _entry_field(dotted)) is not None:
        return None if "." in field else WeightedEnvironment.model_fields[field].annotation
    info = fields().get(dotted)
    return None if info is None else info.annotation


def _is_truth(annotation: Any) -> bool:
    """Whether a field is true or false, or one of a few words instead."""
    return annotation is bool or (get_origin(annotation) in (Union, UnionType) and bool in get_args(annotation))


def _words(annotation: Any) -> frozenset[str]:
    """The words that a field takes besides true and false."""
    return frozenset(word for part in get_args(annotation) if get_origin(part) is Literal for word in get_args(part))


def _is_text(annotation: Any) -> bool:
    """Whether a field takes text: str, Path, a fixed list of words, or one of these or none."""
    if get_origin(annotation) is Literal:
        return True
    if get_origin(annotation) in (Union, UnionType):
        return all(part is type(None) or _is_text(part) for part in get_args(annotation))
    return annotation is str or annotation is Path


def parse_value(text: str) -> Any:
    """A TOML value, ``none`` for None, or the text itself."""
    if text.lower() in ("none", "null"):
        return None
    if text in ("True", "False"):
        return text == "True"
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def get(config: Config, dotted: str) -> Any:
    """The value of a dotted field.  Raises ConfigError naming near matches where there is none."""
    here: Any = config
    for part in dotted.split("."):
        if not isinstance(here, BaseModel) or part not in type(here).model_fields:
            raise ConfigError(unknown_option(dotted))
        here = getattr(here, part)
    return here


def unknown_option(name: str) -> str:
    """One line that names an option that is no field, and the ones the user may have meant."""
    if name == ENTRIES or is_entry(name):
        known = ", ".join(WeightedEnvironment.model_fields)
        return f"--{name}: a field of one environment is set by --{ENTRIES}.NUMBER.FIELD VALUE; known: {known}"
    if name in Config.model_fields or any(field.startswith(f"{name}.") for field in fields()):
        first = next(field for field in fields() if field.startswith(f"{name}."))
        return f"--{name}: is a section and takes no value; name a field of it, for instance --{first}"
    near = suggestions.near(name, fields())
    if near:
        return f"--{name}: unknown option; did you mean {', '.join('--' + field for field in near)}?"
    return f"--{name}: unknown option; `atpo config CONFIG` lists every field"
