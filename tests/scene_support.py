"""A scripted run into which a test brings one fault, and an actor whose messages the test sends itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from atpo_async.core.errors import PeerLost
from atpo_async.core.tree import Turn
from atpo_async.links.client import Client
from atpo_async.run import processes
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.files import write_atomic
from atpo_async.wire.messages import (
    BufferToActor,
    Lease,
    LeaseRequest,
    LeaseReturned,
    Leases,
    TreeClosed,
    TreeOpened,
    Welcome,
)
from tests.fault_support import WAIT_S, Proxy, Recovery, Role, Spawner, Tricks, until_async
from tests.links_support import reserved_endpoints
from tests.oracle_support import Roles, Verdict, judge, make_run
from tests.scripted_roles_support import ALLOWED, acked_file, hello_of, lines, published
from tests.scripted_trees_support import Planned, messages_of, planned


class Scene:
    """A scripted run into which a test brings one fault; the test is its supervisor.  Use as an async context.

    The learner trains ``allowed`` steps and then waits, until ``ended_well`` lets it go.

    Args:
        folder: for the run.
        spawner: forks the roles.
        proxied: actors and learner reach the buffer through ``actors_proxy`` and ``learner_proxy``.
        allowed: steps before the learner waits.
        how: as of ``Roles``.
        sections: of the configuration.
    """

    def __init__(
        self,
        folder: Path,
        spawner: Spawner,
        *,
        seed: int = 0,
        num_tasks: int = 48,
        proxied: bool = False,
        allowed: int = 2,
        how: Mapping[str, Any] | None = None,
        sections: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self.seed = seed
        given = {name: dict(section) for name, section in (sections or {}).items()}
        given["run"] = {"seed": seed, "max_tasks": num_tasks} | given.get("run", {})
        self.rundir = make_run(folder, **given)
        self._spawner = spawner
        self._how = dict(how or {})
        self._proxied = proxied
        there = self.rundir.read_endpoints()
        self.actors_proxy, self.learner_proxy = Proxy(there.actors), Proxy(there.learner)
        self._open = contextlib.AsyncExitStack()
        self.allow(allowed)

    async def __aenter__(self) -> Self:
        endpoints = None
        if self._proxied:
            for proxy in (self.actors_proxy, self.learner_proxy):
                await self._open.enter_async_context(proxy)
            endpoints = Endpoints(actors=self.actors_proxy.endpoint, learner=self.learner_proxy.endpoint)
        self.roles = Roles(self.rundir, self._spawner, seed=self.seed, endpoints=endpoints, **self._how)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.roles.kill()
        await self._open.aclose()

    def __getitem__(self, name: str) -> Role:
        return self.roles.alive[name]

    @property
    def steps(self) -> int:
        return self.roles.steps

    def allow(self, steps: int) -> None:
        """The learner may have trained so many steps in all."""
        write_atomic(self.rundir.path / ALLOWED, str(steps))

    async def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Waits for what the roles bring about; a role that ends meanwhile, not killed by the test, fails it."""

        def look() -> Any:
            for role in self.roles.alive.values():
                assert role.poll() in (None, 0), f"{role.name} ended with {role.poll()} by itself\n{self.roles.story()}"
            return condition()

        return await until_async(look, what, story=self.roles.story)

    def resident_mb(self, name: str) -> float:
        return processes.memory_mb([self[name].pid])

    async def stepped(self, count: int = 1) -> None:
        """``count`` further batches are trained."""
        goal = self.steps + count
        self.allow(goal)
        await self.until(lambda: self.steps >= goal, f"step {goal}")

    def move_buffer(self) -> Endpoints:
        """The next buffer binds other ports."""
        moved = reserved_endpoints()
        self.rundir.write_endpoints(moved)
        return moved

    async def recovered(self, recovery: Recovery, *actors: str) -> None:
        """The next batch is trained, and of each of ``actors`` (all that run, where none is named) a further turn is
        acknowledged: the measured end of a fault."""
        names = actors or tuple(name for name in self.roles.alive if name.startswith("actor"))
        before = {name: self.acked(name) for name in names}
        allowed = goal = self.steps + 1

        def works() -> bool:
            return self.steps >= goal and all(self.acked(name) > before[name] for name in names)

        while True:
            self.allow(allowed)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self.until(works, "work to go on")
                    return recovery.recovered()
            allowed += 1  # they were waiting for room: the next batch makes some

    def acked(self, actor: str) -> int:
        """Turns of an actor that were acknowledged, over all its attempts."""
        return sum(int(line) for line in lines(self.rundir.path, acked_file(actor)))

    async def ended_well(self) -> Verdict:
        """The run goes to its end, and every task was trained on as often as intended."""
        (self.rundir.path / ALLOWED).unlink(missing_ok=True)
        await self.until(lambda: all(r.poll() == 0 for r in self.roles.alive.values()), "the run's end")
        verdict = judge(self.rundir, seed=self.seed, problems=())
        assert not verdict.problems, "\n".join([*verdict.problems, self.roles.story()])
        return verdict


