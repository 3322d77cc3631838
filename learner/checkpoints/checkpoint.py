"""Checkpoints: written aside, synced, renamed.  The last good one always exists.

    checkpoints/step-000050-v000051/
      model.safetensors       the policy's parameters, each once; with LoRA instead of it an adapter folder in peft's
                              format, adapter_config.json and adapter_model.safetensors
      optimizer.safetensors   "<parameter>.<state>": exp_avg, exp_avg_sq, step (``learner.checkpoints.optimizer_state``)
      rng-<rank>.safetensors  torch's generators
      implicit.safetensors, implicit-optimizer.safetensors
                              the same of the implicit reward model, where there is one
      state.json              counters, version, gradient norms, running numbers of the objective's parts, fp16's loss
                              scale, optimizer settings, Python's and numpy's generators

Tensors are safetensors, the rest is JSON: nothing is unpickled.  Tensors are whole, however many ranks hold shards of
them, so a run goes on with another number of ranks, with sharding or without.  Checkpoints of sharded runs once held
``sharded/``, in Accelerate's own format, instead of the first two; those are read by Accelerate, in shards alone.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atpo_async.core.errors import SetupError
from atpo_async.models import adapters
from atpo_async.models.policy import list_checkpoints as list_checkpoints
from atpo_async.models.tensor_files import WEIGHTS
from atpo_async.ops import disk
from atpo_async.run.files import sync
from learner.checkpoints import optimizer_state, reward_model_state
from learner.checkpoints.tensors import parameters_of, read_tensors, write_tensors
from learner.memory.out_of_memory import explained
from learner.policy.optimizer import groups_settings, set_settings
from learner.training.trainer import Trainer

_ASIDE = ".writing-"
FORMAT = 1
SHARDED = "sharded"
"""Folder of a checkpoint in Accelerate's format."""
_NO_NUMBER = 1 << 20
"""In place of an error number, for an error that is not a file system's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The progress of the run."""

    step: int
    """Batches trained."""
    version: int
    """Of the weights in the checkpoint."""


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def name_of(step: int, version: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:06d}-v{version:06d}"


def save(
    folder: Path,
    trainer: Trainer,
    progress: Progress,
    *,
    keep: int,
    spared: Callable[[], Path | None] = lambda: None,
) -> Path:
    """Write a checkpoint and remove all but the newest ``keep``, and one that is still read.  Every rank calls it; rank
    0 writes, the others may be on machines without this folder.

    Raises:
        OSError: a file system refused, that of any rank: with the same number on all of them.  Nothing is left of it.
    """
    accelerator = trainer.accelerator
    target = folder / name_of(progress.step, progress.version)
    aside = folder / f"{_ASIDE}{target.name}"
    # Versions are never used twice: the same name is the same state.
    if trainer.reductions.same_everywhere([float(target.is_dir())])[0]:
        return target
    for part in (_clear_space, _write_tensors, _complete):
        fault: Exception | None = None
        try:
            part(aside, target, trainer, progress)
        # Any error: the other ranks wait for this rank's outcome.
        except Exception as exc:
            fault = exc
        try:
            _agree(fault, trainer)
        except Exception:
            if accelerator.is_main_process:
                # Free its space too: the next attempt, or another program, needs it.
                shutil.rmtree(aside, ignore_errors=True)
            raise
    if accelerator.is_main_process:
        for old in (path for path in list_checkpoints(folder)[:-keep] if path != spared()):
            # Renamed first: a folder that is half removed must not look like a checkpoint.
            gone = folder / f"{_ASIDE}removed-{old.name}"
            old.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
    accelerator.wait_for_everyone()
    return target


def _agree(fault: Exception | None, trainer: Trainer) -> None:
    """Raise on every rank what any rank's file system refused.  Waits for: all ranks."""
    number = 0 if fault is None else (disk.error_number(fault) or _NO_NUMBER)
    worst = -int(trainer.reductions.least(-float(number)))
    if worst == _NO_NUMBER and fault is not None:
        raise fault
    if worst == number and isinstance(fault, OSError):
        raise fault
    if worst == _NO_NUMBER:
        raise RuntimeError("another rank could not write its part of the checkpoint: its log says why")
    if worst:
        raise OSError(worst, os.strerror(worst)) from fault


