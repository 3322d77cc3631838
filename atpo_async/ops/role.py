"""The frame of a role's process: it reads the arguments, sets up logging and signals, and turns an error into one line
and an exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

from atpo_async import config as configuration
from atpo_async.config import Config
from atpo_async.core import texts
from atpo_async.core.errors import (
    AtpoError,
    ConfigError,
    EnvironmentBroken,
    ProbeMismatch,
    RunMismatch,
    SetupError,
    WeightsRejected,
)
from atpo_async.links import addresses
from atpo_async.models import compiled
from atpo_async.ops.exits import (
    ERROR_FILE,
    ERROR_PREFIX,
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_USER,
    PLACED,
    STATUS_FOLDER,
)
from atpo_async.ops.joined.joining import Joined, join
from atpo_async.ops.lifeline import Signals, exit_within, is_supervised, tie_to_supervisor
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.files import write_atomic
from atpo_async.run.rundir import RunDir, joining
from atpo_async.run.temporary import make_temporary_folder_fit
from atpo_async.status import snapshot, waits
from atpo_async.status.loading import Loads
from atpo_async.status.reporter import Reporter

EXIT_DEADLINE_S = 5.0
"""After its work a process may take this long for its clean-up; then it ends."""


@dataclass(kw_only=True)
class RoleContext:
    """Arguments of a role's main function."""

    config: Config
    run_id: str
    """Empty for an actor that joined by address: it takes whichever run it finds there."""
    rundir: RunDir | None
    """None for an actor that joined by address; of a learner that did, its replica (``run.replica``)."""
    endpoints: Endpoints
    name: str
    """``actor-0``, ``buffer``, ``learner``, or as given by --name."""
    index: int
    stopping: asyncio.Event
    """Set by SIGTERM, SIGINT, or the supervisor's end: finish what must be finished and return."""
    log: logging.Logger
    supervised: bool = False
    joined: Joined | None = None
    """Of a learner that joined by address."""
    left: bool = False
    """Set by a role that has ended as a signal asked, and has handed over all that it had: its exit code is 0."""

    def locate(self, name: str) -> Callable[[], str] | None:
        """A function that looks up where a role listens now, by a field of ``Endpoints``: a restarted role listens
        elsewhere.  None for an actor without the run's folder."""
        if self.rundir is None:
            return None
        listening = self.rundir.listening

        def look() -> str:
            found = ""
            with contextlib.suppress(SetupError, OSError):
                found = getattr(listening.now(), name)
            found = found or getattr(self.endpoints, name)
            return addresses.reached_from_here(found) if found else ""

        return look

    @property
    def rank(self) -> int:
        return self.index

    @property
    def process_name(self) -> str:
        """``name``, with its number for ranks after the first: each process of a run has its own."""
        return self.name if self.index == 0 or self.name.endswith(f"-{self.index}") else f"{self.name}-{self.index}"


def run(name: str, main: Callable[[RoleContext], Awaitable[None]], argv: Sequence[str]) -> NoReturn:
    """Run a role to its end and exit with its code.

    Arguments: ``RUN_DIR [--index N] [--name X] [--debug]``, with ``--config FILE`` or dotted options where this role
    differs in what a run lets differ; or for an actor or a learner without the run's folder ``--config FILE --join
    HOST:PORT``, and for that learner ``--dir FOLDER``.

    A first SIGTERM or SIGINT sets ``stopping``; a second one cancels ``main``.  Supervised (``ATPO_SUPERVISOR_PID``
    is set), the role ends when its supervisor does.  A thread writes the role's status (``status.reporter``) and
    answers SIGUSR1 with it.
    """
    debug = "--debug" in argv
    code = EXIT_CRASH
    supervised = is_supervised()
    context: RoleContext | None = None
    try:
        make_temporary_folder_fit(_note)
        compiled.keep(_note)
        context = _context(name, list(argv))
        folder = _status_folder(context)
        if folder is not None:
            actors = [f"actor-{index}" for index in range(context.config.actor.count)]
            if STATUS_FOLDER in os.environ:
                actors = []  # of those that wait elsewhere for a place nothing is known here
            others = ("buffer", "learner", *actors) if supervised else ()
            waits.extend_while(Loads(folder, context.process_name, others))
        with Reporter(context.process_name, folder=folder, log=context.log, on_signal=True) as reporter:
            code = asyncio.run(_serve(main, context, reporter))
    except AtpoError as exc:
        code = _say(exc, supervised=supervised, debug=debug)
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = 128 + signal.SIGINT
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else EXIT_CRASH
    except BaseExceptionGroup as group:
        causes = list(_leaves(group))
        if causes and all(isinstance(cause, AtpoError) for cause in causes):
            code = _say(causes[0], supervised=supervised, debug=debug)
        else:
            _print(texts.trace_of(group))
            code = _say(next(c for c in causes if not isinstance(c, AtpoError)), supervised=supervised, debug=False)
    except BaseException as exc:
        _print(texts.trace_of(exc))
        code = _say(exc, supervised=supervised, debug=False)
    finally:
        if context is not None and context.joined is not None:
            # After the last status: it reaches the run's folder too.
            context.joined.close()
    exit_within(EXIT_DEADLINE_S, code)
    sys.exit(code)


