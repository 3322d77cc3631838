"""Faults for tests: roles that can be killed and frozen, a TCP proxy that cuts, delays and holds, a disk without room.

Roles are real processes, but forked from a warm one that has imported everything: a role is up in milliseconds, and a
test can afford to kill it.  Run as a program this module is that warm process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from atpo_async.run.processes import die_with_parent
from scripts.faults import RECORD

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 60.0
"""For one wait; far beyond what it takes.  It ends a test that would hang, it does not time one."""
CLOCK = "ATPO_TEST_CLOCK"
"""Environment variable for a role: the file that says by how many seconds its wall clock is off."""

WARM = ("buffer.service", "tests.scripted_roles_support")
"""What the warm process imports.  Nothing that makes a thread: a fork copies only one."""


def until(condition: Callable[[], Any], what: str, *, story: Callable[[], str] = lambda: "") -> Any:
    """Poll for what other processes bring about; its first true value.  Fails after ``WAIT_S``."""
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain for {what}\n{story()}")
        time.sleep(0.002)
    return value


async def until_async(condition: Callable[[], Any], what: str, *, story: Callable[[], str] = lambda: "") -> Any:
    """The same beside a running loop."""
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain for {what}\n{story()}")
        await asyncio.sleep(0.002)
    return value


# --- processes -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Role:
    """One process forked for a test."""

    name: str
    pid: int
    log: Path
    _spawner: Spawner
    _code: int | None = None

    def poll(self) -> int | None:
        """Its exit code (-n: ended by signal n), or None while it lives."""
        if self._code is None:
            self._code = self._spawner.ask({"do": "poll", "pid": self.pid})["code"]
        return self._code

    def kill(self) -> None:
        """SIGKILL, frozen or not; returns when it is gone."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            until(lambda: self.poll() is not None, f"the end of {self.name}")

    def terminate(self) -> None:
        """SIGTERM: asks it to stop."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP; returns when it stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        until(lambda: self.frozen or self.poll() is not None, f"{self.name} to stand still")

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        until(lambda: not self.frozen, f"{self.name} to go on")

    @property
    def frozen(self) -> bool:
        return state_of(self.pid) == "T"

    def fill_disk(self, room_bytes: int = 0) -> None:
        """From now on no file of this process grows past ``room_bytes``: writes there fail with EFBIG."""
        hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (room_bytes, hard))

    def free_disk(self) -> None:
        hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (hard, hard))

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def state_of(pid: int) -> str:
    """The letter of ``/proc/PID/stat``: R, S, D, T, Z; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class Spawner:
    """The warm process, seen from the test.  Closing it ends all that it forked."""

    def __init__(self) -> None:
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.fault_support"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            cwd=ROOT,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.close()
        self._popen.wait(timeout=WAIT_S)
        self._popen.stdout.close()

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(json.dumps(question) + "\n")
        self._popen.stdin.flush()
        line = self._popen.stdout.readline()
        if not line:
            raise AssertionError(f"the warm process is gone, asked for {question}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self, name: str, target: str, *args: Any, log: Path, **env: str) -> Role:
        """Fork ``target`` (``module:function``) with JSON-able ``args``; its output is appended to ``log``."""
        answer = self.ask({"do": "start", "target": target, "args": args, "log": str(log), "env": env})
        return Role(name, answer["pid"], log, self)


@dataclass(frozen=True, kw_only=True)
class Tricks:
    """What is done to a buffer inside its own process; the program itself has no hooks for it."""

    silent_s: float | None = None
    """An actor that is silent for so long has lost its leases; otherwise seconds, for engines that start slowly."""
    stop_before_commit: str = ""
    """A file: when it is there, the next commit stands still before its first byte, as does the process."""
    stop_after_commit: str = ""
    """The same, behind the commit: what it holds is on disk and nobody was told."""
    fail_commits: str = ""
    """A file: while it is there, the journal's device has I/O errors."""
    slow_commits: str = ""
    """A file: a commit takes as long as it is there, far longer than an answer waits."""
    settle_wait_s: float | None = None
    """An answer waits no longer for a commit; otherwise seconds."""
    shards_apart: bool = False
    """The front of a buffer with shards starts none: they are roles of the test's own."""

    def play(self) -> None:
        from buffer import state
        from buffer.front import service as front
        from buffer.handlers import pending_answers
        from buffer.journal.tables import Tables

        if self.silent_s is not None:
            state.SILENT_LEAST_S = self.silent_s
        if self.settle_wait_s is not None:
            pending_answers.SETTLE_WAIT_S = self.settle_wait_s
        if self.shards_apart:
            front.STARTS_SHARDS = False
        commit = Tables.commit

        def tricked(tables: Any, group: Any) -> Any:
            if self.fail_commits and os.path.exists(self.fail_commits):
                raise OSError(errno.EIO, "Input/output error")
            while self.slow_commits and os.path.exists(self.slow_commits):
                time.sleep(0.01)
            _stop_if(self.stop_before_commit)
            made = commit(tables, group)
            _stop_if(self.stop_after_commit)
            return made

        Tables.commit = tricked  # type: ignore[assignment,method-assign]


def _stop_if(file: str) -> None:
    if file and os.path.exists(file):
        os.unlink(file)
        os.kill(os.getpid(), signal.SIGSTOP)


def buffer_role(run_dir: str, tricks: Mapping[str, Any], name: str = "buffer") -> None:
    """The real buffer, or a shard of it, as ``python -m buffer RUN_DIR --name NAME`` runs it."""
    from atpo_async.ops import role
    from buffer.service import serve

    Tricks(**tricks).play()
    role.run("buffer", serve, [run_dir, "--name", name])


def _shift_clock(file: str) -> None:
    """The wall clock, for this process: moved by as many seconds as ``file`` says."""
    real = time.time

    def shifted() -> float:
        try:
            with open(file) as said:
                return real() + float(said.read() or 0)
        except OSError:
            return real()

    time.time = shifted


def _serve_forks() -> None:
    """Read requests line by line until the test closes its end; then end all children."""
    for name in WARM:
        importlib.import_module(name)
    gc.freeze()
    ends: dict[int, int | None] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "start":
            pid = _fork(asked)
            ends[pid] = None
            answer: dict[str, Any] = {"pid": pid}
        else:
            answer = {"code": _code(asked["pid"], ends)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in [pid for pid in ends if _code(pid, ends) is None]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _code(pid: int, ends: dict[int, int | None]) -> int | None:
    if ends[pid] is None:
        gone, status = os.waitpid(pid, os.WNOHANG)
        ends[pid] = os.waitstatus_to_exitcode(status) if gone else None
    return ends[pid]


def _fork(asked: Mapping[str, Any]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        die_with_parent(signal.SIGKILL, parent_pid=parent)
        with open(os.devnull) as nothing, open(asked["log"], "ab") as log:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # for whoever looks for a hang
        os.environ.update(asked["env"])
        if CLOCK in asked["env"]:
            _shift_clock(asked["env"][CLOCK])
        module, _, function = asked["target"].partition(":")
        getattr(importlib.import_module(module), function)(*asked["args"])
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# --- the proxy -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Flow:
    """One direction of a proxy: what becomes of bytes on their way.  May be changed at any time."""

    delay_s: float = 0.0
    """Each byte arrives this much later; the order stays."""
    bytes_per_s: float | None = None
    mangle: Callable[[bytes], bytes] | None = None
    """Applied to each chunk as it is read."""
    passed: int = 0
    """Bytes delivered."""
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._open.set()

    def hold(self) -> None:
        """Nothing arrives any more, not even the end of a connection, and no side is told: a network gone dead."""
        self._open.clear()

    def release(self) -> None:
        """What was held arrives now."""
        self._open.set()


class Proxy:
    """TCP between a client and ``target``; use as an async context.  ``up`` leads to the target.

    Args:
        target: ``tcp://host:port``; may be changed later, for the connections to come.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.up, self.down = Flow(), Flow()
        self.accepted = 0
        self._refusing = False
        self._server: asyncio.Server | None = None
        self._live: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def endpoint(self) -> str:
        assert self._server is not None
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Every connection breaks, and new ones break at once."""
        self._refusing = True
        self.break_connections()

    def restore(self) -> None:
        self._refusing = False

    def break_connections(self) -> None:
        """Every connection breaks; new ones are let through."""
        for writer in self._live:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.accepted += 1
        self._live.add(writer)
        ends = [writer]
        try:
            if self._refusing:
                return
            host, _, port = self.target.removeprefix("tcp://").rpartition(":")
            there, back = await asyncio.open_connection(host, int(port))
            self._live.add(back)
            ends.append(back)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, back, self.up), name="up")
                pumps.create_task(self._pump(there, writer, self.down), name="down")
        except (OSError, asyncio.CancelledError):
            pass  # refused by the target, or broken: the client finds out by its own end; or the test is over
        finally:
            for end in ends:
                self._live.discard(end)
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flow: Flow) -> None:
        """One direction of one connection.  Ends with the connection; its end travels like its bytes."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)

        async def deliver() -> None:
            loop = asyncio.get_running_loop()
            while True:
                arrived_at, chunk = await under_way.get()
                # The delay of now: one that is shortened lets go what it held.
                while (left_s := arrived_at + flow.delay_s - loop.time()) > 0:  # noqa: ASYNC110  (a clock has no event)
                    await asyncio.sleep(min(left_s, 0.02))
                await flow._open.wait()
                if not chunk:
                    writer.transport.abort()
                    return
                if flow.bytes_per_s is not None:
                    await asyncio.sleep(len(chunk) / flow.bytes_per_s)
                writer.write(chunk)
                await writer.drain()
                flow.passed += len(chunk)

        async def read() -> None:
            chunk = b"-"
            while chunk:
                try:
                    chunk = await reader.read(1 << 16)
                except OSError:
                    chunk = b""
                if chunk and flow.mangle is not None:
                    chunk = flow.mangle(chunk)
                await under_way.put((asyncio.get_running_loop().time(), chunk))

        async with asyncio.TaskGroup() as both:
            both.create_task(deliver(), name="deliver")
            both.create_task(read(), name="read")


# --- what was measured -----------------------------------------------------------------------------------------


class Recovery:
    """Measures one line of the table of faults; never asserted.

    Args:
        fault: what is done.
        happens: what must come of it.
    """

    def __init__(self, fault: str, happens: str) -> None:
        self._facts = {"fault": fault, "happens": happens}
        self._over_at = time.monotonic()

    def over(self) -> None:
        """The fault has ended (or struck, where it has no end): from here the time runs."""
        self._over_at = time.monotonic()

    def recovered(self) -> None:
        """Work goes on: the next turn is acknowledged, the next batch trained."""
        seconds = time.monotonic() - self._over_at
        file = os.environ.get(RECORD)
        if file:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps({**self._facts, "test": test, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    _serve_forks()
