"""``python -m actors RUN_DIR`` (or ``--config FILE --join HOST:PORT``): one actor.  ``python -m actors eval …``: an
evaluation of a model folder."""

from __future__ import annotations

import asyncio
import sys
import time

from actors.actor import Actor, LearnerMoved, seen_from, until_stopped
from actors.engine import Engine
from actors.environments.base import Environment
from actors.factory import check_eval_tasks, engine_name, make_engine, make_environment
from actors.weights import WeightsFetcher
from atpo_async import role, waits
from atpo_async.errors import PeerLost, SetupError
from atpo_async.links import Client, LinkSettings, Listener
from atpo_async.messages import PROTOCOL, ActorHello, BufferToActor, LearnerToActor, Refused, Welcome
from atpo_async.models import model_folder
from atpo_async.role import RoleContext
from atpo_async.waits import Patience

HELLO_TIMEOUT_S = 5.0
HELLO_PAUSE_S = 0.1


async def act(ctx: RoleContext) -> None:
    """Join the run, start the engine, and work until it is over."""
    config = ctx.config
    model = model_folder(config.model.path)
    settings = LinkSettings.from_config(config.links)
    environment = make_environment(config, model)
    if config.eval.at_start or config.eval.at_end or config.eval.every_steps:
        check_eval_tasks(config, environment, config.eval.num_tasks)
    engine = make_engine(config, model)
    ctx.log.info("actor %s: engine %s, environment %s", ctx.name, engine_name(config), config.environment.name)
    async with Client(
        ctx.endpoints.actors, peer="buffer", identity=ctx.name, receives=BufferToActor, settings=settings
    ) as buffer:
        try:
            welcome = await until_stopped(ctx.stopping, _start(ctx, buffer, engine))
            while welcome is not None:
                welcome = await _work(ctx, welcome, buffer, settings, engine, environment)
        finally:
            with waits.waiting(f"actor {ctx.name}", "the engine's end", on=waits.ENGINE):
                await engine.close()


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
    with waits.waiting(f"actor {ctx.name}", "the engine's start", on=waits.ENGINE):
        await engine.start()


async def _work(
    ctx: RoleContext,
    welcome: Welcome,
    buffer: Client,
    settings: LinkSettings,
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
    hello = ActorHello(
        protocol=PROTOCOL,
        run=ctx.run_id,
        actor=ctx.name,
        environment=ctx.config.environment.name,
        search_leaves=ctx.config.search.max_leaves,
    )
    patience = Patience(
        f"actor {ctx.name}", "its place in the run", ctx.config.links, time.monotonic, log=ctx.log, on="buffer"
    )
    said = ""
    while True:
        try:
            answer = await buffer.request(hello, timeout_s=HELLO_TIMEOUT_S)
        except PeerLost:
            patience.on = "buffer"
            missing = f"the buffer at {ctx.endpoints.actors} does not answer"
            if not buffer.connected:
                missing += " (not connected: nothing listens there, or it does not know our key: docs/keys.md)"
        else:
            if isinstance(answer, Refused):
                raise SetupError(f"the buffer at {ctx.endpoints.actors} refuses actor {ctx.name}: {answer.reason}")
            if isinstance(answer, Welcome) and answer.weights_endpoint:
                return reachable(answer, ctx.endpoints.actors)
            patience.on = "learner"
            missing = "the learner has not published its first weights"
        if missing != said:
            ctx.log.info("actor %s waits: %s", ctx.name, missing)
            said = missing
        patience.again(missing)
        await asyncio.sleep(HELLO_PAUSE_S)


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

        sys.exit(evaluate(argv[1:]))
    role.run("actor", act, argv)


# vLLM starts its processes by spawning: they import this module again, and must not start an actor.
if __name__ == "__main__":
    main(sys.argv[1:])
