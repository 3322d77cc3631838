"""The policy of a run: the warm-started one that it begins with, the trained one in its checkpoints."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atpo_async.config import Config
from atpo_async.core.doors import Door
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.models import adapters
from atpo_async.models.tensor_files import WEIGHTS, read_header, read_headers
from atpo_async.run import launch
from atpo_async.run.replica.elsewhere import elsewhere
from atpo_async.run.rundir import RunDir

MODELS = Path("models")
"""Folder of warm-started policies; later runs use them too."""

_WORLD = ("seed", "min_hops", "max_hops", "num_names", "num_relations")
WARM_STARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hopqa": ("atpo_async.environments.hopqa.warm_start", _WORLD),
    "ledger_qa": ("atpo_async.environments.ledger_qa.warm_start", ("seed", "ledgers", "entries", "num_names")),
    "passage_qa": ("atpo_async.environments.passage_qa.warm_start", (*_WORLD, "num_towns")),
    "next_text": ("atpo_async.environments.next_text.warm_start", ("seed",)),
}
"""Environment -> the program that makes its small policy, and the environment's options that the policy must fit."""

_CHECKPOINT = re.compile(r"step-(\d+)-v(\d+)")
_PREFIX = "hf."
"""A checkpoint names parameters as the learner's module does, a model folder without this."""


def is_there(folder: Path) -> bool:
    """Whether a model folder is complete."""
    return (folder / "config.json").is_file()


def warm_start_command(config: Config) -> list[str]:
    """Makes the small policy that fits the configuration where there is none, and prints its folder last.  Pure.

    Quick when there is nothing to make.  Raises ConfigError for an environment that has no such policy.
    """
    entries = config.named_environments()
    kinds = {name for _, name, _ in entries if name in WARM_STARTS}
    if len(kinds) != 1:
        names = " and ".join(f"{door.field} = {name!r}" for door, name, _ in entries)
        one = "one of them at a time" if kinds else "these only"
        raise ConfigError(
            f"model.warm_start makes a policy for {' or '.join(WARM_STARTS)}, {one}, not for {names}: name a model "
            "with --model.path and set --model.warm_start false"
        )
    module, world = WARM_STARTS[kind := kinds.pop()]
    ours = [_world_of(door, options, world) for door, name, options in entries if name == kind]
    options = _of_all(ours, kind)
    words = {"seed": config.run.seed, "steps": config.model.warm_start_steps}
    words |= {key: options[key] for key in world if key in options}
    command = [*launch.command(module, "--root", str(MODELS), "--device", config.learner.device)]
    for key, value in words.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    return command


def _world_of(door: Door[Any], options: Mapping[str, Any], world: tuple[str, ...]) -> dict[str, int]:
    """The options that a policy must fit.  Raises ConfigError for one of another type."""
    for key in ("hops", *world):
        if isinstance(options.get(key, 0), bool) or not isinstance(options.get(key, 0), int):
            raise ConfigError(f"{door.options}.{key} must be a whole number, got {options[key]!r}")
    hops = {"min_hops": options["hops"], "max_hops": options["hops"]} if options.get("hops") is not None else {}
    return hops | {key: options[key] for key in world if key in options}


def _of_all(worlds: Sequence[dict[str, int]], kind: str) -> dict[str, int]:
    """What one policy fits that is to fit all of several environments of a kind: the least and the most hops of any.

    Raises ConfigError where another option differs: names and relations are the policy's words.
    """
    if len(worlds) == 1:
        return worlds[0]
    found: dict[str, int] = {}
    for key, joined in (("min_hops", min), ("max_hops", max)):
        hops = [world[key] for world in worlds if key in world]
        if hops and len(hops) < len(worlds):
            raise ConfigError(
                f"model.warm_start: some of the {len(worlds)} {kind} environments set {key} (or hops), others leave it "
                "at its default: set it in each, so that the policy can be made for all of them"
            )
        if hops:
            found[key] = joined(hops)
    for key in {key for world in worlds for key in world} - {"min_hops", "max_hops"}:
        values = {world.get(key) for world in worlds}
        if len(values) > 1:
            raise ConfigError(
                f"model.warm_start: the {len(worlds)} {kind} environments differ in {key}, but one policy has the "
                "words of one world: make them agree, or name a model with --model.path"
            )
        if (value := values.pop()) is not None:
            found[key] = value
    return found


