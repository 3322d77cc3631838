"""What training asks of the place where a run's roles are: this machine (``api.training``), or a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from atpo_async.api.beginning import Beginning
from atpo_async.config import Config
from atpo_async.ops.launchers.base import Launcher
from atpo_async.ops.specs import RoleSpec
from atpo_async.ops.supervisor import Outcome, Supervisor
from atpo_async.run.metrics import Record
from atpo_async.run.rundir import RunDir
from atpo_async.status.loading import RoleStart

Say = Callable[[str], None]


class Shown(Protocol):
    """The progress of a run, where its user sees it."""

    @property
    def elapsed_s(self) -> float: ...

    def say(self, line: str) -> None: ...

    def feed(self, records: Sequence[Record]) -> None: ...

    def starting(self, found: Sequence[RoleStart]) -> None: ...


class Place(Protocol):
    """Where roles are, and how they are supervised there."""

    def check(self, begun: Beginning, say: Say) -> None:
        """Raises an AtpoError for what can be refused before anything is written."""

    def check_policy(self, policy: Path, config: Config) -> None:
        """Raises SetupError for a policy that cannot be trained with the configuration."""

    def described(self, begun: Beginning, rundir: RunDir) -> list[str]:
        """Lines about what runs where, when a run begins."""

    def roles(self, rundir: RunDir) -> list[RoleSpec]:
        """What is started."""

    def launcher(self, rundir: RunDir, say: Say) -> Launcher[Any] | None:
        """None: the one that the configuration names."""

    def shown(self, console: Console, config: Config) -> AbstractContextManager[Shown]:
        """Where progress goes."""

    def run(self, supervisor: Supervisor, say: Say) -> Outcome:
        """Waits for: the run's end, or a stop that its user asks for."""

    def close(self) -> None:
        """The roles have ended: nothing of them is left."""