def _status_folder(context: RoleContext) -> Path | None:
    """Where this role writes its status; None where no process would read it."""
    if given := os.environ.get(STATUS_FOLDER):
        return Path(given)
    return None if context.rundir is None else context.rundir.path / snapshot.FOLDER


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)


def _say(error: BaseException, *, supervised: bool, debug: bool) -> int:
    """Report an error in one line on stderr, and for what started the role in a file; returns the exit code."""
    if debug:
        _print(texts.trace_of(error))
    text = texts.middle_cut(str(error)) if isinstance(error, AtpoError) else texts.of_error(error, most=1000)
    _print(f"{ERROR_PREFIX}{text}")
    exact = supervised or PLACED in os.environ
    code = exit_code(error) if exact or not isinstance(error, AtpoError) else EXIT_USER
    if exact and ERROR_FILE in os.environ:
        # A program in between (accelerate) changes the exit code, and an engine may write to the log after us.
        file = Path(os.environ[ERROR_FILE])
        with contextlib.suppress(OSError):
            if code == EXIT_USER or not _is_for_the_user(file):
                write_atomic(file, json.dumps({"code": code, "error": text}))
    return code


def _is_for_the_user(error_file: Path) -> bool:
    """Whether another rank of this role has ended with what only the user can mend.  That this rank then loses its peer
    is no reason of its own."""
    try:
        return bool(json.loads(error_file.read_text(encoding="utf-8"))["code"] == EXIT_USER)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def exit_code(error: BaseException) -> int:
    """2 where only the user can mend it, 3 for a named failure that another attempt may mend, 1 for a crash."""
    if not isinstance(error, AtpoError):
        return EXIT_CRASH
    # Rejected weights end an actor only after it has rejected the same version time and again.
    for_users = ConfigError | SetupError | RunMismatch | EnvironmentBroken | WeightsRejected | ProbeMismatch
    return EXIT_USER if isinstance(error, for_users) else EXIT_FAILURE


def parse_address(text: str) -> str:
    """``HOST:PORT`` or ``tcp://HOST:PORT`` as an endpoint.  Raises ConfigError."""
    try:
        host, port = addresses.split(text)
        if port == 0:
            raise ValueError("port 0 is none to connect to")
    except ValueError as exc:
        raise ConfigError(f"--join {text}: neither a run folder nor an address: {exc}") from None
    return addresses.endpoint_of(host, port)


