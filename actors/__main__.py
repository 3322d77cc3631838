"""``python -m actors RUN_DIR`` (or ``--config FILE --join HOST:PORT``): one actor.  ``python -m actors eval …``: an
evaluation of a model folder."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from pathlib import Path

from actors.actor import Actor, LearnerMoved, until_stopped
from actors.engines.base import Engine
from actors.factory import check_eval_tasks, engine_name, host_environment, make_engine
from actors.hosting import guard
from actors.hosting.host import HostedEnvironment
from actors.weights.fetcher import WeightsFetcher
from atpo_async.config import LinksConfig
from atpo_async.core.errors import PeerLost, SetupError
from atpo_async.environments.base import Environment
from atpo_async.links.addresses import seen_from
from atpo_async.links.announcements import Listener
from atpo_async.links.client import Client
from atpo_async.models.sources import model_folder
from atpo_async.ops import role
from atpo_async.ops.role import RoleContext
from atpo_async.status import waits
from atpo_async.status.waits import BoundedWait
from atpo_async.wire.messages import PROTOCOL, ActorHello, BufferToActor, LearnerToActor, Refused, Welcome

SWITCH_S = 0.0005

HELLO_TIMEOUT_S = 5.0
HELLO_PAUSE_S = 0.1
KNOCK_S, KNOCK_EVERY_S = 2.0, 0.5
"""For a buffer to answer before the engine is loaded, and between two looks at why it does not; one that is there
answers within a few round trips."""


async def act(ctx: RoleContext) -> None:
    """Join the run, start the engine, and work until it is over."""
    config = ctx.config
    model = model_folder(config.model.path)
    settings = config.links
    if not ctx.supervised:  # who was started by the run itself is let in
        await until_stopped(ctx.stopping, _knock(ctx, settings))
        if ctx.stopping.is_set():
            return
    # A tool that computes in Python lets go of the interpreter only after so long, each time that another thread asks.
    sys.setswitchinterval(SWITCH_S)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(guard.stray_signals_end_nothing())
        environment = await until_stopped(ctx.stopping, stack.enter_async_context(host_environment(config, model)))
        if environment is not None:
            await _act(ctx, settings, model, environment)


async def _act(ctx: RoleContext, settings: LinksConfig, model: Path, environment: HostedEnvironment) -> None:
    config = ctx.config
    if config.eval.at_start or config.eval.at_end or config.eval.every_steps:
        check_eval_tasks(config, environment, config.eval.num_tasks)
    engine = make_engine(config, model, actor=ctx.name)
    ctx.log.info("actor %s: engine %s, environment %s", ctx.name, engine_name(config), config.environment.name)
    async with _to_buffer(ctx, settings) as buffer:
        try:
            welcome = await until_stopped(ctx.stopping, _start(ctx, buffer, engine))
            while welcome is not None:
                welcome = await _work(ctx, welcome, buffer, settings, engine, environment)
        finally:
            with waits.waiting(f"actor {ctx.name}", "the engine's end", on=waits.ENGINE):
                await engine.close()


def _to_buffer(ctx: RoleContext, settings: LinksConfig) -> Client:
    return Client(
        ctx.endpoints.actors,
        peer="buffer",
        identity=ctx.name,
        receives=BufferToActor,
        settings=settings,
        locate=ctx.locate("actors"),
    )


async def _knock(ctx: RoleContext, settings: LinksConfig) -> None:
    """Learn whether the buffer lets this actor in, before an engine is loaded in vain.

    Waits for: its answer.  Unblocked by: that; ``KNOCK_S`` without a sign of it, as it may be started later; where it
    refuses the key, being let in after all, given up after ``links.give_up_s``.
    """
    patience = BoundedWait(
        f"actor {ctx.name}", "being let in", ctx.config.links, time.monotonic, log=ctx.log, on="buffer"
    )
    said, last = "", time.monotonic() + KNOCK_S
    # A link of its own: loading an engine may hold up this loop for longer than a peer is let be silent.
    async with _to_buffer(ctx, settings) as buffer:
        while isinstance(missing := await _hello(ctx, buffer, timeout_s=KNOCK_EVERY_S), str):
            if trouble := buffer.trouble:
                last = time.monotonic() + KNOCK_S
            elif time.monotonic() > last:
                ctx.log.info("actor %s loads its engine meanwhile: %s", ctx.name, missing)
                return
            if trouble and trouble != said:
                said = trouble
                ctx.log.error("actor %s loads no engine before it is let in, and tries on: %s", ctx.name, missing)
            patience.again(missing)
            await asyncio.sleep(HELLO_PAUSE_S)  # a link that has failed for good answers at once


async def _start(ctx: RoleContext, buffer: Client, engine: Engine) -> Welcome:
    """Start the engine and join the run, side by side.  Waits for: both."""
    try:
        async with asyncio.TaskGroup() as starting:
            starting.create_task(_start_engine(ctx, engine), name="engine")
            joining = starting.create_task(_join(ctx, buffer), name="join")
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return joining.result()


async def _start_engine(ctx: RoleContext, engine: Engine) -> None:
    """Waits for: the model to be loaded and warmed up, which has no limit while it uses the processor."""
    waits.phase("loading its engine", starting=True)
    with waits.waiting(f"actor {ctx.name}", "the engine's start", on=waits.ENGINE):
        await engine.start()
    waits.phase("waiting for its first task", starting=True)


async def _work(
    ctx: RoleContext,
    welcome: Welcome,
    buffer: Client,
    settings: LinksConfig,
    engine: Engine,
    environment: Environment,
) -> Welcome | None:
    """Work until the end, or until the learner is found elsewhere: then where."""
    async with (
        Client(
            welcome.weights_endpoint, peer="learner", identity=ctx.name, receives=LearnerToActor, settings=settings
        ) as client,
        Listener(welcome.announce_endpoint, receives=LearnerToActor, settings=settings) as listener,
    ):
        weights = WeightsFetcher(run=welcome.run, client=client, listener=listener, settings=ctx.config.weights)
        actor = Actor(
            run=welcome.run,
            name=ctx.name,
            config=ctx.config,
            engine=engine,
            environment=environment,
            buffer=buffer,
            weights=weights,
            stopping=ctx.stopping,
        )
        try:
            await actor.work()
        except LearnerMoved as moved:
            ctx.log.warning("actor %s starts over, its engine goes on: %s", ctx.name, moved)
            return Welcome(
                run=welcome.run, weights_endpoint=moved.weights_endpoint, announce_endpoint=moved.announce_endpoint
            )
        finally:
            weights.close()
    return None


async def _join(ctx: RoleContext, buffer: Client) -> Welcome:
    """Introduce this actor until the buffer knows where the weights are.

    Waits for: the buffer, then the learner's first publication.  Unblocked by: both being up; given up after
    ``links.give_up_s``.
    """
    patience = BoundedWait(
        f"actor {ctx.name}", "its place in the run", ctx.config.links, time.monotonic, log=ctx.log, on="buffer"
    )
    said = ""
    while True:
        answer = await _hello(ctx, buffer, timeout_s=HELLO_TIMEOUT_S)
        if isinstance(answer, str):
            patience.on, missing = "buffer", answer
        elif answer.weights_endpoint:
            return reachable(answer, buffer.endpoint)
        else:
            patience.on, missing = "learner", "the learner has not published its first weights"
        if missing != said:
            ctx.log.info("actor %s waits: %s", ctx.name, missing)
            said = missing
        patience.again(missing)
        await asyncio.sleep(HELLO_PAUSE_S)


async def _hello(ctx: RoleContext, buffer: Client, *, timeout_s: float) -> Welcome | str:
    """The buffer's welcome, or why there is none yet.  Raises SetupError where it refuses this actor for good."""
    hello = ActorHello(
        protocol=PROTOCOL,
        run=ctx.run_id,
        actor=ctx.name,
        environment=ctx.config.environment.name,
        search_leaves=ctx.config.search.max_leaves,
    )
    try:
        answer = await buffer.request(hello, timeout_s=timeout_s)
    except PeerLost:
        if not buffer.endpoint:
            return "the buffer has not said yet where it listens"
        where = f"the buffer at {buffer.endpoint}"
        if trouble := buffer.trouble:
            return f"{where} does not let it in: {trouble}" + (" (docs/keys.md)" if "key" in trouble else "")
        return f"{where} does not answer" + ("" if buffer.connected else " (not connected: nothing listens there)")
    where = f"the buffer at {buffer.endpoint}"
    if isinstance(answer, Refused):
        raise SetupError(f"{where} refuses {ctx.name}: {answer.reason}")
    if not isinstance(answer, Welcome):
        return f"{where} answers with {type(answer).__name__}"
    return answer


def reachable(welcome: Welcome, buffer_endpoint: str) -> Welcome:
    """With addresses as they are seen from here."""
    return Welcome(
        run=welcome.run,
        weights_endpoint=seen_from(buffer_endpoint, welcome.weights_endpoint),
        announce_endpoint=seen_from(buffer_endpoint, welcome.announce_endpoint),
    )


def main(argv: list[str]) -> None:
    if argv[:1] == ["eval"]:
        from actors.evaluate import main as evaluate

        code = evaluate(argv[1:])
        role.exit_within(role.EXIT_DEADLINE_S, code)  # threads of a tool may hang
        sys.exit(code)
    role.run("actor", act, argv)


# vLLM starts its processes by spawning: they import this module again, and must not start an actor.
if __name__ == "__main__":
    main(sys.argv[1:])
