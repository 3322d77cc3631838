"""Reads a run from a program, while it is going on or later: metrics as arrays, trees, lineage, checkpoints, status."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atpo_async.api import arguments
from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from atpo_async.models.policy import checkpoint_step, list_checkpoints, steps_trained
from atpo_async.report.facts import series
from atpo_async.report.page import write_report
from atpo_async.report.tree_samples import TreeSample, read_tree_samples
from atpo_async.run.metrics import Record, read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.status.run_folders import run_at
from atpo_async.status.run_view import RunView, look

SHOWN_NAMES = 4
"""Names that ``repr(metrics)`` and an error message list."""


class Series(NamedTuple):
    """One metric of a run, in the order of time; of a step that the learner did again the last."""

    steps: NDArray[np.int64]
    """int64[N]: learner steps at which it was reported."""
    values: NDArray[np.float64]
    """float64[N]."""


class Metrics(Mapping[str, Series]):
    """Every metric of a run by its name, as it was when ``Run.metrics`` was asked for."""

    def __init__(self, records: list[Record], *, of: str) -> None:
        self._records = records
        self._of = of

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The roles that reported: ``learner``, ``buffer``, ``actor-0``, …"""
        return tuple(sorted({record.source for record in self._records}))

    def by(self, source: str) -> Metrics:
        """The metrics that one role reported.  Raises KeyError where there is none of that name."""
        if source not in self.sources:
            raise KeyError(f"{source!r} reported nothing in {self._of}; there are {', '.join(self.sources) or 'none'}")
        return Metrics([r for r in self._records if r.source == source], of=f"{self._of}, {source}")

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(sorted({name for record in self._records for name in record.metrics}))

    def __getitem__(self, name: str) -> Series:
        found = series(self._records, name)
        if not found:
            near = self._near(name)
            meant = f"{len(self)} names are in it; list(metrics) has them"
            if near:
                meant = f"did you mean {' or '.join(map(repr, near))}?"
            raise KeyError(f"no metric {name!r} in {self._of}; {meant}")
        return Series(
            steps=np.array([sample.step for sample in found], dtype=np.int64),
            values=np.array([sample.value for sample in found], dtype=np.float64),
        )

    def _near(self, name: object) -> list[str]:
        """The names that may be meant: with this last part, else of a similar spelling."""
        if not isinstance(name, str):
            return []
        same = [known for known in self._names if known.rpartition("/")[2] == name.rpartition("/")[2]]
        return same[:SHOWN_NAMES] or difflib.get_close_matches(name, self._names, n=1)

    def __repr__(self) -> str:
        # Those of training first: a reader looks for them.
        some = sorted(self._names, key=lambda name: (not name.startswith("train/"), name))[:SHOWN_NAMES]
        more = ", …" if len(self) > len(some) else ""
        return f"<Metrics of {self._of}: {len(self)} names{': ' if some else ''}{', '.join(some)}{more}>"

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One checkpoint of a run."""

    step: int
    path: Path


class Run:
    """A run folder.  What it holds is read when it is asked for, so a run that goes on may be followed."""

    def __init__(self, rundir: RunDir) -> None:
        self._rundir = rundir
        self.path: Path = rundir.path
        """The run folder."""
        self.run_id: str = rundir.run_id
        """Distinguishes runs of one name."""

    def __repr__(self) -> str:
        return f"<Run {self.path}: step {self.step} of {self.config.run.steps}>"

    @property
    def config(self) -> Config:
        """The configuration that the run has now: it may go on with other settings than it began with."""
        return RunDir.open(self.path).config

    @property
    def step(self) -> int:
        """Of the newest checkpoint; 0 without one."""
        return steps_trained(self._rundir)

    @property
    def ended(self) -> bool:
        """Whether all its steps are done and the trained policy lies in it."""
        return self.policy is not None and self.step >= self.config.run.steps

    @property
    def status(self) -> RunView:
        """Which of its roles run, and what each waits for; of a run that has ended, the last status of its roles."""
        return look(self.path)

    @property
    def metrics(self) -> Metrics:
        """``steps, values = run.metrics["train/reward"]``."""
        return Metrics(list(read_metrics(self._rundir.metrics_path)), of=f"run {self.path}")

    @property
    def trees(self) -> list[TreeSample]:
        """The few trees that the learner writes down as text, in the order of steps."""
        return read_tree_samples(self._rundir.trees_path)

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """What each batch of the run as it stands was trained on, one object for each batch of each rank.

        ``step`` counts the batches before it: the metrics of that batch are those of ``step + 1``.

        Raises SetupError where the run keeps none.
        """
        try:
            lines = self._rundir.lineage_path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise SetupError(
                f"run {self.path} keeps no lineage; it is written with learner.lineage = true, from then on"
            ) from None
        found: list[dict[str, Any]] = []
        for line in map(json.loads, lines):
            if "starts_at" in line:
                # The learner went back to a checkpoint: what that rank did from there on was done again.
                found = [b for b in found if b["rank"] != line["rank"] or b["step"] < line["starts_at"]]
            else:
                found.append(line)
        return found

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those that are whole, the oldest first."""
        return [Checkpoint(step=checkpoint_step(p), path=p) for p in list_checkpoints(self._rundir.checkpoints)]

    @property
    def policy(self) -> Path | None:
        """The trained policy, an ordinary model folder; None until the run's end."""
        folder = self.path / "model"
        return folder if (folder / "config.json").is_file() else None

    def report(self) -> Path:
        """Write ``report.html``; returns its path.  Raises SetupError where nothing is there yet."""
        return write_report(self._rundir)


def open_run(path: Path | str) -> Run:
    """A run by its folder, ``runs/NAME``.

    Raises:
        SetupError: there is none; the message names runs near by.
        ConfigError: its files are damaged, or ``path`` is no path.
    """
    return Run(run_at(arguments.path_of(path, call="open_run", takes="the path of a run folder")))
