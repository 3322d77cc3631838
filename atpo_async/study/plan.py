"""A study: one configuration trained over a grid of lags, corrections and seeds, each cell a run of its own.

A study's folder:
  study.json        the grid, the configuration it started from and the words of the command line that named it; its
                    presence makes the folder a study
  cells/<cell>.json     how a cell ended, and with what settings: a cell with this file is not run again
  configs/<cell>.json   the cell's whole configuration
  runs/<cell>/      its run folder, as of any run         logs/<cell>.log   what its `atpo train` said
  staleness.csv, staleness.md, staleness.png, staleness.html    made by ``study.outputs``

``study.runner`` runs the cells; one that was interrupted begins anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async import config as configuration
from atpo_async.config import Config
from atpo_async.core.errors import ConfigError, RunMismatch, SetupError
from atpo_async.run.rundir import write_atomic
from atpo_async.study.results import Cell, CellResult, from_json, to_json

KIND = "staleness"

ASK_GRACE_S = 1.0
"""supervisor.stop_grace_s of a cell: a cell that is interrupted begins anew, so its roles have nothing to save."""


# --- the grid -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A named setting of ``[correction]``.  Fields it does not name keep what the configuration says."""

    words: str
    """As a sentence calls it."""
    fields: Mapping[str, Any]


_PLAIN: dict[str, Any] = {
    # A name is to mean what it says: no guard that changes the exponent, no gate, nothing besides.
    "exponent": "fixed",
    "exponent_value": 1.0,
    "ess_floor": 0.0,
    "floor": 0.0,
    "gate": None,
    "numerator": "prox",
    "accept_bias": False,
}

CORRECTIONS: dict[str, Correction] = {
    name: Correction(words=words, fields=_PLAIN | fields)
    for name, words, fields in (
        ("none", "no correction", {"action": "none", "level": "turn", "accept_bias": True}),
        ("token", "token-level truncation", {"action": "truncate", "level": "token"}),
        ("turn", "turn-level truncation", {"action": "truncate", "level": "turn"}),
        (
            "turn+ess",
            "turn-level truncation at a bounded ESS",
            {"action": "truncate", "level": "turn", "exponent": "ess"},
        ),
        ("prefix", "truncation by prefix", {"action": "truncate", "level": "prefix"}),
        ("sequence", "sequence-level truncation", {"action": "truncate", "level": "sequence"}),
        ("mask", "turn-level masking", {"action": "mask", "level": "turn", "floor": 0.5, "cap": 2.0}),
        ("icepop", "IcePop", {"action": "icepop", "level": "token", "floor": 0.5, "cap": 5.0}),
        ("m2po", "M2PO", {"action": "m2po", "level": "token", "cap": 1e6}),
        ("topr", "TOPR", {"action": "topr", "level": "sequence", "cap": 1.0}),
    )
}
"""What ``--corrections`` may name."""

MAX_SEED = 2**31
LEAST_STEPS = 3
"""Steps over which sampled success is averaged."""
DEFAULT_LAGS = "0,2,8,16"
DEFAULT_CORRECTIONS = "none,token,turn,turn+ess"
DEFAULT_SEEDS = 2

SET_BY_THE_STUDY: dict[str, str] = {
    "run.name": "--out",
    "run.dir": "--out",
    "staleness.exact_lag": "--lags",
    "staleness.max_lag": "--lags",
    "correction.action": "--corrections",
    "correction.level": "--corrections",
    **{f"correction.{name}": "--corrections" for name in _PLAIN},
}
"""Fields that the grid decides, and the option that does."""

FREE: tuple[str, ...] = ("supervisor.*", "links.*", "run.seed")
"""Fields that a study may go on with otherwise: none bears on what a cell learns; seeds are compared as a list."""


def parse_lags(text: str) -> tuple[int, ...]:
    """``0,2,8`` as ascending lags.  Raises ConfigError."""
    lags = set()
    for word in _words(text, "--lags"):
        if not word.isdecimal():
            raise ConfigError(f"--lags {text}: {word!r} is no lag; lags are learner versions from 0 on, as in 0,2,8")
        lags.add(int(word))
    return tuple(sorted(lags))