def _context(name: str, argv: list[str]) -> RoleContext:
    rest, options = configuration.split_options(argv)
    parser = argparse.ArgumentParser(prog=f"python -m {name}s" if name == "actor" else f"python -m {name}")
    parser.add_argument("run_dir", nargs="?", help="folder of the run")
    parser.add_argument("--config", help="configuration, to join without the run's folder")
    parser.add_argument("--join", help="HOST:PORT of the buffer, to join without the run's folder")
    parser.add_argument("--dir", type=Path, default=None, help="for a learner that joins: folder of its files")
    parser.add_argument("--index", type=int, default=None)
    parser.add_argument("--name", default=None)
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args(rest)

    index = args.index if args.index is not None else int(os.environ.get("RANK", "0"))
    joined: Joined | None = None
    if args.dir is not None and (name != "learner" or not args.join):
        raise ConfigError("--dir is for a learner that joins by address (--join HOST:PORT)")
    if args.run_dir is not None:
        if args.join:
            raise ConfigError(f"{args.run_dir} and --join {args.join}: give the run's folder or the address, not both")
        rundir: RunDir | None = RunDir.open(args.run_dir)
        assert rundir is not None
        config = rundir.config
        if args.config or options:
            source = args.config or rundir.path / "config.json"
            config = joining(rundir, configuration.load(source, options))
        run_id = rundir.run_id
        # Roles that were started together wait for one another; a role started by hand must find the others there.
        waits_for_others = is_supervised() or rundir.listening.there or name == "buffer"
        endpoints = rundir.listening.now() if waits_for_others else rundir.read_endpoints()
        default = f"{name}-{index}" if name == "actor" else name
    elif args.config and args.join:
        config, address = configuration.load(args.config, options), parse_address(args.join)
        rundir, run_id, endpoints, default = None, "", Endpoints(actors=address), hand_name(name)
        if name == "buffer":
            raise ConfigError("a buffer works in the run's folder: it does not join by address")
        if name == "learner":
            default, endpoints = name, Endpoints(learner=address)
            _logger(name)
            joined = _joined_learner(args, config, address, rank=index)
            rundir, run_id = joined.rundir, joined.rundir.run_id
    else:
        raise ConfigError(f"{parser.prog} needs RUN_DIR, or --config FILE --join HOST:PORT")
    role_name = args.name or default
    return RoleContext(
        config=config,
        run_id=run_id,
        rundir=rundir,
        endpoints=endpoints,
        name=role_name,
        index=index,
        stopping=asyncio.Event(),
        log=_logger(role_name),
        supervised=is_supervised(),
        joined=joined,
    )


def _joined_learner(args: argparse.Namespace, config: Config, address: str, *, rank: int) -> Joined:
    """A learner's place in a run whose folder is elsewhere.  Raises as ``ops.joined.joining.join``."""
    if args.name is not None:
        raise ConfigError(f"--name {args.name}: a learner that joins by address is called learner")
    if rank < 0:
        raise ConfigError(f"--index {rank}: the ranks of a learner count from 0")
    return join(config, endpoint=address, rank=rank, parent=args.dir)


def hand_name(role: str) -> str:
    """A name that no other process of the run has: ``actor-myhost-4711``."""
    return f"{role}-{socket.gethostname()}-{os.getpid()}"


def _own_stderr() -> TextIO:
    """The standard error under a descriptor of its own: an environment's code may close or replace the usual one."""
    try:
        return os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1, errors="backslashreplace")
    except (OSError, ValueError, AttributeError):
        return sys.stderr


def _print(text: str) -> None:
    """Print to the standard error, if it is still open."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(text, file=sys.stderr, flush=True)


def _logger(name: str) -> logging.Logger:
    logging.basicConfig(stream=_own_stderr(), level=logging.INFO, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(texts.BoundedFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for noisy in ("httpx", "urllib3", "filelock", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return logging.getLogger(name)


async def _serve(main: Callable[[RoleContext], Awaitable[None]], context: RoleContext, reporter: Reporter) -> int:
    """Run ``main`` under signals.  Waits for: main.  Unblocked by: its return, a second signal cancelling it."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    signals = Signals(context.stopping, cancel=task.cancel, log=context.log)
    for signum in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # not on Windows
            loop.add_signal_handler(signum, signals.received, signum)
    if context.supervised:
        tie_to_supervisor(
            loop,
            signals.supervisor_gone,
            grace_s=context.config.supervisor.stop_grace_s,
            saving_s=context.config.links.give_up_s,
        )
    reporter.attach()
    try:
        await main(context)
    except asyncio.CancelledError:
        if signals.first is None:
            raise
    finally:
        # The loop's clean-up, which follows, can hang as well: on a thread that does not return.
        waits.phase(snapshot.ENDING)
    return EXIT_DONE if signals.first is None or context.left else 128 + signals.first
