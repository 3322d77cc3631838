"""Trains a run on a Ray cluster: what the command does on its machine, and what the run's supervisor does on its node.

The command starts the supervisor, or attaches to the one that is there; the supervisor trains as ``atpo train`` does on
one machine, with a launcher of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs, urlsplit

from rich.console import Console

from atpo_async.api import machine, own_parts
from atpo_async.api.beginning import Beginning
from atpo_async.api.places.base import Say
from atpo_async.config import Config, build, resuming
from atpo_async.core.errors import RunMismatch, SetupError
from atpo_async.models.sources import check_positions
from atpo_async.ops import metrics_sinks
from atpo_async.ops.specs import RoleSpec
from atpo_async.ops.supervisor import Outcome, Supervisor
from atpo_async.report.progress import Progress
from atpo_async.run.metrics import Record
from atpo_async.run.rundir import RunDir
from atpo_async.status import run_view
from atpo_async.status.loading import RoleStart

if TYPE_CHECKING:
    from atpo_async.ops.launchers.ray.job import desk
    from atpo_async.ops.launchers.ray.launcher import RayLauncher
    from atpo_async.ops.launchers.ray.plan import Plan

WORK, LOOK = f"{__name__}:work", f"{__name__}:look"
"""What the supervisor runs in its thread, and for `atpo status`."""

SCHEME = "ray://"
"""Begins what `atpo status` takes for a run on a cluster."""

NO_URL = (
    "note: learner.checkpoint_url is not set: checkpoints are on the learner's node alone, and the learner waits for "
    "that node should it be lost"
)
OTHERS_S = 30.0
"""Within which the processes of a supervisor that was lost have gone, where its node was not."""
MOST_SHOWN = 6
"""Settings that a refusal lists."""


def need_ray() -> None:
    """Raises SetupError where ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise SetupError("--on ray needs ray, which is not installed here: pip install 'atpo-async[ray]'")


# --- the command ------------------------------------------------------------------------------------------------


def train_on_ray(config: Config, *, console: Console, again: str, begin_from: str | None = None) -> bool:
    """Train on a cluster, or attach to the run that is going on there.  Returns whether the run was interrupted.

    Raises an AtpoError as ``train_to_the_end`` does; SetupError where there is no such cluster, or it cannot hold the
    run; RunMismatch where a run of that name is going on with another configuration.
    """
    need_ray()
    from atpo_async.ops.launchers.ray import cluster, roles
    from atpo_async.ops.launchers.ray.job import driver

    roles.check(config)
    settings, name = config.ray, config.run.name
    cluster.connect(settings.address, settings.namespace, runtime_env=_runtime_env(config))
    try:
        here = cluster.here(settings.address)
        found = driver.facts_of(name, settings.namespace)
        if found is None:
            actor, pinned = _start(config, here, again=again, begin_from=begin_from)
        else:
            actor, facts = found
            pinned = _attached(config, facts, console, begin_from=begin_from)
        with _Screen(console, title=f"atpo {name} on Ray", total_steps=config.run.steps) as screen:
            outcome = driver.follow(actor, screen, run=name, pinned=pinned)
    finally:
        cluster.disconnect()
    if outcome.message and outcome.code != "failed":
        console.print(outcome.message, markup=False)
    if outcome.code == "failed":
        raise driver.error_of(outcome)
    return outcome.code == "interrupted"


class _Screen(Progress):
    """Progress that may be over before the last words."""

    _over = False

    def over(self) -> None:
        """Show it as it ended; what is said from now on comes below."""
        if not self._over:
            self._over = True
            super().__exit__(None, None, None)

    def starting(self, found: Sequence[RoleStart]) -> None:
        """Of roles that start."""
        if not self._over:
            super().starting(found)

    def __exit__(self, *exc_info: object) -> None:
        self.over()