def parse_corrections(text: str) -> tuple[str, ...]:
    """Names out of ``CORRECTIONS``, in the order given.  Raises ConfigError listing them."""
    names: list[str] = []
    for word in _words(text, "--corrections"):
        if word not in CORRECTIONS:
            raise ConfigError(f"--corrections {text}: {word!r} is unknown; known: {', '.join(CORRECTIONS)}")
        if word not in names:
            names.append(word)
    return tuple(names)


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"{option} names nothing; separate what it shall name with commas")
    return words


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The grid over a configuration."""

    base: Config
    lags: tuple[int, ...]
    corrections: tuple[str, ...]
    seeds: tuple[int, ...]
    words: tuple[str, ...] = ()
    """Files and options that make ``base`` on a command line; none for what a study takes where none are given."""

    @classmethod
    def of(
        cls,
        base: Config,
        *,
        lags: str = DEFAULT_LAGS,
        corrections: str = DEFAULT_CORRECTIONS,
        seeds: int = DEFAULT_SEEDS,
        options: Sequence[str] = (),
        words: Sequence[str] = (),
    ) -> Plan:
        """From what the command line says; ``options`` are the dotted fields that the user set, ``words`` as the field.

        The seeds are ``base.run.seed`` and those that follow.  Raises ConfigError for anything that does not make a
        grid, and for a cell that no run could have.
        """
        for name in options:
            if name in SET_BY_THE_STUDY:
                raise ConfigError(f"--{name}: the grid of the study sets it; use {SET_BY_THE_STUDY[name]}")
        if seeds < 1:
            raise ConfigError(f"--seeds must be >= 1, got {seeds}")
        if base.run.seed + seeds > MAX_SEED:
            raise ConfigError(
                f"--seeds {seeds} from run.seed = {base.run.seed} on: seeds are below {MAX_SEED}; use fewer, or a "
                "lower run.seed"
            )
        if base.run.steps < LEAST_STEPS:
            raise ConfigError(
                f"run.steps = {base.run.steps}: a cell's success is the mean of its last {LEAST_STEPS} steps; use at "
                f"least --run.steps {LEAST_STEPS}"
            )
        longest = max(parse_lags(lags))
        if longest >= base.run.steps:
            raise ConfigError(
                f"--lags {lags}: lag {longest} with run.steps = {base.run.steps} would never be reached while success "
                f"is measured: the lag grows from 0 by one a step; use smaller lags or --run.steps {2 * longest}"
            )
        if base.learner.schedule != "constant":
            raise ConfigError(
                f"learner.schedule = {base.learner.schedule!r} ends with the run, and a cell's run is longer by its "
                "lag: cells would differ by more than their lag; use --learner.schedule constant"
            )
        plan = cls(
            base=base,
            lags=parse_lags(lags),
            corrections=parse_corrections(corrections),
            seeds=tuple(range(base.run.seed, base.run.seed + seeds)),
            words=tuple(words),
        )
        for cell in plan.cells():
            plan.config(cell, runs=Path("runs"))
        return plan

    def cells(self) -> list[Cell]:
        """The whole grid seed by seed: a study that is stopped early then has all of it once, rather than half."""
        return [
            Cell(lag=lag, correction=name, seed=seed)
            for seed in self.seeds
            for lag in self.lags
            for name in self.corrections
        ]

    def config(self, cell: Cell, *, runs: Path, model: str | None = None) -> Config:
        """A cell's whole configuration.  ``model`` is its seed's policy.  Raises ConfigError naming the cell."""
        data = self.base.model_dump(mode="json")
        # The last batches of a run are trained on and no longer grown: every lag is to grow as many.
        steps = data["run"]["steps"] + cell.lag
        data["run"] |= {"name": cell.name, "dir": str(runs), "seed": cell.seed, "steps": steps}
        data["buffer"]["weight_exponent_steps"] = data["buffer"]["weight_exponent_steps"] or self.base.run.steps
        data["staleness"] |= {"exact_lag": cell.lag, "max_lag": cell.lag}
        data["correction"] |= CORRECTIONS[cell.correction].fields
        # A role that crashes ends its cell: trees lost on the way would make the lag another one.
        data["supervisor"] |= {"max_restarts": 0, "stop_grace_s": min(ASK_GRACE_S, data["supervisor"]["stop_grace_s"])}
        # Cells run side by side.
        data["links"] |= {"actors_port": 0, "learner_port": 0, "weights_port": 0, "announce_port": 0}
        if model is not None:
            data["model"]["path"] = model
        try:
            return configuration.build(data)
        except ConfigError as exc:
            raise ConfigError(f"cell {cell.words}: {exc}") from None

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Dotted path -> value of all that bears on what the cell learns, as JSON has it."""
        config = self.config(cell, runs=Path("runs"))
        kept = _settings(config, leaving=(*FREE, "run.name", "run.dir"))
        if config.model.warm_start:
            kept.pop("model.path")  # follows from the rest, and is made when it is needed
        return kept | {"run.seed": cell.seed}


