"""The run as a whole: its name and length, evaluation, where metrics go, and how its processes are supervised."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from atpo_async.config import doors
from atpo_async.config.sections.base import Options, Section, named


class RunConfig(Section):
    """The run as a whole."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder name under run.dir")
    dir: Path = Field(Path("runs"), description="where run folders are made")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of tasks, sampling, model and search")
    steps: int = Field(100, ge=1, description="learner batches to train")
    max_tasks: int | None = Field(
        None, ge=1, description="training tasks 0 to max_tasks - 1, then the run ends; none for no end but run.steps"
    )


class EvalConfig(Section):
    """Greedy evaluation on held-out tasks."""

    every_steps: int = Field(20, ge=0, description="0: only at the start and the end")
    num_tasks: int = Field(200, ge=1)
    at_start: bool = True
    at_end: bool = True


class SupervisorConfig(Section):
    """Starting, watching, restarting, stopping."""

    launcher: Annotated[str, named(doors.LAUNCHER)] = Field("processes", description="how roles are started")
    launcher_options: Options = Field(default_factory=dict, description="passed to the launcher")
    max_restarts: int = Field(3, ge=0, description="of one role within restart_window_s")
    restart_window_s: float = Field(300.0, gt=0)
    backoff_s: float = Field(0.5, ge=0, description="before the first restart; doubles with every further one")
    max_backoff_s: float = Field(30.0, ge=0)
    sample_every_s: float = Field(2.0, gt=0, description="between two measurements of the roles' memory")
    stop_grace_s: float = Field(6.0, gt=0, description="between asking a role to stop and killing its process group")
    hang_s: float | None = Field(
        None, gt=0, description="a role stuck without progress for so long is restarted; none: 3/4 of links.give_up_s"
    )


class MetricsConfig(Section):
    """Where metrics go besides ``metrics.jsonl`` in the run folder, which is always written."""

    sinks: tuple[Annotated[str, named(doors.SINK)], ...] = ("jsonl",)
    options: dict[str, Options] = Field(default_factory=dict, description="a table for each sink, passed to it")
    trees: int = Field(12, ge=0, description="about how many batches of a run give a tree to trees.jsonl, as text")
