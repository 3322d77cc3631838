"""Liger-Kernel's functions (BSD-2), loaded when they are first needed, and whether they can run here."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WAY_OUT = "pip install 'atpo-async[gpu]'"
INTERPRETER = "TRITON_INTERPRET"
"""With this variable at 1 Triton runs its kernels on a CPU, line by line: for tests."""


def missing() -> list[str]:
    """Packages that it takes and that are not installed."""
    found = {"liger-kernel": "liger_kernel", "triton": "triton"}
    return [package for package, module in found.items() if importlib.util.find_spec(module) is None]


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on a device in a precision; None where they can."""
    if dtype == torch.float64:
        return "the policy is in float64, which the kernels do not have"
    if device.type != "cuda" and os.environ.get(INTERPRETER) != "1":
        return f"the learner is on a {device.type.upper()}, and the kernels are for CUDA"
    if absent := missing():
        return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed ({WAY_OUT})"
    try:
        functions()
    except Exception as exc:
        return f"liger-kernel does not load ({type(exc).__name__}: {exc})"
    return None


@dataclass(frozen=True, slots=True)
class Functions:
    """The library's autograd functions."""

    _norm: Any
    _rotary: Any
    _silu_product: Any

    def norm(self, hidden: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        """RMSNorm in the dtype of ``hidden``; with an offset, (1 + w), as Gemma does it: all of it in float32."""
        # Never in place of its gradient: what follows a norm may be a residual, which shares that tensor.
        result: Tensor = self._norm(hidden, weight, eps, offset, "gemma" if offset else "llama", False, None)
        return result

    def rotary(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding, float[B, H, T, D] with float[B or 1, T, D]; it may overwrite ``query`` and ``key``."""
        result: tuple[Tensor, Tensor] = self._rotary(query, key, cos, sin)
        return result

    def silu_product(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up; the backward pass overwrites both, which nothing else may have kept."""
        result: Tensor = self._silu_product(gate, up)
        return result


@functools.cache
def functions() -> Functions:
    """The library's.  Raises ImportError where it is not installed."""
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    return Functions(LigerRMSNormFunction.apply, LigerRopeFunction.apply, LigerSiLUMulFunction.apply)
