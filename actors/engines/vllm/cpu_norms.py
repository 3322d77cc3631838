"""vLLM's own C++ RMS norms as an implementation of its norm operators on a CPU.

vLLM 0.32 registers these kernels for GPUs only, and spends six small torch operators on each norm of a CPU model
instead: 8 % of a small model's step.  Registered through vLLM's operator registry by ``actors.engines.vllm.plugin``.
"""

from __future__ import annotations

import torch
from vllm import ir
from vllm.platforms import current_platform


def _has(operator: str) -> bool:
    return bool(current_platform.is_cpu()) and hasattr(torch.ops._C, operator)


def _plain(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype


def _plain_fused(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    # The kernel works in place on rows without gaps.
    return _plain(x, weight, epsilon, variance_size) and x.is_contiguous() and x_residual.is_contiguous()


def register_norms(provider: str) -> None:
    """Idempotent.  They are used where ``ir_op_priority`` names ``provider``."""
    current_platform.import_kernels()
    if provider in ir.ops.rms_norm.impls:
        return

    @ir.ops.rms_norm.register_impl(provider, supports_args=_plain, supported=_has("rms_norm"))  # type: ignore[untyped-decorator]
    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> torch.Tensor:
        x = x.contiguous()
        output = torch.empty_like(x)
        torch.ops._C.rms_norm(output, x, weight, epsilon)
        return output

    @ir.ops.fused_add_rms_norm.register_impl(  # type: ignore[untyped-decorator]
        provider, supports_args=_plain_fused, supported=_has("fused_add_rms_norm"), inplace=True
    )
    def fused_add_rms_norm(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual
