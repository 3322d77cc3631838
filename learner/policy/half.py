"""A policy in bfloat16 beside its float32 weights, which it is cast from once an optimizer step.

Autocast casts every weight in every pass, and computes norms and residuals in float32.  Here the whole pass is in
bfloat16, as an engine computes it; inside norms, softmax and rotary positions, and from the logits on, it is float32.
Gradients leave the passes in bfloat16 and are summed in float32 on the policy's own parameters, which the optimizer
steps, checkpoints hold and engines get.

It takes 2 bytes a parameter, which autocast takes too while a pass lasts, and of gradients no more than one layer's.
Sharded parameters have FSDP's own cast instead, and fp16 stays with autocast: the residuals of large models do not fit
in it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atpo_async.config import Config
from learner.packing import attention
from learner.policy import frozen
from learner.policy.model import Policy

DTYPE = torch.bfloat16
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {kind: plain for plain, kind in frozen.KINDS.items()}
REDUCED_AT_ONCE = 1 << 26
"""Numbers of a gradient that ranks exchange in one message (256 MB)."""


def is_for(config: Config, policy: Policy, sharded: bool) -> bool:
    """Whether a run's passes go through such a copy."""
    dtype = next(policy.parameters()).dtype
    return config.learner.mixed_precision == "bf16" and not sharded and dtype in (torch.float32, DTYPE)


class HalfPolicy:
    """Computes what the policy does, in bfloat16.

    Args:
        policy: on its device; parameters that are in bfloat16 already are shared with it.
        trains: let its gradients come to the policy's parameters; else it stays as the policy is now.
    """

    def __init__(self, policy: Policy, *, trains: bool) -> None:
        self._own: list[Tensor] = []
        self._half: list[Tensor] = []
        made: dict[int, Any] = {}
        for parameter in policy.parameters():
            made[id(parameter)] = self._cast(parameter, trains=trains)
        # The modules anew, with other parameters in the places of the policy's: tied ones stay tied.
        self.policy: Policy = copy.deepcopy(policy, made)
        for module in self.policy.modules():
            if type(module) in _PLAIN:  # made for passes in a higher precision than their weights'
                module.__class__ = _PLAIN[type(module)]
        _keep_positions_exact(self.policy.hf)
        self._device = next(policy.parameters()).device.type
        self.is_stale = False
        """The policy's weights have changed since they were cast."""

    def _cast(self, parameter: nn.Parameter, *, trains: bool) -> nn.Parameter:
        needs_grad = trains and parameter.requires_grad
        if parameter.dtype != torch.float32:
            return parameter if trains else nn.Parameter(parameter.detach().clone(), requires_grad=False)
        half = nn.Parameter(parameter.detach().to(DTYPE), requires_grad=needs_grad)
        if trains:
            self._own.append(parameter)
            self._half.append(half)
        if needs_grad:
            half.register_post_accumulate_grad_hook(partial(_hand_over, parameter))  # type: ignore[no-untyped-call]
        return half

    def __call__(self, *arguments: Any, **inputs: Any) -> Tensor:
        """As ``Policy.forward``."""
        if self.is_stale:
            with torch.no_grad():
                torch._foreach_copy_(self._half, self._own)
            self.is_stale = False
        with torch.autocast(self._device, enabled=False):
            found: Tensor = self.policy(*arguments, **inputs)
        return found

    def begin_alike(self, *, num_ranks: int) -> None:
        """Give every rank the first one's weights, as data parallelism does."""
        if num_ranks == 1:
            return
        with torch.no_grad():
            for parameter in self._own:
                dist.broadcast(parameter.data, 0)
        self.is_stale = True

    def sum_over_ranks(self) -> None:
        """Sum the gradients of all ranks, on each of them: once an optimizer step, in float32."""
        trained = [p for p in self._own if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # a rank without rows takes part all the same
                parameter.grad = torch.zeros_like(parameter)
        for group in _grouped([p.grad for p in trained if p.grad is not None]):
            flat = torch.cat([grad.reshape(-1) for grad in group])
            dist.all_reduce(flat)
            parts = torch.split(flat, [grad.numel() for grad in group])
            torch._foreach_copy_(group, [part.view_as(grad) for part, grad in zip(parts, group, strict=True)])


def _hand_over(own: Tensor, half: Tensor) -> None:
    """A gradient just finished, from the copy to the policy's parameter."""
    grad, half.grad = half.grad, None
    if grad is None:
        return
    if own.grad is None:
        own.grad = grad.to(own.dtype)
    else:
        own.grad.add_(grad)


def _grouped(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """In order, as many at once as ``REDUCED_AT_ONCE`` allows; a larger one alone."""
    group: list[Tensor] = []
    size = 0
    for grad in grads:
        if group and size + grad.numel() > REDUCED_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(grad)
        size += grad.numel()
    if group:
        yield group


def _keep_positions_exact(hf: Any) -> None:
    """Let rotary tables come in float32, as under autocast, where the attention puts up with it."""
    if hf.config._attn_implementation != attention.NAME:
        return
    for module in hf.modules():
        if isinstance(getattr(module, "inv_freq", None), Tensor):
            module.register_forward_pre_hook(_as_if_in_float32)


def _as_if_in_float32(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    # It reads no more than the device and the precision of its first argument, the hidden states.
    return (arguments[0][..., :1].float(), *arguments[1:])
