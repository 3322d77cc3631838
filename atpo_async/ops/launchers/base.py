"""The protocol of a launcher (``supervisor.launcher``), which starts roles, observes them, and ends what it started.

The supervisor decides when a role is started, asked to stop, killed and started again; a launcher decides where and how
a role runs.  It may place roles on other machines: whatever it does not know about a role is None, and the supervisor
relies on the role's status file instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from atpo_async.core.errors import AtpoError


class RoleLost(AtpoError):
    """The machine of a role is gone, through no fault of the role.  ``RoleHandle.wait`` may raise it: the role is
    started again, and that is not counted as a crash."""


@dataclass(frozen=True, kw_only=True)
class StartOrder:
    """One attempt of a role that is to be started."""

    role: str
    """``buffer``, ``learner``, ``actor-0``, …"""
    argv: tuple[str, ...]
    """The command.  It names the run's folder, which the role has to find under the same path."""
    env: Mapping[str, str]
    """The whole environment.  ``ATPO_SUPERVISOR_PID`` names the process whose end ends the role too: a launcher that
    starts roles on another machine puts a process of that machine there which ends with the supervisor."""
    log: Path
    """Takes what the role writes to its standard output and error; not there yet."""
    mark: str
    """``run/role/attempt``; also in the environment, as ``ATPO_ROLE_MARK``, which everything that a role starts
    inherits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleUsage:
    """What all processes of a role have done so far."""

    processor_s: float
    moved_mb: float
    """Read and written."""
    stopped: tuple[int, ...] = ()
    """The id of its first process, if a signal has stopped that one."""


class RoleHandle(Protocol):
    """A role that was started."""

    @property
    def pid(self) -> int | None:
        """Of its first process, if that runs on this machine."""

    async def wait(self) -> int:
        """Waits for: the end of its first process.  Returns the exit code, -n where signal n killed it."""

    def ask_to_end(self, pids: Sequence[int]) -> None:
        """Send SIGTERM, and do not wait.

        Args:
            pids: the processes that work as this role where a program stands between (the ranks that accelerate
                starts); empty: the first process is the role.
        """


Handle = TypeVar("Handle", bound=RoleHandle)


class Launcher(Protocol[Handle]):
    """Starts roles.  The configuration names its class, which is called with ``supervisor.launcher_options``."""

    async def start(self, order: StartOrder) -> Handle:
        """Start one attempt of a role.  Raises SetupError where another attempt would not help."""

    async def kill(self, handles: Sequence[Handle]) -> None:
        """End these roles and everything that they started, all at once.  Waits for: the ends of all of it, for some
        seconds at most.  Also called for roles that have ended, for the sake of what they left running."""

    def usage(self, handles: Sequence[Handle]) -> Sequence[RoleUsage | None]:
        """Usage of each; None where that is not known.  Called in a thread, and may block."""

    def memory_mb(self, handles: Sequence[Handle]) -> Sequence[float | None]:
        """MiB that all processes of each use; None where that is not known.  Called in a thread, and may block."""
