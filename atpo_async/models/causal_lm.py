"""What a model folder holds, how transformers loads it, and under which names weights are published.

Learner and engines open a folder through this module, so they agree on it.  Weights are published under the names and
shapes of the folder's own files: transformers may hold them otherwise (the experts of a layer fused into one tensor).

torch and transformers are imported when a function is called: ``import atpo_async`` needs neither.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async.core.dtypes import FILE_DTYPES
from atpo_async.core.errors import SetupError
from atpo_async.models.tensor_files import counting_files, read_headers

log = logging.getLogger("atpo.models")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder, as far as configuration and headers tell."""

    folder: Path
    skeleton: Any
    """The transformers model on the meta device, loaded from tensors without content."""
    shapes: Mapping[str, tuple[int, ...]]
    """Published name -> shape of every floating tensor that the files hold and the model takes up."""
    ignored: tuple[str, ...]
    """Tensors of the files that the model has no place for, but for those that transformers knows to be idle."""

    @property
    def is_converted(self) -> bool:
        """Whether transformers holds tensors otherwise than the files do."""
        return bool(getattr(self.skeleton, "_weight_conversions", None))


def examine(folder: Path) -> Checkpoint:
    """Read configuration and headers, and try on tensors without content what loading would do.

    Raises:
        SetupError: a file is missing or damaged; the configuration is none of a causal language model, or of a
            quantised one; a tensor is missing or has another shape; the model's tensors cannot be published under the
            files' names.
    """
    import torch

    headers = read_headers(folder)
    empty = _skeleton(folder)
    tensors = {
        name: torch.empty(entry["shape"], dtype=torch_dtype(FILE_DTYPES.get(entry["dtype"], "float32")), device="meta")
        for name, entry in headers.items()
    }
    kind = type(empty).__name__
    try:
        with _quiet():
            skeleton, found = type(empty).from_pretrained(
                None, config=empty.config, state_dict=dict(tensors), device_map="meta", ignore_mismatched_sizes=True,
                output_loading_info=True,
            )  # fmt: skip
    except (ValueError, KeyError, RuntimeError) as exc:
        raise SetupError(
            f"model.path = {str(folder)!r}: its tensors do not make a {kind}: {_first_sentence(exc)}"
        ) from exc
    if missing := sorted(found["missing_keys"]):
        raise SetupError(
            f"model.path = {str(folder)!r}: {missing[0]} of {kind} is missing from its files ({len(missing)} of "
            f"{len(empty.state_dict())} tensors are; none is made up); save or fetch the model whole"
        )
    if wrong := sorted(found["mismatched_keys"]):
        name, there, wanted = wrong[0]
        raise SetupError(
            f"model.path = {str(folder)!r}: {name} has shape {tuple(there)}, config.json wants {tuple(wanted)} "
            f"({len(wrong)} tensors differ); the files and config.json are of two models"
        )
    ignored = tuple(sorted(found["unexpected_keys"]))
    return Checkpoint(folder, skeleton, _published_shapes(folder, skeleton, tensors), ignored)


