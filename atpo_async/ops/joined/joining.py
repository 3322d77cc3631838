"""How a learner joins a run by address: it hears of the run, compares its configuration, and gets a replica."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async import config as configuration
from atpo_async.config import Config, resuming
from atpo_async.core.errors import ConfigError, RunMismatch, SetupError
from atpo_async.models.identity import identity_of
from atpo_async.models.policy import checkpoint_step, list_checkpoints
from atpo_async.models.sources import looks_like_hub_name
from atpo_async.ops.joined.uplink import Uplink
from atpo_async.run.replica.elsewhere import Elsewhere
from atpo_async.run.replica.folder import Replica, ReplicaDir, default_parent
from atpo_async.wire.joined import LearnerWelcome

log = logging.getLogger("atpo.joined")


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A learner's place in a run."""

    rundir: ReplicaDir
    uplink: Uplink
    replica: Replica

    def close(self) -> None:
        """Pass on what is left, and end."""
        self.uplink.close()
        self.replica.close()


def join(config: Config, *, endpoint: str, rank: int, parent: Path | None = None) -> Joined:
    """Take a rank's place in the run whose buffer listens for learners at ``endpoint``.

    Waits for: the buffer.  Unblocked by: its answer; given up after ``links.give_up_s``.

    Args:
        config: of this learner.
        endpoint: ``tcp://host:port``.
        rank: from 0.
        parent: folder of replicas; None: in the user's cache.

    Raises:
        SetupError: the buffer refuses, another learner is at work, or there is no place for files.
        RunMismatch: the run has another configuration; names each field.
        WaitTimeout: nothing answers.
    """
    uplink = Uplink(endpoint, settings=config.links, rank=rank)
    replica = None
    try:
        found = uplink.look()
        check(config, found)
        replica = Replica(parent or default_parent(), run_id=found.run, rank=rank)
        welcome = _taken_in(uplink, replica)
        saved = Elsewhere(step=welcome.saved_step, where=welcome.saved_where or "in the run's own folder")
        replica.describe(config, welcome.facts.tobytes(), saved=saved)
        rundir = ReplicaDir(replica, run_id=welcome.run, config=config, uplink=uplink)
        if rank == 0 and config.learner.checkpoint_url is None:
            # Before a model is loaded; with a URL the learner looks there too.
            check_checkpoint(rundir, saved)
        uplink.begin(replica, welcome.taken)
    except BaseException:
        uplink.close(timeout_s=1.0)
        if replica is not None:
            replica.close()
        raise
    log.info("joined run %s by address; this learner's files are in %s", welcome.run, replica.path)
    return Joined(rundir=rundir, uplink=uplink, replica=replica)


def _taken_in(uplink: Uplink, replica: Replica) -> LearnerWelcome:
    """The buffer's welcome, and the replica as the buffer knows it."""
    own = replica.known.replica
    welcome = uplink.join(own)
    if welcome.replica == own and replica.lacks(welcome.taken):
        log.warning("%s lacks lines that have arrived already: it is made anew", replica.path)
        welcome = uplink.join("")
    if welcome.replica != own:
        if own:
            log.warning("%s is of an earlier life of the run: what it has not passed on is dropped", replica.path)
        replica.begin(welcome.replica, evaluations=welcome.evaluations.tobytes())
    return welcome


def check(config: Config, found: LearnerWelcome) -> None:
    """Raises RunMismatch where the run was made by a configuration that this learner's does not fit."""
    try:
        theirs = configuration.build(json.loads(found.settings.tobytes()), source=f"the configuration of {found.run}")
    except (ValueError, ConfigError) as exc:
        raise SetupError(f"the buffer's configuration of run {found.run} cannot be read: {exc}") from exc
    # A path means another folder on each machine; what is in it counts.
    same_path = theirs.model.model_copy(update={"path": config.model.path})
    differing = list(resuming.refused(theirs.model_copy(update={"model": same_path}), config))
    ours, path = identity_of(config.model.path), config.model.path
    if found.policy and ours and found.policy != ours:
        raise RunMismatch(
            f"run {found.run} began with other weights than model.path = {path!r} holds here: copy the folder "
            f"{theirs.model.path!r} of the buffer's machine, and name it by --model.path"
        )
    if looks_like_hub_name(theirs.model.path) and looks_like_hub_name(path) and theirs.model.path != path:
        differing.append(("model.path", theirs.model.path, path))
    if differing:
        listed = "; ".join(f"{name} is {old!r} there and {new!r} here" for name, old, new in differing)
        raise RunMismatch(
            f"run {found.run} was made by another configuration: {listed}.  Bring the run's configuration file; "
            "whatever bears on tasks, on how they are sampled and on which weights are trained stays in a run"
        )
    for name, old, new in _learners(theirs, config):
        log.info("%s: %s in the run's configuration, %s for this learner", name, old, new)


def _learners(theirs: Config, own: Config) -> list[tuple[str, Any, Any]]:
    """Differences that are allowed, and bear on training."""
    sections = ("learner.", "objective.", "correction.", "credit.", "staleness.", "run.steps")
    return [change for change in resuming.changes(theirs, own) if change[0].startswith(sections)]


def check_checkpoint(rundir: ReplicaDir, saved: Elsewhere) -> None:
    """Raises SetupError where the run counts on a newer checkpoint than there is here: trees up to its step are
    gone."""
    newest = max((checkpoint_step(path) for path in list_checkpoints(rundir.checkpoints)), default=0)
    if newest < saved.step:
        found = f"none newer than step {newest}" if newest else "none"
        raise SetupError(
            f"run {rundir.run_id} counts on a checkpoint of step {saved.step} ({saved.where}), and there is {found} in "
            f"{rundir.checkpoints}: name the folder in which the learner worked before by --dir; if that is lost, "
            "begin another run (--run.name), with learner.checkpoint_url for checkpoints that outlast a machine"
        )