def _settings(config: Config, *, leaving: Sequence[str]) -> dict[str, Any]:
    data = config.model_dump(mode="json")
    found = {}
    for path in configuration.fields():
        if any(path == free or (free.endswith("*") and path.startswith(free[:-1])) for free in leaving):
            continue
        here: Any = data
        for part in path.split("."):
            here = here[part]
        found[path] = here
    return found


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits: other settings, another cell."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


# --- the folder ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """Where a study lies."""

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
        """What the study was made for, or the part of its grid that is named as on the command line.

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
        kept_lags = tuple(was["lags"]) if lags is None else parse_lags(lags)
        names = tuple(was["corrections"]) if corrections is None else parse_corrections(corrections)
        for option, some, every in (
            ("--lags", kept_lags, was["lags"]),
            ("--corrections", names, was["corrections"]),
        ):
            if not set(some) <= set(every):
                raise ConfigError(
                    f"{option} {_joined(some)}: study {self.path} has {_joined(every)}; name some of those"
                )
        data: dict[str, dict[str, Any]] = {"run": {"seed": was["seeds"][0]}, "staleness": {"max_lag": max(was["lags"])}}
        for path, value in was["base"].items():
            section, _, name = path.partition(".")
            data.setdefault(section, {})[name] = value
        return Plan(
            base=configuration.build(data, source=str(file)),
            lags=kept_lags,
            corrections=names,
            seeds=tuple(was["seeds"][:seeds]),
            words=tuple(was["words"]),
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
        listed = _listed_differences(was["base"], now["base"])
        if listed:
            differing.append(listed)
        if differing:
            raise RunMismatch(
                f"study {self.path} was made with other settings: {'; '.join(differing)}.  Use another --out, or the "
                "old settings; a study goes on with more lags, corrections and seeds, not with fewer or with another "
                "configuration (--report tells of a part of it)"
            )

    def _known(self, file: Path) -> dict[str, Any]:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            kept = {name: data[name] for name in ("kind", "lags", "corrections", "seeds", "base")}
            if not all(isinstance(kept[name], list) and kept[name] for name in ("lags", "corrections", "seeds")):
                raise ValueError("no grid")
            kept["words"] = [str(word) for word in data.get("words", ())]
            kept["base"] = dict(kept["base"])
            return kept
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise SetupError(
                f"{file} is damaged ({type(exc).__name__}: {exc}); use another --out, or delete the folder"
            ) from None

    @staticmethod
    def _facts(plan: Plan) -> dict[str, Any]:
        base = _settings(plan.base, leaving=(*FREE, *SET_BY_THE_STUDY))
        return {
            "kind": KIND,
            "lags": list(plan.lags),
            "corrections": list(plan.corrections),
            "seeds": list(plan.seeds),
            "words": list(plan.words),
            "base": base,
        }


def _listed_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``learner.lr was 0.1, is 0.2; …``; empty where nothing differs."""
    paths = [*now, *(path for path in was if path not in now)]
    return "; ".join(
        f"{path} was {was.get(path)!r}, is {now.get(path)!r}" for path in paths if was.get(path) != now.get(path)
    )


def _joined(values: Sequence[object]) -> str:
    return ",".join(str(value) for value in values)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises SetupError naming the process that holds the folder."""
    try:
        import fcntl
    except ImportError:  # no POSIX locks here: two studies in one folder are then the user's business
        yield
        return
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
            raise SetupError(
                f"study {folder} is in use by process {holder or '?'}; stop that one, or use another --out"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)
