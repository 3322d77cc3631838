"""``atpo train A.toml --from RUN[:STEP]``: a new run begins with another run's policy, and with nothing else of it.

The other run may be under way: its files are read, none is touched.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async.config import Config
from atpo_async.config.resuming import Start
from atpo_async.core.errors import RunMismatch, SetupError
from atpo_async.models.policy import assemble, checkpoint_step, is_there, list_checkpoints, steps_trained, weights_in
from atpo_async.models.sources import looks_like_hub_name, model_folder
from atpo_async.ops.disk import error_number
from atpo_async.run.rundir import LATEST, START, RunDir
from atpo_async.status.run_folders import run_at, runs_near

TRIES = 5
"""Attempts to read a checkpoint that its run may remove meanwhile for a newer one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The run and the step of a policy to begin with."""

    run: RunDir
    step: int | None
    """None: the newest."""

    @property
    def name(self) -> str:
        """The text of the option --from."""
        return f"{self.run.path}" if self.step is None else f"{self.run.path}:{self.step}"


def find(text: str, runs: Path) -> Source:
    """What ``RUN[:STEP]`` names: a run folder, or the name of one in ``runs``.

    Raises SetupError where there is no such run.
    """
    name, colon, digits = text.rpartition(":")
    step = int(digits) if colon and digits.isdecimal() else None
    name = text if step is None else name
    for folder in (Path(name), runs / name):
        # Where links cannot be made, ``latest`` is a file that names the run.
        if (folder / "run.json").is_file() or (folder.name == LATEST and folder.is_file()):
            return Source(run=run_at(folder), step=step)
    raise SetupError(
        f"--from {text}: no run folder (with a run.json) at {Path(name)} or {runs / name}; it takes RUN or RUN:STEP; "
        f"{runs_near(Path(name), runs=runs)}"
    )


def is_same(source: Source, known: RunDir) -> bool:
    """Whether ``known`` began with this policy.

    Raises RunMismatch where it began otherwise and something was trained in it since.
    """
    recorded = known.started_from
    same = (
        recorded is not None
        and recorded.get("run_id") == source.run.run_id
        and source.step in (None, recorded.get("step"))
    )
    if not same and known.is_trained:
        began = f"with model.path = {known.config.model.path!r}"
        if recorded is not None:
            began = f"from {recorded.get('run')}, step {recorded.get('step')}"
        raise RunMismatch(
            f"run folder {known.path} began {began}, not from {source.name}: use another --run.name, or leave --from "
            "out to go on with that run"
        )
    return same


@contextlib.contextmanager
def assembled(source: Source, config: Config) -> Iterator[tuple[Config, Start]]:
    """``config`` of a run that begins with ``source``, and the policy itself, which is gone after the block unless the
    run has taken it.

    ``model.path`` of the configuration is where the policy will lie in the run.

    Raises SetupError: the run has no policy of that step; names those that it has.
    """
    path = config.run.dir / config.run.name
    if path.resolve() == source.run.path.resolve():
        raise SetupError(f"--from {source.name} names the run itself: use another --run.name, or leave --from out")
    config.run.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.from-", dir=config.run.dir) as aside:
        folder = Path(aside) / START
        record = _write(source, folder)
        model = config.model.model_copy(update={"path": str(path / START), "warm_start": False})
        yield config.model_copy(update={"model": model}), Start(folder=folder, record=record)


def described(record: Mapping[str, Any]) -> str:
    """A line about where a run's policy is from, as recorded in ``run.json``."""
    step = "" if record.get("step") is None else f", step {record['step']}"
    run, policy = record.get("run"), record.get("policy")
    return f"the run began with the policy of {run}{step} ({policy}), and with an optimizer of its own"


def _write(source: Source, folder: Path) -> dict[str, Any]:
    """Write the policy as an ordinary model folder; returns its record for ``run.json``."""
    for _ in range(TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            origin, step = _choose(source)
            _copy(source, origin, folder)
        except (OSError, SetupError) as exc:
            # A run under way removes its oldest checkpoint when there is a new one: then there is a newer one to take.
            if error_number(exc) == errno.ENOENT:
                continue
            if isinstance(exc, SetupError):
                raise
            raise SetupError(f"--from {source.name}: its policy cannot be copied to {folder.parent}: {exc}") from exc
        return {"run": str(source.run.path), "run_id": source.run.run_id, "step": step, "policy": str(origin)}
    raise SetupError(
        f"--from {source.name}: its checkpoints were removed while they were read; name a step that it keeps, or raise "
        "its learner.keep_checkpoints"
    )


def _choose(source: Source) -> tuple[Path, int | None]:
    """A checkpoint or a model folder, and its step."""
    run = source.run
    whole = {checkpoint_step(path): path for path in list_checkpoints(run.checkpoints) if weights_in(path) is not None}
    exported = run.path / "model"
    if source.step is not None:
        if source.step in whole:
            return whole[source.step], source.step
        steps = ", ".join(map(str, sorted(whole))) or "none"
        raise SetupError(
            f"--from {source.name}: run {run.path} keeps no checkpoint of step {source.step}; of steps: {steps} "
            f"(it saves every {run.config.learner.checkpoint_every} steps, learner.checkpoint_every, and keeps the "
            f"last {run.config.learner.keep_checkpoints}, learner.keep_checkpoints)"
        )
    newest = max(whole, default=None)
    if is_there(exported):
        made = (exported / "config.json").stat().st_mtime
        if newest is None or made >= (weights_in(whole[newest]) or whole[newest]).stat().st_mtime:
            return exported, steps_trained(run) or newest
    if newest is not None:
        return whole[newest], newest
    sharded = list_checkpoints(run.checkpoints)
    why = (
        "its checkpoints are in shards (FSDP), of which only its model/ at the end is made whole"
        if sharded
        else ("it has neither a checkpoint (learner.checkpoint_every) nor a model/ yet")
    )
    raise SetupError(f"--from {source.name}: run {run.path} has no policy to begin with: {why}")


def _copy(source: Source, origin: Path, folder: Path) -> None:
    if origin.name == "model":
        shutil.copytree(origin, folder, dirs_exist_ok=True)
        return
    assemble(_origin_of(source), origin, folder)


def _origin_of(source: Source) -> Path:
    """The model folder that the run began with, for configuration and tokenizer; a relative path is from where it was
    started, which may not be here."""
    path = source.run.config.model.path
    for candidate in (Path(path), source.run.path.parent.parent / path):
        if is_there(candidate):
            return candidate
    if looks_like_hub_name(path):
        with contextlib.suppress(SetupError):
            return model_folder(path)
    raise SetupError(
        f"--from {source.name}: the model folder that run {source.run.path} began with, model.path = {path!r}, is "
        "needed for its configuration and tokenizer, and is not here; start from the folder where that run was started"
    )
