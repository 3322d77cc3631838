"""The operations of a transformers model that a kernel can take over, and how each is recognised and checked.

An instance gets another class, a subclass of its own made here: parameters, names, hooks and copies stay what they
were, and other models in the process are untouched.  A kind takes over a module only if the module computes what the
kernel does; that is tried on a small input, forward and backward, before the class is changed.

Shapes: B rows, T tokens, H heads, D channels of a head.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from learner.kernels.liger import Functions

ROTARY = "apply_rotary_pos_emb"
"""The function of transformers' attention classes that takes query, key, cosines and sines."""

MARK = "_atpo_kernel"
"""Attribute of the classes made here."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.004}
"""Of a number, as a share of the largest one beside it, or of 1."""

ROWS_IN_BLOCKS = 4096 * 8
"""From this many rows on the library takes another kernel for narrow norms."""


class Kind:
    """One kind of operation; ``takes`` says whether a module is of it, by its attributes."""

    name: str

    def __init__(self, functions: Functions) -> None:
        self.functions = functions

    def takes(self, module: nn.Module) -> bool:
        raise NotImplementedError

    def key(self, module: nn.Module) -> tuple[Any, ...]:
        """Modules with the same key get the same class, and are checked once."""
        return (type(module),)

    def made(self, module: nn.Module) -> type[nn.Module]:
        """The class that the module gets."""
        raise NotImplementedError

    def fault(self, module: nn.Module, device: torch.device, dtypes: Sequence[torch.dtype], model: Any) -> str | None:
        """What the kernel does that the module does not, tried on a device; None where they agree."""
        raise NotImplementedError


class Norms(Kind):
    """RMSNorm, those of queries and keys too: x / rms(x) * w, or * (1 + w)."""

    name = "RMSNorm"

    def takes(self, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return (
            type(module).__name__.endswith("RMSNorm")
            and isinstance(weight, nn.Parameter)
            and weight.dim() == 1
            and [name for name, _ in module.named_parameters()] == ["weight"]
            and not list(module.buffers())
            and _eps(module) is not None
        )

    def key(self, module: nn.Module) -> tuple[Any, ...]:
        return (type(module), _eps(module), len(_weight(module)))

    def made(self, module: nn.Module) -> type[nn.Module]:
        cls: Any = type(module)
        return _norm_class(cls, self.functions, float(_eps(module) or 0.0), _offset(module))

    def fault(self, module: nn.Module, device: torch.device, dtypes: Sequence[torch.dtype], model: Any) -> str | None:
        width = len(_weight(module))
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(width, generator=generator)
        for rows in [5] if device.type != "cuda" else [5, ROWS_IN_BLOCKS + 3]:
            inputs = torch.randn(rows, width, generator=generator)
            inputs[0] *= 1e-3  # so small that the epsilon counts
            for dtype in dtypes:
                small = _with(module, parameters={"weight": weight.to(device, dtype)})
                fault = _difference(small, _as(small, self.made(module)), [inputs.to(device, dtype)])
                if fault is not None:
                    return fault
        return None


class GatedUnits(Kind):
    """SwiGLU: down(silu(gate(x)) * up(x)); the projections stay the modules that they are (adapters included)."""

    name = "SwiGLU"

    def takes(self, module: nn.Module) -> bool:
        children = dict(module.named_children())
        activation = children.get("act_fn")
        return {"gate_proj", "up_proj", "down_proj"} <= children.keys() and (
            isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
        )

    def made(self, module: nn.Module) -> type[nn.Module]:
        cls: Any = type(module)
        return _gated_class(cls, self.functions)

    def fault(self, module: nn.Module, device: torch.device, dtypes: Sequence[torch.dtype], model: Any) -> str | None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(5, 40, generator=generator) * 3
        # No products of matrices, whose precision is another setting's.
        projections = {
            name: _Times(factor) for name, factor in (("gate_proj", 0.7), ("up_proj", 1.3), ("down_proj", 0.9))
        }
        small = _with(module, modules=projections)
        replaced = _as(small, self.made(module))
        return _first(_difference(small, replaced, [inputs.to(device, dtype)]) for dtype in dtypes)


class Rotary(Kind):
    """The rotary embedding of attention layers that call ``apply_rotary_pos_emb``."""

    name = "rotary embedding"

    def takes(self, module: nn.Module) -> bool:
        return _rotary_of(type(module)) is not None

    def made(self, module: nn.Module) -> type[nn.Module]:
        cls: Any = type(module)
        return _rotary_class(cls, self.functions)

    def fault(self, module: nn.Module, device: torch.device, dtypes: Sequence[torch.dtype], model: Any) -> str | None:
        original = _rotary_of(type(module))
        positions = next((m.rotary_emb for m in model.modules() if hasattr(m, "rotary_emb")), None)
        if original is None or positions is None:
            return "its model has no rotary_emb"
        generator = torch.Generator().manual_seed(0)
        # As the model makes them: half of each is a copy of the other half, or the kernel is not for it.
        here = next((buffer.device for buffer in positions.buffers()), torch.device("cpu"))
        try:
            cos, sin = positions(torch.zeros(1, 5, 1, device=here), torch.arange(5, device=here)[None] * 3)
        except Exception as exc:
            return f"its rotary_emb raises {type(exc).__name__}"
        # Heads lie as projections give them, so that the kernel overwrites what it is given, as it will.
        heads = [torch.randn(1, 5, count, cos.shape[-1], generator=generator).transpose(1, 2) for count in (3, 2)]
        replaced = _rotary_function(original, self.functions)
        return _first(
            _difference(original, replaced, [h.to(device, dtype) for h in heads], [cos.to(device), sin.to(device)])
            for dtype in dtypes
        )


# --- classes


@functools.cache
def _norm_class(cls: Any, functions: Functions, eps: float, offset: float) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return functions.norm(hidden_states, self.weight, eps, offset)

    return _subclass(cls, forward)


@functools.cache
def _gated_class(cls: Any, functions: Functions) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(functions.silu_product(self.gate_proj(x), self.up_proj(x)))
        return result

    return _subclass(cls, forward)


@functools.cache
def _rotary_class(cls: Any, functions: Functions) -> type[nn.Module]:
    """Its forward is the class's own, in which one name means another function."""
    own: Any = cls.forward
    names = {**own.__globals__, ROTARY: _rotary_function(own.__globals__[ROTARY], functions)}
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return _subclass(cls, functools.wraps(own)(forward))


