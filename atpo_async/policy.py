"""Where a run's policy lies: the warm-started one before it, the trained one in its checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from atpo_async.config import Config
from atpo_async.errors import SetupError
from atpo_async.rundir import RunDir

MODELS = Path("models")
"""Where warm-started policies are kept, to be used by later runs too."""

_CHECKPOINT = re.compile(r"step-(\d+)-v(\d+)")
_PREFIX = "hf."
"""A checkpoint names parameters as the learner's module does, a model folder without this."""


def with_policy_path(config: Config) -> Config:
    """``config`` with ``model.path`` set where the warm start decides it: ``models/<environment>-<fingerprint>``.

    The fingerprint is of everything that the policy follows from, so that another task, seed or number of supervised
    steps never meets an older policy.  Pure.
    """
    if not config.model.warm_start or config.model.path:
        return config
    causes = {
        "format": 1,
        "environment": config.environment.model_dump(mode="json"),
        "steps": config.model.warm_start_steps,
        "context": config.model.max_context_tokens,
        "seed": config.run.seed,
    }
    fingerprint = hashlib.sha256(json.dumps(causes, sort_keys=True).encode()).hexdigest()[:10]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", config.environment.name)
    model = config.model.model_copy(update={"path": str(MODELS / f"{name}-{fingerprint}")})
    return config.model_copy(update={"model": model})


def is_there(folder: Path) -> bool:
    """Whether a model folder is complete."""
    return (folder / "config.json").is_file()


def warm_start_command(config_file: Path, target: Path) -> list[str]:
    """Makes the policy ``target`` as ``config_file`` says; the folder appears complete or not at all."""
    return [sys.executable, "-m", "learner", "warm-start", "--config", str(config_file), "--out", str(target)]


def list_checkpoints(rundir: RunDir) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(tuple(int(n) for n in m.groups()), p) for p in rundir.checkpoints.glob("step-*") if (m := _match(p))]
    return [path for _, path in sorted(found)]


def _match(path: Path) -> re.Match[str] | None:
    return _CHECKPOINT.fullmatch(path.name)


@contextlib.contextmanager
def latest_policy(rundir: RunDir) -> Iterator[tuple[Path, str]]:
    """The run's newest policy as an ordinary model folder, and what to call it; a folder made for it goes afterwards.

    Raises SetupError where the run has neither a checkpoint nor an exported model.
    """
    exported = rundir.path / "model"
    whole = [path for path in list_checkpoints(rundir) if (path / "model.safetensors").is_file()]
    newest = whole[-1].stat().st_mtime if whole else 0.0
    if is_there(exported) and (exported / "config.json").stat().st_mtime >= newest:
        yield exported, str(exported)
        return
    if not whole:
        raise SetupError(f"run {rundir.path} has no checkpoint yet (learner.checkpoint_every); train it first")
    with tempfile.TemporaryDirectory(prefix="atpo-policy-") as folder:
        yield assemble(Path(rundir.config.model.path), whole[-1], Path(folder)), str(whole[-1])


def assemble(source: Path, checkpoint: Path, target: Path) -> Path:
    """Put the checkpoint's weights beside the configuration and tokenizer of ``source``.  Returns ``target``."""
    if not is_there(source):
        raise SetupError(f"model.path = '{source}', from which this run started, is gone: its tokenizer is needed")
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth") or ".index." in file.name
        if file.is_file() and not weights:
            shutil.copyfile(file, target / file.name)
    _rename_tensors(checkpoint / "model.safetensors", target / "model.safetensors")
    return target


def _rename_tensors(source: Path, target: Path) -> None:
    """Copy a safetensors file, taking the prefix off the names; the tensors' bytes stay as they are.

    The format: u64 little-endian length, a JSON header of that length, the data that its offsets point into.
    """
    with source.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > os.path.getsize(source):
            raise SetupError(f"checkpoint {source} is damaged: its header is longer than the file")
        header = json.loads(file.read(length))
        renamed = {name.removeprefix(_PREFIX): entry for name, entry in header.items() if name != "__metadata__"}
        renamed["__metadata__"] = {"format": "pt"}
        text = json.dumps(renamed, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data stays aligned
        with target.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(file, out, 1 << 20)
