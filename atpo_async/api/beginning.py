"""How a run begins: new, resumed, or new with the policy of another run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from atpo_async.api import other_run
from atpo_async.config import Config
from atpo_async.config.resuming import Start
from atpo_async.models.policy import with_path
from atpo_async.run.rundir import RunDir, going_on


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """A run before anything is started."""

    config: Config
    known: RunDir | None
    """The run as it was found; None for a new one."""
    anew: bool = False
    """The run folder exists, nothing was trained in it, and it begins again with another configuration."""
    start: Start | None = None
    """The policy of another run, to be moved into this one."""

    @property
    def checked(self) -> Config:
        """``config`` with ``model.path`` at the place where the policy lies before the run has taken it."""
        return self.config if self.start is None else with_path(self.config, self.start.folder)


@contextlib.contextmanager
def beginning(config: Config, begin_from: str | None) -> Iterator[Beginning]:
    """How a run of ``config`` and ``--from`` begins; a policy assembled for it is removed after the block if no run
    took it.

    Raises:
        RunMismatch: the run is there and may not go on with that.
        SetupError: there is no such policy.
    """
    path = config.run.dir / config.run.name
    known = RunDir.open(path, to_begin=True) if (path / "run.json").is_file() else None
    with contextlib.ExitStack() as stack:
        if begin_from is not None:
            source = other_run.find(begin_from, config.run.dir)
            if known is None or not other_run.is_same(source, known):
                config, start = stack.enter_context(other_run.assembled(source, config))
                yield Beginning(config=config, known=known, anew=known is not None, start=start)
                return
        anew = False
        if known is not None:
            config, anew = going_on(known, config)
        yield Beginning(config=config, known=known, anew=anew)
