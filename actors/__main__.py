"""``python -m actors RUN_DIR`` (or ``--config FILE --join HOST:PORT``): one actor.  ``python -m actors eval …``: an
evaluation of a model folder; ``python -m actors benchmarks …``: its answers to published test sets; ``python -m actors
sampled …``: what its sampled chains earn on training tasks."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
from pathlib import Path

from actors import interpreter
from actors.actor import Actor, until_stopped
from actors.engines.base import Engine
from actors.environments import Environments, host_environments
from actors.factory import engine_name, make_engine
from actors.hosting import guard, printed
from actors.joining import Place, buffer_link, join, knock, reachable
from actors.leases import LearnerMoved
from actors.weights.fetcher import WeightsFetcher
from actors.weights.merging import Merging
from atpo_async.links.announcements import Listener
from atpo_async.links.client import Client, RoutedClient
from atpo_async.models.sources import model_folder
from atpo_async.ops import role
from atpo_async.ops.lifeline import exit_within
from atpo_async.ops.role import RoleContext
from atpo_async.status import waits
from atpo_async.transports.base import Transport
from atpo_async.transports.registry import make_transport
from atpo_async.wire.messages import LearnerToActor, Welcome

SUPERVISED_LEAVE_SHARE = 1 / 3
"""Of ``supervisor.stop_grace_s``: the leases' return and the engine's end take their time too."""


def leave_s_of(ctx: RoleContext) -> float:
    """How long an actor that is asked to end has for its turns under way."""
    config = ctx.config
    most = SUPERVISED_LEAVE_SHARE * config.supervisor.stop_grace_s if ctx.supervised else config.actor.leave_s
    return min(config.actor.leave_s, most)


async def act(ctx: RoleContext) -> None:
    """Join the run, start the engine, and work until it is over, or until it is asked to end."""
    await _join_and_act(ctx)
    # The supervisor starts one again that was not to end; a scheduler is told that this one has left in good order.
    ctx.left = ctx.stopping.is_set() and not ctx.supervised


async def _join_and_act(ctx: RoleContext) -> None:
    config = ctx.config
    model = model_folder(config.model.path)
    if not ctx.supervised:  # an actor that the run itself has started is let in
        await until_stopped(ctx.stopping, knock(ctx))
        if ctx.stopping.is_set():
            return
    interpreter.divide_time()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(guard.stray_signals_end_nothing())
        stack.enter_context(printed.limited())
        environments = await until_stopped(ctx.stopping, stack.enter_async_context(host_environments(config, model)))
        if environments is not None:
            await _act(ctx, model, environments)


async def _act(ctx: RoleContext, model: Path, environments: Environments) -> None:
    config = ctx.config
    if config.eval.at_start or config.eval.at_end or config.eval.every_steps:
        environments.check_eval_tasks(config.eval.num_tasks)
    transport = make_transport(config.weights)
    engine = make_engine(config, model, actor=ctx.name, stop_strings=environments.stop_strings)
    ctx.log.info("engine %s, environment %s", engine_name(config), config.task_name)
    async with buffer_link(ctx) as buffer:
        try:
            found = await until_stopped(ctx.stopping, _start(ctx, buffer, engine))
            if found is None:
                return
            place = Place(ctx, buffer, found)
            welcome: Welcome | None = reachable(found, buffer.endpoint)
            while welcome is not None:
                welcome = await _work(ctx, place, welcome, buffer, engine, environments, transport)
        finally:
            with waits.waiting(f"actor {ctx.name}", "the engine's end", on=waits.ENGINE):
                await engine.close()


async def _start(ctx: RoleContext, buffer: Client, engine: Engine) -> Welcome:
    """Start the engine and join the run, side by side.  Waits for: both."""
    try:
        async with asyncio.TaskGroup() as starting:
            starting.create_task(_start_engine(ctx, engine), name="engine")
            joining = starting.create_task(join(ctx, buffer), name="join")
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return joining.result()


async def _start_engine(ctx: RoleContext, engine: Engine) -> None:
    """Waits for: the model to be loaded and warmed up, which has no limit while it uses the processor."""
    waits.phase(waits.LOADING_ENGINE, starting=True)
    with waits.waiting(f"actor {ctx.name}", "the engine's start", on=waits.ENGINE):
        await engine.start()
    interpreter.spare_what_is_loaded()
    waits.phase("waiting for its first task", starting=True)


async def _work(
    ctx: RoleContext,
    place: Place,
    welcome: Welcome,
    buffer: RoutedClient,
    engine: Engine,
    environments: Environments,
    transport: Transport,
) -> Welcome | None:
    """Work until the end, or until the learner is found elsewhere: then where."""
    settings = ctx.config.links
    client = Client("", peer="learner", identity=ctx.name, receives=LearnerToActor, settings=settings)
    listener = Listener("", receives=LearnerToActor, settings=settings)

    def look_at(welcome: Welcome, server_key: str) -> None:
        for end, endpoint in ((client, welcome.weights_endpoint), (listener, welcome.announce_endpoint)):
            if endpoint and endpoint != end.endpoint:
                end.move(endpoint, server_key)

    look_at(welcome, buffer.way.current.server_key)
    place.on_moved = look_at
    async with client, listener:
        weights = WeightsFetcher(
            run=welcome.run, client=client, listener=listener, settings=ctx.config.weights, transport=transport,
            merging=Merging(
                run=welcome.run, model=model_folder(ctx.config.model.path), precision=ctx.config.model.dtype
            ),
        )  # fmt: skip
        actor = Actor(
            run=welcome.run, name=ctx.name, config=ctx.config, engine=engine, environment=environments,
            buffer=buffer, weights=weights, stopping=ctx.stopping, leave_s=leave_s_of(ctx),
        )  # fmt: skip
        try:
            await actor.work()
        except LearnerMoved as moved:
            ctx.log.warning("starts over, its engine goes on: %s", moved)
            return Welcome(
                run=welcome.run, weights_endpoint=moved.weights_endpoint, announce_endpoint=moved.announce_endpoint
            )
        finally:
            weights.close()
    return None


PROGRAMS = {"eval": "actors.evaluate", "benchmarks": "actors.benchmarks", "sampled": "actors.sampled"}
"""First word -> the module of what is no actor of a run."""


def main(argv: list[str]) -> None:
    if argv and argv[0] in PROGRAMS:
        code = importlib.import_module(PROGRAMS[argv[0]]).main(argv[1:])
        exit_within(role.EXIT_DEADLINE_S, code)  # threads of a tool may hang
        sys.exit(code)
    role.run("actor", act, argv)


# vLLM starts its processes by spawning: they import this module again, and must not start an actor.
if __name__ == "__main__":
    main(sys.argv[1:])
