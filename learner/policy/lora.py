"""Low-rank adapters on the policy: peft's layers trained alone, merged for engines and export, switched off for the
reference.

Names: of a layer, of a tensor "in the model" are those of the model without adapters.  peft is imported when there are
adapters only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atpo_async.config import Config, LoraConfig
from atpo_async.config.sections.learning import ALL_LINEAR
from atpo_async.core.errors import SetupError
from atpo_async.core.vocabulary import Precision
from atpo_async.models import adapters, causal_lm
from learner.policy.frozen import hold_in_half

log = logging.getLogger("atpo.learner")

ADAPTER = "default"
"""peft's name for it: part of its parameters' names."""

_SHOWN = 12


class Lora:
    """The adapters of one model.

    Args:
        layers: peft's layers, by their names in the model.
        settings: they were made by.
        engine: precision that engines hold merged weights in.
        digest: of the weights under them.
    """

    def __init__(self, layers: Mapping[str, Any], settings: LoraConfig, *, engine: Precision, digest: str) -> None:
        self.layers, self.settings, self.digest = layers, settings, digest
        self._engine: torch.dtype = causal_lm.torch_dtype(engine)
        self.scale = adapters.scale_of(rank=settings.rank, alpha=settings.alpha, rslora=settings.rslora)

    def split(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], adapters.Adapters]:
        """A state dict -> the model's own tensors by their names in the model, and the adapters."""
        own: dict[str, Tensor] = {}
        pairs: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if name.endswith(f".{ADAPTER}.weight") and (".lora_A." in name or ".lora_B." in name):
                pairs[name.replace(f".{ADAPTER}.", ".")] = tensor
            else:
                own[name.replace(".base_layer.", ".")] = tensor
        return own, adapters.Adapters(scale=self.scale, tensors=pairs)

    def for_engines(self, own: Mapping[str, Tensor], pairs: adapters.Adapters) -> Mapping[str, Tensor]:
        """What is published: the model's tensors with their adapters merged in, or the adapters alone, in float32,
        where actors merge (``learner.lora.publish``)."""
        if self.travels_alone:
            return {name: tensor.detach() for name, tensor in pairs.tensors.items()}
        return Merged(own, pairs)

    @property
    def travels_alone(self) -> bool:
        """Whether actors get adapters, and merge them."""
        return self.settings.publish == "adapter"

    def _rounded(self, whole: Tensor) -> Tensor:
        return whole if whole.dtype == torch.float64 else whole.to(self._engine)

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name, as an adapter folder has them without its prefix; the optimizer's, in its order."""
        return {
            f"{layer}.{part}.weight": getattr(module, part)[ADAPTER].weight
            for layer, module in self.layers.items()
            for part in ("lora_A", "lora_B")
        }

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Within, the model computes what it does without adapters.  No gradient: use it under ``torch.no_grad``."""
        # peft's own switch also stops the adapters' gradients, which data parallelism and compiled layers depend on.
        for module in self.layers.values():
            module._disable_adapters = True
        try:
            yield
        finally:
            for module in self.layers.values():
                module._disable_adapters = False

    def without(self, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``model``, which may be the policy in its wrappers, without its adapters: the policy of ``model.path``."""

        def answer(**inputs: Any) -> Tensor:
            with self.switched_off():
                return model(**inputs)

        return answer

    @contextlib.contextmanager
    def as_in_engines(self) -> Iterator[None]:
        """Within, each layer with an adapter computes with its merged weight, rounded as engines hold it; one layer's
        at a time, and the model is not changed."""
        for module in self.layers.values():
            module.forward = _MergedForward(module, self.scale, self._rounded)
        try:
            # Compiled layers hold the layers' own forward functions.
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for module in self.layers.values():
                del module.forward

    def said(self) -> dict[str, Any]:
        """What a checkpoint records: adapters of another shape, scale or model fit no other way."""
        return {"rank": self.settings.rank, "scale": self.scale, "layers": sorted(self.layers), "base": self.digest}

    def write_settings(self, folder: Path, *, base: str) -> None:
        """``adapter_config.json`` beside the adapters' tensors, as peft writes it.  Raises OSError."""
        if Path(base).is_dir():
            base = str(Path(base).resolve())  # found from whatever folder it is read in
        peft_settings(self.settings, _named_briefly(self.layers, self.settings), base=base).save_pretrained(folder)

    def __str__(self) -> str:
        kinds = sorted({name.rpartition(".")[2] for name in self.layers})
        return f"adapters of rank {self.settings.rank} on {len(self.layers)} layers ({', '.join(kinds[:_SHOWN])})"


