"""Starts, watches, restarts and stops the roles of a run on one machine.

Each role is a process in a session of its own, with its output in ``logs/<role>.<attempt>.log``.  When a role ends, all
that it started is ended too, before it is started again: an engine's processes outlive a killed parent and hold its
memory.  The roles end by themselves when this process is killed (``atpo_async.ops.role``).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import IO, Any

from atpo_async.config import Config, SupervisorConfig
from atpo_async.core.errors import RoleCrashed, SetupError
from atpo_async.core.texts import middle_cut
from atpo_async.links import addresses
from atpo_async.ops import accelerate_environment, notices, stopping
from atpo_async.ops.role import DOING, ERROR_FILE, ERROR_PREFIX, EXIT_CRASH, EXIT_DONE, EXIT_USER, SUPERVISOR_PID
from atpo_async.run import launch, processes, scratch
from atpo_async.run.metrics import MetricsTail, MetricsWriter, Record
from atpo_async.run.rundir import RunDir
from atpo_async.status import hangs, snapshot
from atpo_async.status.loading import RoleStart, starts
from atpo_async.status.reporter import EVERY_S
from atpo_async.status.wording import status_lines

LOG_LINES = 20
"""Lines of a crashed role's log in the error."""

LINE_CHARACTERS, REASON_CHARACTERS = 1000, 2000
"""Of each of them, and of the reason for which a role ended; its log has the rest."""

LAST_GRACE_S = 1.5
"""For the buffer, which is asked to stop after those that still talk to it."""

COMEBACK_S = 5.0
"""So long the learner may take to end after the others have, where it may not be the one that told them to."""

HANG_SHARE = 0.75
"""Of ``links.give_up_s``: who is stuck is ended before those who wait for it give up."""

NOTICES = "notices.jsonl"
"""In the run's scratch folder: what roles have for the terminal."""

TAIL_S = 0.25
"""Between two looks at the metrics file."""


@dataclass(frozen=True, kw_only=True)
class RoleSpec:
    """How to start one role."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    ends_run: bool = False
    """The run is done when this role is (the learner)."""
    stops_last: bool = False
    """Others need it while they stop (the buffer)."""


class Outcome(Enum):
    DONE = "done"
    INTERRUPTED = "interrupted"


@dataclass
class _Running:
    process: asyncio.subprocess.Process
    mark: str
    log: Path
    error_file: Path
    silent_end: bool = False
    """Its process ended in the middle of its environment's code, with no error said."""
    hung: str = ""
    """Why it was ended from here."""


def role_specs(
    config: Config,
    rundir: Path,
    *,
    has_cuda: Callable[[], bool],
    python: str = sys.executable,
    environ: Mapping[str, str] = os.environ,
) -> list[RoleSpec]:
    """The buffer, the learner and ``actor.count`` actors; ``has_cuda`` is asked only where it decides something.

    Raises SetupError for a GPU that ``environ`` does not allot.
    """
    folder = str(rundir)
    learner = launch.command("learner", folder, python=python)
    env = _threads(config.learner.num_threads) | _visible(config.learner.gpus, environ)
    if config.learner.num_processes > 1 or config.learner.accelerate_config:
        # A launcher takes a program of Python and its arguments.
        learner = (*_accelerate(config, python), *learner[2:])
        device = config.learner.device
        if config.learner.accelerate_config is None and (device == "cpu" or (device == "auto" and not has_cuda())):
            env["ACCELERATE_USE_CPU"] = "true"
    specs = [
        RoleSpec(
            name="buffer",
            argv=launch.command("buffer", folder, python=python),
            env=_threads(1) | _hidden(),
            stops_last=True,
        ),
        RoleSpec(name="learner", argv=learner, env=env, ends_run=True),
    ]
    each = config.actor.tensor_parallel_size
    for index in range(config.actor.count):
        gpus = config.actor.gpus[index * each : (index + 1) * each]
        specs.append(
            RoleSpec(
                name=f"actor-{index}",
                argv=launch.command("actors", folder, "--index", str(index), python=python),
                env=_threads(config.actor.num_threads) | _visible(gpus, environ),
            )
        )
    return specs


def _accelerate(config: Config, python: str) -> tuple[str, ...]:
    learner = config.learner
    words = [python, "-P", "-m", "accelerate.commands.launch", "--num_processes", str(learner.num_processes)]
    if learner.accelerate_config:
        words += ["--config_file", learner.accelerate_config]
    else:
        # The name notwithstanding this is "one process per rank": on a CPU, ACCELERATE_USE_CPU makes them gloo ranks.
        # What is given here is not taken from the user's own default file for accelerate.
        words += ["--multi_gpu", "--num_machines", "1", "--dynamo_backend", "no", "--gpu_ids", "all"]
    return (*words, "--mixed_precision", learner.mixed_precision, "--main_process_port", "0")


def _threads(count: int | None) -> dict[str, str]:
    return {} if count is None else {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


def _visible(gpus: Sequence[int], outer: Mapping[str, str]) -> dict[str, str]:
    """What shows a role its GPUs: numbers count within the ``outer`` CUDA_VISIBLE_DEVICES (a cluster's allotment)."""
    if not gpus:
        return {}
    allotted = outer.get("CUDA_VISIBLE_DEVICES")
    names = None if allotted is None else [name.strip() for name in allotted.split(",") if name.strip()]
    if names is not None and max(gpus) >= len(names):
        raise SetupError(f"GPU {max(gpus)} is asked for, but CUDA_VISIBLE_DEVICES = {allotted!r} allots {len(names)}")
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) if names is None else names[gpu] for gpu in gpus),
        # CUDA's own order is by speed: with unlike cards its numbers are not those of nvidia-smi.
        "CUDA_DEVICE_ORDER": outer.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
    }


def _hidden() -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ""}


class Supervisor:
    """Runs roles to the end of the run.

    Args:
        rundir: the run; its roles say there where they listen.
        specs: the roles, in the order of starting.
        settings: restarts, back-off, grace.
        say: one line to the user about an event (a restart, a stop).
        on_records: new records of the metrics file, as they come.
        on_starts: the roles that are starting, about once a second.
    """

    def __init__(
        self,
        rundir: RunDir,
        specs: Sequence[RoleSpec],
        *,
        settings: SupervisorConfig,
        say: Callable[[str], None] = lambda line: None,
        on_records: Callable[[Sequence[Record]], None] = lambda records: None,
        on_starts: Callable[[Sequence[RoleStart]], None] = lambda starts: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rundir = rundir
        self._specs = list(specs)
        self._settings = settings
        self._say = say
        self._on_records = on_records
        self._on_starts = on_starts
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._done = asyncio.Event()
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()
        self._restarts = 0
        self._comebacks = 0
        """How often the role that ends the run was started again."""
        self._comeback = asyncio.Event()
        """Set by the next time."""
        self._starts_at: dict[str, float] = {}
        """Roles that have ended -> when they are started again, seconds of ``time.monotonic()``."""
        self._step = 0
        self._version = 0
        self._tail = MetricsTail(rundir.metrics_path)
        self._notices = notices.Tail(rundir.scratch / NOTICES)
        self._status_folder = rundir.path / snapshot.FOLDER

    @property
    def _hang_s(self) -> float:
        return self._settings.hang_s or HANG_SHARE * self._rundir.config.links.give_up_s

    @property
    def pids(self) -> dict[str, int]:
        """Role -> process id, of those that run."""
        return {name: running.process.pid for name, running in self._running.items()}

    def interrupt(self) -> None:
        """Ask for a stop; the second time, for one without grace.  For signal handlers."""
        if self._stopping.is_set():
            self._at_once.set()
        self._stopping.set()

    async def run(self) -> Outcome:
        """Start the roles and wait.  Waits for: the learner.  Unblocked by: its end, ``interrupt``, a role given up.

        Whatever way it ends, no process of a role is left, nor its weights in shared memory.

        Raises:
            SetupError: a role ended with something that only the user can mend.
            RoleCrashed: a role crashed too often; the message ends with the last lines of its log.
        """
        await asyncio.to_thread(snapshot.forget_the_dead, self._status_folder)
        keepers = [asyncio.create_task(self._keep(spec), name=f"keep {spec.name}") for spec in self._specs]
        signs: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._done.wait(), name="run done"),
            asyncio.create_task(self._stopping.wait(), name="stop asked for"),
        ]
        helpers = [
            asyncio.create_task(self._follow_metrics(), name="follow metrics"),
            asyncio.create_task(self._sample_memory(), name="sample memory"),
            asyncio.create_task(self._look_for_hangs(), name="look for hangs"),
            asyncio.create_task(self._follow_starts(), name="follow starts"),
            asyncio.create_task(self._tell_the_address(), name="tell the address"),
        ]
        try:
            waiting: set[asyncio.Task[Any]] = {*keepers}
            while not (self._done.is_set() or self._stopping.is_set()):
                ended, _ = await asyncio.wait({*waiting, *signs}, return_when=asyncio.FIRST_COMPLETED)
                for task in ended & waiting:
                    waiting.discard(task)
                    task.result()  # raises what made the role be given up
            if self._stopping.is_set():
                return Outcome.INTERRUPTED
            # The others hear from the buffer that the run is over, and end by themselves.
            await self._wait_ended(self._settings.stop_grace_s, cut=self._stopping)
            return Outcome.DONE
        finally:
            self._stopping.set()
            await asyncio.shield(self._stop(keepers))
            for task in (*signs, *helpers, *keepers):
                task.cancel()
            await asyncio.gather(*signs, *helpers, *keepers, return_exceptions=True)
            self._pass_on_notices()
            self._on_records(self._tail.new())
            # A learner that was killed rather than asked had no chance to.
            await asyncio.to_thread(scratch.clear, self._rundir.run_id)

    # --- one role -----------------------------------------------------------------------------------------------

    async def _keep(self, spec: RoleSpec) -> None:
        """Keep one role going.  Waits for: its process.  Unblocked by: its end, then the back-off or a stop."""
        crashes: collections.deque[float] = collections.deque()
        while not self._stopping.is_set():
            running, comebacks = await self._start(spec), self._comebacks
            code = _code_of(running, await running.process.wait())
            await asyncio.to_thread(processes.kill_all, running.process.pid, running.mark)
            self._running.pop(spec.name, None)
            if self._stopping.is_set() or self._done.is_set():
                return
            if code == EXIT_DONE:
                if spec.ends_run:
                    self._done.set()
                    return
                if not await self._is_needed_again(comebacks):
                    return
                self._say(f"{spec.name} had ended with the run, whose learner died before it did; starting it again")
                continue
            code, reason = (code, running.hung) if running.hung else _failure(running, code)
            reason = middle_cut(reason, REASON_CHARACTERS)
            if code == EXIT_USER:
                raise SetupError(f"{spec.name}: {reason}  (log: {running.log})")
            now = self._clock()
            crashes.append(now)
            while crashes and now - crashes[0] > self._settings.restart_window_s:
                crashes.popleft()
            if len(crashes) > self._settings.max_restarts:
                raise RoleCrashed(_given_up(spec.name, len(crashes), self._settings, reason, running.log))
            pause_s = backoff_s(len(crashes), self._settings)
            self._say(f"{spec.name} ended: {reason}; starting it again in {pause_s:g} s  (log: {running.log})")
            self._restarts += 1
            if spec.ends_run:
                self._comebacks += 1
                self._comeback.set()
                self._comeback = asyncio.Event()
            self._starts_at[spec.name] = time.monotonic() + pause_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), timeout=pause_s)
            del self._starts_at[spec.name]

    async def _is_needed_again(self, comebacks: int) -> bool:
        """Whether a role that was told that the run is over is needed once more: by a learner that died after it had
        said so, and that will ask, and say so, again.

        Waits for: the run's end.  Unblocked by: the learner, which ends or comes back.

        Args:
            comebacks: ``_comebacks`` when the role was started.
        """
        if not any(spec.ends_run for spec in self._specs):
            return False
        # One that has come back since may wait for this role already, or be about to end.
        limit_s = None if comebacks == self._comebacks else COMEBACK_S
        events = (self._done, self._stopping, self._comeback)
        waits = [asyncio.create_task(event.wait(), name="needed again?") for event in events]
        try:
            await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return not (self._done.is_set() or self._stopping.is_set())

    async def _start(self, spec: RoleSpec) -> _Running:
        attempt = self._rundir.next_attempt(spec.name)
        log = self._rundir.log_path(spec.name, attempt)
        mark = f"{self._rundir.run_id}/{spec.name}/{attempt}"
        error_file = self._rundir.scratch / f"{spec.name}.{attempt}.error"
        if (strays := accelerate_environment.settings(os.environ)) and spec.ends_run:
            self._say(accelerate_environment.not_heeded(strays))
        env = {
            **{name: value for name, value in os.environ.items() if name not in strays},
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **spec.env,
            SUPERVISOR_PID: str(os.getpid()),
            processes.ROLE_MARK: mark,
            ERROR_FILE: str(error_file),
            notices.FILE: str(self._rundir.scratch / NOTICES),
        }
        error_file.unlink(missing_ok=True)
        with log.open("xb") as output:
            process = await _spawn(spec, env, output)
        running = _Running(process, mark, log, error_file)
        self._running[spec.name] = running
        return running

    # --- stopping -----------------------------------------------------------------------------------------------

    async def _stop(self, keepers: Sequence[asyncio.Task[None]]) -> None:
        """Ask, wait, kill.  Waits for: the roles' ends.  Unblocked by: the grace, a second interrupt.

        The buffer is asked after the others, which bring their last turns to it.  A role that saves is waited for.
        """
        last = {spec.name for spec in self._specs if spec.stops_last}
        for grace_s, names in (
            (self._settings.stop_grace_s, {spec.name for spec in self._specs} - last),
            (LAST_GRACE_S, last),
        ):
            ranks = await asyncio.to_thread(self._ranks)
            for name in names:
                if name in self._running:
                    # To the role alone: it ends its engine itself, or the killing below does.
                    for pid in ranks.get(name, [self._running[name].process.pid]):
                        with contextlib.suppress(ProcessLookupError, PermissionError):
                            os.kill(pid, signal.SIGTERM)
            await self._wait_saved(grace_s, names)
        # All at once: one after the other, many roles that will not go would keep the user waiting.
        marks = {running.process.pid: running.mark for running in self._running.values()}
        await asyncio.to_thread(processes.kill_roles, marks)
        if keepers:
            await asyncio.wait(keepers, timeout=5.0)

    def _ranks(self) -> dict[str, list[int]]:
        """Role -> its ranks, of those that a launcher has started: a launcher that is asked gives them 30 s to save."""
        found: dict[str, list[int]] = {}
        for observed in self._observe()[0]:
            pids = [status.pid for status in observed.statuses if snapshot.is_alive(status)]
            running = self._running.get(observed.role)
            if pids and running is not None and running.process.pid not in pids:
                found[observed.role] = pids
        return found

    async def _wait_saved(self, grace_s: float, names: set[str]) -> None:
        """Waits for: the ends of ``names``.  Unblocked by: those, ``grace_s`` in which none of them saved, a second
        interrupt."""
        watch = stopping.Watch(self._hang_s)
        deadline = self._clock() + grace_s
        while names & self._running.keys() and not self._at_once.is_set():
            observed_roles, _ = await asyncio.to_thread(self._observe)
            look = watch.look([observed for observed in observed_roles if observed.role in names], time.monotonic())
            for line in look.lines:
                self._say(line)
            if look.waited_for:
                deadline = self._clock() + grace_s
            left = deadline - self._clock()
            if left <= 0:
                return
            await self._wait_ended(min(left, 0.25), names)

    async def _wait_ended(
        self, timeout_s: float, names: set[str] | None = None, *, cut: asyncio.Event | None = None
    ) -> None:
        """Waits for: the ends of ``names`` (all where None).  Unblocked by: those, the timeout, ``cut``."""
        cut = cut or self._at_once
        deadline = self._clock() + timeout_s
        while any(names is None or name in names for name in self._running):
            left = deadline - self._clock()
            if left <= 0 or cut.is_set():
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(cut.wait(), timeout=min(0.05, left))

    # --- looking on ---------------------------------------------------------------------------------------------

    async def _follow_metrics(self) -> None:
        """Pass new records on.  Waits for: nothing but the clock."""
        while True:
            records = self._tail.new()
            for record in records:
                self._step = max(self._step, record.step)
                self._version = max(self._version, record.version)
            self._pass_on_notices()
            self._on_records(records)
            await asyncio.sleep(TAIL_S)

    def _pass_on_notices(self) -> None:
        for line in self._notices.new():
            self._say(line)

    async def _tell_the_address(self) -> None:
        """Say where further actors can join, once the buffer listens and whenever it has moved.  Waits for: nothing but
        the clock."""
        told = ""
        while True:
            with contextlib.suppress(SetupError, OSError):
                found = self._rundir.listening.now().actors
                if found and found != told:
                    moved = ": the buffer is no longer where it was" if told else ""
                    self._say(f"actors join with --join {addresses.to_join(found)}{moved}")
                    told = found
            await asyncio.sleep(TAIL_S)

    async def _follow_starts(self) -> None:
        """Pass on who is still starting.  Waits for: nothing but the clock."""
        while not (self._done.is_set() or self._stopping.is_set()):
            statuses, _ = await asyncio.to_thread(snapshot.read, self._status_folder)
            marks = {running.mark for running in self._running.values()}
            own = [status for status in statuses.values() if status.mark in marks]
            self._on_starts(starts(own, now=time.monotonic(), wall=time.time()))
            await asyncio.sleep(EVERY_S)

    async def _look_for_hangs(self) -> None:
        """Say who waits for whom when that takes long, and end a role that is stuck, which ``_keep`` starts again.

        Waits for: nothing but the clock.
        """
        links = self._rundir.config.links
        hang_s = self._hang_s
        every_s = min(EVERY_S, links.deadline_s / 4, hang_s / 4)
        watch = hangs.Watch(deadline_s=links.deadline_s, hang_s=hang_s, every_s=every_s)
        failed = False
        while not (self._done.is_set() or self._stopping.is_set()):
            await asyncio.sleep(every_s)
            try:
                observed_roles, others = await asyncio.to_thread(self._observe)
                now = time.monotonic()
                restarts = {role: max(0.0, at - now) for role, at in self._starts_at.items()}
                verdicts = watch.look(observed_roles, now, others=others, restarts=restarts)
            # The run is worth more than what looks after it.
            except Exception as exc:
                if not failed:
                    self._say(f"hangs cannot be looked for: {type(exc).__name__}: {exc}")
                failed = True
                continue
            for verdict in verdicts:
                running = self._running.get(verdict.ends) if verdict.ends is not None else None
                if verdict.ends is None:
                    self._say(verdict.line)
                elif running is not None and not running.hung:
                    await self._end_hung(running, verdict, hang_s)

    async def _end_hung(self, running: _Running, verdict: hangs.Verdict, hang_s: float) -> None:
        status = running.log.with_suffix(".stuck.txt")
        with contextlib.suppress(OSError):
            status.write_text("\n".join([verdict.line, *self.status_of_all()]) + "\n", encoding="utf-8")
        running.hung = (
            f"stuck for more than {hang_s:g} s (supervisor.hang_s): {verdict.line}  (the run as it stood: {status})"
        )
        await asyncio.to_thread(processes.kill_all, running.process.pid, running.mark)

    def status_of_all(self) -> list[str]:
        """What every role says of itself, in lines."""
        statuses, damaged = snapshot.read(self._status_folder)
        told = [line for name in sorted(statuses) for line in status_lines(statuses[name])]
        return told + [f"{name}: {fault}" for name, fault in damaged.items()]

    def _observe(self) -> tuple[list[hangs.ObservedRole], list[snapshot.StatusSnapshot]]:
        """The roles as they are seen from here; and snapshots of others that take part in the run."""
        statuses, _ = snapshot.read(self._status_folder)
        found = []
        alive = processes.processes()
        for name, running in list(self._running.items()):
            # Of several ranks one may have ended before the others.
            own = tuple(p for p in statuses.values() if p.mark == running.mark and p.phase != snapshot.ENDED)
            leader = running.process.pid
            family = [p.pid for p in processes.members(leader, alive)]
            found.append(
                hangs.ObservedRole(
                    role=name,
                    statuses=own,
                    stopped=tuple(processes.stopped({leader, *(p.pid for p in own)})),
                    processor_s=processes.processor_s(family),
                    moved_mb=processes.moved_mb(family),
                )
            )
        seen = {p.role for observed in found for p in observed.statuses}
        return found, [p for p in statuses.values() if p.role not in seen and snapshot.is_alive(p) is not False]

    async def _sample_memory(self) -> None:
        """Write ``memory/<role>_mb`` of each role, summed over its processes.  Waits for: nothing but the clock."""
        with MetricsWriter(self._rundir.metrics_path, source="supervisor") as writer:
            while True:
                await asyncio.sleep(self._settings.sample_every_s)
                sizes = await asyncio.to_thread(_memory, self.pids)
                if sizes:
                    writer.write(
                        step=self._step,
                        version=self._version,
                        metrics={**sizes, "supervisor/restarts": self._restarts},
                    )