def _clear_space(aside: Path, target: Path, trainer: Trainer, progress: Progress) -> None:
    if trainer.accelerator.is_main_process:
        for leftover in _entries(aside.parent):
            if leftover.name.startswith(_ASIDE):
                shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)


def _write_tensors(aside: Path, target: Path, trainer: Trainer, progress: Progress) -> None:
    accelerator = trainer.accelerator
    for rank, states in enumerate(_torch_rngs(trainer)):
        if accelerator.is_main_process:
            save_file(states, aside / f"rng-{rank}.safetensors")
    if not (trainer.whole.sharded or accelerator.is_main_process):
        return
    lora = trainer.policy.lora
    files: dict[str, Mapping[str, Tensor]] = {
        _weights_file(trainer): _trained(trainer),
        "optimizer.safetensors": optimizer_state.tensors_of(trainer.optimizer),
    }
    if trainer.implicit is not None:
        files |= reward_model_state.files_of(trainer.implicit)
    fault: Exception | None = None
    for name, tensors in files.items():
        writes = accelerator.is_main_process and fault is None
        try:
            write_tensors(aside / name if writes else None, tensors)
        # The other ranks do not know yet: they gather the next file's tensors.
        except Exception as exc:
            fault = exc
    if fault is not None:
        raise fault
    if lora is not None and accelerator.is_main_process:
        lora.write_settings(aside, base=trainer.config.model.path)


def _complete(aside: Path, target: Path, trainer: Trainer, progress: Progress) -> None:
    if not trainer.accelerator.is_main_process:
        return
    state = {
        "format": FORMAT,
        "step": progress.step,
        "version": progress.version,
        **trainer.history.snapshot(),
        "objective": trainer.objective_state,
        "scaler": None if trainer.accelerator.scaler is None else trainer.accelerator.scaler.state_dict(),
        "param_groups": groups_settings(trainer.optimizer),
        "lora": None if trainer.policy.lora is None else trainer.policy.lora.said(),
        "python_rng": _jsonable(random.getstate()),
        "numpy_rng": _jsonable(np.random.get_state()),
    }
    if trainer.implicit is not None:
        state["implicit_reward"] = reward_model_state.counters_of(trainer.implicit)
    (aside / "state.json").write_text(json.dumps(state), encoding="utf-8")
    publish(aside, target)


def publish(aside: Path, target: Path) -> None:
    """Sync every file of ``aside`` to disk, then let it appear as ``target``."""
    for path in sorted(aside.rglob("*")):
        sync(path)
    sync(aside)
    aside.rename(target)
    sync(target.parent)


