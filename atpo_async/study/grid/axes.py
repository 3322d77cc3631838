"""The axes of a study: what one varies, the values it takes, and what each value sets.

An axis is a dotted field of the configuration, or one of these names:

  lag          every batch exactly so many learner versions old
  correction   a named setting of ``[correction]`` (``grid.corrections``)
  recipe       a file of ``configs/recipes`` by its name, or any file; on a demo with what its scale asks for besides
  config       any file, laid over the others
  task         a file that the others are laid over: ``configs/<name>.toml`` by its name, or any file
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atpo_async.config import fields, parse_value, read_tables, unknown_option
from atpo_async.config.recipes import TABLE, taken_from
from atpo_async.core.errors import ConfigError
from atpo_async.study.grid.corrections import CORRECTIONS
from atpo_async.study.grid.names import CORRECTION, FILES, LAG, NAMED, RECIPE, TASK

OWN: dict[str, str] = {
    "run.seed": "--seeds",
    "run.name": "--out",
    "run.dir": "--out",
    "staleness.exact_lag": "--axis lag=",
}
"""Fields that a study sets by itself, and the option that decides them."""

CONFIGS = Path("configs")
RECIPES = CONFIGS / "recipes"
DEMOS = ("demo", "demo_agent")
"""Tasks of the scale that ``configs/recipes/demo_scale`` is for."""

PREFERRED_REFERENCE = {CORRECTION: "none", RECIPE: "at2po"}
"""The value of an axis that the others are compared with, where it has it; else its first."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a grid."""

    name: str
    values: tuple[str, ...]
    """As text, numbers in one form; of a file what a reader calls it."""
    layers: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Value -> the content of its files, where values are files."""
    words: tuple[str, ...] = ()
    """The values as the user gave them, where that is another text."""
    reference: str = ""
    """The value that the others are compared with; the first one where left out."""

    @property
    def numbers(self) -> list[float] | None:
        """The values as numbers; None where one is none."""
        try:
            return [float(value) for value in self.values]
        except ValueError:
            return None

    @property
    def against(self) -> str:
        """The value that the others are compared with."""
        preferred = self.reference or PREFERRED_REFERENCE.get(self.name, "")
        return preferred if preferred in self.values else self.values[0]

    def value_named(self, word: str) -> str | None:
        """The value that the user's word names: as it stands, by the path of its file, or as a number in another form;
        None where it names none."""
        return next((text for text in (word, _called(word), canonical(word)) if text in self.values), None)

    @property
    def is_compared(self) -> bool:
        """Whether success at its values is success at one and the same task."""
        sections = {section for tables in self.layers.values() for table in tables for section in table}
        sections |= {self.name.partition(".")[0]}
        return self.name != TASK and not {"environment", "environments"} & sections

    @property
    def text(self) -> str:
        """As on a command line."""
        return f"{self.name}={','.join(self.words or self.values)}"


def parse_axis(text: str, *, root: Path, on_demo: bool = False, option: str = "--axis") -> Axis:
    """``learner.lr=2e-4,4e-4`` as an axis.  Raises ConfigError naming the axis and the value.

    Args:
        root: of the checkout, where configs/ is.
        on_demo: recipes come with what the demos' scale asks for.
        option: under which the user gave it.
    """
    name, equals, listed = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise ConfigError(f"{option} {text}: an axis is NAME=VALUE,VALUE, as in {option} learner.lr=2e-4,4e-4")
    if name in OWN:
        raise ConfigError(f"{option} {name}: a study sets that itself; use {OWN[name]}")
    if name not in NAMED and name not in fields():
        raise ConfigError(_unknown_axis(name, option))
    words = split_values(listed, f"{option} {text}")
    if name in FILES:
        layers = dict(_layer(name, word, root=root, on_demo=on_demo, option=option) for word in words)
        if len(layers) < len(words):
            names = [_called(word) for word in words]
            raise ConfigError(
                f"{option} {text}: {_repeated(names)!r} is there twice (a file is called by its name); name each once"
            )
        return Axis(name=name, values=tuple(layers), layers=layers, words=tuple(words))
    values = [_value(name, word, option) for word in words]
    if len(set(values)) < len(values):
        raise ConfigError(f"{option} {text}: {_repeated(values)} is given twice; name each value once")
    axis = Axis(name=name, values=tuple(values))
    return Axis(name=name, values=tuple(sorted(values, key=float))) if axis.numbers is not None else axis


def _unknown_axis(name: str, option: str) -> str:
    if "." in name:
        return unknown_option(name).replace(f"--{name}", f"{option} {name}", 1)
    return f"{option} {name} is no axis; an axis is a field of the configuration, as learner.lr, or {', '.join(NAMED)}"


def split_values(listed: str, where: str) -> list[str]:
    """The values between commas; a comma within brackets or quotes is part of a value."""
    words, word, depth, quote = [], "", 0, ""
    for sign in listed:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        else:
            depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and not depth and not quote:
            words.append(word.strip())
            word = ""
        else:
            word += sign
        if depth < 0:
            break
    if quote or depth:
        raise ConfigError(
            f"{where}: a bracket or quote has no partner; a value that has commas stands in brackets or quotes, as in "
            '[1, 2] or "a, b"'
        )
    words.append(word.strip())
    if not all(words):
        raise ConfigError(f"{where}: there is no value {'' if listed else 'at all '}between two commas or at an end")
    return words


def _value(name: str, word: str, option: str) -> str:
    """One value of an axis that is no file, in one form for each."""
    if name == CORRECTION:
        if word not in CORRECTIONS:
            raise ConfigError(f"{option} {name}={word}: {word!r} is unknown; known: {', '.join(CORRECTIONS)}")
        return word
    if name == LAG:
        if not word.isdecimal():
            raise ConfigError(
                f"{option} {name}={word}: {word!r} is no lag; lags are learner versions from 0 on, as in 0,2,8"
            )
        return str(int(word))
    return canonical(word)


def canonical(word: str) -> str:
    """The text of a value, one for each value: 3e-4 and 0.0003 are the same."""
    value = parse_value(word)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, list):
        return json.dumps(value)
    if isinstance(value, dict):  # as an option takes it
        inner = {
            key: json.dumps(each) if isinstance(each, str) else canonical(str(each)) for key, each in value.items()
        }
        return f"{{ {', '.join(f'{key} = {text}' for key, text in inner.items())} }}"
    return str(value)


def _repeated(values: Sequence[str]) -> str:
    return next(value for i, value in enumerate(values) if value in values[:i])


# --- files --------------------------------------------------------------------------------------------------------


def _layer(name: str, word: str, *, root: Path, on_demo: bool, option: str) -> tuple[str, list[dict[str, Any]]]:
    """(what a reader calls the file, the content of it and of what goes with it)."""
    path = _found(name, word, root=root, option=option)
    files = [path]
    scale = root / RECIPES / "demo_scale" / path.name
    if name == RECIPE and on_demo and scale.is_file() and path.parent.resolve() == (root / RECIPES).resolve():
        files.append(scale)
    try:
        tables = read_tables(files)
        about = taken_from(dict(tables[0]), str(path))
    except ConfigError as exc:
        raise ConfigError(f"{option} {name}={word}: {exc}") from None
    if name == RECIPE and about is None:
        raise ConfigError(
            f"{option} {name}={word}: {path} is no recipe, for it has no [{TABLE}] table (docs/recipes.md): give it "
            f"one, or lay it over the others' settings with {option} config={word}"
        )
    return _called(word), tables


def _called(word: str) -> str:
    return Path(word).stem if word.endswith((".toml", ".json")) else word


def _found(name: str, word: str, *, root: Path, option: str) -> Path:
    """The file of a value: as it stands, or by its name in ``configs``."""
    folder = {RECIPE: root / RECIPES, TASK: root / CONFIGS}.get(name)
    if word.endswith((".toml", ".json")):
        # Those of the checkout are found from everywhere, as what comes with a name (`placement`) is.
        if (path := Path(word)).is_file() or (path := root / word).is_file():
            return path
        raise ConfigError(f"{option} {name}={word}: there is no file {word} here")
    if folder is None:
        raise ConfigError(f"{option} {name}={word}: {word!r} is no file; name a TOML file")
    if (path := folder / f"{word}.toml").is_file():
        return path
    known = recipes(root) if name == RECIPE else sorted(path.stem for path in folder.glob("*.toml"))
    raise ConfigError(f"{option} {name}={word}: {word!r} is unknown; there are {', '.join(known) or 'none here'}")


def recipes(root: Path) -> list[str]:
    """Names of the recipes of a checkout, AT2PO's first."""
    names = sorted(path.stem for path in (root / RECIPES).glob("*.toml"))
    return sorted(names, key=lambda name: (not name.startswith("at2po"), name))
