"""The roles that a run starts: the command of each, and the environment variables that set its threads and GPUs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from atpo_async.run import accelerate_environment, launch


@dataclass(frozen=True, kw_only=True)
class RoleSpec:
    """How to start one role."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    ends_run: bool = False
    """The run is done when this role is (the learner)."""
    stops_last: bool = False
    """Others need it while they stop (the buffer)."""


def role_specs(
    config: Config,
    rundir: Path,
    *,
    has_cuda: Callable[[], bool],
    python: str = sys.executable,
    environ: Mapping[str, str] = os.environ,
) -> list[RoleSpec]:
    """The buffer, the learner and ``actor.count`` actors; ``has_cuda`` is asked only where it decides something.

    Raises SetupError for a GPU that ``environ`` does not allot.
    """
    folder = str(rundir)
    specs = [
        RoleSpec(
            name="buffer",
            argv=launch.command("buffer", folder, python=python),
            env=_threads(1) | _hidden(),
            stops_last=True,
        ),
        learner_spec(config, [folder], has_cuda=has_cuda, python=python, environ=environ),
    ]
    each = config.actor.tensor_parallel_size
    for index in range(config.actor.count):
        gpus = config.actor.gpus[index * each : (index + 1) * each]
        specs.append(
            RoleSpec(
                name=f"actor-{index}",
                argv=launch.command("actors", folder, "--index", str(index), python=python),
                env=_threads(config.actor.num_threads) | _visible(gpus, environ),
            )
        )
    return specs


def learner_spec(
    config: Config,
    words: Sequence[str],
    *,
    has_cuda: Callable[[], bool],
    python: str = sys.executable,
    environ: Mapping[str, str] = os.environ,
) -> RoleSpec:
    """The learner's ranks on one machine.

    Args:
        config: of the learner.
        words: arguments of each rank: the run's folder, or ``--config FILE --join HOST:PORT``.
        has_cuda: is asked only where it decides something.

    Raises SetupError for a GPU that ``environ`` does not allot.
    """
    argv = launch.command("learner", *words, python=python)
    env = _threads(config.learner.num_threads) | _visible(config.learner.gpus, environ)
    if config.learner.num_processes > 1 or config.learner.accelerate_config:
        # accelerate's launcher takes a Python program and its arguments.
        argv = (*_accelerate(config, python), *argv[2:])
        if _on_one_machine(config):
            env |= accelerate_environment.ONE_MACHINE
        device = config.learner.device
        if config.learner.accelerate_config is None and (device == "cpu" or (device == "auto" and not has_cuda())):
            env["ACCELERATE_USE_CPU"] = "true"
    return RoleSpec(name="learner", argv=argv, env=env, ends_run=True)


def _accelerate(config: Config, python: str) -> tuple[str, ...]:
    learner = config.learner
    words = [python, "-P", "-m", "accelerate.commands.launch", "--num_processes", str(learner.num_processes)]
    if learner.accelerate_config:
        words += ["--config_file", learner.accelerate_config]
    else:
        # Despite its name, --multi_gpu means one process per rank: on a CPU, ACCELERATE_USE_CPU makes them gloo ranks.
        # An option given here is not taken from the user's default file for accelerate.
        words += ["--multi_gpu", "--num_machines", "1", "--dynamo_backend", "no", "--gpu_ids", "all"]
    # No port of Accelerate's own: on one machine it is not used (``ONE_MACHINE``), and 29500 may be another run's.
    return (*words, "--mixed_precision", learner.mixed_precision, "--main_process_port", "0")


def _on_one_machine(config: Config) -> bool:
    """Whether all ranks run here, by the file of ``learner.accelerate_config`` (read as text: it is flat YAML)."""
    file = config.learner.accelerate_config
    if file is None:
        return True
    try:
        found = re.search(r"^num_machines:\s*['\"]?(\d+)", Path(file).read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        return False
    return found is None or int(found[1]) <= 1


def _threads(count: int | None) -> dict[str, str]:
    return {} if count is None else {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


def _visible(gpus: Sequence[int], outer: Mapping[str, str]) -> dict[str, str]:
    """The variables that show a role its GPUs; numbers count within the ``outer`` CUDA_VISIBLE_DEVICES (as a cluster
    allots them)."""
    if not gpus:
        return {}
    allotted = outer.get("CUDA_VISIBLE_DEVICES")
    names = None if allotted is None else [name.strip() for name in allotted.split(",") if name.strip()]
    if names is not None and max(gpus) >= len(names):
        raise SetupError(f"GPU {max(gpus)} is asked for, but CUDA_VISIBLE_DEVICES = {allotted!r} allots {len(names)}")
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) if names is None else names[gpu] for gpu in gpus),
        # CUDA's own order is by speed: with unlike cards its numbers are not those of nvidia-smi.
        "CUDA_DEVICE_ORDER": outer.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
    }


def _hidden() -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ""}
