"""One process and several do the same: a batch gives the same weights and metrics, and batches hold the same trees."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.engines.base import EngineStats
from actors.environments import Environments
from atpo_async.config import Config, build
from atpo_async.links.server import Server
from atpo_async.run.metrics import Record, read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.study.workers.settings import in_one_process
from atpo_async.wire.messages import (
    Batch,
    BatchTree,
    Checkpointed,
    LearnerToBuffer,
    Lease,
    SampleRequest,
    Trained,
    VersionPublished,
)
from buffer.state import BufferState
from inprocess import idle
from inprocess.generation.engine import BatchEngine
from inprocess.growth import Growth
from inprocess.run import opened
from learner.role import learn
from learner.training.trainer import Trainer
from tests.scripted_trees_support import messages_of, planned, tree_hashes
from tests.test_in_process import small
from tests.test_learner_loop import LINKS, WAIT_S, ScriptedBuffer, context

# --- the learner --------------------------------------------------------------------------------------------------

LEARNED = ("train/loss", "grad_norm", "lr", "clip_share", "is/", "kl/", "lag/", "mismatch/", "tokens/trained", "batch/")
"""Metrics that follow from batches and weights."""


def learned(records: list[Record]) -> list[dict[str, float]]:
    return [
        {name: value for name, value in each.metrics.items() if name.startswith(LEARNED) and not name.endswith("_s")}
        for each in records
        if "train/loss" in each.metrics
    ]


def test_the_learner_of_a_run_of_several_processes_makes_the_same_weights_and_metrics_of_the_same_batches(
    hopqa_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in one process, whose batches a learner then gets over its links."""
    config = in_one_process(small(hopqa_policy, tmp_path, "one", eval={"at_end": False, "every_steps": 0}))
    batches, train = list[Batch](), Trainer.train

    def kept(self: Trainer, batch: Batch, **arguments: Any) -> Any:
        batches.append(batch)
        return train(self, batch, **arguments)

    monkeypatch.setattr(Trainer, "train", kept)
    loop, selector = idle.new_loop()
    weights: dict[str, torch.Tensor] = {}

    async def work(rundir: RunDir) -> None:
        async with opened(config, rundir, selector, lambda step, success: None) as run:
            await run.run()
            weights.update({name: tensor.clone() for name, tensor in run.trainer.whole.tensors().items()})

    with RunDir.held(config, resume=False) as rundir:
        loop.run_until_complete(work(rundir))
    loop.close()
    monkeypatch.setattr(Trainer, "train", train)
    assert len(batches) == config.run.steps

    other = config.model_copy(update={"run": config.run.model_copy(update={"name": "several"})})
    there = RunDir.create(other)

    async def serve() -> None:
        buffer = ScriptedBuffer()
        buffer.on_sample = lambda request: batches[request.step]
        async with Server(
            "tcp://127.0.0.1:0", name="buffer", receives=LearnerToBuffer, handler=buffer.handle, settings=LINKS
        ) as server:
            await asyncio.wait_for(learn(context(there, server.endpoint)), WAIT_S)

    asyncio.run(serve())
    again = load_file(there.path / "model" / "model.safetensors")
    assert again
    for name, tensor in again.items():
        assert torch.equal(tensor, weights[name]), name
    ours = learned(list(read_metrics(rundir.metrics_path)))
    assert len(ours) == config.run.steps
    assert ours == learned(list(read_metrics(there.metrics_path)))


# --- the delay line -----------------------------------------------------------------------------------------------

SEED, STEPS, PER_BATCH = 5, 9, 4


def exact(lag: int) -> Config:
    return build(
        {
            "run": {"seed": SEED, "steps": STEPS},
            "staleness": {"exact_lag": lag, "max_lag": lag, "trees_per_batch": PER_BATCH, "max_oversampling": 2.0},
            "search": {"initial_rollouts": 4, "rounds": 1, "branches": 1},
        }
    )


def state_of(config: Config) -> BufferState:
    state = BufferState(config, run="r", rng=np.random.default_rng(SEED), now=0.0)
    state.restore(None)
    return state


def served(config: Config, state: BufferState, grow: Any) -> list[tuple[list[list[str]], set[int], float]]:
    """Of each batch: its trees by their content, the ages of its turns, and how many trees were produced for it."""
    found = []
    for step in range(config.run.steps):
        state.publish(VersionPublished(run="r", version=step, weights_endpoint="", announce_endpoint=""))
        request = SampleRequest(
            run="r", rank=0, num_ranks=1, step=step, version=step, num_trees=PER_BATCH, wait_s=0.0
        )  # fmt: skip
        while (batch := state.sample(request, 0.0)) is None:
            grow(step)
        assert isinstance(batch, Batch)
        trees = sorted((tree_hashes(tree.prompt, tree.turns) for tree in batch.trees), key=str)
        found.append((trees, ages(batch.trees, step), batch.metrics["train/trees"]))
        state.trained(Trained(run="r", batch_id=batch.batch_id, version=step + 1, priorities={}))
        state.checkpointed(Checkpointed(run="r", step=step + 1, version=step + 1))
    return found


def ages(trees: tuple[BatchTree, ...], version: int) -> set[int]:
    return {version - turn.oldest_version for tree in trees for turn in tree.turns}


@pytest.mark.parametrize("lag", [0, 3])
def test_trees_that_are_grown_ahead_change_neither_a_batch_nor_its_age(lag: int) -> None:
    """Beside an actor that is leased two trees at a time, each once it is known to be needed."""
    config = exact(lag)
    one, several = state_of(config), state_of(config)

    def in_turn(version: int) -> None:
        while leases := several.lease("a", 2, 0.0, engine_version=version).leases:
            for lease in leases:
                for message in messages_of(lease, planned(SEED, lease.task_index), run="r", version=version):
                    several.take(message, 0.0)

    engine = SimpleNamespace(
        stats=lambda: EngineStats(
            version=0, in_flight=0, prompt_tokens=0, cached_prompt_tokens=0, generated_tokens=0, finished_requests=0,
            failed_requests=0,
        )
    )  # fmt: skip
    growth = Growth(
        config, run="r", state=one, engine=cast(BatchEngine, engine),
        environments=Environments(config, [cast(Any, SimpleNamespace(num_tasks=lambda split: None))]),
    )  # fmt: skip
    withdrawn: list[str] = []
    withdraw = one.withdraw
    at_once = 0

    class Scripted:
        async def grow(self, lease: Lease) -> None:
            nonlocal at_once
            at_once = max(at_once, len(growth._messages))
            for message in messages_of(lease, planned(SEED, lease.task_index), run="r", version=version_now):
                await growth._emit(message)

    version_now = 0
    growth._grower = cast(Any, Scripted())

    def counted(tree_ids: Any) -> None:
        withdrawn.extend(tree_ids)
        withdraw(tree_ids)

    one.withdraw = counted  # type: ignore[method-assign]

    def together(version: int) -> None:
        nonlocal version_now
        version_now = version
        asyncio.run(growth.grow(version))

    assert served(config, one, together) == served(config, several, in_turn)
    assert withdrawn  # some were grown in vain
    assert at_once > PER_BATCH


def test_the_scripted_trees_have_some_without_a_signal() -> None:
    """What the test above is about."""
    assert {planned(SEED, task).kind for task in range(40)} == {"plain", "dull", "barren"}
