"""How an actor joins a run: the buffer admits it, and reports to it where the learner is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from atpo_async.core.errors import PeerLost, SetupError
from atpo_async.links.addresses import seen_from
from atpo_async.links.client import Client, RoutedClient
from atpo_async.links.way import Way
from atpo_async.ops.role import RoleContext
from atpo_async.run.host import as_name, host_id, host_name
from atpo_async.status.waits import BoundedWait
from atpo_async.wire.messages import PROTOCOL, ActorHello, BufferToActor, Refused, Welcome

HELLO_TIMEOUT_S = 5.0
HELLO_PAUSE_S = 0.1
KNOCK_S, KNOCK_EVERY_S = 2.0, 0.5
"""How long a buffer has to answer before the engine is loaded, and how often a silent link is checked; a buffer that
runs answers within a few round trips."""


def buffer_link(ctx: RoleContext, way: Way | None = None) -> RoutedClient:
    """This actor's link to the buffer.

    Args:
        ctx: of its process.
        way: what is known already of the relays in between.
    """
    return RoutedClient(
        way or Way(ctx.endpoints.actors),
        peer="buffer",
        identity=ctx.name,
        receives=BufferToActor,
        settings=ctx.config.links,
        locate=ctx.locate("actors"),
    )


class Place:
    """An actor's place in the run: under which name the buffer knows it, and where it finds the weights.

    Behind a relay that falls silent an actor goes on by way of the next server, under the name that it has there; its
    leases stay its own (``ActorHello.continues``).

    Args:
        ctx: of the actor's process.
        buffer: its link, which has been welcomed.
        welcome: as it came.
    """

    def __init__(self, ctx: RoleContext, buffer: RoutedClient, welcome: Welcome) -> None:
        self.on_moved: Callable[[Welcome, str], None] = lambda welcome, server_key: None
        """Called when it goes on by way of another server: with where the weights are, and with that server's key."""
        self._ctx, self._buffer = ctx, buffer
        self._known_as, self._ticket = welcome.name, welcome.ticket
        buffer.way.learn(welcome.way)
        buffer.introduce_by(self._greeting, self._greeted)

    def _greeting(self) -> ActorHello:
        return msgspec.structs.replace(hello_of(self._ctx), continues=self._known_as, ticket=self._ticket)

    def _greeted(self, welcome: Welcome) -> None:
        way, former = self._buffer.way, self._known_as
        way.learn(welcome.way)
        self._known_as, self._ticket = welcome.name, welcome.ticket
        if former != welcome.name:
            self._ctx.log.warning(
                "goes on by way of %s: the buffer calls it %s now", way.current.endpoint, welcome.name
            )
        self.on_moved(reachable(welcome, self._buffer.endpoint), way.current.server_key)


async def knock(ctx: RoleContext) -> None:
    """Find out whether the buffer admits this actor, before an engine is loaded in vain.

    Waits for: its answer.  Unblocked by: that; ``KNOCK_S`` without a sign of it, as it may be started later; where it
    refuses the key, being let in after all, given up after ``links.give_up_s``.
    """
    wait = BoundedWait(f"actor {ctx.name}", "being let in", ctx.config.links, time.monotonic, log=ctx.log, on="buffer")
    logged, last = "", time.monotonic() + KNOCK_S
    # A link of its own: loading an engine may hold up this loop for longer than a peer may be silent.
    async with buffer_link(ctx) as buffer:
        while isinstance(missing := await _hello(ctx, buffer, timeout_s=KNOCK_EVERY_S), str):
            if trouble := buffer.trouble:
                last = time.monotonic() + KNOCK_S
            elif time.monotonic() > last:
                ctx.log.info("loads its engine meanwhile: %s", missing)
                return
            if trouble and trouble != logged:
                logged = trouble
                ctx.log.error("loads no engine before it is let in, and tries on: %s", missing)
            wait.again(missing)
            await asyncio.sleep(HELLO_PAUSE_S)  # a link that has failed for good answers at once


async def join(ctx: RoleContext, buffer: Client) -> Welcome:
    """Introduce this actor until the buffer knows where the weights are.

    Waits for: the buffer, then the learner's first publication.  Unblocked by: both being up; given up after
    ``links.give_up_s``.

    Returns the welcome as it came; ``reachable`` makes its addresses those for this machine.
    """
    wait = BoundedWait(
        f"actor {ctx.name}", "its place in the run", ctx.config.links, time.monotonic, log=ctx.log, on="buffer"
    )
    logged = ""
    while True:
        answer = await _hello(ctx, buffer, timeout_s=HELLO_TIMEOUT_S)
        if isinstance(answer, str):
            wait.on, missing = "buffer", answer
        elif answer.weights_endpoint:
            return answer
        else:
            wait.on, missing = "learner", "the learner has not published its first weights"
        if missing != logged:
            ctx.log.info("waits: %s", missing)
            logged = missing
        wait.again(missing)
        await asyncio.sleep(HELLO_PAUSE_S)


async def _hello(ctx: RoleContext, buffer: Client, *, timeout_s: float) -> Welcome | str:
    """The buffer's welcome, or why there is none yet.  Raises SetupError where it refuses this actor for good."""
    try:
        answer = await buffer.request(hello_of(ctx), timeout_s=timeout_s)
    except PeerLost:
        if not buffer.endpoint:
            return "the buffer has not recorded yet where it listens"
        where = f"the buffer at {buffer.endpoint}"
        if trouble := buffer.trouble:
            return f"{where} does not let it in: {trouble}" + (" (docs/keys.md)" if "key" in trouble else "")
        return f"{where} does not answer" + ("" if buffer.connected else " (not connected: nothing listens there)")
    where = f"the buffer at {buffer.endpoint}"
    if isinstance(answer, Refused):
        hint = ""
        if "'actor_hello' is unknown here" in answer.reason:
            hint = "; this is no socket for actors: --join takes the address that `atpo train` prints for them"
        raise SetupError(f"{where} refuses {ctx.name}: {answer.reason}{hint}")
    if not isinstance(answer, Welcome):
        return f"{where} answers with {type(answer).__name__}"
    return answer


def hello_of(ctx: RoleContext) -> ActorHello:
    """What this actor says of itself."""
    environment, leaves = ctx.config.task_name, ctx.config.max_leaves
    return ActorHello(
        protocol=PROTOCOL, run=ctx.run_id, actor=ctx.name, environment=environment, search_leaves=leaves,
        host=host_name(), host_id=as_name(host_id()),
    )  # fmt: skip


def reachable(welcome: Welcome, buffer_endpoint: str) -> Welcome:
    """The same with addresses that are reachable from here."""
    return Welcome(
        run=welcome.run,
        weights_endpoint=seen_from(buffer_endpoint, welcome.weights_endpoint),
        announce_endpoint=seen_from(buffer_endpoint, welcome.announce_endpoint),
    )
