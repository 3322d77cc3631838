"""Ranks that train, save and load plain, under DDP or under FSDP2.  Run as a program, this is one rank.

On CUDA a policy is sharded as ``accelerate launch`` would have it.  Accelerate shards on GPUs only; its wrapping works
on a CPU as well, once its state says that it shards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from atpo_async.wire.messages import Batch
    from learner.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "configs" / "accelerate_fsdp.yaml"
Sections = dict[str, dict[str, Any]]


def set_environment() -> None:
    """As ``accelerate launch`` does with the file that is shipped."""
    import yaml  # type: ignore[import-untyped,unused-ignore]

    for key, value in yaml.safe_load(SHIPPED.read_text())["fsdp_config"].items():
        os.environ[key.upper()] = str(value).lower() if isinstance(value, bool) else str(value)


def plugin(precision: str) -> Any:
    """FSDP2 as Accelerate makes it in that environment."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    set_environment()
    made = FullyShardedDataParallelPlugin()
    if precision != "no":
        made.set_mixed_precision(precision)
    return made


def make_trainer(model: Path, kind: str, sections: Sections, *, scaler: torch.amp.GradScaler | None = None) -> Trainer:
    """A trainer of this rank.

    Args:
        model: folder.
        kind: ``plain`` (DDP where there are ranks), ``fsdp2``, or ``alone`` (this process is no rank from here on).
        sections: of the configuration.
        scaler: of the loss, as under fp16; the arithmetic stays float32, for there is no GPU.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    from learner.policy import compilation
    from learner.policy.accelerator import make_accelerator
    from learner.policy.model import load_policy
    from learner.training.trainer import Trainer
    from tests.learner_support import make_config

    if kind == "fsdp2":
        sections = {**sections, "learner": {**sections.get("learner", {}), "accelerate_config": str(SHIPPED)}}
    config = make_config(model, **sections)
    if "RANK" in os.environ:  # another trainer of this process may have had another precision
        AcceleratorState._reset_state(True)
    on_cuda = config.learner.device == "cuda"
    # What matters here is how layers are cut into graphs; the code generator takes a minute.
    if "RANK" in os.environ and not on_cuda:
        compilation.BACKEND = "eager"
    if kind == "alone":
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if kind == "fsdp2" and on_cuda:
        set_environment()
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    accelerator = make_accelerator(config)
    if kind == "fsdp2" and not on_cuda:
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin(config.learner.mixed_precision)
    if scaler is not None:
        accelerator.scaler = scaler
    trainer = Trainer(config, accelerator=accelerator, policy=load_policy(config))
    optimizer: Any = trainer.optimizer
    if scaler is not None:
        accelerator.unscale_gradients = lambda _=None: scaler.unscale_(optimizer.optimizer)
    return trainer


def batch_for(trainer: Trainer, *, seed: int, idle: Sequence[int] = ()) -> Batch:
    """This rank's share of a batch of five trees; the ranks of ``idle`` have none."""
    from tests.learner_support import batch_of, make_batch

    whole = make_batch(seed=seed, num_trees=5).trees
    busy = [rank for rank in range(trainer.accelerator.num_processes) if rank not in idle]
    rank = trainer.accelerator.process_index
    share = whole[busy.index(rank) :: len(busy)] if rank in busy else ()
    return batch_of(share, whole, step=seed)


def gradients_of(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Filled with the whole gradient of each optimizer step that the trainer will take."""
    from learner.checkpoints.tensors import _gathered, parameters_of

    found: list[dict[str, Tensor]] = []
    original = trainer.optimizer.step

    def step(*args: Any) -> None:
        gradients = {n: p.grad for n, p in parameters_of(trainer.policy).items() if p.grad is not None}
        found.append({n: _gathered(g.detach()).clone() for n, g in gradients.items()})
        original(*args)

    trainer.optimizer.step = step
    return found


def from_reference(trainer: Trainer) -> float:
    """Nats between the policy and its reference before any step: they are one policy."""
    import torch

    from learner.policy import precision

    reference = trainer._loss.reference
    assert reference is not None
    tokens = torch.arange(24, device=trainer.accelerator.device).reshape(2, 12) * 5 % 31
    places = torch.arange(22, device=tokens.device)
    inputs: dict[str, Any] = {"tokens": tokens, "predictor": places, "target": tokens.reshape(-1)[1:23]}
    with torch.no_grad():
        own = trainer._loss.model(**inputs)
        with precision.as_the_policy(trainer.accelerator):
            return float((own - reference(**inputs)).abs().max())


def trained(trainer: Trainer, seeds: Sequence[int], *, idle: Sequence[int] = ()) -> dict[str, Any]:
    """What came of training on a batch for each seed.  Every rank gets the metrics, rank 0 the tensors too."""
    apart = from_reference(trainer)
    gradients = gradients_of(trainer)
    metrics = [trainer.train(batch_for(trainer, seed=seed, idle=idle), version=3).metrics for seed in seeds]
    published = dict(trainer.whole.published())
    probed = trainer.whole.probe(np.arange(24, dtype=np.int32).reshape(2, 12) * 5 % 31)
    found: dict[str, Any] = {
        "layout": trainer.layout,
        "metrics": metrics,
        "probe": probed.tolist(),
        "from_reference": apart,
    }
    if trainer.accelerator.is_main_process:
        found |= {
            "names": sorted(published),
            "weights": {name: tensor.double().reshape(-1).tolist() for name, tensor in sorted(published.items())},
            "gradients": [{n: g.double().reshape(-1).tolist() for n, g in sorted(step.items())} for step in gradients],
        }
    return found


def launch(folder: Path, work: list[list[Any]], *, ranks: int) -> list[Any]:
    """Rank 0's results of jobs that ``ranks`` processes do together, each ``[its name in JOBS, arguments...]``."""
    folder.mkdir()
    (folder / "work.json").write_text(json.dumps(work))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = []
    for rank in range(ranks):
        env = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "PYTHONPATH": path,
        }  # fmt: skip
        with (folder / f"log-{rank}").open("w") as log:
            command = [sys.executable, str(Path(__file__)), str(folder)]
            started.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=280) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    logs = [(folder / f"log-{rank}").read_text()[-3000:] for rank in range(ranks)]
    assert codes == [0] * ranks, "\n".join(logs)
    found: list[Any] = json.loads((folder / "found.json").read_text())
    return found


