"""Finds a run by its folder, and names the runs that may be meant where the folder is none."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from atpo_async.core.errors import SetupError
from atpo_async.run.rundir import RunDir

NEAR = 3
"""Runs of a similar name that are proposed."""
LISTED = 5
"""Other runs that are listed."""
RUNS = Path("runs")
"""Default of ``run.dir``."""


def run_at(path: Path | str) -> RunDir:
    """A run by its folder.  Raises SetupError that names the runs near by where it is none, ConfigError for a damaged
    one."""
    try:
        return RunDir.open(path)
    except SetupError as exc:
        raise SetupError(f"{exc}; {runs_near(Path(path))}") from None


def runs_near(path: Path, *, runs: Path = RUNS) -> str:
    """The hint for a path that is no run folder: runs of a similar name, then the newest few, and how many more.

    Args:
        path: what a user named.
        runs: where runs are, beside the folder named and its parent.
    """
    groups = [_runs_in(folder) for folder in (path, path.parent, runs)]
    by_name: dict[str, Path] = {}
    for found in groups:
        for run in found:
            by_name.setdefault(run.name, run)
    near = [by_name[name] for name in difflib.get_close_matches(path.name, by_name, n=NEAR)]
    others = [run for run in next(filter(None, groups), []) if run not in near]
    parts = [f"did you mean {' or '.join(map(str, near))}?"] if near else []
    if others:
        more = len(others) - LISTED
        listed = ", ".join(map(str, others[:LISTED])) + (f" and {more} more" if more > 0 else "")
        subject = "Other runs are" if near else "runs are"
        parts.append(f"{subject} {listed}{' (the newest first)' if len(others) > 1 else ''}")
    return "  ".join(parts) or f"name the folder of a run: {runs}/<run.name>"


def _runs_in(folder: Path) -> Sequence[Path]:
    """The run folders in ``folder``, the newest first; the link to the latest one is left out."""
    made = []
    for file in folder.glob("*/run.json"):
        if not file.parent.is_symlink():
            try:
                made.append((-file.stat().st_mtime_ns, file.parent))
            except OSError:
                continue  # removed meanwhile
    return [run for _, run in sorted(made)]