def with_path(config: Config, path: Path | str) -> Config:
    """``config`` with another ``model.path``."""
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder of checkpoints, oldest first."""
    found = [(tuple(int(n) for n in m.groups()), p) for p in folder.glob("step-*") if (m := _match(p))]
    return [path for _, path in sorted(found)]


def checkpoint_step(path: Path) -> int:
    """Of a complete checkpoint, by its name."""
    found = _match(path)
    if found is None:
        raise ValueError(f"{path} is no checkpoint")
    return int(found.group(1))


def steps_trained(rundir: RunDir) -> int:
    """Step of the newest checkpoint, in the run's folder or elsewhere; 0 without one."""
    found = [int(m.group(1)) for path in list_checkpoints(rundir.checkpoints) if (m := _match(path))]
    other = elsewhere(rundir.path)
    return max(*found, 0 if other is None else other.step, 0)


def _match(path: Path) -> re.Match[str] | None:
    return _CHECKPOINT.fullmatch(path.name)


@contextlib.contextmanager
def latest_policy(rundir: RunDir) -> Iterator[tuple[Path, str]]:
    """The run's newest policy as an ordinary model folder, and what to call it; a folder made for it goes afterwards.

    Raises SetupError where the run has neither a checkpoint nor an exported model.
    """
    exported = rundir.path / "model"
    whole = [path for path in list_checkpoints(rundir.checkpoints) if weights_in(path) is not None]
    newest = whole[-1].stat().st_mtime if whole else 0.0
    if is_there(exported) and (exported / "config.json").stat().st_mtime >= newest:
        yield exported, str(exported)
        return
    if not whole:
        if (other := elsewhere(rundir.path)) is not None:
            raise SetupError(f"the checkpoints of run {rundir.path} are not in its folder: see {other.where}")
        raise SetupError(f"run {rundir.path} has no checkpoint yet (learner.checkpoint_every); train it first")
    with tempfile.TemporaryDirectory(prefix="atpo-policy-") as folder:
        yield assemble(Path(rundir.config.model.path), whole[-1], Path(folder)), str(whole[-1])


def weights_in(checkpoint: Path) -> Path | None:
    """The file of a checkpoint that a policy can be assembled from, all weights or adapters; None in shards."""
    files = (checkpoint / name for name in (WEIGHTS, adapters.WEIGHTS))
    return next((file for file in files if file.is_file()), None)


def assemble(source: Path, checkpoint: Path, target: Path) -> Path:
    """Put the checkpoint's weights, adapters merged in, beside the configuration and tokenizer of ``source``.

    Returns ``target``.
    """
    if not is_there(source):
        raise SetupError(f"model.path = '{source}', from which this run started, is gone; its tokenizer is needed")
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth") or ".index." in file.name
        if file.is_file() and not weights:
            shutil.copyfile(file, target / file.name)
    if adapters.is_adapter(checkpoint):
        _merge(source, checkpoint, target / WEIGHTS)
        return target
    trained = checkpoint / WEIGHTS
    names = {name.removeprefix(_PREFIX) for name in read_header(trained)}
    if names <= set(read_headers(source)):
        _rename_tensors(trained, target / WEIGHTS)
    else:
        _convert_tensors(trained, target / WEIGHTS, source=source)
    return target


def _merge(source: Path, checkpoint: Path, target: Path) -> None:
    """One safetensors file, in float32 as other checkpoints are: the weights that the run began with, the checkpoint's
    adapters merged in."""
    from safetensors.torch import save_file

    merged = dict(adapters.merged_tensors(source, adapters.read(checkpoint)))
    whole = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in merged.items()}
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, target, metadata={"format": "pt"})


def _convert_tensors(trained: Path, target: Path, *, source: Path) -> None:
    """A safetensors file by the names, and in the shapes, of the model folder that the run started from."""
    from safetensors.torch import load_file, save_file

    from atpo_async.models import causal_lm

    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(trained).items()}
    converted = causal_lm.published(causal_lm.examine(source).skeleton, tensors)
    save_file({name: tensor.contiguous() for name, tensor in converted.items()}, target, metadata={"format": "pt"})


def _rename_tensors(source: Path, target: Path) -> None:
    """Copy a safetensors file, taking the prefix off the names; the tensors' bytes stay as they are."""
    renamed: dict[str, Any] = {name.removeprefix(_PREFIX): entry for name, entry in read_header(source).items()}
    renamed["__metadata__"] = {"format": "pt"}
    with source.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        text = json.dumps(renamed, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data stays aligned
        with target.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(file, out, 1 << 20)
