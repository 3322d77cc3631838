"""Where what is compiled for a run's models is kept, so that the next start, of this run or another, finds it there.

torch keeps it in the folder for temporary files by default, which a reboot empties and which differs with TMPDIR.  vLLM
and Triton keep theirs in the user's home, unless that cannot be written.  Variables that the user has set are left.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

TORCH, TRITON, VLLM = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"
"""Environment variables that name these folders."""


def keep(say: Callable[[str], None] = lambda line: None) -> None:
    """Set the variables for torch in this process and those that it starts.

    Args:
        say: a line for the user, where nothing can be kept.
    """
    found, problem = variables(os.environ)
    if problem:
        say(problem)
    os.environ.update(found)


def variables(
    environment: Mapping[str, str], *, usable: Callable[[Path], bool] | None = None, home: Path | None = None
) -> tuple[dict[str, str], str]:
    """What to set for torch, and what to tell the user, if anything.

    Args:
        environment: as it is.
        usable: whether a folder is there, or could be made, and can be written.
        home: of the user; None: this one's.
    """
    usable = usable or _usable
    if TORCH in environment:
        return {}, ""
    cache = _cache(environment, home)
    ours = None if cache is None else cache / "atpo-async" / "torch"
    if ours is not None and usable(ours):
        return {TORCH: str(ours)}, ""
    lost = _temporary()
    found = {TORCH: str(lost / "torch"), TRITON: str(lost / "triton")}
    return {name: value for name, value in found.items() if name not in environment}, (
        f"{ours or 'the home folder'} cannot be written: what torch compiles is kept in {lost}, and is gone after a "
        f"reboot; set {TORCH}, or XDG_CACHE_HOME, to a folder that stays"
    )


def variables_for_vllm(
    environment: Mapping[str, str], *, usable: Callable[[Path], bool] | None = None, home: Path | None = None
) -> dict[str, str]:
    """What to set for vLLM: nothing where its own choice, a folder in the user's cache, can be written."""
    usable = usable or _usable
    cache = _cache(environment, home)
    if VLLM in environment or (cache is not None and usable(cache / "vllm")):
        return {}
    return {VLLM: str(_temporary() / "vllm")}


def model_links(environment: Mapping[str, str], *, home: Path | None = None) -> Path | None:
    """Where links to model folders stay: vLLM knows what it compiled for a model by the name of its folder."""
    cache = _cache(environment, home)
    return None if cache is None else cache / "atpo-async" / "models"


def _cache(environment: Mapping[str, str], home: Path | None) -> Path | None:
    if named := environment.get("XDG_CACHE_HOME"):
        return Path(named)
    with contextlib.suppress(RuntimeError):
        return (home or Path.home()) / ".cache"
    return None


def _temporary() -> Path:
    uid = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"atpo-compiled-{uid}"


def _usable(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.access(folder, os.W_OK | os.X_OK)
    return False
