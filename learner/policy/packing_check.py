"""Whether a policy can score packed trees, found out by trying: its layout of a batch.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from learner.packing import attention
from learner.packing.attention import DeviceLayout
from learner.packing.rows import MicroBatch, Row, micro_batches
from learner.packing.tree import tree_micro_batches
from learner.policy import precision
from learner.policy.model import Policy

log = logging.getLogger("atpo.learner")


def layout_for(
    policy: Policy, config: Config, model: Callable[..., Tensor] | None = None
) -> tuple[Literal["tree", "flat"], str]:
    """The layout of this policy's batches, and why: ``learner.packing``, as far as the model supports it.

    A model can if a small forked tree gets the same log-probs packed as flat, on the device where the policy is.  The
    first way of attention that does so is the policy's from then on (``Policy.attention_way``).

    Args:
        policy: the policy.
        config: the run's.
        model: what trains, where that is not the policy's own arithmetic (half precision, sharded parameters); every
            rank then calls this.

    Raises:
        SetupError: ``learner.packing = "tree"`` and the model cannot.
    """
    if config.learner.packing == "flat":
        return "flat", "learner.packing = 'flat'"
    obstacle = attention.obstacle(policy.hf, max_tokens=config.model.max_context_tokens)
    if obstacle is None:
        obstacle = _packing_fault(policy, model, config.learner.mixed_precision)
    if obstacle is None:
        return "tree", "packed trees get the log-probs of flat rows"
    if config.learner.packing == "tree":
        raise SetupError(
            f"learner.packing = 'tree', but {type(policy.hf).__name__} in model.path = {config.model.path!r} cannot "
            f"score packed trees: {obstacle}; use --learner.packing flat"
        )
    return "flat", obstacle


PACKING_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Nats between packed and flat log-probs, by dtype of the parameters."""

WRAPPED_TOLERANCE = {"no": 1e-3, "bf16": 0.1, "fp16": 0.02}
"""The same of what trains in another precision than the parameters', by ``learner.mixed_precision``."""

OF_EFFECT = {"no": 0.02, "bf16": 0.25, "fp16": 0.25}
"""Of what wrong context changes, the part that is no fault: half precision alone moves log-probs by hundredths."""


def _packing_fault(policy: Policy, model: Callable[..., Tensor] | None, mixed_precision: str) -> str | None:
    """The fault when a small tree is scored packed; None where there is none."""
    flat, packed = (small_pass(policy, layout) for layout in ("flat", "tree"))
    assert packed.layout is not None
    device, dtype = next((p.device, p.dtype) for p in policy.parameters())

    def score(batch: MicroBatch, layout: DeviceLayout | None) -> Tensor:
        tokens, predictor, target = (
            torch.from_numpy(values).to(device) for values in (batch.tokens, batch.predictor, batch.target)
        )
        run = policy.logprobs if model is None else model
        scored: Tensor = run(tokens, predictor, target, layout=layout).double()
        return scored if batch.occurrence is None else scored[torch.from_numpy(batch.occurrence).to(device)]

    tolerance = PACKING_TOLERANCE.get(dtype, 0.1) if model is None else WRAPPED_TOLERANCE[mixed_precision]
    share = OF_EFFECT["no" if model is None else mixed_precision]
    fault = None
    with torch.no_grad():
        expected = score(flat, None)
        # How much wrong context changes: a model that hardly depends on its context must not pass for that reason.
        effect = float((score(packed, None) - expected).abs().max())
        for way in attention.ways(device, dtype if model is None else precision.computed_in(mixed_precision)):
            layout = attention.to_device(packed.layout, device, way=way)
            allowed = min(tolerance, max(share * effect, tolerance / 100))
            fault = _fault(partial(score, packed, layout), expected, allowed)
            if fault is None:
                policy.attention_way = way
                return None
            log.warning("attention over packed trees, computed by %r, is not this model's: %s", way, fault)
    return fault


def small_pass(policy: Policy, layout: str) -> MicroBatch:
    """Three leaves of a tree in one forward pass."""
    rows = _forked_rows(int(policy.hf.config.vocab_size))
    if layout == "flat":
        return micro_batches(rows, max_tokens=1024, version=0)[0]
    return tree_micro_batches(rows, max_tokens=1024, pack_tokens=None, version=0)[0]


def _fault(score: Callable[[], Tensor], expected: Tensor, tolerance: float) -> str | None:
    try:
        error = float((score() - expected).abs().max())
    except Exception as exc:
        return f"it raises {type(exc).__name__}: {str(exc).strip().splitlines()[0] if str(exc) else ''}"
    return None if error <= tolerance else f"their log-probs differ from flat ones by {error:.2g} nats"


def _forked_rows(vocab_size: int) -> list[Row]:
    """Three rows of one length, depth first: a shared observation, two turns without one, a shared prefix."""
    parts = (
        ((0, 6, 6), (1, 10, 13), (3, 16, 16)),
        ((0, 6, 6), (1, 10, 13), (4, 16, 16)),
        ((0, 6, 6), (2, 10, 13), (5, 16, 18)),
    )
    rows = []
    for path in parts:
        tokens = np.zeros(21, dtype=np.int32)
        tokens[:6] = np.arange(6) * 5 + 3
        ends = [begin for _, begin, _ in path[1:]] + [len(tokens)]
        at, turn = [], []
        for (number, begin, action), end in zip(path, ends, strict=True):
            tokens[begin:end] = np.arange(begin, end) * 7 + np.where(np.arange(begin, end) < action, 0, 11 * number + 1)
            at.append(np.arange(action, end, dtype=np.int64))
            turn.append(np.full(end - action, number, dtype=np.int64))
        places, turns = np.concatenate(at), np.concatenate(turn)
        nothing = np.zeros(len(places))
        rows.append(
            Row(
                tokens=tokens % vocab_size, parts=np.array(path, dtype=np.int64), tree=0, at=places, mu=nothing,
                advantage=nothing, version=turns * 0, turn=turns, weight=nothing,
            )
        )  # fmt: skip
    return rows
