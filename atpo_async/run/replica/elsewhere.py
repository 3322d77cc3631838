"""Where a run's newest checkpoint is, if that is not the run's own folder: noted in that folder by the buffer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from atpo_async.run.files import write_atomic
from atpo_async.run.rundir import JOINED

_FILE = "checkpoint.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """A checkpoint that is not in the run's folder."""

    step: int
    where: str
    """For people: a URL, or a folder and its host."""


def elsewhere(run: Path) -> Elsewhere | None:
    """The newest checkpoint of a run that is not in its folder; None where there is none."""
    try:
        said = json.loads((run / JOINED / _FILE).read_text(encoding="utf-8"))
        return Elsewhere(step=int(said["step"]), where=str(said["where"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note(run: Path, found: Elsewhere) -> None:
    """Remember it in the run's folder.  Raises OSError."""
    (run / JOINED).mkdir(exist_ok=True)
    write_atomic(run / JOINED / _FILE, json.dumps(asdict(found)) + "\n")
