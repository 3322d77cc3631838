"""Runs one attempt of a role on its node, and tells the supervisor its log, its status and its end when asked.

The role is an ordinary process, in a session of its own, that joins by address.  Whatever it needs and leaves lies in a
folder that only this user can read and that goes with the host; so does the role, by way of ``ops.lifeline``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from atpo_async import __version__
from atpo_async.links import keys
from atpo_async.ops import notices
from atpo_async.ops.exits import DOING, ERROR_FILE, STATUS_FOLDER, SUPERVISOR_PID
from atpo_async.ops.launchers.base import RoleUsage, StartOrder
from atpo_async.ops.launchers.processes import LocalRole, ProcessLauncher
from atpo_async.ops.launchers.ray import policy
from atpo_async.ops.launchers.ray.messages import End, Greeting, News, Order, Push, Start
from atpo_async.ops.launchers.ray.run_keys import write_public
from atpo_async.run import launch, processes, scratch, tail
from atpo_async.wire.messages import PROTOCOL

LOG_BYTES = 256 << 10
"""Of the log in one answer; what is more comes with the next ones."""
STATUS_BYTES, STATUS_FILES = 1 << 20, 64
NOTICE_LINES = 100
ERROR_BYTES = 64 << 10
DOING_FILES = 64

NEWS_S = 1.0
"""How long a host has no answer while there is nothing new."""
LOOK_S = 0.05
MEMORY_S = 2.0
"""Between two measurements of the memory, which reads much of /proc."""
END_S = 5.0
"""For the end of a process that was killed."""


class RoleHost:
    """One attempt of a role.

    Args:
        order: what is to run.
        address: of this node, at which others reach it.
        node_id: Ray's.
    """

    def __init__(self, order: Order, *, address: str, node_id: str) -> None:
        if order.folder and Path(order.folder).is_dir():
            os.chdir(order.folder)  # what the configuration names by a relative path is there as for the driver
        self._order = order
        self._address = address
        self._node_id = node_id
        temporary = Path(tempfile.gettempdir())
        scratch.sweep(temporary, "atpo-role-")
        self._scratch = scratch.Scratch(temporary, "atpo-role-")
        self._folder = self._scratch.path
        self._keys = self._folder / "keys"
        self._status = self._folder / "status"
        self._log = self._folder / "log"
        self._error = self._folder / "error"
        self._own_key = ""
        self._meeting = hold_port(address) if any("{port}" in word for word in order.argv) else None
        self._policy = order.policy
        self._launcher = ProcessLauncher()
        self._role: LocalRole | None = None
        self._code: int | None = None
        self._ended: asyncio.Task[None] | None = None
        self._notices = tail.Tail(self._folder / "notices")
        self._told: dict[str, bytes] = {}
        """Status files that the supervisor has, as they were."""
        self._pushed: set[str] = set()
        self._usage: RoleUsage | None = None
        self._memory_mb: float | None = None
        self._measured_at = self._weighed_at = 0.0
        for folder in (self._keys, self._status):
            folder.mkdir(mode=0o700)

    async def greet(self) -> Greeting:
        """Make this host's key, and tell what the supervisor has to know before the role can start."""
        public = ""
        if self._order.with_key:
            path, _ = keys.make_keys(self._keys, keys.CLIENT_KEY)
            public = path.read_text(encoding="utf-8")
            self._own_key = keys.load_public(path).decode()
        return Greeting(
            address=self._address,
            hostname=socket.gethostname(),
            node_id=self._node_id,
            pid=os.getpid(),
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
            package=__version__,
            protocol=PROTOCOL,
            public_key=public,
            lacks_policy=policy.is_lacking(Path(self._order.policy), self._order.files),
            meeting_port=self._meeting.getsockname()[1] if self._meeting else 0,
        )

    async def receive(self, name: str, data: bytes) -> None:
        """Take the next part of a file of the policy; its folder is the role's ``model.path`` from now on."""
        folder = self._folder / "policy"
        self._policy = str(folder)
        await asyncio.to_thread(policy.append, folder, name, data)

    async def start(self, start: Start) -> int:
        """Start the role; returns its process id.  Raises SetupError where that fails."""
        order = self._order
        if order.with_key:
            self._write_keys(start)
        config = self._folder / "config.json"
        config.write_text(order.config, encoding="utf-8")
        env = {
            **os.environ,
            **order.env,
            SUPERVISOR_PID: str(os.getpid()),
            ERROR_FILE: str(self._error),
            notices.FILE: str(self._folder / "notices"),
            STATUS_FOLDER: str(self._status),
            **({"CUDA_VISIBLE_DEVICES": ""} if order.hides_gpus else {}),
        }
        argv = filled(
            order.argv,
            python=sys.executable,
            launch=launch.HERE,
            config=str(config),
            join=start.join,
            host=start.host,
            keys=start.keys_dir or str(self._keys),
            policy=self._policy,
            head=start.head,
            port=str(start.port),
            rank=str(start.rank),
        )
        started = StartOrder(role=order.role, argv=argv, env=env, log=self._log, mark=order.mark)
        self._role = await self._launcher.start(started)
        self._ended = asyncio.create_task(self._wait(self._role), name=f"end of {order.role}")
        return self._role.pid

    def _write_keys(self, start: Start) -> None:
        if start.server_secret:
            secret = self._keys / f"{keys.SERVER_KEY}.key_secret"
            secret.touch(mode=0o600)  # closed to others before there is anything in it
            secret.write_text(start.server_secret, encoding="utf-8")
        (self._keys / f"{keys.SERVER_KEY}.key").write_text(start.server_key, encoding="utf-8")

    async def _wait(self, role: LocalRole) -> None:
        """Waits for: the end of the role's first process."""
        self._code = await role.wait()

    async def poll(self, push: Push) -> News:
        """Take in what the supervisor tells.  Waits for: news.  Unblocked by: output, the end, ``NEWS_S``."""
        self._take(push)
        deadline = time.monotonic() + NEWS_S
        while True:
            code = self._code  # before the log is read: what it wrote before its end is in the log then
            data = _read(self._log, push.log_from)
            if data or code is not None or time.monotonic() >= deadline:
                break
            await asyncio.sleep(LOOK_S)
        if code is None:
            await asyncio.to_thread(self._measure)
        lines = tuple(self._notices.new(most_bytes=notices.MOST_CHARACTERS * NOTICE_LINES))
        return News(
            log=data,
            statuses=self._new_statuses(),
            notices=lines,
            usage=self._usage,
            memory_mb=self._memory_mb,
            end=self._end(code) if code is not None and not data else None,
        )

    def _take(self, push: Push) -> None:
        if push.admitted is not None and self._order.with_key:
            # Its own key would be there twice: as its client's, and under its name.
            others = {name: key for name, key in push.admitted.items() if key != self._own_key}
            admit(self._keys, others)
        for name, content in push.statuses.items():
            self._pushed.add(name)
            with contextlib.suppress(OSError):
                aside = self._status / f".{name}"
                aside.write_bytes(content)
                aside.replace(self._status / name)

    def _new_statuses(self) -> dict[str, bytes]:
        """Status files of the role that have changed since they were told."""
        found: dict[str, bytes] = {}
        for file in sorted(self._status.glob("*.json"))[: STATUS_FILES + len(self._pushed)]:
            if file.name.startswith(".") or file.name in self._pushed:
                continue
            with contextlib.suppress(OSError):
                content = file.read_bytes()
                if len(content) <= STATUS_BYTES and content != self._told.get(file.name):
                    found[file.name] = self._told[file.name] = content
        return found

    def _measure(self) -> None:
        now = time.monotonic()
        if self._role is None:
            return
        if now - self._measured_at >= NEWS_S:
            self._measured_at = now
            (self._usage,) = self._launcher.usage([self._role])
        if now - self._weighed_at >= MEMORY_S:
            self._weighed_at = now
            (self._memory_mb,) = self._launcher.memory_mb([self._role])

    def _end(self, code: int) -> End:
        doing = {}
        first = self._error.with_suffix(DOING)
        others = sorted(first.parent.glob(f"{first.stem}.[0-9]*{DOING}"))
        for file in (first, *others)[:DOING_FILES]:
            with contextlib.suppress(OSError):
                doing[file.name.removeprefix(first.stem)] = file.read_bytes()[:ERROR_BYTES]
        error = b""
        with contextlib.suppress(OSError):
            error = self._error.read_bytes()[:ERROR_BYTES]
        return End(code=code, error=error, doing=doing)

    async def ask_to_end(self, pids: tuple[int, ...]) -> None:
        """SIGTERM to those of ``pids`` that belong to the role; to its first process where none does."""
        if self._role is None or self._code is not None:
            return
        family = {p.pid for p in processes.members(self._role.pid, processes.processes())}
        self._role.ask_to_end([pid for pid in pids if pid in family])

    async def end(self) -> None:
        """End the role and all that it started.  Waits for: their ends, for ``END_S``."""
        if self._role is None:
            return
        await self._launcher.kill([self._role])
        if self._ended is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._ended), END_S)

    async def close(self) -> None:
        """End what is left and remove all files."""
        await self.end()
        if self._meeting:
            self._meeting.close()
        await asyncio.to_thread(self._scratch.remove)
        if self._order.role == "learner":
            await asyncio.to_thread(scratch.clear, self._order.run_id)


def filled(argv: tuple[str, ...], **fields: str) -> tuple[str, ...]:
    """A command with its fields in braces filled in; other braces stay."""
    found = []
    for word in argv:
        for name, value in fields.items():
            word = word.replace(f"{{{name}}}", value)
        found.append(word)
    return tuple(found)


def admit(folder: Path, admitted: Mapping[str, str]) -> None:
    """Have exactly ``admitted`` (name -> public key) let in by the keys of a folder, besides its own."""
    own = {keys.SERVER_KEY, keys.CLIENT_KEY}
    for file in folder.glob("*.key"):
        if file.stem not in own and file.stem not in admitted:
            file.unlink(missing_ok=True)
    for name, key in admitted.items():
        if keys.is_name(name):
            write_public(folder / f"{name}.key", key)


def _read(file: Path, offset: int) -> bytes:
    try:
        with file.open("rb") as log:
            log.seek(offset)
            return log.read(LOG_BYTES)
    except OSError:
        return b""


def hold_port(address: str) -> socket.socket | None:
    """A socket that keeps a port of this node for ranks to meet at; None where none can be had.

    It does not listen: until it is closed no other process is given the port, and torch's store, which sets
    SO_REUSEADDR as this does, may listen there.
    """
    held = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((address, 0))
    except OSError:
        held.close()
        return None
    return held
