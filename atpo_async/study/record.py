"""The plan of a study as its folder keeps it, and what differs between two of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async import config as configuration
from atpo_async.core.errors import SetupError
from atpo_async.study.grid.axes import Axis
from atpo_async.study.grid.choosing import Choosing
from atpo_async.study.grid.names import CORRECTION, LAG, TASK
from atpo_async.study.plan import FREE, Plan, joined, leaving, settings_of


@dataclass(frozen=True, kw_only=True)
class Record:
    """What ``study.json`` holds."""

    name: str
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    base: Mapping[str, Any]
    """Dotted path -> value of what all cells have in common, resolved."""
    own: Sequence[Mapping[str, Any]]
    over: Mapping[str, str]
    choosing: Choosing | None = None
    by_tokens: bool = False
    arguments: tuple[str, ...] = ()

    @classmethod
    def of(cls, plan: Plan) -> Record:
        """Of a plan."""
        return cls(
            name=plan.name,
            axes=plan.axes,
            seeds=plan.seeds,
            base=leaving(settings_of(plan.base), (*FREE, *plan.decided())),
            own=plan.own,
            over=plan.over,
            choosing=plan.choosing,
            by_tokens=plan.by_tokens,
            arguments=plan.arguments,
        )

    def plan(self) -> Plan:
        """The plan of the whole grid."""
        return Plan(
            name=self.name,
            axes=self.axes,
            seeds=self.seeds,
            own=self.own,
            over=self.over,
            choosing=self.choosing,
            by_tokens=self.by_tokens,
            arguments=self.arguments,
        )

    def to_json(self) -> dict[str, Any]:
        """As ``read_record`` reads it."""
        choosing = self.choosing
        return {
            "kind": self.name,
            "axes": [
                {
                    "name": axis.name,
                    "values": list(axis.values),
                    "words": list(axis.words),
                    "layers": {value: list(tables) for value, tables in axis.layers.items()},
                    "reference": axis.reference,
                }
                for axis in self.axes
            ],
            "seeds": list(self.seeds),
            "by_tokens": self.by_tokens,
            "choosing": None
            if choosing is None
            else {
                "field": choosing.field,
                "values": list(choosing.values),
                "by": choosing.by,
                "at": {name: list(values) for name, values in choosing.at.items()},
                "seeds": choosing.seeds,
                "criterion": choosing.criterion,
            },
            "words": list(self.arguments),
            "own": list(self.own),
            "over": dict(self.over),
            "base": dict(self.base),
        }


def read_record(file: Path) -> Record:
    """Of a study's folder, of this program or an earlier one.  Raises SetupError where it is damaged."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        seeds = tuple(int(seed) for seed in data["seeds"])
        axes = tuple(_axis(each) for each in data["axes"]) if "axes" in data else _axes_of_old(data)
        if not seeds or not all(axis.values for axis in axes):
            raise ValueError("no grid")
        base = dict(data["base"])
        return Record(
            name=str(data["kind"]),
            axes=axes,
            seeds=seeds,
            base=base,
            own=list(data["own"]) if "own" in data else [_nested(base | {"run.seed": seeds[0]})],
            over={str(name): str(text) for name, text in data.get("over", {}).items()},
            choosing=_choosing(data.get("choosing")),
            by_tokens=bool(data.get("by_tokens", False)),
            arguments=tuple(str(word) for word in data.get("words", ())),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise SetupError(
            f"{file} is damaged ({type(exc).__name__}: {exc}); use another --out, or delete the folder"
        ) from None


def _axis(data: Mapping[str, Any]) -> Axis:
    return Axis(
        name=str(data["name"]),
        values=tuple(map(str, data["values"])),
        words=tuple(map(str, data["words"])),
        layers={str(value): list(tables) for value, tables in data["layers"].items()},
        reference=str(data["reference"]),
    )


def _axes_of_old(data: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Of a program whose studies had these two axes."""
    return (
        Axis(name=LAG, values=tuple(str(int(lag)) for lag in data["lags"])),
        Axis(name=CORRECTION, values=tuple(map(str, data["corrections"]))),
    )


def _choosing(data: Mapping[str, Any] | None) -> Choosing | None:
    if data is None:
        return None
    return Choosing(
        field=str(data["field"]),
        values=tuple(map(str, data["values"])),
        by=str(data["by"]),
        at={str(name): tuple(map(str, values)) for name, values in data["at"].items()},
        seeds=int(data["seeds"]),
        criterion=str(data["criterion"]),
    )


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in settings.items():
        *sections, name = path.split(".")
        here = found
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = value  # without a section: a list of them
    return found


# --- differences --------------------------------------------------------------------------------------------------


def differences(was: Record, now: Record, *, part: bool) -> list[str]:
    """Why a study cannot go on as another one; none where it can.

    Args:
        part: the grid of ``now`` may be a part of that of ``was``, and no more; else it is to hold all of it.
    """
    found = []
    if was.name != now.name:
        found.append(f"its name was {was.name!r}, is {now.name!r}")
    names = [[axis.name for axis in each.axes] for each in (was, now)]
    if names[0] != names[1]:
        return [*found, f"its axes were {joined(names[0])}, are {joined(names[1])}"]
    for old, new in zip(was.axes, now.axes, strict=True):
        whole, some = (old, new) if part else (new, old)
        if not set(some.values) <= set(whole.values):
            found.append(f"--axis {old.name} had {joined(old.values)}, has {joined(new.values)}")
        for value in old.values:
            if value in new.values and list(old.layers.get(value, ())) != list(new.layers.get(value, ())):
                found.append(f"the file of {old.name} {value} has changed")
    whole_seeds, some_seeds = (was.seeds, now.seeds) if part else (now.seeds, was.seeds)
    if not set(some_seeds) <= set(whole_seeds):
        found.append(f"--seeds had {joined(was.seeds)}, has {joined(now.seeds)}")
    if was.choosing != now.choosing and not part:
        found.append(f"its first stage was {_said(was.choosing)}, is {_said(now.choosing)}")
    if was.by_tokens != now.by_tokens:
        found.append(f"success was compared by {'tokens' if was.by_tokens else 'steps'}, and is by the other now")
    return found + _settings_differences(was, now)


def _settings_differences(was: Record, now: Record) -> list[str]:
    found = []
    if any(axis.name == TASK for axis in now.axes):  # the base is that of the first task, whichever comes first
        if list(was.own) != list(now.own):
            found.append("its configuration files have changed")
    else:
        found.append(listed_differences(with_later_fields(was.base, now.base), now.base))
    was_over, now_over = ({name: v for name, v in each.over.items() if not _is_free(name)} for each in (was, now))
    if any(axis.layers for axis in now.axes):  # options go over files, and are seen in the base only there
        said = [name for name in {**was.base, **now.base} if was.base.get(name) != now.base.get(name)]
        over = ({name: text for name, text in each.items() if name not in said} for each in (was_over, now_over))
        found.append(listed_differences(*over))
    return list(dict.fromkeys(line for line in found if line))


def _is_free(name: str) -> bool:
    return any(name == free or (free.endswith("*") and name.startswith(free[:-1])) for free in FREE)


def with_later_fields(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an earlier program, with the fields of ``now`` that it had not: it did what they do by default."""
    defaults = settings_of(configuration.Config())
    return {path: defaults[path] for path in now if path in defaults and path not in was} | dict(was)


def listed_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``learner.lr was 0.1, is 0.2; …``; empty where nothing differs."""
    paths = [*now, *(path for path in was if path not in now)]
    return "; ".join(
        f"{path} was {was.get(path)!r}, is {now.get(path)!r}" for path in paths if was.get(path) != now.get(path)
    )


def _said(choosing: Choosing | None) -> str:
    return "none" if choosing is None else " ".join(choosing.words)
