"""On which node a run's checkpoints are, without ``learner.checkpoint_url``: its learner has to go there again."""

from __future__ import annotations

import json
from pathlib import Path

from atpo_async.models.policy import steps_trained
from atpo_async.run.files import write_atomic
from atpo_async.run.rundir import RunDir

FILE = "ray.json"
"""In the run's folder."""


def node_of_checkpoints(rundir: RunDir) -> str | None:
    """The address of the node that the learner needs; None where any one does: nothing is saved yet, or at a URL."""
    if rundir.config.learner.checkpoint_url is not None or not steps_trained(rundir):
        return None
    try:
        return str(json.loads(_file(rundir).read_text(encoding="utf-8"))["learner"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note(rundir: RunDir, address: str) -> None:
    """The learner works on this node now."""
    text = json.dumps({"learner": address}) + "\n"
    try:
        if _file(rundir).read_text(encoding="utf-8") == text:
            return
    except OSError:
        pass
    write_atomic(_file(rundir), text)


def _file(rundir: RunDir) -> Path:
    return rundir.path / FILE
