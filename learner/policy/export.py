"""The trained policy as a Hugging Face folder: the precision of each tensor, and which files come from the source.

Weights and configuration come from the model; everything else (tokenizer, generation settings, templates, code) is the
source's file as it lies there: transformers loads files that it then refuses to write.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from atpo_async.core.dtypes import PRECISION_BYTES, PRECISION_IN_FILES
from atpo_async.models.adapters import PREFIX, Adapters
from atpo_async.models.adapters import WEIGHTS as ADAPTER_WEIGHTS
from atpo_async.models.causal_lm import torch_dtype
from atpo_async.models.tensor_files import read_header
from learner.policy.lora import Lora
from learner.policy.model import Policy

GENERATION = "generation_config.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack")
"""Files of the source that are not taken over: the trained ones stand for them."""


@dataclass(frozen=True, slots=True)
class Precision:
    """The precision that tensors are written in."""

    usual: torch.dtype
    own: dict[str, torch.dtype]
    """Name in the source's files -> its precision there, of those that differ from the usual one."""
    why: str

    @property
    def name(self) -> str:
        """``bfloat16``."""
        return str(self.usual).removeprefix("torch.")

    def of(self, name: str, tensor: Tensor) -> torch.dtype:
        return self.own.get(name, self.usual) if tensor.is_floating_point() else tensor.dtype


def precision(source: Path, wanted: str) -> Precision:
    """The precision of an export of a policy that began as ``source``.

    Args:
        source: model folder.
        wanted: ``learner.export_dtype``: ``source``, or the name of a precision.
    """
    if wanted != "source":
        return Precision(torch_dtype(wanted), {}, f"learner.export_dtype = {wanted!r}")
    found: dict[str, torch.dtype] = {}
    weight: Counter[torch.dtype] = Counter()
    for file in sorted(source.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            if entry["dtype"] in PRECISION_IN_FILES:
                dtype = torch_dtype(PRECISION_IN_FILES[entry["dtype"]])
                found[name] = dtype
                weight[dtype] += entry["data_offsets"][1] - entry["data_offsets"][0]
    declared = _declared(source)
    if declared is not None:
        # A folder put together from a checkpoint holds float32 and records the precision that it began with.
        stored = weight.most_common(1)[0][0] if weight else declared
        own = {name: dtype for name, dtype in found.items() if dtype != declared} if stored == declared else {}
        return Precision(declared, own, "as the folder that the run began with")
    if weight:
        usual = weight.most_common(1)[0][0]
        own = {name: dtype for name, dtype in found.items() if dtype != usual}
        return Precision(usual, own, "as the files that the run began with")
    return Precision(torch.float32, {}, "the source does not record its precision")


def _declared(source: Path) -> torch.dtype | None:
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        said = str(config.get("dtype") or config.get("torch_dtype"))
        return torch_dtype(said) if said in PRECISION_BYTES else None
    except (OSError, ValueError, AttributeError):
        return None


def export_model(policy: Policy, tensors: dict[str, Tensor], source: Path, target: Path, form: Precision) -> None:
    """Write an ordinary Hugging Face folder: weights and config, and what ``source`` has besides (tokenizer, …).

    ``target`` has its old content or the new one, but for the moment between two renames; where writing fails nothing
    new is left.

    Raises:
        OSError, SafetensorError: a file system refuses.
        ValueError: transformers refuses to write what it has loaded.
    """
    _replace(target, lambda aside: write_model(policy, tensors, source, aside, form))


def export_adapter(lora: Lora, adapters: Adapters, target: Path, *, base: str) -> None:
    """Write adapters as a folder that peft loads over the model folder ``base``, in float32; replaced as a model is.

    Raises OSError, SafetensorError: a file system refuses.
    """

    def write(aside: Path) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        lora.write_settings(aside, base=base)
        tensors = {f"{PREFIX}{name}": tensor.cpu().contiguous() for name, tensor in adapters.tensors.items()}
        save_file(tensors, aside / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    _replace(target, write)


def _replace(target: Path, write: Callable[[Path], None]) -> None:
    aside = target.with_name(f".{target.name}.writing")
    try:
        write(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def write_model(policy: Policy, tensors: dict[str, Tensor], source: Path, folder: Path, form: Precision) -> None:
    """``export_model`` into a new folder that no other process uses."""
    shutil.rmtree(folder, ignore_errors=True)
    with _generation_config_apart(policy.hf, source):
        policy.hf.save_pretrained(folder, state_dict=_converted(tensors, form))
    _say_precision(folder / "config.json", form)
    for file in source.iterdir():
        weights = file.suffix in WEIGHTS or ".index." in file.name
        there = (folder / file.name).exists() and file.name != GENERATION
        if file.is_file() and not weights and not there and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)


def _converted(tensors: dict[str, Tensor], form: Precision) -> dict[str, Tensor]:
    """In the export's precision; tied tensors stay one, which is how transformers finds them."""
    made: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        dtype = form.of(name, tensor)
        key = (tensor.data_ptr(), tensor.shape, dtype)
        if key not in made:
            made[key] = tensor.detach().to(dtype)
        found[name] = made[key]
    return found


@contextmanager
def _generation_config_apart(hf: Any, source: Path) -> Iterator[None]:
    """transformers checks generation settings harder when it writes them than when it loads them; training changes none
    of them, so the source's file is taken over as it is."""
    if not (source / GENERATION).is_file():
        yield
        return
    own, hf.generation_config = hf.generation_config, GenerationConfig()
    try:
        yield
    finally:
        hf.generation_config = own


def _say_precision(config: Path, form: Precision) -> None:
    data = json.loads(config.read_text(encoding="utf-8"))
    data["dtype"] = form.name
    if "torch_dtype" in data:
        data["torch_dtype"] = form.name
    config.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