def _subclass(cls: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    own = {"forward": forward, MARK: True, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(f"Fused{cls.__name__}", (cls,), own)


def is_replaced(module: nn.Module) -> bool:
    """Whether its class is one that a kind has made."""
    return hasattr(type(module), MARK)


def _rotary_function(original: Callable[..., Any], functions: Functions) -> Callable[..., Any]:
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or q.dim() != 4:
            return original(q, k, cos, sin, *rest, **named)
        return functions.rotary(q, k, cos, sin)

    return rotary


# --- what a module is


def _rotary_of(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """The function that an attention class's own forward calls by that name."""
    forward = cls.forward
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    found: Any = forward.__globals__.get(ROTARY)
    if not callable(found) or list(inspect.signature(found).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    function: Callable[..., Any] = found
    return function


def _eps(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _weight(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _offset(module: nn.Module) -> float:
    """What the module adds to its weight: with weights of zero it gives nothing, or the normalised input."""
    with torch.no_grad():
        width = len(_weight(module))
        return float(_with(module, parameters={"weight": torch.zeros(width)})(torch.ones(1, width)).any())


# --- the check


class _Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _with(
    module: nn.Module, *, parameters: dict[str, Tensor] | None = None, modules: Mapping[str, nn.Module] | None = None
) -> nn.Module:
    """A module of the same class and attributes with other parameters or children."""
    other = copy.copy(module)
    other._parameters = {name: nn.Parameter(value) for name, value in (parameters or {}).items()}
    other._modules = {**module._modules, **(modules or {})}
    return other


def _as(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    other = copy.copy(module)
    other.__class__ = cls
    return other


def _difference(
    original: Callable[..., Any], replaced: Callable[..., Any], inputs: list[Tensor], fixed: Sequence[Tensor] = ()
) -> str | None:
    """Where results or gradients differ by more than the precision of the inputs explains; None where they agree."""
    tolerance = TOLERANCE[inputs[0].dtype]
    try:
        pairs = list(zip(_results(original, inputs, fixed), _results(replaced, inputs, fixed), strict=True))
    except Exception as exc:
        return f"it raises {type(exc).__name__}: {str(exc).strip().splitlines()[0] if str(exc) else ''}"
    for number, (one, other) in enumerate(pairs):
        error = float(((one - other).abs() / one.abs().amax(-1, keepdim=True).clamp(min=1.0)).max())
        if not error <= tolerance:
            where = "result" if number < len(pairs) // 2 else "gradient"
            return f"its {where} in {str(inputs[0].dtype).removeprefix('torch.')} differs by {error:.2g}"
    return None


def _results(function: Callable[..., Any], inputs: list[Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
    """Results and gradients of inputs and parameters, in float32."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    weights = list(function.parameters()) if isinstance(function, nn.Module) else []
    with torch.enable_grad():
        # Not the leaves themselves: a kernel may overwrite what it is given.
        found = function(*(x * 1.0 for x in leaves), *(x.clone() for x in fixed))
        results = list(found) if isinstance(found, tuple) else [found]
        weighed = [r.float().flatten() @ torch.linspace(-1, 1, r.numel(), device=r.device) for r in results]
        gradients = torch.autograd.grad(torch.stack(weighed).sum(), [*leaves, *weights])
    return [x.detach().float() for x in (*results, *gradients)]


def _first(faults: Any) -> str | None:
    return next((fault for fault in faults if fault is not None), None)
