"""The kernels of the extra `gpu`, run on a CPU by Triton's interpreter (make test-kernels)."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.kernels


def test_the_fused_head_of_the_library_weighs_each_token_by_its_own_gradient() -> None:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 16, generator=generator, dtype=torch.float32) for n in (5, 40))
    target, gradient = torch.arange(5) * 7, torch.randn(5, generator=generator)
    found = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if fused:
            loss = LigerFusedLinearCrossEntropyFunction.apply(h, w, target, None, None, -100, 0.0, 0.0, "none")[0]
        else:
            loss = torch.nn.functional.cross_entropy(h @ w.T, target, reduction="none")
        (loss * gradient).sum().backward()
        assert h.grad is not None
        assert w.grad is not None
        found.append((loss.detach(), h.grad, w.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
