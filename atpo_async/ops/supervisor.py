"""Starts, watches, restarts and stops the roles of a run, by way of a launcher.

Each attempt of a role has its output in ``logs/<role>.<attempt>.log``.  When a role ends, all that it started is ended
too, before it is started again: an engine's processes outlive a killed parent and hold its memory.  The roles end by
themselves when this process is killed (``ops.lifeline``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from enum import Enum
from typing import Any

from atpo_async.config import SupervisorConfig
from atpo_async.config.doors import LAUNCHER
from atpo_async.core.errors import AtpoError, RoleCrashed, SetupError
from atpo_async.core.texts import of_error
from atpo_async.ops import notices, stopping
from atpo_async.ops.attempts import Attempt, Crashes, Ending
from atpo_async.ops.exits import ERROR_FILE, EXIT_CRASH, EXIT_DONE, EXIT_USER, SUPERVISOR_PID
from atpo_async.ops.following import NOTICES, Follower
from atpo_async.ops.launchers.base import Launcher, RoleLost, StartOrder
from atpo_async.ops.specs import LEARNER, RoleSpec
from atpo_async.ops.watching import HangWatch, RoleWatch, write_hang_report
from atpo_async.run import accelerate_environment, processes, scratch
from atpo_async.run.metrics import Record
from atpo_async.run.rundir import RunDir
from atpo_async.status import snapshot
from atpo_async.status.hangs import Verdict
from atpo_async.status.loading import RoleStart

LAST_GRACE_S = 1.5
"""For the buffer, which is asked to stop after the roles that still send to it."""

COMEBACK_S = 5.0
"""How long the learner may take to end after the others, where an earlier attempt of it may have ended the run."""

HANG_SHARE = 0.75
"""Of ``links.give_up_s``: a role that is stuck is ended before those that wait for it give up."""


class Outcome(Enum):
    DONE = "done"
    INTERRUPTED = "interrupted"


class Supervisor:
    """Runs roles to the end of the run.

    Args:
        rundir: the run; its roles record there where they listen.
        specs: the roles, in the order of starting.
        settings: the launcher, restarts, back-off, grace.
        launcher: in place of the one that ``settings`` names.
        say: one line to the user about an event (a restart, a stop).
        on_records: new records of the metrics file, as they come.
        on_starts: the roles that are starting, about once a second.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        rundir: RunDir,
        specs: Sequence[RoleSpec],
        *,
        settings: SupervisorConfig,
        launcher: Launcher[Any] | None = None,
        say: Callable[[str], None] = lambda line: None,
        on_records: Callable[[Sequence[Record]], None] = lambda records: None,
        on_starts: Callable[[Sequence[RoleStart]], None] = lambda starts: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rundir = rundir
        self._specs = list(specs)
        self._settings = settings
        self._say = say
        self._clock = clock
        self._launcher: Launcher[Any] = launcher or LAUNCHER.make(settings.launcher, options=settings.launcher_options)
        self._by = f"supervisor.launcher = {settings.launcher!r}" if launcher is None else type(launcher).__name__
        """The launcher, in errors."""
        self._attempts: dict[str, Attempt] = {}
        """Role -> its attempt that runs."""
        self._done = asyncio.Event()
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()
        self._again = "Ctrl-C again"
        self._restarts = 0
        self._comebacks = 0
        """How often the role that ends the run was started again."""
        self._comeback = asyncio.Event()
        """Set when it is started again the next time."""
        self._starts_at: dict[str, float] = {}
        """Roles that have ended -> when they are started again, seconds of ``time.monotonic()``."""
        self._follower = Follower(rundir, say=say, on_records=on_records, on_starts=on_starts)
        self._watch = RoleWatch(rundir.path / snapshot.FOLDER, self._launcher, self._attempts, say)

    @property
    def _hang_s(self) -> float:
        return self._settings.hang_s or HANG_SHARE * self._rundir.config.links.give_up_s

    @property
    def pids(self) -> dict[str, int]:
        """Role -> process id, of those whose first process runs on this machine."""
        return {role: a.handle.pid for role, a in self._attempts.items() if a.handle.pid is not None}

    def status_lines(self) -> list[str]:
        """The status of every role, in lines."""
        return self._watch.status_lines()

    def interrupt(self, again: str = "Ctrl-C again") -> None:
        """Ask for a stop; the second time, for one without grace.  For signal handlers.

        Args:
            again: what the user does to ask the second time.
        """
        if self._stopping.is_set():
            self._at_once.set()
        self._again = again
        self._stopping.set()

    async def run(self) -> Outcome:
        """Start the roles and wait.  Waits for: the learner.  Unblocked by: its end, ``interrupt``, a role given up.

        Whatever way it ends, no process of a role is left, nor its weights in shared memory.

        Raises:
            SetupError: a role ended with something that only the user can mend.
            RoleCrashed: a role crashed too often; the message ends with the last lines of its log.
        """
        await asyncio.to_thread(snapshot.forget_the_dead, self._rundir.path / snapshot.FOLDER)
        keepers = [asyncio.create_task(self._keep(spec), name=f"keep {spec.name}") for spec in self._specs]
        learner = all(spec.name != LEARNER for spec in self._specs)
        signs = _tasks({"run done": self._done.wait(), "stop asked for": self._stopping.wait()})
        follower = self._follower
        passive = _tasks(
            {
                "follow metrics": follower.follow_records(),
                "tell the addresses": follower.tell_the_addresses(learner=learner),
                "sample memory": follower.sample_memory(
                    self._watch, every_s=self._settings.sample_every_s, restarts=lambda: self._restarts
                ),
            }
        )
        # These are for a run that is to go on: they end as soon as it is done or stops.
        active = _tasks(
            {"look for hangs": self._hang_watch().run(), "follow starts": follower.follow_starts(self._attempts)}
        )
        try:
            waiting: set[asyncio.Task[Any]] = {*keepers}
            while not (self._done.is_set() or self._stopping.is_set()):
                ended, _ = await asyncio.wait({*waiting, *signs}, return_when=asyncio.FIRST_COMPLETED)
                for task in ended & waiting:
                    waiting.discard(task)
                    task.result()  # raises what made the role be given up
            for task in active:
                task.cancel()
            if self._stopping.is_set():
                return Outcome.INTERRUPTED
            # The others learn from the buffer that the run is over, and exit by themselves.
            await self._wait_ended(self._settings.stop_grace_s, cut=self._stopping)
            return Outcome.DONE
        finally:
            self._stopping.set()
            for task in active:
                task.cancel()
            await asyncio.shield(self._stop(keepers))
            helpers = [*signs, *passive, *active, *keepers]
            for task in helpers:
                task.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            follower.pass_on()
            # A learner that was killed had no chance to remove its weights.
            await asyncio.to_thread(scratch.clear, self._rundir.run_id)

    # --- one role -----------------------------------------------------------------------------------------------

    async def _keep(self, spec: RoleSpec) -> None:
        """Run one role, again after a crash.  Waits for: its process.  Unblocked by: its end, the back-off, a stop."""
        crashes = Crashes(self._settings)
        while not self._stopping.is_set():
            attempt, comebacks = await self._start(spec), self._comebacks
            ending = await self._wait(attempt)
            if self._stopping.is_set() or self._done.is_set():
                return
            if ending.code == EXIT_DONE:
                if spec.ends_run:
                    self._done.set()
                    return
                if not await self._is_needed_again(comebacks):
                    return
                self._say(f"{spec.name} had ended with the run, whose learner died before it did; starting it again")
                continue
            if ending.code == EXIT_USER:
                raise SetupError(f"{spec.name}: {ending.reason}  (log: {attempt.log})")
            pause_s = self._settings.backoff_s
            if not ending.lost:
                crashes.add(self._clock())
                if crashes.too_many:
                    raise RoleCrashed(crashes.given_up(attempt, ending.reason))
                pause_s = crashes.pause_s
            self._say(f"{spec.name} ended: {ending.reason}; starting it again in {pause_s:g} s  (log: {attempt.log})")
            await self._back_off(spec, pause_s)

    async def _start(self, spec: RoleSpec) -> Attempt:
        attempt = self._rundir.next_attempt(spec.name)
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
        log = self._rundir.log_path(spec.name, attempt)
        handle = await self._launched(StartOrder(role=spec.name, argv=spec.argv, env=env, log=log, mark=mark))
        running = Attempt(role=spec.name, handle=handle, mark=mark, log=log, error_file=error_file)
        self._attempts[spec.name] = running
        return running

    async def _launched(self, order: StartOrder) -> Any:
        """The handle of a role that was started.  Raises SetupError with the launcher's name where it fails."""
        by = f"by {self._by}"
        try:
            handle = await self._launcher.start(order)
        except AtpoError:
            raise
        except Exception as exc:
            raise SetupError(f"{order.role} cannot be started {by}: {of_error(exc)}") from exc
        missing = [part for part in ("pid", "wait", "ask_to_end") if not hasattr(handle, part)]
        if missing:
            raise SetupError(
                f"{order.role} cannot be started {by}: its start() returned {type(handle).__name__}, which lacks "
                f"{', '.join(missing)}; see {LAUNCHER.protocol}"
            )
        return handle

    async def _wait(self, attempt: Attempt) -> Ending:
        """Waits for: the end of a role, and of all that it started.  Returns how it ended."""
        ending: Ending | None = None
        try:
            code = await attempt.handle.wait()
        except RoleLost as exc:
            ending = Ending(code=EXIT_CRASH, reason=str(exc), lost=True)
        except SetupError as exc:
            ending = Ending(code=EXIT_USER, reason=str(exc))
        except AtpoError as exc:
            ending = Ending(code=EXIT_CRASH, reason=str(exc))
        except Exception as exc:
            ending = Ending(code=EXIT_CRASH, reason=f"its launcher has lost it: {of_error(exc)}")
        await self._kill([attempt])
        self._attempts.pop(attempt.role, None)
        return ending or attempt.ending(code)

    async def _kill(self, attempts: Sequence[Attempt]) -> None:
        """End these attempts and all that they started, together.  Reports to the user where the launcher fails."""
        try:
            await self._launcher.kill([attempt.handle for attempt in attempts])
        except Exception as exc:
            names = ", ".join(attempt.role for attempt in attempts)
            self._say(f"{self._by} could not end {names}: {of_error(exc)}")

    async def _back_off(self, spec: RoleSpec, pause_s: float) -> None:
        """Waits for: ``pause_s`` before a crashed role is started again.  Unblocked by: a stop."""
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
        """Whether a role that ended with the run is needed again, because the learner died after it had ended the run.

        Waits for: the run's end.  Unblocked by: the learner, which ends or is restarted.

        Args:
            comebacks: ``_comebacks`` when the role was started.
        """
        if not any(spec.ends_run for spec in self._specs):
            return False
        # A learner that was restarted since then may already wait for this role, or be about to end.
        limit_s = None if comebacks == self._comebacks else COMEBACK_S
        events = (self._done, self._stopping, self._comeback)
        waits = [asyncio.create_task(event.wait(), name="needed again?") for event in events]
        try:
            await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return not (self._done.is_set() or self._stopping.is_set())

    # --- hangs --------------------------------------------------------------------------------------------------

    def _hang_watch(self) -> HangWatch:
        return HangWatch(
            self._watch,
            deadline_s=self._rundir.config.links.deadline_s,
            hang_s=self._hang_s,
            restarts=self._restarts_due,
            end=self._end_hung,
            say=self._say,
        )

    def _restarts_due(self) -> dict[str, float]:
        """Role that has ended -> seconds until it is started again."""
        now = time.monotonic()
        return {role: max(0.0, at - now) for role, at in self._starts_at.items()}

    async def _end_hung(self, verdict: Verdict) -> None:
        """End a role that hangs; ``_keep`` starts it again."""
        attempt = self._attempts.get(verdict.ends or "")
        if attempt is None or attempt.hung:
            return
        report = write_hang_report(attempt, verdict, self.status_lines())
        attempt.hung = (
            f"stuck for more than {self._hang_s:g} s (supervisor.hang_s): {verdict.line}  (the run as it stood: "
            f"{report})"
        )
        await self._kill([attempt])

    # --- stopping -----------------------------------------------------------------------------------------------

    async def _stop(self, keepers: Sequence[asyncio.Task[None]]) -> None:
        """Ask, wait, kill.  Waits for: the roles' ends.  Unblocked by: the grace, a second interrupt.

        The buffer is asked after the others, which send their last turns to it.  A role that saves may finish.
        """
        last = {spec.name for spec in self._specs if spec.stops_last}
        for grace_s, names in (
            (self._settings.stop_grace_s, {spec.name for spec in self._specs} - last),
            (LAST_GRACE_S, last),
        ):
            working = await asyncio.to_thread(self._watch.working_pids)
            for name in names & self._attempts.keys():
                self._attempts[name].handle.ask_to_end(working.get(name, ()))
            await self._wait_saved(grace_s, names)
        if self._attempts:
            await self._kill(list(self._attempts.values()))
        if keepers:
            await asyncio.wait(keepers, timeout=5.0)

    async def _wait_saved(self, grace_s: float, names: set[str]) -> None:
        """Waits for: the ends of ``names``.  Unblocked by: those, ``grace_s`` in which none of them saved, a second
        interrupt."""
        watch = stopping.Watch(self._hang_s, again=self._again)
        deadline = self._clock() + grace_s
        while names & self._attempts.keys() and not self._at_once.is_set():
            observed, _ = await asyncio.to_thread(self._watch.observe)
            look = watch.look([role for role in observed if role.role in names], time.monotonic())
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
        while any(names is None or name in names for name in self._attempts):
            left = deadline - self._clock()
            if left <= 0 or cut.is_set():
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(cut.wait(), timeout=min(0.05, left))


def _tasks(named: dict[str, Coroutine[Any, Any, Any]]) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(work, name=name) for name, work in named.items()]