def job_train(model: str, kind: str, sections: Sections, idle: list[int], batches: int = 1) -> dict[str, Any]:
    trainer = make_trainer(Path(model), kind, sections)
    return trained(trainer, range(batches), idle=idle) | {"wrapper": type(trainer.model).__name__}


def job_resume(model: str, kind: str, sections: Sections, source: str | None, target: str, train: bool) -> str:
    """Load a checkpoint, train on if asked, and save another; its folder."""
    trainer = make_trainer(Path(model), kind, sections)
    step = checkpoint_of(trainer, source)
    if train:
        trainer.train(batch_for(trainer, seed=step), version=3)
    return save(trainer, target, step=step + train)


def checkpoint_of(trainer: Trainer, source: str | None) -> int:
    from learner.checkpoints import checkpoint

    return checkpoint.load(Path(source), trainer).step if source is not None else 0


def save(trainer: Trainer, target: str, *, step: int) -> str:
    from learner.checkpoints import checkpoint
    from learner.checkpoints.checkpoint import Progress

    return str(checkpoint.save(Path(target), trainer, Progress(step=step, version=step), keep=3))


def job_former(model: str, target: str) -> list[str]:
    """A checkpoint as it is, and what is saved after reading it as Accelerate once wrote it."""
    import shutil

    from learner.checkpoints.checkpoint import SHARDED

    trainer = make_trainer(Path(model), "fsdp2", {})
    trainer.train(batch_for(trainer, seed=0), version=3)
    path = save(trainer, f"{target}-now", step=1)
    former = Path(target) / Path(path).name
    if trainer.accelerator.is_main_process:
        shutil.copytree(path, former)
        for name in ("model", "optimizer"):
            (former / f"{name}.safetensors").unlink()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.save_state(str(former / SHARDED), safe_serialization=True)
    again = make_trainer(Path(model), "fsdp2", {})
    return [path, save(again, f"{target}-again", step=checkpoint_of(again, str(former)))]


def job_full_disk(model: str, kind: str, target: str) -> dict[str, Any]:
    """A checkpoint that rank 0's disk refuses, and the next one, which it takes."""
    import errno

    from learner.checkpoints import tensors

    trainer = make_trainer(Path(model), kind, {})
    trainer.train(batch_for(trainer, seed=0), version=3)

    def full(tensors: Mapping[str, Tensor]) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original, tensors._header = tensors._header, full
    number = 0
    try:
        save(trainer, target, step=1)
    except OSError as exc:
        number = exc.errno or -1
    finally:
        tensors._header = original
    numbers = trainer.reductions.gather(float(number))
    left = [path.name for path in Path(target).iterdir()]
    return {"numbers": numbers, "left": left, "path": save(trainer, target, step=1)}


def job_overflow(model: str, kind: str, target: str) -> dict[str, Any]:
    """fp16's loss scale where one rank's part of the gradient does not fit, with a limit of one skipped update."""
    import torch
    from torch.distributed.tensor import DTensor

    sections: Sections = {"learner": {"max_skipped_updates": 1}}
    trainer = make_trainer(Path(model), kind, sections, scaler=torch.amp.GradScaler("cpu", init_scale=65536.0))
    gather, unscale = trainer.reductions.gather, trainer.accelerator.unscale_gradients
    before = {name: tensor.clone() for name, tensor in trainer.whole.tensors().items()}
    left = [3]

    def overflowing(_: Any = None) -> None:
        if left[0] and trainer.accelerator.process_index == trainer.accelerator.num_processes - 1:
            gradient = next(p.grad for p in trainer.policy.parameters() if p.grad is not None)
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient)[0] = torch.inf
        left[0] -= bool(left[0])
        unscale()

    trainer.accelerator.unscale_gradients = overflowing
    scales, faults = [], []
    for seed in range(4):
        report = trainer.train(batch_for(trainer, seed=seed), version=3)
        faults.append(report.fault)
        scales.append(gather(report.metrics["guard/fp16_scale"]))
        if seed == 2:
            same = all(torch.equal(tensor, before[name]) for name, tensor in trainer.whole.tensors().items())
    path = save(trainer, target, step=4)
    again = make_trainer(Path(model), kind, sections, scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    checkpoint_of(again, path)
    return {
        "scales": scales,
        "faults": faults,
        "overflows": report.metrics["guard/fp16_overflows"],
        "skipped": report.metrics["guard/skipped_updates"],
        "updates": trainer.history.updates,
        "unchanged": same,
        "restored": [again.accelerator.scaler.get_scale(), again.history.overflows],
    }


JOBS: dict[str, Callable[..., Any]] = {
    "train": job_train,
    "resume": job_resume,
    "former": job_former,
    "full_disk": job_full_disk,
    "overflow": job_overflow,
}


def main(folder: Path) -> None:
    import torch
    from torch._C._distributed_c10d import FileStore

    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=FileStore(str(folder / "store"), ranks),
        rank=rank,
        world_size=ranks,
    )
    found = [JOBS[name](*arguments) for name, *arguments in json.loads((folder / "work.json").read_text())]
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    # A rank that leaves while the other still uses the group's threads aborts in their destructors.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
