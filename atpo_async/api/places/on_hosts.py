"""Trains a run whose learner and actors are started elsewhere: here are its folder, its buffer and its supervisor.

Whatever places the others (Slurm, Kubernetes, a person) starts them with ``--join HOST:PORT`` of this buffer
(``atpo launch`` prints how).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from atpo_async.api import machine, own_parts
from atpo_async.api.beginning import Beginning
from atpo_async.api.places.base import Say
from atpo_async.config import Config
from atpo_async.models.sources import check_positions
from atpo_async.ops import metrics_sinks
from atpo_async.ops.specs import BUFFER, RoleSpec, role_specs
from atpo_async.ops.supervisor import Outcome, Supervisor
from atpo_async.report.collapse import advice
from atpo_async.report.progress import Progress
from atpo_async.run.rundir import RunDir


class OnHosts:
    """Only the buffer is started here; the run is over when it is told so by the learner.

    Args:
        run: waits for a supervisor's end, under this process's signals.
    """

    def __init__(self, run: Callable[[Supervisor, Say], Outcome]) -> None:
        self._run = run

    def check(self, begun: Beginning, say: Say) -> None:
        config = begun.checked
        machine.check_environment(config)
        machine.check_packages(config)
        machine.check_links(config)
        machine.check_journal_dir(config)
        metrics_sinks.check(begun.config)
        machine.check_warm_start(config)
        own_parts.check(begun.config, say=say)
        machine.check_model(config)

    def check_policy(self, policy: Path, config: Config) -> None:
        check_positions(policy, config.model.max_context_tokens)

    def described(self, begun: Beginning, rundir: RunDir) -> list[str]:
        return ["the buffer is here; the learner and actors join it from where they are started"]

    def roles(self, rundir: RunDir) -> list[RoleSpec]:
        specs = role_specs(rundir.config, rundir.path, has_cuda=lambda: False, environ={})
        return [replace(spec, ends_run=True) for spec in specs if spec.name == BUFFER]

    def launcher(self, rundir: RunDir, say: Say) -> None:
        """The one that the configuration names."""

    def shown(self, console: Console, config: Config) -> Progress:
        title = f"atpo {config.run.name}"
        return Progress(console, title=title, total_steps=config.run.steps, advice=advice(config))

    def run(self, supervisor: Supervisor, say: Say) -> Outcome:
        return self._run(supervisor, say)

    def close(self) -> None:
        """The supervisor has ended the buffer."""
