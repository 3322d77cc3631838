"""Checks that this machine has what a run needs, before anything is started or written.

Heavy packages are not imported to look.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import psutil

from atpo_async.config import Config, get
from atpo_async.config.doors import DOORS, ENGINE, ENVIRONMENT, STRATEGY
from atpo_async.core.doors import Door
from atpo_async.core.errors import SetupError
from atpo_async.environments.next_text import environment as next_text
from atpo_async.environments.search_qa import retrievers
from atpo_async.links import addresses, ports
from atpo_async.models.policy import MODELS, is_there, warm_start_command
from atpo_async.models.sources import check_positions, model_folder
from atpo_async.run.installed import version_of


def has_module(name: str) -> bool:
    """Whether a module could be imported, without doing so."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def no_cuda_because() -> str | None:
    """Why torch cannot use a GPU here; None where it can.  Quick where no driver is here."""
    version = version_of("torch")
    if version is None:
        return "torch is not installed"
    if "+cpu" in version:
        return f"torch {version} is a build for the CPU"
    if not (Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi")):
        return "no NVIDIA driver is here"
    return None if cuda_devices() else f"torch {version} finds no GPU that it can use"


def has_cuda() -> bool:
    return no_cuda_because() is None


def cuda_devices() -> int:
    """GPUs that torch can use.  Asked in a process of its own: here it would open a context that is then inherited."""
    question = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-c", question], capture_output=True, text=True, timeout=120, check=True
        ).stdout
        return int(answer.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


def engine_of(config: Config) -> tuple[str, str]:
    """(engine that an actor would use here, why).  Raises SetupError where the one asked for is not installed."""
    wanted = config.actor.engine
    present = has_module("vllm")
    if wanted == "vllm" and not present:
        raise SetupError(
            "actor.engine = 'vllm', but vLLM is not installed here: install it (`pip install 'atpo-async[vllm]'` for "
            "CUDA; `make setup` brings the CPU build), or set --actor.engine transformers"
        )
    if wanted != "auto":
        return wanted, f"actor.engine = {wanted!r}"
    if present:
        return "vllm", "actor.engine = 'auto', and vLLM is installed"
    return "transformers", "actor.engine = 'auto', and vLLM is not installed: slower, the same results"


def engine_elsewhere(config: Config) -> str:
    """The engine where the run will be, which this machine may lack: ``vllm`` where that is not known."""
    try:
        return engine_of(config)[0]
    except SetupError:
        return config.actor.engine


def check_machine(config: Config) -> None:
    """Check what can be checked before anything is started or written.

    Raises SetupError naming the first thing that is missing: an engine, a GPU, a port, a file, a key, a package.
    """
    engine, _ = engine_of(config)
    if engine == "transformers" and not has_module("transformers"):
        raise SetupError("transformers is not installed; run `atpo doctor` for what is missing")
    for field, device in (("actor.device", config.actor.device), ("learner.device", config.learner.device)):
        if device == "cuda":
            why_not = no_cuda_because()
            if why_not is not None:
                raise SetupError(f"{field} = 'cuda', but {why_not}; set --{field} cpu, or run where a GPU is")
    _check_gpus(config, engine)
    check_launch(config)
    check_kernels(config)
    check_environment(config)
    check_texts(config)
    check_packages(config)
    check_links(config)
    check_journal_dir(config)


def check_launch(config: Config) -> None:
    launch = config.learner.accelerate_config
    if launch is not None and not Path(launch).is_file():
        raise SetupError(f"learner.accelerate_config = {launch!r} is no file; `accelerate config` makes one")


def check_kernels(config: Config) -> None:
    """Raises SetupError naming a package that the learner's settings ask for, or an adapter folder that is not here."""
    if config.learner.optimizer == "adamw8bit" and not has_module("torchao"):
        raise SetupError(
            "learner.optimizer = 'adamw8bit', but torchao is not installed here: pip install 'atpo-async[gpu]', or use "
            "--learner.optimizer offload or adamw"
        )
    begin = config.learner.lora.init
    if config.learner.lora.rank and begin is not None and not Path(begin).is_dir():
        raise SetupError(f"learner.lora.init = {str(begin)!r} is no folder; name an adapter folder in peft's format")
    if config.learner.kernels == "liger" and not has_module("liger_kernel"):
        raise SetupError(
            "learner.kernels = 'liger', but liger-kernel is not installed here: pip install 'atpo-async[gpu]', or use "
            "--learner.kernels auto"
        )


def check_journal_dir(config: Config) -> None:
    folder = config.buffer.journal_dir
    if folder is None:
        return
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    why_not = "is no folder" if not there.is_dir() else "cannot be written" if not os.access(there, os.W_OK) else None
    if why_not is not None:
        raise SetupError(f"buffer.journal_dir = {str(folder)!r}: {there} {why_not}; name a folder you can write")


def _check_gpus(config: Config, engine: str) -> None:
    actor = config.actor
    # Without numbers each actor's vLLM takes its share of the same first GPUs.
    shares = actor.count * actor.gpu_memory_utilization
    if engine == "vllm" and actor.count > 1 and not actor.gpus and actor.device != "cpu" and shares > 1 and has_cuda():
        raise SetupError(
            f"actor.count = {actor.count} without actor.gpus puts all actors on the same GPU, where "
            f"actor.gpu_memory_utilization = {actor.gpu_memory_utilization:g} of each is more than there is: name "
            "their GPUs with --actor.gpus, or lower one of the two"
        )
    wanted = [("learner.gpus", gpu) for gpu in config.learner.gpus] + [("actor.gpus", gpu) for gpu in config.actor.gpus]
    if not wanted:
        return
    why_not = no_cuda_because()
    if why_not is not None:
        raise SetupError(f"{wanted[0][0]} names GPU {wanted[0][1]}, but {why_not}")
    count = cuda_devices()
    for field, gpu in wanted:
        if gpu >= count:
            outer = os.environ.get("CUDA_VISIBLE_DEVICES")
            whose = "this machine has" if outer is None else f"CUDA_VISIBLE_DEVICES = {outer!r} allots"
            raise SetupError(f"{field} names GPU {gpu}, but {whose} {count} (0 to {count - 1})")


def check_warm_start(config: Config) -> None:
    """Raises ConfigError where a warm start is asked for and the environment has no such policy."""
    if config.model.warm_start:
        warm_start_command(config)


def check_model(config: Config) -> None:
    """Raises SetupError where there is no model and no warm start would make it.  One on the Hub is fetched: once, and
    before any role needs it."""
    path = Path(config.model.path)
    check_warm_start(config)
    if config.model.warm_start:
        if config.model.path and not is_there(path) and path.parent != MODELS:
            raise SetupError(
                f"model.path = {config.model.path!r} is not there, and the warm start makes its policies in {MODELS}/; "
                "name a model folder and set --model.warm_start false, leave model.path out to use the warm-started "
                "one, or, where a run began with that folder, use another --run.name"
            )
    else:
        check_positions(model_folder(config.model.path), config.model.max_context_tokens)


def check_environment(config: Config) -> None:
    """Raises SetupError where the package of a user's own environment is not here, or what a built-in one needs."""
    _check_packages(config, (ENVIRONMENT,))
    for each in config.every_environment if config.actor.count else ():
        if each.name == "search_qa":
            retrievers.check_needs(each.options)


def check_texts(config: Config) -> None:
    """Raises ConfigError or SetupError for options of ``next_text`` that cannot be, or a corpus that is not here."""
    for each in config.every_environment if config.actor.count else ():
        if each.name == "next_text":
            next_text.check_needs(each.options)


def check_packages(config: Config) -> None:
    """Raises SetupError naming the first package that a user's own surrogate, engine, sink, … needs and that is not
    here."""
    _check_packages(config, [door for door in DOORS if door is not ENVIRONMENT])


def _check_packages(config: Config, doors: Sequence[Door[Any]]) -> None:
    for door in doors:
        if door in (ENVIRONMENT, STRATEGY, ENGINE) and not config.actor.count:
            continue  # actors of other machines have it
        value = () if door is ENVIRONMENT else get(config, door.field)
        names = [(door, name) for name in ((value,) if isinstance(value, str) else value)]
        if door is ENVIRONMENT:
            names = [(each, name) for each, name, _ in config.named_environments()]
        for its_door, name in names:
            top = name.partition(":")[0].partition(".")[0]
            if name in door.choices() or has_module(top):
                continue
            # Roles see the working folder (launch.py), which an installed `atpo` does not.
            if PathFinder.find_spec(top, [str(Path.cwd())]) is None:
                raise SetupError(
                    f"{its_door.field} = {name!r}: there is no package {top!r} here; install it, or set PYTHONPATH to "
                    "where it lies"
                )


def check_links(config: Config) -> None:
    """Raises SetupError naming a port that is taken, an address that is not ours, or the keys that it needs."""
    links = config.links
    if links.host == "*":
        raise SetupError("links.host = '*': say 0.0.0.0 for every address of this machine")
    keys = links.keys_dir
    if keys is None:
        if not addresses.is_loopback(links.host):
            raise SetupError(
                f"links.host = {links.host!r} is no loopback address and needs keys: `atpo keys new --dir DIR` makes "
                "them; then --links.keys_dir DIR"
            )
    elif not keys.is_dir():
        raise SetupError(
            f"links.keys_dir = '{keys}' is no folder; `atpo keys new --dir {keys}` makes it, or leave "
            "links.keys_dir out on loopback"
        )
    else:
        # The actors and the learner of this machine are clients of the buffer: they need a pair of their own.
        for file in ("server.key_secret", "server.key", "client.key_secret", "client.key"):
            if not (keys / file).is_file():
                raise SetupError(
                    f"links.keys_dir = '{keys}' has no {file}; `atpo keys new --dir {keys}` makes what is missing"
                )
        from atpo_async.links.keys import load_pair

        # Now and not in each role: only the user can mend a secret that others can read.
        for name in ("server", "client"):
            load_pair(keys, name)
    ports.check(links)


def memory_gb() -> tuple[float, float]:
    """(total, available) in GiB."""
    memory = psutil.virtual_memory()
    return memory.total / 2**30, memory.available / 2**30


def gpu_bytes() -> dict[int, float]:
    """Memory of each GPU by the number that ``learner.gpus`` and ``actor.gpus`` give it; empty where none is seen."""
    tool = shutil.which("nvidia-smi")
    if tool is None or "+cpu" in (version_of("torch") or "+cpu"):
        return {}
    query = [tool, "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return visible_gpus(said, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible_gpus(said: str, visible: str | None) -> dict[int, float]:
    """Number -> bytes, from lines of ``index, uuid, MiB`` and CUDA_VISIBLE_DEVICES, within which numbers count.

    As CUDA does, whatever follows an entry that is no GPU is left out.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines()]
    sizes = {row[0]: (row[1], float(row[2]) * 2**20) for row in rows if len(row) == 3 and row[2].isdecimal()}
    if visible is None:
        return {int(index): size for index, (_, size) in sizes.items()}
    found: dict[int, float] = {}
    for name in (word.strip() for word in visible.split(",")):
        fitting = [size for index, (uuid, size) in sizes.items() if name and (name == index or uuid.startswith(name))]
        if not fitting:
            break
        found[len(found)] = fitting[0]
    return found
