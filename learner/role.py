"""The learner's process: loads the model, opens the links, and runs the loop to its end."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import torch

from atpo_async.config import Config
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.errors import SetupError
from atpo_async.core.texts import counted
from atpo_async.links import ports
from atpo_async.links.client import Client
from atpo_async.ops.role import RoleContext
from atpo_async.run.metrics import MetricsWriter
from atpo_async.run.rundir import RunDir
from atpo_async.status import waits
from atpo_async.transports.registry import make_transport
from atpo_async.wire.messages import BufferToLearner
from learner.loop import Learner
from learner.loss.loading import load_correction, load_surrogate
from learner.memory import kept
from learner.memory.out_of_memory import explained
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.torch_thread import TorchThread
from learner.training.trainer import Trainer
from learner.weights.publisher import Publisher
from learner.weights.store import WeightsStore


@contextlib.asynccontextmanager
async def _opened(ctx: RoleContext, thread: TorchThread) -> AsyncIterator[Learner]:
    """A learner with its model loaded and its links open."""
    config, rundir = ctx.config, ctx.rundir
    if rundir is None:
        raise SetupError("the learner needs the run's folder")
    # Before the model, which may take minutes to load: what a user has named wrong is said at once.
    credit_rule(config.credit)
    load_surrogate(config.objective)
    load_correction(config)
    transport = make_transport(config.weights)
    waits.phase("loading its model", starting=True)
    trainer: Trainer = await thread(_load, config, rundir)
    rank = trainer.accelerator.process_index
    links = config.links
    async with contextlib.AsyncExitStack() as stack:
        publisher = metrics = None
        if rank == 0:
            store = WeightsStore(
                run=ctx.run_id,
                fallback=rundir.scratch,
                settings=config.weights,
                transport=transport,
            )
            publisher = await stack.enter_async_context(
                Publisher(
                    store,
                    weights_endpoint=ports.to_bind(config.links, "weights"),
                    announce_endpoint=ports.to_bind(config.links, "announce"),
                    settings=links,
                    former=rundir.listening.former(),
                )
            )
            rundir.listening.note(weights=publisher.weights_endpoint, announce=publisher.announce_endpoint)
            metrics = stack.enter_context(MetricsWriter(rundir.metrics_path, source="learner"))
        buffer = await stack.enter_async_context(
            Client(
                ctx.endpoints.learner,
                peer="buffer",
                identity="learner" if rank == 0 else f"learner-{rank}",
                receives=BufferToLearner,
                settings=links,
                locate=ctx.locate("learner"),
            )
        )
        yield Learner(
            ctx, rundir, trainer=trainer, buffer=buffer, publisher=publisher, metrics=metrics, torch_thread=thread
        )


def _load(config: Config, rundir: RunDir) -> Trainer:
    torch.manual_seed(config.run.seed)
    accelerator = make_accelerator(config)
    with explained("loading the policy", config, accelerator.device):
        trainer = Trainer(
            config, accelerator=accelerator, policy=load_policy(config), memory_file=rundir.path / kept.FILE
        )
        trainer.warm_up()
    return trainer


async def learn(ctx: RoleContext) -> None:
    """The learner's main: load, then loop."""
    thread = TorchThread(ctx.config.learner.num_threads)
    try:
        async with _opened(ctx, thread) as learner:
            ctx.log.info(
                "%d parameters on %s, %s",
                sum(p.numel() for p in learner.trainer.policy.parameters()),
                learner.trainer.accelerator.device,
                counted(learner.trainer.accelerator.num_processes, "process", "processes"),
            )
            if (lora := learner.trainer.policy.lora) is not None:
                trained = sum(p.numel() for p in lora.parameters().values())
                ctx.log.info("%s: %d parameters are trained", lora, trained)
            ctx.log.info("%s layout: %s", learner.trainer.layout, learner.trainer.layout_reason)
            ctx.log.info("kernels: %s", learner.trainer.kernels.reason)
            ctx.log.info("compiled layers: %s", learner.trainer.compiled)
            # A pass that does not fit is no error (``memory.fitting``); what is left are copies beside the passes.
            with explained("the learner, outside its passes,", ctx.config, learner.trainer.accelerator.device):
                await learner.run()
            # A rank that exits while others still use the group's threads may abort.
            await thread(learner.trainer.accelerator.wait_for_everyone)
    finally:
        thread.close()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
