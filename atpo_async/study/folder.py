"""The folder of a study: its plan, and how each of its cells ended.

  study.json        the grid, the configuration it started from and the arguments that named it on the command line
                    (``study.record``); its presence makes the folder a study
  cells/<cell>.json     how a cell ended, and with what settings: a cell with this file is not run again
  configs/<cell>.json   the cell's whole configuration
  runs/<cell>/      its run folder, as of any run         logs/<cell>.log   output of its `atpo train`
  <name>.csv, <name>.md, <name>.png, <name>.html    made by ``study.output``

``study.runner`` runs the cells; one that was interrupted begins anew.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from atpo_async.core.errors import ConfigError, RunMismatch, SetupError
from atpo_async.run import locks
from atpo_async.run.files import write_atomic
from atpo_async.study.cells import Cell, CellResult, from_json, to_json
from atpo_async.study.grid.axes import Axis, split_values
from atpo_async.study.grid.choosing import Choice, choices
from atpo_async.study.plan import Plan, fingerprint, joined
from atpo_async.study.record import Record, differences, listed_differences, read_record, with_later_fields


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """The folder of a study."""

    path: Path

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    def run(self, cell: Cell) -> Path:
        return self.runs / cell.name

    def marker(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.name}.json"

    def config(self, cell: Cell) -> Path:
        return self.path / "configs" / f"{cell.name}.json"

    def log(self, cell: Cell) -> Path:
        return self.path / "logs" / f"{cell.name}.log"

    def plan(self, *, axes: Mapping[str, str] | None = None, seeds: int | None = None) -> Plan:
        """The plan that the study was made for, or the part of its grid that is named as on the command line.

        Args:
            axes: axis -> some of its values, with commas between them.

        Raises SetupError where there is no study or a damaged one, ConfigError for what is not in its grid.
        """
        file = self.path / "study.json"
        if not file.is_file():
            raise SetupError(f"{self.path} is no study (it has no study.json); run it first, without --report")
        was = read_record(file)
        if seeds is not None and not 1 <= seeds <= len(was.seeds):
            raise ConfigError(
                f"--seeds {seeds}: study {self.path} has {len(was.seeds)} seeds ({joined(was.seeds)}); use 1 to "
                f"{len(was.seeds)}"
            )
        some = tuple(self._some(axis, (axes or {}).get(axis.name)) for axis in was.axes)
        for name in axes or {}:
            if name not in {axis.name for axis in was.axes}:
                raise ConfigError(
                    f"--axis {name}: study {self.path} has no such axis; it has "
                    f"{', '.join(axis.name for axis in was.axes)}"
                )
        return self.resolved(was.plan().of_grid(axes=some, seeds=was.seeds[:seeds]))

    def _some(self, axis: Axis, listed: str | None) -> Axis:
        """Those of an axis' values that are named; all where none is, or ``all``."""
        if listed is None or (listed == "all" and "all" not in axis.values):
            return axis
        words = split_values(listed, f"--axis {axis.name}={listed}")
        values = [axis.value_named(word) for word in words]
        if unknown := [word for word, value in zip(words, values, strict=True) if value is None]:
            raise ConfigError(
                f"--axis {axis.name}={listed}: study {self.path} has {joined(axis.values)}, not {unknown[0]}; name "
                "some of those"
            )
        return replace(axis, values=tuple(value for value in axis.values if value in values), words=())

    def results(self, plan: Plan) -> dict[Cell, CellResult]:
        """Of the plan's cells that have ended.  Raises RunMismatch for one that was run with other settings."""
        return self._ended(plan, plan.cells())

    def first_stage(self, plan: Plan) -> dict[Cell, CellResult]:
        """The same of the cells of the first stage."""
        return self._ended(plan, plan.first_stage())

    def choices(self, plan: Plan) -> dict[str, Choice]:
        """What the first stage has found so far: value of its axis -> choice, once all of its cells have ended."""
        if plan.choosing is None:
            return {}
        ended, by = self.first_stage(plan), plan.choosing.by
        lacking = {dict(cell.at).get(by, "") for cell in plan.first_stage() if cell not in ended}
        found = choices(plan.choosing, plan.axes, ended.values())
        return {of: choice for of, choice in found.items() if of not in lacking}

    def resolved(self, plan: Plan) -> Plan:
        """The plan with what its first stage has chosen so far."""
        if plan.choosing is None:
            return plan
        return plan.with_chosen({of: choice.value for of, choice in self.choices(plan).items()})

    def _ended(self, plan: Plan, cells: Sequence[Cell]) -> dict[Cell, CellResult]:
        found = {}
        for cell in cells:
            file = self.marker(cell)
            try:
                data = json.loads(file.read_text(encoding="utf-8"))
                settings, result = dict(data["settings"]), from_json(data)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
                raise SetupError(
                    f"{file} is damaged ({type(exc).__name__}: {exc}); delete it to have the cell run again"
                ) from None
            now = plan.settings(cell)
            settings = with_later_fields(settings, now)
            if result.cell != cell or fingerprint(settings) != fingerprint(now):
                raise RunMismatch(
                    f"{file} has the result of other settings: {listed_differences(settings, now)}.  Use another "
                    "--out, the old settings, or delete that file to have the cell run again"
                )
            found[cell] = result
        return found

    def write_result(self, plan: Plan, result: CellResult) -> None:
        """The cell has ended: on disk whole or not at all."""
        settings = plan.settings(result.cell)
        data = to_json(result) | {
            "fingerprint": fingerprint(settings),
            "settings": settings,
            "ended": round(time.time()),
        }
        write_atomic(self.marker(result.cell), json.dumps(data, indent=1) + "\n")

    @contextlib.contextmanager
    def held(self, plan: Plan) -> Iterator[None]:
        """Make the folder, or open it again for a plan that it can go on with, and hold it.

        Raises:
            RunMismatch: made by another configuration or a grid that is no part of this one; names what differs.
            SetupError: the folder is something else, cannot be made, or another process holds it.
        """
        self.check(plan)
        try:
            for name in ("cells", "configs", "runs", "logs"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise SetupError(f"study folder {self.path} cannot be made: {exc.strerror or exc}; see --out") from exc
        with _locked(self.path):
            self.check(plan)
            write_atomic(self.path / "study.json", json.dumps(Record.of(plan).to_json(), indent=1) + "\n")
            yield

    def check(self, plan: Plan, *, part: bool = False) -> None:
        """Raises as ``held``, and changes nothing.

        Args:
            part: the plan's grid may be a part of the folder's, and no more; else it is to hold all of it.
        """
        file = self.path / "study.json"
        if not file.is_file():
            ours = {"cells", "configs", "runs", "logs", "lock"}
            if self.path.exists() and not (
                self.path.is_dir() and all(entry.name in ours for entry in self.path.iterdir())
            ):
                raise SetupError(f"{self.path} exists and is no study (it has no study.json); use another --out")
            return
        differing = differences(read_record(file), Record.of(plan), part=part)
        if differing:
            raise RunMismatch(
                f"study {self.path} was made with other settings: {'; '.join(differing)}.  Use another --out, or the "
                "old settings; a study goes on with more values of its axes and more seeds, not with fewer, other "
                "axes or another configuration (--report reports a part of it)"
            )


def _locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Raises SetupError naming the process that holds the folder."""
    return locks.held(
        folder / "lock",
        in_use=lambda holder: f"study {folder} is in use by process {holder}; stop that one, or use another --out",
    )
