"""The folder of a run: its layout, making and opening it, its lock, the durable counter of versions.

runs/<name>/
  run.json          run_id, name, when it was made, whose policy it began with; its presence makes the folder a run
  config.json       the resolved configuration
  versions.json     Python, platform, packages (older ones as versions.<n>.json after an upgrade)
  endpoints.json    where the roles listen (endpoints.former.json: in an earlier life of the run)
  version           the next version number
  metrics.jsonl     one record a line
  trees.jsonl       a few trees for the report
  logs/<role>.<attempt>.log, and <role>.<attempt>.stuck.txt where one had to be ended
  status/<role>.json                what a role waits for now
  checkpoints/      of the learner
  start/            the policy that it began with, where that is another run's
  joined/           how much a learner that joined by address has passed on (``buffer.uplink``)
  scratch/          files that mean nothing once the run stands still
runs/latest         link to the run started last
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from atpo_async import config as configuration
from atpo_async.config import Config, resuming
from atpo_async.config.resuming import Start
from atpo_async.core.errors import ConfigError, RunMismatch, SetupError
from atpo_async.run import locks, processes, scratch
from atpo_async.run.endpoints import Endpoints, EndpointsFile
from atpo_async.run.files import sync_folder, write_atomic
from atpo_async.run.installed import versions
from atpo_async.run.metrics import read_metrics

LATEST = "latest"
FOLLOWING, PROMOTED = "following.json", "promoted.json"
"""Files that make a folder a follower's copy of a run, and one that was promoted (``buffer.following``)."""
START = "start"
"""Folder in a run: the policy that it began with, where that is another run's."""


JOINED = "joined"
"""Folder in a run: how much a learner without this folder has passed on, and where its checkpoints are."""


