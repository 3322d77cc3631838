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
from atpo_async.links import addresses
from atpo_async.run import accelerate_environment, launch

BUFFER, LEARNER = "buffer", "learner"
"""Names of roles; actors are ``actor-0``, ``actor-1``, …"""


@dataclass(frozen=True, kw_only=True)
class RoleShare:
    """One role of a run, wherever it is started, and the GPUs that it takes."""

    name: str
    processes: int = 1
    """Ranks of the learner."""
    gpus: tuple[int, ...] = ()
    """Numbers that the configuration gives it, of one machine; empty: it has none of its own."""
    num_gpus: int = 0
    """GPUs that it takes where a machine has them for it."""
    num_threads: int | None = None


def role_shares(config: Config) -> list[RoleShare]:
    """The roles of a run: the buffer, the learner and ``actor.count`` actors."""
    learner, actor = config.learner, config.actor
    each = actor.tensor_parallel_size
    return [
        RoleShare(name=BUFFER, num_threads=1),
        RoleShare(
            name=LEARNER,
            processes=learner.num_processes,
            gpus=learner.gpus,
            num_gpus=0 if learner.device == "cpu" else learner.num_processes,
            num_threads=learner.num_threads,
        ),
        *(
            RoleShare(
                name=f"actor-{index}",
                gpus=actor.gpus[index * each : (index + 1) * each],
                num_gpus=0 if actor.device == "cpu" else each,
                num_threads=actor.num_threads,
            )
            for index in range(actor.count)
        ),
    ]


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


@dataclass(frozen=True, kw_only=True)
class Machines:
    """One of the machines on which a learner's ranks run; they share no folder."""

    count: int
    """Of all; ``learner.num_processes`` ranks are spread evenly over them."""
    index: int
    """Of this one; rank 0 is on machine 0."""
    meet_at: str
    """HOST:PORT of machine 0, free there, at which torch's launchers of all machines meet."""


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
    buffer, _, *actors = role_shares(config)
    return [
        RoleSpec(
            name=buffer.name,
            argv=launch.command("buffer", folder, python=python),
            env=_threads(buffer.num_threads) | _hidden(),
            stops_last=True,
        ),
        learner_spec(config, [folder], has_cuda=has_cuda, python=python, environ=environ),
        *(
            RoleSpec(
                name=actor.name,
                argv=launch.command("actors", folder, "--index", str(index), python=python),
                env=_threads(actor.num_threads) | _visible(actor.gpus, environ),
            )
            for index, actor in enumerate(actors)
        ),
    ]


def learner_spec(
    config: Config,
    words: Sequence[str],
    *,
    has_cuda: Callable[[], bool],
    python: str = sys.executable,
    environ: Mapping[str, str] = os.environ,
    machines: Machines | None = None,
) -> RoleSpec:
    """The learner's ranks on one machine.

    Args:
        config: of the learner.
        words: arguments of each rank: the run's folder, or ``--config FILE --join HOST:PORT``.
        has_cuda: is asked only where it decides something.
        machines: which one of several; None: all ranks are here.

    Raises SetupError for a GPU that ``environ`` does not allot, and for ranks that cannot be spread over the machines.
    """
    argv = launch.command("learner", *words, python=python)
    env = _threads(config.learner.num_threads) | _visible(config.learner.gpus, environ)
    if config.learner.num_processes > 1 or config.learner.accelerate_config:
        # accelerate's launcher takes a Python program and its arguments.
        argv = (*_accelerate(config, python, machines), *argv[2:])
        if machines is not None:
            env |= accelerate_environment.SEVERAL_MACHINES
        elif _on_one_machine(config):
            env |= accelerate_environment.ONE_MACHINE
        device = config.learner.device
        if config.learner.accelerate_config is None and (device == "cpu" or (device == "auto" and not has_cuda())):
            env["ACCELERATE_USE_CPU"] = "true"
    return RoleSpec(name="learner", argv=argv, env=env, ends_run=True)


def _accelerate(config: Config, python: str, machines: Machines | None) -> tuple[str, ...]:
    learner = config.learner
    where: Sequence[str] = ("--num_machines", "1")
    # No port of Accelerate's own: on one machine it is not used (``ONE_MACHINE``), and 29500 may be another run's.
    port = "0"
    if machines is not None:
        where, port = _on_machine(config, machines)
    words = [python, "-P", "-m", "accelerate.commands.launch", "--num_processes", str(learner.num_processes)]
    if learner.accelerate_config:
        words += ["--config_file", learner.accelerate_config, *(where if machines is not None else ())]
    else:
        # Despite its name, --multi_gpu means one process per rank: on a CPU, ACCELERATE_USE_CPU makes them gloo ranks.
        # An option given here is not taken from the user's default file for accelerate.
        words += ["--multi_gpu", *where, "--dynamo_backend", "no", "--gpu_ids", "all"]
    return (*words, "--mixed_precision", learner.mixed_precision, "--main_process_port", port)


def _on_machine(config: Config, machines: Machines) -> tuple[Sequence[str], str]:
    """Accelerate's words for one of several machines, and the port at which they meet.  Raises SetupError."""
    ranks, count = config.learner.num_processes, machines.count
    try:
        host, port = addresses.split(machines.meet_at)
    except ValueError as exc:
        raise SetupError(f"{machines.meet_at!r} is no address of machine 0: {exc}") from None
    if port == 0:
        raise SetupError(f"{machines.meet_at}: the machines meet at a port that all of them know, which 0 is not")
    if not 0 <= machines.index < count or ranks % count or ranks < count:
        raise SetupError(
            f"learner.num_processes = {ranks} ranks cannot be spread evenly over {count} machines, of which this is "
            f"number {machines.index} (from 0)"
        )
    words = ["--num_machines", str(count), "--machine_rank", str(machines.index), "--main_process_ip", host]
    return [*words, "--same_network", "--rdzv_backend", "static"], str(port)


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
