"""Wording of configuration errors: one line for each, with the dotted path, the value, its file and the way out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from atpo_async.config import suggestions
from atpo_async.config.schema import Config, fields


def line(error: Any, source: str, holders: Mapping[str, str]) -> str:
    """One line for one of pydantic's errors.

    Args:
        error: as in ``ValidationError.errors()``.
        source: where the whole configuration comes from.
        holders: dotted path -> where its value comes from, if there are several.
    """
    path = ".".join(str(p) for p in error["loc"])
    value = error.get("input")
    kind = error["type"]
    holder = _holder(path, holders)
    where = f" in {holder}" if holder else ""
    if kind == "extra_forbidden":
        near = suggestions.near(path, fields()) if "." in path else suggestions.sections(path, Config.model_fields)
        meant = f"did you mean {', '.join(near)}?  K" if near else "k"
        known = f"{meant}nown in {_section_of(path)}: {_known(path)}"
        return f"{path}: unknown key (value {_cut(value)}) in {holder or source}; {known}"
    if kind == "value_error" and not path:
        return f"{error['ctx']['error']}{_sides(str(error['ctx']['error']), holders)}"
    bounds = {
        "greater_than_equal": ("ge", ">="),
        "greater_than": ("gt", ">"),
        "less_than_equal": ("le", "<="),
        "less_than": ("lt", "<"),
    }
    if kind in bounds:
        key, sign = bounds[kind]
        return f"{path} must be {sign} {_number(error['ctx'][key])}, got {_shown(value)}{where}"
    if kind in ("bool_parsing", "bool_type"):
        return f"{path} must be true or false, got {value!r}{where}"
    if kind == "string_pattern_mismatch" and path == "run.name":
        return (
            f"run.name is the name of a folder in run.dir: letters, digits, '.', '_' and '-', the first one a letter "
            f"or a digit; got {value!r}{where}"
        )
    if kind == "door":
        said = str(error["msg"]).replace("environments.name", path, 1)
        return said.replace(" is unknown", f"{where} is unknown", 1)
    if kind == "literal_error":
        return f"{path} must be one of {error['ctx']['expected']}, got {value!r}{where}"
    if kind in ("tuple_type", "list_type") and path == "environments":
        return f"environments must be a list of tables, [[environments]] with name and weight, got {_cut(value)}{where}"
    if kind == "missing":
        return f"{path} is missing{where}: every entry of [[environments]] has one"
    if kind in ("tuple_type", "list_type"):
        example = _example(path, value)
        return f"{path} must be a list, as in {example} (on the command line '{example}'), got {_cut(value)}{where}"
    if kind == "too_short":
        return f"{path} must name one at least, got {_cut(value)}{where}"
    wanted = next((words for kinds, words in WANTED if kind in kinds), None)
    if wanted is not None:
        return f"{path} must be {wanted.format(section=path)}, got {_cut(value)}{where}"
    return f"{path}: {error['msg']}, got {_cut(value)}{where}"


def no_section(name: str, value: Any) -> str:
    """One line for a value that a program gave by a name that is neither a section nor a dotted path."""
    if name in Config.model_fields and name != "environments":
        first = next(field for field in fields() if field.startswith(f"{name}.")).partition(".")[2]
        return f"{name} = {_cut(value)}: is a section, and takes its fields: {name}={{{first!r}: …}}"
    near = suggestions.near(name, fields()) or suggestions.sections(name, Config.model_fields)
    meant = f"; did you mean {', '.join(near)}?" if near else ""
    return (
        f"{name} = {_cut(value)}: values are given by section, as in learner={{'lr': 1e-5}}, or by dotted path, as in "
        f"**{{'learner.lr': 1e-5}}{meant}"
    )


WANTED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("int_parsing", "int_type", "int_from_float"), "a whole number"),
    (("float_parsing", "float_type", "finite_number"), "a number"),
    (("string_type",), "text"),
    (("model_type", "model_attributes_type", "dict_type"), "a section, [{section}]"),
)
"""Kinds of pydantic's errors -> the value that the field takes, in a user's words."""


def _example(path: str, value: Any) -> str:
    """A list that the field at ``path`` takes: its default, or one of its own element type, made of ``value`` if it is
    text and fits."""
    known = fields().get(path)
    if known is None:
        return "[0, 1]"
    first, *_ = get_args(known.annotation) or (int,)
    if _plain(first) is str:
        fits = isinstance(value, str) and value and value.isprintable() and len(value) <= 40 and "'" not in value
        return json.dumps([value if fits else "name"], ensure_ascii=False)
    return json.dumps(list(known.default) or [0, 1])


def _plain(annotation: Any) -> Any:
    """The type without its constraints."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _cut(value: Any) -> str:
    """A value, shortened: it may be a whole section."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _number(value: float) -> str:
    """A whole number without decimals and with its digits grouped, as a configuration takes it: 1_048_576."""
    return f"{int(value):_}" if math.isfinite(value) and value == int(value) else f"{value:g}"


def _shown(value: Any) -> str:
    return _number(value) if type(value) is int else repr(value)


def _holder(path: str, holders: Mapping[str, str]) -> str | None:
    """Where the value of a dotted path, or of the section that it lies in, comes from."""
    while path and path not in holders:
        path = path.rpartition(".")[0]
    return holders.get(path)


def _sides(message: str, holders: Mapping[str, str]) -> str:
    """Where the values of the fields that a contradiction names come from."""
    named = dict.fromkeys(re.findall(r"(?<![\w.-])[a-z]+(?:\.[a-z_]+)+", message))
    known = [f"{name}: {holders[name]}" for name in named if name in holders]
    return f"  ({'; '.join(known)})" if known else ""


def _section_of(path: str) -> str:
    section = path.rpartition(".")[0]
    return f"[{section}]" if section else "the file"


def _known(path: str) -> str:
    model: type[BaseModel] = Config
    for part in path.split(".")[:-1]:
        if part.isdigit():
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        annotation = next(iter(get_args(annotation)), annotation)  # of a list, its entries
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return ", ".join(model.model_fields)