class Merged(Mapping[str, Tensor]):
    """A model's tensors, each merged with its adapter when it is asked for: no second model lies in memory.

    Args:
        own: the model's, by the names of its files.
        pairs: must not change before the last tensor was taken.
    """

    def __init__(self, own: Mapping[str, Tensor], pairs: adapters.Adapters) -> None:
        self._own, self._pairs = own, pairs
        self._merged = {f"{layer}.weight" for layer in pairs.layers}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._pairs.whole(name, self._own[name])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    def forms(self) -> dict[str, Tensor]:
        """The same without merging: of merged tensors only the form (on the meta device), so that none seems to lie
        where an earlier one lay."""
        return {name: tensor.to("meta") if name in self._merged else tensor for name, tensor in self._own.items()}


class _MergedForward:
    """A linear layer with an adapter as one matrix."""

    def __init__(self, layer: Any, scale: float, rounded: Callable[[Tensor], Tensor]) -> None:
        self._layer, self._scale, self._rounded = layer, scale, rounded

    def __call__(self, x: Tensor) -> Tensor:
        layer, base = self._layer, self._layer.base_layer
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        whole = self._rounded(adapters.merge(base.weight, a, b, self._scale))
        return nn.functional.linear(x, whole.to(x.dtype), None if base.bias is None else base.bias.to(x.dtype))


def attach(hf: Any, config: Config, folder: Path) -> Lora | None:
    """Put adapters on a model in place, and freeze the rest of it; None where ``learner.lora.rank`` is 0.

    Adapters begin as peft's do, B at zero and A uniform, by ``run.seed`` and the layer's name alone; or as those of
    ``learner.lora.init``.

    Args:
        hf: the transformers model, in float32.
        config: the run's.
        folder: that the model was loaded from.

    Raises:
        SetupError: the settings do not fit the model, or the adapter folder does not fit them.
    """
    settings = config.learner.lora
    if not settings.rank:
        return None
    if adapters.is_adapter(folder) and settings.init is None:
        log.warning(
            "the adapter beside the model in %s stays unused; --learner.lora.init %s begins with it", folder, folder
        )
    names = chosen_layers(hf, settings)
    _check_names(hf, names)
    digest = _digest(hf, names)
    layers = _inject(hf, settings, names)
    lora = Lora(layers, settings, engine=config.model.dtype, digest=digest)
    _begin(lora, config.run.seed)
    # Shards are cast when they are gathered.
    if config.learner.mixed_precision == "bf16" and config.learner.accelerate_config is None:
        now, before = hold_in_half(hf)
        log.info(
            "frozen weights take %.2f GB (%.2f in float32): bfloat16 where that loses nothing",
            now / 2**30,
            before / 2**30,
        )
    return lora


def chosen_layers(hf: Any, settings: LoraConfig) -> list[str]:
    """The names of the layers that get an adapter, in the model's order.

    Raises SetupError naming a target that matches none, and what there is; or a layer smaller than the rank.
    """
    linear = _linear_layers(hf)
    chosen: set[str] = set()
    for target in settings.targets:
        found = set(linear) if target == ALL_LINEAR else {name for name in linear if _ends_in(name, target)}
        if not found:
            raise SetupError(_no_match(hf, target, linear))
        chosen |= found
    for name in (name for name in linear if name in chosen):
        least = min(linear[name].weight.shape)
        if settings.rank > least:
            raise SetupError(
                f"learner.lora.rank = {settings.rank} is above the smaller side of {name}, "
                f"{tuple(linear[name].weight.shape)}, the highest that an adapter of it can have; lower it, or leave "
                "that layer out of learner.lora.targets"
            )
    return [name for name in linear if name in chosen]


def _linear_layers(hf: Any) -> dict[str, nn.Linear]:
    """All but the output head, which stays one matrix, as its embeddings may be the same one."""
    head = hf.get_output_embeddings()
    return {name: module for name, module in hf.named_modules() if isinstance(module, nn.Linear) and module is not head}


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _no_match(hf: Any, target: str, linear: Mapping[str, nn.Linear]) -> str:
    there = ", ".join(sorted({name.rpartition(".")[2] for name in linear})[:_SHOWN]) or "none"
    others = [(name, type(module).__name__) for name, module in hf.named_modules() if _ends_in(name, target)]
    tensors = [name for name, _ in hf.named_parameters() if _ends_in(name, target)]
    what = "matches no layer"
    if others:
        head = " and the output head" if hf.get_output_embeddings() is hf.get_submodule(others[0][0]) else ""
        what = f"matches {others[0][0]}{head}, a {others[0][1]}, which gets no adapter"
    elif tensors:
        what = f"matches {tensors[0]}, a tensor of several layers (experts) in one, which gets no adapter"
    return (
        f"learner.lora.targets: {target!r} {what} of {type(hf).__name__}; linear layers that can have one: {there}; or "
        f"{ALL_LINEAR} for all of them"
    )