class RunDir:
    """An open run folder."""

    def __init__(self, path: Path, *, run_id: str, config: Config) -> None:
        self.path = path
        self.run_id = run_id
        self.config = config

    @classmethod
    def create(cls, config: Config, *, resume: bool = True) -> RunDir:
        """Make ``run.dir/run.name``, or open it again with the same configuration.

        The folder appears complete or not at all.  ``latest`` points to it afterwards.  Raises as ``held``.
        """
        with cls.held(config, resume=resume) as run:
            return run

    @classmethod
    @contextlib.contextmanager
    def held(cls, config: Config, *, resume: bool = True, start: Start | None = None) -> Iterator[RunDir]:
        """``create``, and hold the run's lock inside the block.  Of a run that another holds nothing is changed.

        Args:
            config: of the run.  In a folder in which nothing was trained it may be another one than the folder was made
                with: the run then begins anew.
            resume: whether the folder may be there.
            start: the policy that a new run begins with, ``config.model.path``; it is moved there.

        Raises:
            RunMismatch: the folder was made by another configuration (names each differing field), or exists and
                ``resume`` is false.
            SetupError: the folder is there and is no run, or cannot be made, or another process holds the run.
        """
        path = config.run.dir / config.run.name
        if (path / FOLLOWING).exists():
            raise SetupError(
                f"{path} is a follower's copy of a run, which may be going on elsewhere: where its buffer's machine is "
                f"lost, `atpo follower --promote --dir {path}` makes it a run's folder"
            )
        if config.run.name == LATEST:
            raise SetupError(f"run.name = {LATEST!r} is the name of the link to the latest run; use another --run.name")
        if (path / "run.json").is_file():
            if not resume:
                raise RunMismatch(f"run folder {path} exists already; use another --run.name, or resume it")
            run = cls.open(path, to_begin=True)
            going_on(run, config)
        else:
            run = cls._make(path, config, start)
            start = None
        with run.locked():
            # Only now: a run that goes on must not find its files changed by one that is refused.
            run._take(config, start)
            _point_latest(config.run.dir, config.run.name)
            yield run

    def _take(self, config: Config, start: Start | None) -> None:
        """Go on with ``config``.  What is on disk is read again: its last holder may have changed it."""
        on_disk = RunDir.open(self.path)
        if start is None:
            config, anew = going_on(on_disk, config)
        else:
            anew = True
        self.run_id = on_disk.run_id
        if anew:
            on_disk._forget()
            self.run_id = _new_id(config.run.name)
            if start is not None:
                start.folder.rename(self.path / START)
        self.config = config
        if on_disk.config != config:
            write_atomic(self.path / "config.json", _dump(config.model_dump(mode="json")))
        if anew:
            write_atomic(self.path / "run.json", _facts(self.run_id, config, start))
        self._note_versions()

    def _forget(self) -> None:
        """Take away what belongs to the configuration so far; nothing was trained with it.  Logs and numbers stay.

        Whenever this is broken off the folder is still a run in which nothing was trained.
        """
        scratch.clear(self.run_id)
        for folder in (
            self.journal,
            *(self.path / name for name in ("status", "scratch", "model", "skipped", JOINED, START)),
        ):
            shutil.rmtree(folder, ignore_errors=True)
        for name in ("endpoints.json", "trees.jsonl", "lineage.jsonl", "report.html", "version"):
            (self.path / name).unlink(missing_ok=True)
        if self.metrics_path.exists():
            number = sum(1 for _ in self.path.glob("metrics.*.jsonl"))
            self.metrics_path.rename(self.path / f"metrics.{number}.jsonl")

    @classmethod
    def _make(cls, path: Path, config: Config, start: Start | None = None) -> RunDir:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise SetupError(f"{path} exists and is no run folder (it has no run.json); use another --run.name")
        run_id = _new_id(config.run.name)
        scratch.sweep_unheld(path.parent, _is_unmade)
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        lock: int | None = None
        try:
            aside.mkdir(parents=True)
            lock = scratch.hold(aside)
            for folder in ("logs", "checkpoints"):
                (aside / folder).mkdir()
            write_atomic(aside / "config.json", _dump(config.model_dump(mode="json")))
            write_atomic(aside / "versions.json", _dump(versions()))
            if start is not None:
                start.folder.rename(aside / START)
            write_atomic(aside / "run.json", _facts(run_id, config, start))
            aside.rename(path)
            sync_folder(path.parent)
        except OSError as exc:
            shutil.rmtree(aside, ignore_errors=True)
            raise SetupError(f"run folder {path} cannot be made: {exc.strerror or exc}; see run.dir") from exc
        finally:
            if lock is not None:
                os.close(lock)
        return cls(path, run_id=run_id, config=config)

    @classmethod
    def open(cls, path: Path | str, *, to_begin: bool = False) -> RunDir:
        """Open a run folder; ``latest`` is followed.  Raises SetupError if it is none, ConfigError if damaged.

        Args:
            to_begin: for a run that could as well have another name; the error for a damaged one says so.
        """
        folder = Path(path)
        if folder.is_file() and folder.name == LATEST:
            folder = folder.parent / folder.read_text(encoding="utf-8").strip()
        folder = folder.resolve()
        try:
            run_id = str(_read(folder / "run.json", "run_id", to_begin=to_begin)["run_id"])
            data = _read(folder / "config.json", "run", to_begin=to_begin)
        except (FileNotFoundError, NotADirectoryError):
            raise SetupError(f"{path} is no run folder: it has no run.json and config.json") from None
        except OSError as exc:
            raise SetupError(f"run folder {path} cannot be read: {exc.strerror or exc}") from None
        return cls(folder, run_id=run_id, config=configuration.build(data, source=str(folder / "config.json")))

    @property
    def created(self) -> float:
        """Unix seconds."""
        return float(json.loads((self.path / "run.json").read_text(encoding="utf-8"))["created"])

    @property
    def started_from(self) -> Mapping[str, Any] | None:
        """Where the policy that this run began with is from, if it is another run's (``atpo_async.api.other_run``)."""
        found = json.loads((self.path / "run.json").read_text(encoding="utf-8")).get("from")
        return found if isinstance(found, dict) else None

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def journal(self) -> Path:
        """Folder of the buffer's journal."""
        elsewhere = self.config.buffer.journal_dir
        return self.path / "journal" if elsewhere is None else elsewhere / self.run_id

    @property
    def trees_path(self) -> Path:
        """A few trees for the report, one JSON object a line (``atpo_async.report.tree_samples``)."""
        return self.path / "trees.jsonl"

    @property
    def lineage_path(self) -> Path:
        """What each batch was trained on, where ``learner.lineage`` is set."""
        return self.path / "lineage.jsonl"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def checkpoints_place(self) -> str:
        """Where the checkpoints are, for people, if that is not the run's own folder; empty where it is."""
        return ""

    @property
    def scratch(self) -> Path:
        """For files that mean nothing once the run stands still; made when first asked for.

        Raises SetupError where it cannot be made.
        """
        folder = self.path / "scratch"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as exc:
            raise SetupError(f"{folder} cannot be made: {exc.strerror or exc}; the run needs its folder") from exc
        return folder

    def log_path(self, role: str, attempt: int) -> Path:
        return self.path / "logs" / f"{role}.{attempt}.log"

    def next_attempt(self, role: str) -> int:
        """The first attempt number of ``role`` without a log; a resumed run goes on counting."""
        pattern = re.compile(re.escape(role) + r"\.(\d+)\.log")
        found = [m for p in (self.path / "logs").glob("*.log") if (m := pattern.fullmatch(p.name))]
        return 1 + max((int(m.group(1)) for m in found), default=-1)

    def next_version(self) -> int:
        """The next version number, from 0.  Never the same one twice, not after a crash either.

        On disk before it is returned.  One at a time rather than in blocks: a gap left by a crash would count as lag.
        """
        version = self.following_version()
        write_atomic(self.path / "version", f"{version + 1}\n")
        return version

    def skip_versions(self, upto: int) -> int:
        """Let ``next_version`` give none up to ``upto``.  Returns how many it would have given twice."""
        twice = max(upto + 1 - self.following_version(), 0)
        if twice:
            write_atomic(self.path / "version", f"{upto + 1}\n")
        return twice

    def pass_on(self) -> None:
        """Returns once what was written here is in the run's own folder.  Waits for: the buffer, in a replica of that
        folder on another machine (``run.replica``)."""

    def following_version(self) -> int:
        """What ``next_version`` gives next.  Raises SetupError where the count is damaged."""
        file = self.path / "version"
        try:
            return int(file.read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0
        except ValueError:
            raise SetupError(f"{file} is damaged: {file.read_bytes()[:40]!r} is no version number") from None

    @property
    def listening(self) -> EndpointsFile:
        """Where the roles listen."""
        return EndpointsFile(self.path, write_atomic)

    def read_endpoints(self) -> Endpoints:
        """Raises SetupError where no role was started in this folder yet."""
        listening = self.listening
        if not listening.path.exists():
            raise SetupError(
                f"{listening.path} does not exist: nothing has been started in this run; start the buffer first"
            )
        return listening.now()

    def write_endpoints(self, endpoints: Endpoints) -> None:
        self.listening.replace(endpoints)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run: a second supervisor is refused.  Freed by the system when this process ends, however it does.

        Raises SetupError naming the process that holds it.
        """

        def in_use(holder: str) -> str:
            stopped = holder.isdecimal() and processes.stopped([int(holder)])
            how = f", which a signal has stopped (kill -CONT {holder} lets it go on)" if stopped else ""
            return f"run {self.path} is in use by process {holder}{how}; stop that one, or use another --run.name"

        with locks.held(self.path / "lock", in_use=in_use):
            yield

    @property
    def is_trained(self) -> bool:
        """Whether a learner has trained on a batch here.

        Publishing the first weights does not count: a run whose actors could not start gets as far.  Neither does a
        batch without a tree to train on.  A promoted copy holds what was trained on elsewhere.
        """
        if next(self.checkpoints.glob("step-*"), None) is not None or (self.path / PROMOTED).exists():
            return True
        return self.metrics_path.exists() and any(
            record.source == "learner" and "train/loss" in record.metrics for record in read_metrics(self.metrics_path)
        )

    def _note_versions(self) -> None:
        """Write down what is installed now; what the run was made with stays beside it."""
        file = self.path / "versions.json"
        now = _dump(versions())
        if file.is_file() and file.read_text(encoding="utf-8") == now:
            return
        if file.is_file():
            number = sum(1 for _ in self.path.glob("versions.*.json"))
            file.rename(self.path / f"versions.{number}.json")
        write_atomic(file, now)


def joining(run: RunDir, config: Config) -> Config:
    """``config`` for a process that takes part in ``run``, whose policy is the run's: a warm-started one, or another's.

    Raises RunMismatch naming each field that differs and may not, with both values.
    """
    config = _with_policy_of(run, config)
    differing = resuming.refused(run.config, config)
    if differing:
        listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, old, new in differing)
        raise RunMismatch(
            f"run folder {run.path} was made by another configuration: {listed}.  Use the old values, or another "
            f"--run.name (with --from {run.path} it starts from this run's policy); whatever bears on tasks, on how "
            "they are sampled and on which weights are trained stays in a run"
        )
    return config


def going_on(run: RunDir, config: Config) -> tuple[Config, bool]:
    """``config`` for going on with ``run``, and whether the run begins anew with it: nothing was trained in it.

    Raises RunMismatch as ``joining`` where something was.
    """
    fitting = _with_policy_of(run, config)
    if not resuming.refused(run.config, fitting):
        return fitting, False
    if run.is_trained:
        return joining(run, config), False
    return config, True


def _with_policy_of(run: RunDir, config: Config) -> Config:
    if run.started_from is not None:
        update = {"path": run.config.model.path, "warm_start": False}
    elif config.model.warm_start and not config.model.path:
        update = {"path": run.config.model.path}
    else:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update=update)})


def _read(file: Path, part: str, *, to_begin: bool) -> dict[str, Any]:
    """A JSON object that has ``part``.  Raises OSError, or ConfigError where it is none."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(said, dict) or part not in said:
            raise ValueError(f"it has no {part!r}")
    except ValueError as exc:
        otherwise = ", or use another --run.name" if to_begin else "; without it this run cannot be read"
        raise ConfigError(f"{file} is damaged: {exc}; put it back from a copy{otherwise}") from None
    return said


def _is_unmade(folder: Path) -> bool:
    """Whether ``folder`` is what ``RunDir._make`` leaves when it is killed."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}", folder.name) is not None and all(
        entry.name in ("logs", "checkpoints") or re.fullmatch(r"\.?(config|versions|run)\.json.*", entry.name)
        for entry in folder.iterdir()
    )


def _point_latest(folder: Path, name: str) -> None:
    link = folder / LATEST
    aside = folder / f".{LATEST}.{secrets.token_hex(4)}"
    try:
        aside.symlink_to(name)
        aside.replace(link)
    except OSError:  # no links on this file system: a file with the name does
        aside.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            write_atomic(link, f"{name}\n")


def _new_id(name: str) -> str:
    return f"{name}-{secrets.token_hex(4)}"


def _facts(run_id: str, config: Config, start: Start | None) -> str:
    """``run.json``."""
    found: dict[str, Any] = {"run_id": run_id, "name": config.run.name, "created": round(time.time(), 3)}
    if start is not None:
        found["from"] = dict(start.record)
    return _dump(found)


def _dump(data: Any) -> str:
    return json.dumps(data, indent=2, sort_keys=False) + "\n"
