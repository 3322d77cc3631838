"""Liger-Kernel's operations under data parallelism and sharding, by Triton's interpreter (make test-kernels).

One rank in a process of its own: the gradient of a training step is that of a policy without kernels and wrappers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.kernels_support import let_triton_interpret
from tests.learner_support import make_batch, make_config, make_model

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "FSDPPolicy"])
def test_a_wrapped_policy_with_kernels_has_the_loss_and_gradient_of_one_without(tmp_path: Path, wrapper: str) -> None:
    folder, out = make_model(tmp_path / "model"), tmp_path / "found.json"
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), str(folder), str(out), wrapper],
        env={**os.environ, **rank, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}"},
        capture_output=True, text=True, timeout=170, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["wrapper"] == wrapper
    assert found["kernels"] == "liger: RMSNorm (9 modules), rotary embedding (2 modules), SwiGLU (2 modules)"
    assert found["sharded"] == (3 if wrapper == "FSDPPolicy" else 0)  # two layers, and what holds them
    config = make_config(folder)
    plain = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
    expected = plain.train(make_batch(num_trees=1), version=3).metrics
    for name, value in found["metrics"].items():
        assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def one_rank(folder: Path, out: Path, wrapper: str) -> None:
    let_triton_interpret(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    config = make_config(folder, learner={"kernels": "liger"})
    accelerator = make_accelerator(config)
    if wrapper == "FSDPPolicy":
        shard()
    trainer = Trainer(config, accelerator=accelerator, policy=load_policy(config))
    report = trainer.train(make_batch(num_trees=1), version=3)
    metrics = {name: report.metrics[name] for name in ("train/loss", "grad_norm")}
    sharded = sum(type(module).__name__.startswith("FSDP") for module in trainer.model.modules())
    found = {"wrapper": type(trainer.model).__name__, "kernels": trainer.kernels.reason, "sharded": sharded}
    out.write_text(json.dumps(found | {"metrics": metrics}))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def shard() -> None:
    """Let Accelerate shard as FSDP2 does, each layer and the rest; on its own it does so on GPUs only."""
    plugin: Any = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