def backoff_s(crashes: int, settings: SupervisorConfig) -> float:
    """Seconds before the restart after the ``crashes``-th crash (from 1) of the window: doubling, with a limit."""
    return min(settings.backoff_s * 2.0 ** (crashes - 1), settings.max_backoff_s)


def _memory(pids: Mapping[str, int]) -> dict[str, float]:
    running = processes.processes()
    sizes = {name: processes.memory_mb(p.pid for p in processes.members(pid, running)) for name, pid in pids.items()}
    return {f"memory/{name}_mb": round(size, 1) for name, size in sizes.items() if size}


async def _spawn(spec: RoleSpec, env: Mapping[str, str], output: IO[bytes]) -> asyncio.subprocess.Process:
    tie = functools.partial(processes.die_with_parent, parent_pid=os.getpid())
    try:
        return await asyncio.create_subprocess_exec(
            *spec.argv,
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            # A launcher that is not ours (accelerate) must end with us as well.
            preexec_fn=tie if sys.platform.startswith("linux") else None,
        )
    except OSError as exc:
        raise SetupError(f"{spec.name} cannot be started: {spec.argv[0]}: {exc.strerror}") from exc


def _failure(running: _Running, code: int) -> tuple[int, str]:
    """The exit code as the role meant it, and its reason in a line."""
    try:
        said = json.loads(running.error_file.read_text(encoding="utf-8"))
        return int(said["code"]), str(said["error"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if code < 0:
        return code, f"killed by {processes.signal_name(-code)}{_was_doing(running)}"
    if running.silent_end:
        return code, f"it ended without a word, as by os._exit(){_was_doing(running)}"
    lines = last_lines(running.log, LOG_LINES)
    said_last = next((line for line in reversed(lines) if line.startswith(ERROR_PREFIX)), None)
    if said_last is not None:
        return code, said_last.removeprefix(ERROR_PREFIX)
    if code == EXIT_USER and lines:
        return code, lines[-1]
    return code, f"exit code {code}"


def _code_of(running: _Running, code: int) -> int:
    """The exit code, a crash's where a role ended amid its environment's code without having said why."""
    running.silent_end = code >= 0 and bool(_was_doing(running)) and not running.error_file.exists()
    return EXIT_CRASH if running.silent_end else code


def _was_doing(running: _Running) -> str:
    """What others' code was at when the role died, for the end of a sentence; empty where nothing is known."""
    try:
        said = running.error_file.with_suffix(DOING).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return f"; its environment was at {said}" if said else ""


def _given_up(name: str, crashes: int, settings: SupervisorConfig, reason: str, log: Path) -> str:
    lines = "\n".join(f"  | {line}" for line in last_lines(log, LOG_LINES)) or "  | (its log is empty)"
    return (
        f"{name} crashed {crashes} times within {settings.restart_window_s:g} s (supervisor.max_restarts = "
        f"{settings.max_restarts}): {reason}\nlast lines of {log}:\n{lines}"
    )


def last_lines(path: Path, count: int) -> list[str]:
    """The last ``count`` lines of a text file, each cut; of a huge one no more than its end is read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [
        line if len(line) <= LINE_CHARACTERS else f"{line[:LINE_CHARACTERS]}…" for line in text.splitlines()[-count:]
    ]
