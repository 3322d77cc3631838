"""The launcher of a run on a Ray cluster: each role has a place of its own, and a host there that starts it.

A role is under way from the moment it asks for its place: it may wait for one for days.  What its host tells goes into
the run's folder, where the supervisor finds it as if the role ran beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atpo_async import __version__
from atpo_async.core.errors import AtpoError, SetupError
from atpo_async.core.texts import of_error
from atpo_async.links import addresses
from atpo_async.ops.exits import ERROR_FILE
from atpo_async.ops.following import NOTICES
from atpo_async.ops.launchers.base import RoleLost, RoleUsage, StartOrder
from atpo_async.ops.launchers.ray import home, policy, waiting
from atpo_async.ops.launchers.ray.intake import Intake
from atpo_async.ops.launchers.ray.messages import Greeting, News, Order, Push, Start
from atpo_async.ops.launchers.ray.places import HostGone, Places
from atpo_async.ops.launchers.ray.plan import Need, Node, Plan, mismatch
from atpo_async.ops.launchers.ray.roles import BUFFER, LEARNER
from atpo_async.ops.launchers.ray.run_keys import RunKeys
from atpo_async.run import processes
from atpo_async.run.host import host_id
from atpo_async.run.rundir import RunDir
from atpo_async.status import snapshot
from atpo_async.status.snapshot import StatusSnapshot
from atpo_async.wire.messages import PROTOCOL

FIRST_LOOK_S, LOOK_S = 0.02, 0.5
"""Between two looks at places that have not come, and at endpoints that are not there."""
SHOW_S = 1.0
"""Between two snapshots of roles that wait for their place."""
GONE_S = 5.0
"""Within which Ray knows that a node is gone whose host is."""
DRAIN_S = 5.0
"""For the rest of the log of a role that was killed."""
CLOSE_S = 10.0
"""For a host to end its role and to remove its files."""
TOLD_ROLES = 8
"""Other roles whose status a role is told."""
AGAIN_S = 1.0
"""Before the log is asked for again that the disk here did not take."""


@dataclass(kw_only=True)
class RayRole:
    """One attempt of a role, from the request for its place to its end."""

    order: StartOrder
    needs: Sequence[Need]
    place: Any = None
    hosts: list[Any] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    """Of each host, once it has greeted."""
    work: asyncio.Task[int] | None = None
    news: list[News] = field(default_factory=list)
    """The newest of each host."""
    ask: Callable[[RayRole, Sequence[int]], None]
    lost: bool = False
    """A node of it is gone, and with that its place."""

    pid: None = None
    """It runs on another machine."""

    async def wait(self) -> int:
        """Waits for: its end.  Raises RoleLost where its node is gone, AtpoError where it could not be started."""
        assert self.work is not None
        try:
            return await asyncio.shield(self.work)
        except asyncio.CancelledError:
            if self.work.cancelled():
                return -signal.SIGTERM
            raise

    def ask_to_end(self, pids: Sequence[int]) -> None:
        self.ask(self, pids)


class RayLauncher:
    """Starts, observes and ends roles on a cluster.

    Args:
        rundir: the run, on this node.
        plan: what each role takes.
        places: the cluster.
        keys: of the run.
        folder: the driver's working folder.
        say: one line to the user.
    """

    def __init__(
        self, rundir: RunDir, plan: Plan, places: Places, keys: RunKeys, *, folder: str, say: Callable[[str], None]
    ) -> None:
        self._rundir = rundir
        self._plan = plan
        self._places = places
        self._keys = keys
        self._folder = folder
        self._say = say
        self._status = rundir.path / snapshot.FOLDER
        self._waiting = waiting.Waiting(say=say, blank=own_status)
        self._asked: dict[str, RayRole] = {}
        """Role -> its attempt that has no place yet."""
        self._came: dict[str, asyncio.Event] = {}
        self._watch: asyncio.Task[None] | None = None
        self._kept: dict[str, Any] = {}
        """Role -> the place of its last attempt: what is given back, others may take."""

    def close(self) -> None:
        """The roles have ended for good: their places are free."""
        for place in self._kept.values():
            self._places.give_back(place)
        self._kept.clear()

    # --- what the supervisor asks

    async def start(self, order: StartOrder) -> RayRole:
        role = RayRole(order=order, needs=self._needs(order.role), ask=self._ask)
        role.work = asyncio.create_task(self._carry(role), name=f"{order.role} on Ray")
        return role

    def _needs(self, role: str) -> Sequence[Need]:
        if role == BUFFER:
            return (self._plan.buffer,)
        if role != LEARNER:
            return (self._plan.actor,)
        node = home.node_of_checkpoints(self._rundir)
        return self._plan.learner if node is None else tuple(need.on(node) for need in self._plan.learner)

    def _ask(self, role: RayRole, pids: Sequence[int]) -> None:
        if role.work is None or role.work.done():
            return
        if not role.news:
            role.work.cancel()  # it has not begun
            return
        for host in role.hosts:
            task = asyncio.create_task(self._quietly(host, "ask_to_end", tuple(pids)))
            task.add_done_callback(lambda done: done.exception())

    async def kill(self, handles: Sequence[RayRole]) -> None:
        await asyncio.gather(*(self._end(role) for role in handles))

    async def _end(self, role: RayRole) -> None:
        """Waits for: the ends of its processes, the rest of its log.  Leaves nothing of it on its nodes."""
        assert role.work is not None
        name = role.order.role
        if not role.news:
            role.work.cancel()
        await asyncio.gather(*(self._quietly(host, "end") for host in role.hosts))
        await asyncio.wait([role.work], timeout=DRAIN_S)
        role.work.cancel()
        await asyncio.gather(*(self._quietly(host, "close") for host in role.hosts))
        for host in role.hosts:
            self._places.end(host)
        if role.place is not None and role.lost:
            self._places.give_back(role.place)
        elif role.place is not None:
            self._kept[name] = role.place
        role.place = None
        for number in range(len(role.needs)):
            self._keys.shut_out(_key_name(name, number))
        self._waiting.end(name)
        if self._asked.pop(name, None) is not None:
            waiting.unwrite(self._status, name)

    async def _quietly(self, host: Any, method: str, *words: Any) -> None:
        """A call whose failure changes nothing: the host is ended in any case."""
        with contextlib.suppress(AtpoError, TimeoutError):
            await asyncio.wait_for(self._places.call(host, method, *words), CLOSE_S)

    def usage(self, handles: Sequence[RayRole]) -> list[RoleUsage | None]:
        # Of several hosts the first one's: what the others do shows in their status.
        return [role.news[0].usage if role.news else None for role in handles]

    def memory_mb(self, handles: Sequence[RayRole]) -> list[float | None]:
        return [sum(found) if (found := [n.memory_mb for n in r.news if n.memory_mb]) else None for r in handles]

    # --- one attempt

    async def _carry(self, role: RayRole) -> int:
        """From the request for a place to the role's end.  Returns its exit code."""
        intakes = [self._intake(role.order, number) for number in range(len(role.needs))]
        try:
            await self._place(role)
            greetings = await self._greet(role)
            await self._begin(role, greetings)
            return await self._follow(role, intakes)
        except HostGone as exc:
            for intake in intakes:
                intake.forget()
            raise await self._as_lost(role, exc) from None

    def _intake(self, order: StartOrder, number: int) -> Intake:
        log = order.log if number == 0 else order.log.with_suffix(f".node-{number}.log")
        notices = self._rundir.scratch / NOTICES
        return Intake(log, status=self._status, notices=notices, error_file=Path(order.env[ERROR_FILE]))

    async def _place(self, role: RayRole) -> None:
        """Waits for: a node that has what the role needs, however long that takes.  Unblocked by: that, a stop."""
        order = role.order
        if order.role != BUFFER:
            kept = self._kept.pop(order.role, None)
            name = f"{self._rundir.config.run.name}/{order.role}"
            role.place = self._places.ask(name, role.needs) if kept is None else kept
            await self._until_placed(role)
        for number, need in enumerate(role.needs):
            role.hosts.append(self._places.host(self._order(order), need, place=role.place, bundle=number))

    async def _until_placed(self, role: RayRole) -> None:
        name = role.order.role
        need = " and ".join(map(str, role.needs))
        self._waiting.begin(name, need=need, mark=role.order.mark, now=time.monotonic())
        self._asked[name], self._came[name] = role, asyncio.Event()
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_places(), name="places that have not come")
        await self._came[name].wait()

    async def _watch_places(self) -> None:
        """Waits for: the places of all that have none.  Ends when none is left; one look serves all of them."""
        shown_at, pause_s, asked = 0.0, FIRST_LOOK_S, 0
        while self._asked:
            places = {name: role.place for name, role in self._asked.items()}
            try:
                came = await asyncio.to_thread(self._places.placed, places)
            except Exception as exc:  # the head may be out of reach for a while
                self._say(f"the cluster does not say which places have come: {of_error(exc)}")
                came = set()
                await asyncio.sleep(SHOW_S)
            for name in came & self._asked.keys():
                del self._asked[name]
                waiting.unwrite(self._status, name)
                self._came[name].set()
            now = time.monotonic()
            if now - shown_at >= SHOW_S:
                shown_at = now
                for name, status in self._waiting.look(now).items():
                    if name in self._asked:
                        waiting.write(self._status, status)
            # A place on a node that is there comes within milliseconds, another perhaps in days.
            pause_s = min(2 * pause_s, LOOK_S) if len(self._asked) <= asked else FIRST_LOOK_S
            asked = len(self._asked)
            await asyncio.sleep(pause_s)

    def _order(self, order: StartOrder) -> Order:
        config = self._rundir.config
        path = Path(config.model.path)
        # What the supervisor has put into its own environment for the role; the rest is of another machine.
        env = {name: text for name, text in order.env.items() if os.environ.get(name) != text}
        need = self._needs(order.role)[0]
        return Order(
            run_id=self._rundir.run_id,
            role=order.role,
            mark=order.mark,
            argv=order.argv,
            env=env,
            config=config.model_dump_json(),
            folder=self._folder,
            policy=config.model.path,
            files=None if order.role == BUFFER else policy.files_of(path),
            hides_gpus=not need.amounts.get("GPU"),
            with_key=order.role != BUFFER,
        )

    async def _greet(self, role: RayRole) -> list[Greeting]:
        """Waits for: the hosts' processes.  Raises SetupError for a node that cannot run the role."""
        found: list[Greeting] = await asyncio.gather(*(self._places.call(host, "greet") for host in role.hosts))
        ours = (f"{sys.version_info.major}.{sys.version_info.minor}", __version__, PROTOCOL)
        for greeting in found:
            node = Node(node_id=greeting.node_id, address=greeting.address, hostname=greeting.hostname, total={})
            role.nodes.append(node)
            theirs = (greeting.python, greeting.package, greeting.protocol)
            if unfit := mismatch(role.order.role, str(node), theirs=theirs, ours=ours):
                raise SetupError(unfit)
        self._waiting.end(role.order.role, placed_on=" and ".join(map(str, role.nodes)))
        return found

    async def _begin(self, role: RayRole, greetings: Sequence[Greeting]) -> None:
        """Let the hosts in, send the policy where it is lacking, and start the role's processes."""
        name = role.order.role
        for number, greeting in enumerate(greetings):
            if greeting.public_key:
                self._keys.let_in(_key_name(name, number), greeting.public_key, learner=name == LEARNER)
        for host, greeting in zip(role.hosts, greetings, strict=True):
            if greeting.lacks_policy and name != BUFFER:
                await self._send_policy(host)
        join = "" if name == BUFFER else await self._endpoint(LEARNER if name == LEARNER else "actors")
        serves = name in (BUFFER, LEARNER)
        for number, (host, greeting) in enumerate(zip(role.hosts, greetings, strict=True)):
            start = Start(
                join=join,
                host=self._bind(name, greeting.address),
                server_key=self._keys.public,
                server_secret=self._keys.secret if serves and name != BUFFER else "",
                keys_dir=str(self._keys.folder) if name == BUFFER else "",
                head=greetings[0].address,
                port=greetings[0].meeting_port,
                rank=number,
            )
            await self._places.call(host, "start", start)
        role.news = [News() for _ in role.hosts]
        if name == LEARNER:
            home.note(self._rundir, greetings[0].address)

    def _bind(self, role: str, address: str) -> str:
        """Where a role binds on a node: as the configuration says for the buffer's, else at the node's address."""
        host = self._rundir.config.links.host
        if addresses.is_wildcard(host):
            return host
        return host if role == BUFFER and not addresses.is_loopback(host) else address

    async def _send_policy(self, host: Any) -> None:
        folder = Path(self._rundir.config.model.path)
        files = policy.files_of(folder) or {}
        for name, data in policy.parts(folder, files):
            await self._places.call(host, "receive", name, data)

    async def _endpoint(self, name: str) -> str:
        """HOST:PORT of the buffer's socket.  Waits for: the buffer, which the supervisor starts again if it ends."""
        while True:
            with contextlib.suppress(SetupError, OSError):
                found: str = getattr(self._rundir.listening.now(), name)
                if found:
                    host, port = addresses.split(found)
                    there = self._places.address() if addresses.is_wildcard(host) else host
                    return addresses.endpoint_of(there, port).removeprefix("tcp://")
            await asyncio.sleep(LOOK_S)

    async def _follow(self, role: RayRole, intakes: Sequence[Intake]) -> int:
        """Take in what the hosts tell, to the end of the first that fails, or of all."""
        tasks = [
            asyncio.create_task(self._pump(role, number, intake), name=f"news of {role.order.role}")
            for number, intake in enumerate(intakes)
        ]
        try:
            waiting_for = set(tasks)
            while waiting_for:
                ended, waiting_for = await asyncio.wait(waiting_for, return_when=asyncio.FIRST_COMPLETED)
                failed = [code for task in ended if (code := task.result())]
                if failed:
                    return failed[0]
            return 0
        finally:
            for task in tasks:
                task.cancel()

    async def _pump(self, role: RayRole, number: int, intake: Intake) -> int:
        """The news of one host, one after the other.  Waits for: the host.  Unblocked by: the role's end."""
        admitted: Mapping[str, str] | None = None
        told: dict[str, bytes] = {}
        while True:
            now = self._keys.admitted() if role.order.role == LEARNER else None
            others = self._others(role.order.role, told)
            push = Push(log_from=intake.taken, admitted=now if now != admitted else None, statuses=others)
            news: News = await self._places.call(role.hosts[number], "poll", push)
            admitted = now
            told |= others
            role.news[number] = news
            try:
                await asyncio.to_thread(intake.take, news)
            except OSError as exc:
                self._say(f"the log of {role.order.role} cannot be written: {exc.strerror or exc}; it is tried again")
                await asyncio.sleep(AGAIN_S)
                continue
            if news.end is not None:
                intake.end(news.end)
                return news.end.code

    def _others(self, role: str, told: Mapping[str, bytes]) -> dict[str, bytes]:
        """The status of those that a role may wait for, where it has changed since it was ``told``."""
        if role == BUFFER:
            return {}
        names = [BUFFER, LEARNER] if role != LEARNER else [BUFFER, *(f"actor-{n}" for n in range(TOLD_ROLES))]
        found = {}
        for name in names:
            with contextlib.suppress(OSError):
                file = self._status / f"{name}.json"
                if name != role and (content := file.read_bytes()) != told.get(file.name):
                    found[file.name] = content
        return found

    async def _as_lost(self, role: RayRole, exc: HostGone) -> AtpoError:
        """The error for a host that is gone: its node is too, or it alone.  Waits for: Ray to know, for ``GONE_S``."""
        deadline = time.monotonic() + GONE_S
        while role.nodes:
            living = {node.node_id for node in await asyncio.to_thread(self._places.nodes)}
            gone = [node for node in role.nodes if node.node_id not in living]
            if gone:
                role.lost = True
                return RoleLost(f"node {gone[0]} is gone")
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(LOOK_S)
        where = f" on node {role.nodes[0]}" if role.nodes else ""
        return AtpoError(f"its host process{where} is gone: {exc}")


def _key_name(role: str, number: int) -> str:
    """What the key of a role's host is called; of several hosts each has one."""
    return role if number == 0 else f"{role}-node-{number}"


def own_status() -> StatusSnapshot:
    """A status of this process, to be filled in for a role that has none yet."""
    return StatusSnapshot(
        role="",
        mark="",
        pid=os.getpid(),
        started=processes.started(os.getpid()) or 0,
        host=host_id(),
        hostname=socket.gethostname(),
        at=time.time(),
        monotonic_s=time.monotonic(),
        sequence=0,
        phase="",
        phase_s=0.0,
        starting=False,
        still_s=0.0,
        loop_age_s=None,
    )