def _check_names(hf: Any, names: list[str]) -> None:
    """Raises SetupError for a layer that the model's files hold otherwise than transformers does."""
    weights = {f"{name}.weight": hf.get_parameter(f"{name}.weight").to("meta") for name in names}
    published = causal_lm.published(hf, weights)
    if odd := [name for name in weights if name not in published or published[name].shape != weights[name].shape]:
        raise SetupError(
            f"learner.lora.targets: {odd[0]} is held otherwise in the model's files than by transformers "
            f"({type(hf).__name__}), so no adapter of it could be merged there; leave that layer out"
        )


def peft_settings(settings: LoraConfig, targets: list[str], *, base: str | None = None) -> Any:
    """peft's ``LoraConfig``."""
    import peft

    alpha: Any = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=alpha,
        use_rslora=settings.rslora,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=False,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )


def _named_briefly(layers: Mapping[str, Any], settings: LoraConfig) -> list[str]:
    """Targets that choose these layers and no others: ends of names, as readers of adapter folders expect."""
    if ALL_LINEAR not in settings.targets:
        return list(settings.targets)
    return sorted({name.rpartition(".")[2] for name in layers})


def _inject(hf: Any, settings: LoraConfig, names: list[str]) -> dict[str, Any]:
    """Raises SetupError where peft refuses, or does anything but put an adapter on each of these layers."""
    try:
        import peft
        from peft.tuners.lora import Linear
    except ImportError as exc:
        raise SetupError(
            f"learner.lora.rank = {settings.rank} needs peft, which cannot be loaded ({exc}): pip install peft, or "
            "train all weights with --learner.lora.rank 0"
        ) from exc

    with torch.random.fork_rng(devices=[]):  # the adapters get numbers of their own
        try:
            peft.inject_adapter_in_model(peft_settings(settings, names), hf, adapter_name=ADAPTER)
        except (ValueError, NotImplementedError, RuntimeError) as exc:
            raise SetupError(f"learner.lora: peft puts no adapters on {type(hf).__name__}: {exc}") from exc
    layers = {name: module for name, module in hf.named_modules() if isinstance(module, Linear)}
    for module in layers.values():
        # Adapters compute in the precision of their layer, autocast's or their own: without two more copies of inputs.
        module.cast_input_dtype_enabled = False
    trained = {name for name, p in hf.named_parameters() if p.requires_grad}
    expected = {f"{name}.lora_{part}.{ADAPTER}.weight" for name in names for part in "AB"}
    if list(layers) != names or trained != expected:
        odd = sorted(set(names) ^ set(layers)) or sorted(trained ^ expected)
        raise SetupError(
            f"learner.lora: peft treats {odd[0]} of {type(hf).__name__} otherwise than as one linear layer; leave it "
            "out of learner.lora.targets"
        )
    return layers


def _begin(lora: Lora, seed: int) -> None:
    """The adapters' first values: the same on every rank and at every start."""
    path = lora.settings.init
    given = None if path is None else _initial(Path(path), lora)
    with torch.no_grad():
        for name, parameter in lora.parameters().items():
            if given is not None:
                parameter.copy_(given.tensors[name])
            elif name.endswith(adapters.A):
                number = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")
                nn.init.kaiming_uniform_(parameter, a=5**0.5, generator=torch.Generator().manual_seed(number))
            else:
                parameter.zero_()


def _initial(folder: Path, lora: Lora) -> adapters.Adapters:
    """The adapters of ``learner.lora.init``.  Raises SetupError where they are of other layers, rank or scale."""
    if not adapters.is_adapter(folder):
        raise SetupError(f"learner.lora.init = {str(folder)!r}: no adapter folder (no {adapters.CONFIG}) there")
    given, own = adapters.read(folder), lora.parameters()
    odd = sorted(given.tensors.keys() ^ own.keys())
    odd = odd or [name for name, tensor in given.tensors.items() if tensor.shape != own[name].shape]
    if odd or abs(given.scale - lora.scale) > 1e-9 * lora.scale:
        what = (
            f"{odd[0]} is not the same in both" if odd else f"its scale is {given.scale:g}, here it is {lora.scale:g}"
        )
        raise SetupError(
            f"learner.lora.init = {str(folder)!r} does not fit rank {lora.settings.rank}, alpha "
            f"{lora.settings.alpha:g} and targets {', '.join(lora.settings.targets)} of [learner.lora]: {what}; set "
            f"them as its {adapters.CONFIG} has them"
        )
    if broken := [name for name, tensor in given.tensors.items() if not bool(tensor.isfinite().all())]:
        raise SetupError(
            f"learner.lora.init = {str(folder)!r}: {broken[0]} holds numbers that are not finite ({len(broken)} of "
            f"{len(given.tensors)} tensors do); begin with another adapter"
        )
    return given


def _digest(hf: Any, names: list[str]) -> str:
    """Of the weights under the adapters: of the beginning of each, in bfloat16, in which some may be held."""
    found = hashlib.blake2b(digest_size=16)
    for name in names:
        weight = hf.get_parameter(f"{name}.weight").detach().reshape(-1)[:256]
        found.update(name.encode() + weight.to(torch.bfloat16).view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()