def _runtime_env(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if config.ray.working_dir is not None:
        if not config.ray.working_dir.is_dir():
            raise SetupError(f"ray.working_dir = '{config.ray.working_dir}' is no folder here")
        found["working_dir"] = str(config.ray.working_dir.absolute())
    if config.ray.env_vars:
        found["env_vars"] = dict(config.ray.env_vars)
    return found


def _start(config: Config, here: str, *, again: str, begin_from: str | None) -> tuple[Any, str]:
    """A new supervisor, and which node it is on.  Raises SetupError where the cluster cannot hold the run."""
    from atpo_async.ops.launchers.ray import cluster, plan
    from atpo_async.ops.launchers.ray.job.supervisor import CONCURRENT, RunSupervisor

    nodes = cluster.nodes()
    planned = plan.plan(config, nodes, here=here)
    plan.check(planned, nodes, wait=config.ray.wait_for_nodes)
    data, folder = config.model_dump_json(), str(Path.cwd())
    arguments = {"config": data, "here": here, "folder": folder, "again": again, "begin_from": begin_from}
    actor = cluster.start_supervisor(
        RunSupervisor,
        config.run.name,
        planned.pin,
        concurrency=CONCURRENT,
        work=WORK,
        look=LOOK,
        arguments=arguments,
        folder=folder,
        facts={"config": data, "pinned": str(planned.pin), "from": begin_from or ""},
    )
    return actor, str(planned.pin)


def _attached(config: Config, facts: Mapping[str, str], console: Console, *, begin_from: str | None = None) -> str:
    """Say that the run goes on, and where.  Raises RunMismatch where it is another one of that name."""
    name = config.run.name
    if "config" not in facts:
        console.print(f"run {name} is going on, and its supervisor is out of reach now; attached to it", markup=False)
        return "of the buffer"
    running = build(_parsed(facts["config"]), source=f"run {name} on the cluster")
    differing = [change for change in resuming.changes(running, config) if not change[0].startswith("ray.")]
    if running.run.dir != config.run.dir:
        differing.insert(0, ("run.dir", running.run.dir, config.run.dir))
    if differing:
        listed = "; ".join(f"{field} is {old!r} there, {new!r} here" for field, old, new in differing[:MOST_SHOWN])
        more = f"; and {len(differing) - MOST_SHOWN} more" if len(differing) > MOST_SHOWN else ""
        raise RunMismatch(
            f"a run {name} is going on in the namespace {config.ray.namespace} with another configuration: {listed}"
            f"{more}.  The same configuration attaches to it (Ctrl-C there stops it), `atpo status {SCHEME}{name}` "
            "shows it; use another --run.name or --ray.namespace for this one"
        )
    if begin_from is not None and begin_from != facts["from"]:
        other = f"--from {facts['from']}" if facts["from"] else "no --from"
        raise RunMismatch(
            f"run {name} is going on, and was started with {other}: --from {begin_from} has no effect on it; leave it "
            "out to attach to it, or use another --run.name"
        )
    console.print(f"run {name} is going on; attached to it", markup=False)
    return facts["pinned"]


def _parsed(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


def look_on_ray(url: str) -> run_view.RunView:
    """The state of a run: ``ray://RUN``, ``ray://ADDRESS/RUN``, with ``?namespace=NAME`` where that is not ``atpo``.

    Raises SetupError where there is no such run or cluster.
    """
    need_ray()
    from atpo_async.ops.launchers.ray import cluster
    from atpo_async.ops.launchers.ray.job import driver

    address, run, namespace = parse_url(url)
    cluster.connect(address, namespace)
    try:
        found = driver.look(run, namespace, address)
    finally:
        cluster.disconnect()
    assert isinstance(found, run_view.RunView)
    return found


def parse_url(url: str) -> tuple[str, str, str]:
    """(address, run, namespace).  Raises SetupError for what is none."""
    parts = urlsplit(url)
    inner = parts.path.strip("/")
    address, run = (parts.netloc, inner) if inner else ("auto", parts.netloc)
    asked = parse_qs(parts.query)
    if not run or "/" in run or asked.keys() - {"namespace"}:
        raise SetupError(f"{url} names no run on Ray: {SCHEME}RUN, or {SCHEME}HOST:PORT/RUN?namespace=NAME")
    return address, run, asked.get("namespace", ["atpo"])[0]


# --- the supervisor ---------------------------------------------------------------------------------------------


def work(at: desk.Desk, *, config: str, here: str, folder: str, again: str, begin_from: str | None) -> desk.Outcome:
    """Train, in the supervisor; its lines go to ``at``."""
    from atpo_async.api.training import train_to_the_end
    from atpo_async.ops.launchers.ray.job import desk

    wanted = build(_parsed(config), source="the driver's configuration")
    _check_folder(wanted, folder)
    _outlive_the_lost(wanted)
    console = Console(
        file=cast(IO[str], _Lines(at)), highlight=False, soft_wrap=True, width=10_000, force_terminal=False
    )
    place = OnRay(at, here=here, folder=folder)
    trained = train_to_the_end(wanted, console=console, again=again, begin_from=begin_from, place=place)
    return desk.Outcome(code="interrupted" if trained.interrupted else "done")


def look(*, config: str, **_: Any) -> run_view.RunView:
    """What `atpo status` shows, in the supervisor."""
    run = build(_parsed(config), source="the driver's configuration").run
    return run_view.look(run.dir / run.name)


def _check_folder(config: Config, folder: str) -> None:
    if not (config.run.dir.is_absolute() or Path(folder).is_dir()):
        raise SetupError(
            f"run.dir = '{config.run.dir}' is relative, and the buffer's node has no folder {folder}: name an absolute "
            "--run.dir"
        )


def _outlive_the_lost(config: Config) -> None:
    """Waits for: the processes that hosts of a lost supervisor still run here, which Ray ends with it; ``OTHERS_S``."""
    path = config.run.dir / config.run.name
    if not (path / "run.json").is_file():
        return
    from atpo_async.ops.orphans import marked_processes

    run_id = RunDir.open(path).run_id
    deadline = time.monotonic() + OTHERS_S
    while time.monotonic() < deadline:
        if all(found.supervisor is None or found.folder == path for found in marked_processes(run_id)):
            return
        time.sleep(0.1)


class _Lines(io.TextIOBase):
    """A file whose lines go to the desk."""

    def __init__(self, at: desk.Desk) -> None:
        self._at = at
        self._rest = ""

    def write(self, text: str, /) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            self._at.say(line.rstrip())
        return len(text)

    def flush(self) -> None:
        """What has no end of line yet is kept."""


class _Told:
    """Progress, as the drivers are told it."""

    def __init__(self, at: desk.Desk) -> None:
        self._at = at
        self._began = time.time()

    @property
    def elapsed_s(self) -> float:
        return time.time() - self._began

    def say(self, line: str) -> None:
        self._at.say(line)

    def feed(self, records: Sequence[Record]) -> None:
        self._at.feed(records)

    def starting(self, found: Sequence[RoleStart]) -> None:
        self._at.starting(found)


class OnRay:
    """Roles on the cluster that this process is a part of.

    Args:
        at: where progress goes, and stops come from.
        here: Ray's resource of the driver's node.
        folder: the driver's working folder.
    """

    def __init__(self, at: desk.Desk, *, here: str, folder: str) -> None:
        self._at = at
        self._here = here
        self._folder = folder
        self._close = contextlib.ExitStack()
        self._plan: Plan | None = None

    def check(self, begun: Beginning, say: Say) -> None:
        """What the roles need is checked where they are; here, what the buffer and the run's folder need."""
        config = begun.checked
        machine.check_launch(config)
        machine.check_journal_dir(config)
        metrics_sinks.check(config)
        machine.check_warm_start(config)
        machine.check_environment(config)
        machine.check_packages(config)
        own_parts.check(config, say=say)
        self._plan = self._planned(config)

    def _planned(self, config: Config) -> Plan:
        from atpo_async.ops.launchers.ray import cluster, plan

        return plan.plan(config, cluster.nodes(), here=self._here)

    def check_policy(self, policy: Path, config: Config) -> None:
        if (policy / "config.json").is_file():  # else each node has it, or fetches it by its name
            check_positions(policy, config.model.max_context_tokens)

    def described(self, begun: Beginning, rundir: RunDir) -> list[str]:
        from atpo_async.ops.launchers.ray import cluster

        plan = self._plan or self._planned(rundir.config)
        count, later = rundir.config.actor.count, plan.actors - rundir.config.actor.count
        actors = f"{count} actor(s)" + (f", and {later} more when nodes come" if later else "")
        learner = " and ".join(map(str, plan.learner))
        alone = [] if rundir.config.learner.checkpoint_url is not None else [NO_URL]
        return [
            *alone,
            f"on Ray: supervisor and buffer on node {cluster.address()}; the learner takes {learner}; {actors}, each "
            f"{plan.actor}",
        ]

    def roles(self, rundir: RunDir) -> list[RoleSpec]:
        from atpo_async.ops.launchers.ray.roles import cluster_specs

        plan = self._plan or self._planned(rundir.config)
        gpus = any(need.amounts.get("GPU") for need in plan.learner)
        return cluster_specs(rundir.config, rundir.path, actors=plan.actors, gpus=gpus)

    def launcher(self, rundir: RunDir, say: Say) -> RayLauncher:
        from atpo_async.ops.launchers.ray.cluster import RayPlaces
        from atpo_async.ops.launchers.ray.launcher import RayLauncher
        from atpo_async.ops.launchers.ray.run_keys import RunKeys

        own = rundir.config.links.keys_dir
        keys = RunKeys(own or rundir.scratch / "keys", made=own is None)
        self._close.callback(keys.remove)
        plan = self._plan or self._planned(rundir.config)
        launcher = RayLauncher(rundir, plan, RayPlaces(), keys, folder=self._folder, say=say)
        self._close.callback(launcher.close)
        return launcher

    @contextlib.contextmanager
    def shown(self, console: Console, config: Config) -> Iterator[_Told]:
        try:
            yield _Told(self._at)
        finally:
            self._at.over()

    def run(self, supervisor: Supervisor, say: Say) -> Outcome:
        async def supervised() -> Outcome:
            loop = asyncio.get_running_loop()

            def stop(again: str) -> None:
                with contextlib.suppress(RuntimeError):  # it has just ended
                    loop.call_soon_threadsafe(supervisor.interrupt, again)

            self._at.answers_stops(stop)
            try:
                return await supervisor.run()
            finally:
                self._at.answers_stops(None)

        return asyncio.run(supervised())

    def close(self) -> None:
        self._close.close()
