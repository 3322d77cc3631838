"""The folder of a study: its plan, and how each of its cells ended.

  study.json        the grid, the configuration it started from and the arguments that named it on the command line; its
                    presence makes the folder a study
  cells/<cell>.json     how a cell ended, and with what settings: a cell with this file is not run again
  configs/<cell>.json   the cell's whole configuration
  runs/<cell>/      its run folder, as of any run         logs/<cell>.log   output of its `atpo train`
  staleness.csv, staleness.md, staleness.png, staleness.html    made by ``study.outputs``

``study.runner`` runs the cells; one that was interrupted begins anew.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async import config as configuration
from atpo_async.core.errors import ConfigError, RunMismatch, SetupError
from atpo_async.run import locks
from atpo_async.run.files import write_atomic
from atpo_async.study.cells import Cell, CellResult, from_json, to_json
from atpo_async.study.plan import (
    FREE,
    SET_BY_THE_STUDY,
    Plan,
    fingerprint,
    parse_corrections,
    parse_lags,
    settings_of,
)

KIND = "staleness"
"""Kind of the study, and the name of its output files without their endings."""


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

    def plan(self, *, lags: str | None = None, corrections: str | None = None, seeds: int | None = None) -> Plan:
        """The plan that the study was made for, or the part of its grid that is named as on the command line.

        Raises SetupError where there is no study or a damaged one, ConfigError for what is not in its grid.
        """
        file = self.path / "study.json"
        if not file.is_file():
            raise SetupError(f"{self.path} is no study (it has no study.json); run it first, without --report")
        was = self._known(file)
        if seeds is not None and not 1 <= seeds <= len(was["seeds"]):
            raise ConfigError(
                f"--seeds {seeds}: study {self.path} has {len(was['seeds'])} seeds ({_joined(was['seeds'])}); use 1 to "
                f"{len(was['seeds'])}"
            )
        some_lags = tuple(was["lags"]) if lags is None else parse_lags(lags)
        names = tuple(was["corrections"]) if corrections is None else parse_corrections(corrections)
        for option, some, every in (
            ("--lags", some_lags, was["lags"]),
            ("--corrections", names, was["corrections"]),
        ):
            if not set(some) <= set(every):
                raise ConfigError(
                    f"{option} {_joined(some)}: study {self.path} has {_joined(every)}; name some of those"
                )
        data: dict[str, Any] = {"run": {"seed": was["seeds"][0]}, "staleness": {"max_lag": max(was["lags"])}}
        for path, value in was["base"].items():
            *sections, name = path.split(".")
            here = data
            for section in sections:
                here = here.setdefault(section, {})
            here[name] = value  # without a section: a list of them
        return Plan(
            base=configuration.build(data, source=str(file)),
            lags=some_lags,
            corrections=names,
            seeds=tuple(was["seeds"][:seeds]),
            arguments=tuple(was["words"]),
        )

    def results(self, plan: Plan) -> dict[Cell, CellResult]:
        """Of the plan's cells that have ended.  Raises RunMismatch for one that was run with other settings."""
        found = {}
        for cell in plan.cells():
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
            settings = _with_later_fields(settings, now)
            if result.cell != cell or fingerprint(settings) != fingerprint(now):
                raise RunMismatch(
                    f"{file} has the result of other settings: {_listed_differences(settings, now)}.  Use another "
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
            write_atomic(self.path / "study.json", json.dumps(self._facts(plan), indent=1) + "\n")
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
        was, now = self._known(file), self._facts(plan)
        differing = []
        if was["kind"] != now["kind"]:
            differing.append(f"kind was {was['kind']!r}, is {now['kind']!r}")
        for name, option in (("lags", "--lags"), ("corrections", "--corrections"), ("seeds", "--seeds")):
            whole, some = (was, now) if part else (now, was)
            if any(value not in whole[name] for value in some[name]):
                differing.append(f"{option} had {_joined(was[name])}, has {_joined(now[name])}")
        listed = _listed_differences(_with_later_fields(was["base"], now["base"]), now["base"])
        if listed:
            differing.append(listed)
        if differing:
            raise RunMismatch(
                f"study {self.path} was made with other settings: {'; '.join(differing)}.  Use another --out, or the "
                "old settings; a study goes on with more lags, corrections and seeds, not with fewer or with another "
                "configuration (--report reports a part of it)"
            )

    def _known(self, file: Path) -> dict[str, Any]:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            found = {name: data[name] for name in ("kind", "lags", "corrections", "seeds", "base")}
            if not all(isinstance(found[name], list) and found[name] for name in ("lags", "corrections", "seeds")):
                raise ValueError("no grid")
            found["words"] = [str(word) for word in data.get("words", ())]
            found["base"] = dict(found["base"])
            return found
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise SetupError(
                f"{file} is damaged ({type(exc).__name__}: {exc}); use another --out, or delete the folder"
            ) from None

    @staticmethod
    def _facts(plan: Plan) -> dict[str, Any]:
        base = settings_of(plan.base, leaving=(*FREE, *SET_BY_THE_STUDY))
        return {
            "kind": KIND,
            "lags": list(plan.lags),
            "corrections": list(plan.corrections),
            "seeds": list(plan.seeds),
            "words": list(plan.arguments),
            "base": base,
        }


def _with_later_fields(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an earlier program, with the fields of ``now`` that it had not: it did what they do by default."""
    defaults = settings_of(configuration.Config(), leaving=())
    return {path: defaults[path] for path in now if path in defaults and path not in was} | dict(was)


def _listed_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``learner.lr was 0.1, is 0.2; …``; empty where nothing differs."""
    paths = [*now, *(path for path in was if path not in now)]
    return "; ".join(
        f"{path} was {was.get(path)!r}, is {now.get(path)!r}" for path in paths if was.get(path) != now.get(path)
    )


def _joined(values: Sequence[object]) -> str:
    return ",".join(str(value) for value in values)


def _locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Raises SetupError naming the process that holds the folder."""
    return locks.held(
        folder / "lock",
        in_use=lambda holder: f"study {folder} is in use by process {holder}; stop that one, or use another --out",
    )
