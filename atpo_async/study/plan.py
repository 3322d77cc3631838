"""The grid of a study: axes and seeds over a configuration, each cell a run of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from atpo_async import config as configuration
from atpo_async.config import Config
from atpo_async.core.errors import ConfigError
from atpo_async.study.cells import Cell
from atpo_async.study.grid.axes import OWN, Axis
from atpo_async.study.grid.choosing import Choosing
from atpo_async.study.grid.corrections import CORRECTIONS, DECIDED
from atpo_async.study.grid.names import CONFIG, CORRECTION, LAG, RECIPE, TASK

ASK_GRACE_S = 1.0
"""supervisor.stop_grace_s of a cell: a cell that is interrupted begins anew, so its roles have nothing to save."""

MAX_SEED = 2**31
CHOOSING_SEEDS = 1000
"""Above ``run.seed`` begin the seeds of the first stage: no seed of the results is ever one of them."""
LEAST_STEPS = 3
"""Steps over which sampled success is averaged."""

FREE: tuple[str, ...] = ("supervisor.*", "links.*", "metrics.*", "ray.*", "run.seed")
"""Fields that may change when a study goes on: none affects what a cell learns; seeds are compared as a list."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The grid over a configuration."""

    name: str
    """Of the study: of its output files, and between the marks of a page."""
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    own: Sequence[Mapping[str, Any]]
    """The content of the files that all cells have in common."""
    over: Mapping[str, str] = field(default_factory=dict)
    """Dotted path -> text of what the user gave as options: they go over every file."""
    choosing: Choosing | None = None
    """The first stage, where a field's value is chosen."""
    chosen: Mapping[str, str] = field(default_factory=dict)
    """Value of ``choosing.by`` -> the value that was chosen for it; none as long as the first stage runs."""
    by_tokens: bool = False
    """Success is compared at equal tokens generated, not after equal steps."""
    arguments: tuple[str, ...] = ()
    """Files and options that make the same on a command line."""
    part_of: Plan | None = None
    """The study of whose results this is a part, or whose values it compares with other references; None where it is
    the study itself."""
    _settings: dict[Cell, dict[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def base(self) -> Config:
        """What all cells have in common, with the first value of the axis ``task`` where there is one."""
        return configuration.build(self._layers({axis.name: axis.values[0] for axis in self.axes if axis.name == TASK}))

    def axis(self, name: str) -> Axis | None:
        """None where the grid has no such axis."""
        return next((axis for axis in self.axes if axis.name == name), None)

    @property
    def num_groups(self) -> int:
        """Cells of one seed."""
        return math.prod(len(axis.values) for axis in self.axes)

    def cells(self) -> list[Cell]:
        """The whole grid seed by seed: a study that is stopped early then has all of it once, rather than half."""
        return [Cell(at=at, seed=seed) for seed in self.seeds for at in combinations(self.axes)]

    def first_stage(self) -> list[Cell]:
        """The cells from which a field's value is chosen, seed by seed; none where nothing is chosen."""
        if self.choosing is None:
            return []
        first = self.seeds[0] + CHOOSING_SEEDS
        axes = [self._narrowed(axis) for axis in self.axes]
        candidates = Axis(name=self.choosing.field, values=self.choosing.values)
        return [
            Cell(at=at, seed=seed, stage="choose")
            for seed in range(first, first + self.choosing.seeds)
            for at in combinations((*axes, candidates))
        ]

    def of_one_seed(self) -> list[Cell]:
        """Every setting that a cell has, once: of the first stage, where there is one, and of the grid."""
        choosing = self.first_stage()
        return [
            *choosing[: len(choosing) // (self.choosing.seeds if self.choosing else 1)],
            *self.cells()[: self.num_groups],
        ]

    def _narrowed(self, axis: Axis) -> Axis:
        assert self.choosing is not None
        return replace(axis, values=self.choosing.at.get(axis.name, axis.values))

    def decided(self) -> dict[str, str]:
        """Field -> the option that decides it, for all fields that are not the user's to set besides."""
        found = {name: option for name, option in OWN.items() if name != "run.seed"}
        for axis in self.axes:
            if axis.name == LAG:
                found |= dict.fromkeys(("staleness.exact_lag", "staleness.max_lag"), "--axis lag=")
            elif axis.name == CORRECTION:
                found |= dict.fromkeys(DECIDED, "--axis correction=")
            elif "." in axis.name:
                found[axis.name] = f"--axis {axis.name}="
        if self.choosing is not None:
            found[self.choosing.field] = f"--choose {self.choosing.field}="
        return found

    # --- configurations -------------------------------------------------------------------------------------------

    def _layers(self, at: Mapping[str, str]) -> dict[str, Any]:
        """The nested fields of files and options for some axes' values, the later over the earlier."""
        layers = {axis.name: axis.layers[at[axis.name]] for axis in self.axes if axis.name in at and axis.layers}
        tables = [*layers.get(TASK, ()), *self.own, *layers.get(CONFIG, ()), *layers.get(RECIPE, ())]
        data = configuration.laid(tables, source=f"study {self.name}")
        for name, text in self.over.items():
            configuration.put(data, name, text)
        return data

    def config(self, cell: Cell, *, runs: Path, model: str | None = None) -> Config:
        """A cell's whole configuration.  ``model`` is its policy's folder.  Raises ConfigError naming the cell."""
        at = dict(cell.at)
        try:
            data = self._layers(at)
            for name, value in at.items():
                if name == CORRECTION:
                    for path, setting in CORRECTIONS[value].fields.items():
                        put(data, path, setting)
                elif "." in name:
                    configuration.put(data, name, value)
            if self.choosing is not None and not cell.stage:
                value = self.chosen.get(at[self.choosing.by] if self.choosing.by else "", self.choosing.values[0])
                configuration.put(data, self.choosing.field, value)
            self._put_own(data, cell, runs, model)
            return configuration.build(data)
        except ConfigError as exc:
            raise ConfigError(f"cell {cell.label}: {exc}") from None

    def _put_own(self, data: dict[str, Any], cell: Cell, runs: Path, model: str | None) -> None:
        """What every cell of a study has."""
        put(data, "run.name", cell.name)
        put(data, "run.dir", str(runs))
        put(data, "run.seed", cell.seed)
        if cell.lag is not None:
            # The last batches of a run are trained on and no longer grown: every lag is to grow as many.
            steps = get(data, "run.steps")
            put(data, "run.steps", steps + cell.lag)
            put(data, "buffer.weight_exponent_steps", get(data, "buffer.weight_exponent_steps") or steps)
            put(data, "staleness.exact_lag", cell.lag)
            put(data, "staleness.max_lag", cell.lag)
        # A role that crashes ends its cell: what is lost on the way would make it another one.
        put(data, "supervisor.max_restarts", 0)
        put(data, "supervisor.stop_grace_s", min(ASK_GRACE_S, get(data, "supervisor.stop_grace_s")))
        for port in ("actors_port", "learner_port", "weights_port", "announce_port"):
            put(data, f"links.{port}", 0)  # cells run side by side
        if model is not None:
            put(data, "model.path", model)

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Dotted path -> value of all settings that affect what the cell learns, as JSON has it."""
        if cell not in self._settings:
            config = self.config(cell, runs=Path("runs"))
            found = leaving(settings_of(config), (*FREE, "run.name", "run.dir"))
            if config.model.warm_start:
                found.pop("model.path")  # follows from the rest, and is made when it is needed
            self._settings[cell] = found | {"run.seed": cell.seed}
        return self._settings[cell]

    def of_grid(self, *, axes: Sequence[Axis], seeds: Sequence[int]) -> Plan:
        """A part of the grid, or the same with other references; the plan itself where it is neither."""
        if tuple(seeds) == self.seeds and all(
            (part.values, part.against) == (axis.values, axis.against)
            for part, axis in zip(axes, self.axes, strict=True)
        ):
            return self
        return replace(self, axes=tuple(axes), seeds=tuple(seeds), part_of=self.part_of or self)

    def left_out(self) -> list[str]:
        """What of the study is not in this part of it, line by line; none where it is the study itself."""
        if self.part_of is None:
            return []
        found = []
        for axis, every in zip(self.axes, self.part_of.axes, strict=True):
            if len(axis.values) < len(every.values):
                found.append(f"of {axis.name} {joined(every.values)} only {joined(axis.values)}")
            elif axis.against != every.against:
                found.append(f"{axis.name} compared with {axis.against}, in the study with {every.against}")
        if len(self.seeds) < len(self.part_of.seeds):
            found.append(f"of the seeds {joined(self.part_of.seeds)} only {joined(self.seeds)}")
        return found

    def with_chosen(self, chosen: Mapping[str, str]) -> Plan:
        """The plan of the second stage."""
        return replace(self, chosen=dict(chosen), _settings={})


def joined(values: Sequence[object]) -> str:
    """As on a command line."""
    return ",".join(map(str, values))


def combinations(axes: Sequence[Axis]) -> Iterator[tuple[tuple[str, str], ...]]:
    """Every combination of the axes' values, the last axis changing first."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield tuple(zip((axis.name for axis in axes), values, strict=True))


def put(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a field of nested ones."""
    section, name = dotted.split(".")
    data[section] = dict(data.get(section) or {}) | {name: value}


def get(data: Mapping[str, Any], dotted: str) -> Any:
    """A field of nested ones; its default where they do not have it."""
    section, name = dotted.split(".")
    found = data.get(section) or {}
    return found[name] if name in found else configuration.get(Config(), dotted)


def leaving(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Settings by their dotted paths without some of them; ``links.*`` names a whole section."""
    return {
        path: value
        for path, value in settings.items()
        if not any(path == name or (name.endswith("*") and path.startswith(name[:-1])) for name in names)
    }


def settings_of(config: Config) -> dict[str, Any]:
    """Dotted path -> value, as JSON has it, of all fields."""
    data = config.model_dump(mode="json")
    found = {}
    for path in configuration.fields():
        here: Any = data
        for part in path.split("."):
            here = here[part]
        found[path] = here
    if not config.environments:
        found.pop("environments", None)  # cells that were trained before there could be several keep their names
    if not config.learner.lora.rank:  # nor do those from before there were adapters
        found = {path: value for path, value in found.items() if not path.startswith("learner.lora.")}
    return found


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits: other settings, another cell."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