def _skeleton(folder: Path) -> Any:
    """A model of the folder's configuration on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if (quantised := getattr(config, "quantization_config", None)) is not None:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise SetupError(
                f"model.path = {str(folder)!r} is quantised ({method}); weights are trained and published as floating "
                "numbers: give the model it was made from"
            )
        with torch.device("meta"), _quiet():
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as exc:
        raise SetupError(
            f"model.path = {str(folder)!r} holds no causal language model that transformers can build: "
            f"{_first_sentence(exc)}"
        ) from exc


def _published_shapes(folder: Path, skeleton: Any, tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    held = skeleton.state_dict()
    tied = {*skeleton.all_tied_weights_keys, *skeleton.all_tied_weights_keys.values()}
    aliases = set(published(skeleton, {name: tensor for name, tensor in held.items() if name in tied}))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in published(skeleton, held).items():
        there = tensors.get(name)
        if there is None and name in aliases:
            continue
        if there is None or there.shape != tensor.shape:
            what = "no such tensor" if there is None else f"shape {tuple(there.shape)}"
            raise SetupError(
                f"model.path = {str(folder)!r}: {type(skeleton).__name__} holds its tensors otherwise than the files "
                f"do, and transformers does not give {name} back as it was: shape {tuple(tensor.shape)}, in the files "
                f"{what}; engines could not take up what is published"
            )
        if tensor.is_floating_point():
            shapes[name] = tuple(tensor.shape)
    return shapes


def load(folder: Path, **options: Any) -> tuple[Any, Checkpoint]:
    """The transformers model of a folder.  Tensors that it has no place for are named in a warning.

    Args:
        folder: of the model.
        options: of ``from_pretrained``.

    Raises:
        SetupError: as ``examine``; or its files differ where its configuration ties tensors.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    checkpoint = examine(folder)
    if checkpoint.ignored:
        log.warning(
            "%d tensors in %s are not part of %s and stay unused: %s",
            len(checkpoint.ignored),
            folder,
            type(checkpoint.skeleton).__name__,
            ", ".join(checkpoint.ignored[:4]),
        )
    try:
        with counting_files(folder) as counting, _quiet():
            model = AutoModelForCausalLM.from_pretrained(counting, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as exc:
        raise SetupError(
            f"model.path = {str(folder)!r} holds no causal language model that transformers can load: "
            f"{_first_sentence(exc)}"
        ) from exc
    model.config._name_or_path = str(folder)
    for name, other in checkpoint.skeleton.all_tied_weights_keys.items():
        if model.get_parameter(name) is not model.get_parameter(other):
            raise SetupError(
                f"model.path = {str(folder)!r}: config.json ties {name} to {other}, but the files hold both with "
                'different values; set "tie_word_embeddings": false there, or remove one of them'
            )
    return model, checkpoint


def published(model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by the model's own names -> by the names, and in the shapes, of the files it was loaded from."""
    if not getattr(model, "_weight_conversions", None):
        return dict(tensors)
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Any] = revert_weight_conversion(model, dict(tensors))
    return found


def taken_up(model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The other way: published tensors -> by the model's own names, in its own shapes.

    Raises ValueError naming a tensor that is missing or has another shape.
    """
    if not getattr(model, "_weight_conversions", None):
        return dict(tensors)
    with _quiet():
        other, found = type(model).from_pretrained(
            None, config=model.config, state_dict=dict(tensors), dtype=model.dtype, ignore_mismatched_sizes=True,
            output_loading_info=True,
        )  # fmt: skip
    if wrong := sorted(found["missing_keys"]) or sorted(name for name, *_ in found["mismatched_keys"]):
        raise ValueError(f"tensor {wrong[0]} is missing, or has another shape")
    own: dict[str, Any] = other.state_dict()
    return own


def torch_dtype(name: str) -> Any:
    """torch's object of a number format: of ``bfloat16``, ``torch.bfloat16``."""
    import torch

    return getattr(torch, name)


@contextlib.contextmanager
def in_one_thread() -> Iterator[None]:
    """torch's operations of the calling thread run in that thread alone meanwhile.

    For copies of a model tensor by tensor: one thread has most of the memory's speed, and on a busy machine the pool
    waits at the end of each of some hundred tensors until the system has run all of its threads.  Measured on two busy
    cores for 1.2 GB in 311 tensors: 0.2 s in one thread, 1.3 to 3.6 s in two.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What transformers would report is reported here, in the words of this program, and once."""
    from transformers.utils import logging as reports

    before = reports.get_verbosity()
    reports.set_verbosity_error()
    try:
        yield
    finally:
        reports.set_verbosity(before)


def _first_sentence(exc: BaseException) -> str:
    line = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
    return line.split(". ")[0]
