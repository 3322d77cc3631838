"""Whole runs of the learner on a device that is too small for its passes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atpo_async.core.errors import SetupError
from atpo_async.links.server import Server
from atpo_async.run.metrics import read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.wire.messages import LearnerToBuffer, RunFinished
from learner.checkpoints import optimizer_state
from learner.policy.model import Policy
from learner.role import learn
from tests.learner_support import make_model
from tests.test_learner_loop import LINKS, WAIT_S, ScriptedBuffer, context, make_config, stopping_at


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of passes that ran out of memory: those above 250 tokens."""
    found: list[int] = []
    inner = Policy.logprobs

    def logprobs(self: Policy, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if tokens.numel() > 250 and torch.is_grad_enabled():
            found.append(tokens.numel())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return inner(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Policy, "logprobs", logprobs)
    return found


async def test_a_run_goes_on_in_smaller_passes_and_does_not_run_out_again_after_a_restart(
    tmp_path: Path, errors: list[int]
) -> None:
    buffer = ScriptedBuffer()
    async with Server(
        "tcp://127.0.0.1:0", name="buffer", receives=LearnerToBuffer, handler=buffer.handle, settings=LINKS
    ) as server:
        settings: dict[str, object] = {"packing": "flat", "micro_batch_tokens": 1000}
        config = make_config(tmp_path, make_model(tmp_path / "model"), learner=settings, eval={"every_steps": 0})
        rundir = RunDir.create(config)
        first = context(rundir, server.endpoint)
        buffer.on_sample = stopping_at(2, first.stopping)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("learner.training.trainer.Trainer.warm_up", lambda self: None)
            await asyncio.wait_for(learn(first), WAIT_S)
            assert len(errors) >= 1
            assert (rundir.path / "memory.json").is_file()
            errors.clear()
            buffer.on_sample = None
            await asyncio.wait_for(learn(context(RunDir.open(rundir.path), server.endpoint)), WAIT_S)
    assert not errors
    assert buffer.kinds()[-1] is RunFinished
    steps = [r for r in read_metrics(rundir.metrics_path) if "train/loss" in r.metrics]
    assert [r.step for r in steps] == [1, 2, 3]
    assert [r.metrics["train/updates"] for r in steps] == [1, 2, 3]
    (tokens,) = {r.metrics["pack/micro_batch_tokens"] for r in steps}
    assert tokens <= 250


async def test_what_does_not_fit_while_the_policy_loads_or_a_checkpoint_is_read_is_for_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.")

    buffer = ScriptedBuffer()
    async with Server(
        "tcp://127.0.0.1:0", name="buffer", receives=LearnerToBuffer, handler=buffer.handle, settings=LINKS
    ) as server:
        rundir = RunDir.create(make_config(tmp_path, make_model(tmp_path / "model"), eval={"every_steps": 0}))
        with monkeypatch.context() as patch:
            patch.setattr("learner.role.load_policy", full)
            with pytest.raises(SetupError, match=r"^loading the policy ran out of the memory of the CPU: .*16.00 GiB"):
                await asyncio.wait_for(learn(context(rundir, server.endpoint)), WAIT_S)
        first = context(rundir, server.endpoint)
        buffer.on_sample = stopping_at(1, first.stopping)
        await asyncio.wait_for(learn(first), WAIT_S)
        monkeypatch.setattr(optimizer_state, "load_into", full)
        with pytest.raises(SetupError, match=r"^the optimizer's state of a checkpoint ran out .*--learner.optimizer"):
            await asyncio.wait_for(learn(context(rundir, server.endpoint)), WAIT_S)