def load(path: Path, trainer: Trainer) -> Progress:
    """Load a checkpoint's state into ``trainer``.  Every rank calls it.

    Raises:
        SetupError: the checkpoint is damaged or of another model.
    """
    accelerator = trainer.accelerator
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise SetupError(f"checkpoint {path} has format {state['format']}, this program reads {FORMAT}")
        _check_adapters(path, state.get("lora"), trainer)
        if (path / SHARDED).is_dir():
            _load_shards(path, trainer)
        else:
            _load_parameters(trainer, path / _weights_file(trainer))
            with explained("the optimizer's state of a checkpoint", trainer.config, accelerator.device):
                optimizer_state.load_into(trainer.optimizer, dict(read_tensors(path / "optimizer.safetensors", {})))
        if trainer.implicit is not None:
            reward_model_state.load_into(trainer.implicit, path, state.get("implicit_reward"), policy=trainer.policy)
        rng = path / f"rng-{accelerator.process_index}.safetensors"
        if rng.is_file():  # with more ranks than before the new ones start afresh
            _set_torch_rng(load_file(rng))
        version, internal, gauss = state["python_rng"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy_rng"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        trainer.history.restore(state)
        trainer.restore_objective(state.get("objective", {}))  # older checkpoints lack it: it begins anew
        if accelerator.scaler is not None and state.get("scaler"):
            accelerator.scaler.load_state_dict(state["scaler"])
        return Progress(step=int(state["step"]), version=int(state["version"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as exc:
        raise SetupError(
            f"checkpoint {path} cannot be loaded: {exc}; remove that folder to go on from the one before"
        ) from exc


def _weights_file(trainer: Trainer) -> str:
    return WEIGHTS if trainer.policy.lora is None else adapters.WEIGHTS


def _trained(trainer: Trainer) -> dict[str, nn.Parameter]:
    """What training changes, each once, under the names that it has in the checkpoint's file; shards of it."""
    found = parameters_of(trainer.policy)
    if trainer.policy.lora is None:
        return found
    return {f"{adapters.PREFIX}{name}": p for name, p in trainer.policy.lora.parameters().items()}


def _load_parameters(trainer: Trainer, file: Path) -> None:
    own = _trained(trainer)
    left = set(own)
    with torch.no_grad():
        for name, tensor in read_tensors(file, own):
            if name not in left:
                raise ValueError(f"its parameter {name} is none of the model's")
            own[name].copy_(tensor)
            left.remove(name)
    if left:
        raise ValueError(f"it lacks parameters of the model: {sorted(left)[:4]}")


def _check_adapters(path: Path, was: dict[str, Any] | None, trainer: Trainer) -> None:
    """Raises SetupError for adapters over other weights, of another shape or scale, or where there are none now."""
    now = None if trainer.policy.lora is None else trainer.policy.lora.said()
    if was == now:
        return
    if was is None or now is None:
        holds, keeps = ("all weights", "adapters") if was is None else ("adapters", "all weights")
        what = f"holds {holds}, and with learner.lora.rank = {trainer.config.learner.lora.rank} {keeps} are trained"
    else:
        odd = next(name for name in now if was.get(name) != now[name])
        what = {
            "base": f"holds adapters over other weights than those of model.path = {trainer.config.model.path!r} now",
            "layers": "holds adapters of other layers than learner.lora.targets names",
        }.get(odd, f"holds adapters of {odd} {was.get(odd)!r}, [learner.lora] makes it {now[odd]!r}")
    raise SetupError(
        f"checkpoint {path} {what}: go on with the former settings and weights, or start another run from the merged "
        "policy with `atpo train CONFIG --from RUN`"
    )


def _load_shards(path: Path, trainer: Trainer) -> None:
    """As Accelerate wrote them.  Raises SetupError where tensors are whole now."""
    if not trainer.whole.sharded:
        raise SetupError(
            f"checkpoint {path} holds shards in Accelerate's format, and with learner.accelerate_config = "
            f"{trainer.config.learner.accelerate_config!r} this learner keeps whole tensors: go on with the former "
            "learner.accelerate_config until the next checkpoint, which any number of ranks reads with or without "
            "sharding, or start another run from the policy alone with `atpo train CONFIG --from RUN`"
        )
    settings = groups_settings(trainer.optimizer)
    trainer.accelerator.load_state(str(path / SHARDED))
    set_settings(trainer.optimizer, settings)


def _torch_rng() -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _torch_rngs(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Of each rank, on every rank."""
    own = _torch_rng()
    names, device = sorted(own), trainer.accelerator.device
    sizes = {name: [int(n) for n in trainer.reductions.gather(own[name].numel())] for name in names}
    found: list[dict[str, Tensor]] = [{} for _ in sizes[names[0]]]
    for name in names:
        together = trainer.reductions.concatenated(own[name].to(device)).cpu()
        at = 0
        for states, size in zip(found, sizes[name], strict=True):
            states[name], at = together[at : at + size].clone(), at + size
    return found


def _set_torch_rng(found: dict[str, Tensor]) -> None:
    torch.set_rng_state(found["cpu"])
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["cuda"])


def _jsonable(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_jsonable(v) for v in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