def starts_slowly(plan: Planned) -> bool:
    """Three turns come before its second leaf: cut off there, the tree goes to another actor."""
    leaves = [part.turn_id for part in plan.parts if part.is_leaf]
    return plan.kind == "plain" and len(leaves) > 1 and leaves[1] > 3


class Hand:
    """An actor whose every message the test sends itself.  Use as an async context.

    Args:
        scene: the run.
        name: of this actor.
        endpoint: of the buffer, if not where it binds.
        max_message_bytes: what this sender takes for the limit.
    """

    def __init__(
        self, scene: Scene, name: str = "by-hand", *, endpoint: str = "", max_message_bytes: int | None = None
    ) -> None:
        self._scene = scene
        self._rundir = scene.rundir
        self.name = name
        self.run = self._rundir.run_id
        self.refusals: list[str] = []
        self._held: set[str] = set()
        settings = self._rundir.config.links
        if max_message_bytes is not None:
            settings = settings.model_copy(update={"max_message_bytes": max_message_bytes})
        self.link = Client(
            endpoint or self._rundir.read_endpoints().actors,
            peer="buffer",
            identity=name,
            receives=BufferToActor,
            settings=settings,
            on_refused=lambda message, reason: self.refusals.append(reason),
        )

    async def __aenter__(self) -> Self:
        await self.link.__aenter__()
        hello = hello_of(self._rundir.config, run=self.run, actor=self.name)
        while True:
            with contextlib.suppress(PeerLost):
                answer = await self.link.request(hello, timeout_s=5.0)
                assert isinstance(answer, Welcome), answer
                if answer.weights_endpoint:
                    return self
            await asyncio.sleep(0.01)

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._held:
            with contextlib.suppress(PeerLost):
                await self.return_all()
        await self.link.close()

    async def return_all(self) -> None:
        """Hands back what it holds: nobody has to wait until its leases lapse."""
        await self.send(LeaseReturned(run=self.run, actor=self.name, tree_ids=tuple(self._held)))
        self.forget()

    def forget(self) -> None:
        """Leave its leases to lapse, or to its successor."""
        self._held.clear()

    async def leases(self, count: int = 1) -> tuple[Lease, ...]:
        """One answer; maybe none."""
        request = LeaseRequest(run=self.run, actor=self.name, count=count, version=published(self._rundir.path))
        answer = await self.link.request(request, timeout_s=WAIT_S)
        assert isinstance(answer, Leases), answer
        self._held |= {lease.tree_id for lease in answer.leases}
        return answer.leases

    async def lease(self, *, of: Callable[[Planned], bool] = lambda plan: plan.kind == "plain") -> Lease:
        """A lease of a task that ``of`` takes; the others are grown on the way."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for lease in await self.leases():
                    if of(self.plan(lease)):
                        return lease
                    await self.grow(lease)

    async def begin_slow_tree(self, num_turns: int) -> tuple[Lease, list[Turn], TreeClosed]:
        """A lease of a tree that ``starts_slowly``, opened, with so many of its turns sent; and all its turns."""
        lease = await self.lease(of=starts_slowly)
        opened, *turns, closed = self.messages(lease)
        assert isinstance(closed, TreeClosed)
        await self.send(opened, *turns[:num_turns])
        return lease, [turn for turn in turns if isinstance(turn, Turn)], closed

    def plan(self, lease: Lease) -> Planned:
        return planned(self._scene.seed, lease.task_index)

    def messages(self, lease: Lease) -> list[TreeOpened | Turn | TreeClosed]:
        """All that an actor sends for a lease, in order."""
        return messages_of(lease, self.plan(lease), run=self.run, version=published(self._rundir.path))

    async def grow(self, lease: Lease) -> None:
        await self.send(*self.messages(lease))

    async def send(self, *messages: object) -> None:
        """Sent, and acknowledged or refused."""
        for message in messages:
            await self.link.send(message)
        await self.link.drain(timeout_s=WAIT_S)


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A tree that a test grows by hand: opened, and its first turn acknowledged."""

    lease: Lease
    turns: list[Turn]
    """Those that are still to be sent."""
    closed: TreeClosed
    acked: int
    """Messages of the hand that are acknowledged so far."""


@contextlib.asynccontextmanager
async def begun_by_hand(
    folder: Path, spawner: Spawner, *, tricks: Tricks | None = None
) -> AsyncIterator[tuple[Scene, Hand, Begun]]:
    """A run whose only actor is the test, in the middle of a tree.  Afterwards nothing of the hand's may have been
    refused, and the run goes to its end with another actor."""
    async with Scene(folder, spawner, how={"actors": 1, "tricks": tricks or Tricks()}) as scene:
        scene.roles.start("buffer", "learner")
        async with Hand(scene) as hand:
            lease, turns, closed = await hand.begin_slow_tree(1)
            yield scene, hand, Begun(lease=lease, turns=turns[1:], closed=closed, acked=hand.link.stats.acked)
            assert not hand.refusals
        scene.roles.start("actor-0")
        await scene.ended_well()
