"""The inputs of the loss: the action tokens of one forward pass, with log-probs under each policy.

All tensors of a struct share one shape: rows ``BT``, or a flat list ``M`` of action tokens.  Places where ``turn`` is
-1 hold no action token that counts (observations, padding, masked turns); they may hold anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from learner.loss.protocols import MinP


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionTokens:
    """The action tokens of one forward pass, as the objective reads them."""

    logp: Tensor
    """float: log-probs under the weights being trained; carries the gradient."""
    prox: Tensor
    """float: log-probs under the proximal policy, without gradient."""
    mu: Tensor
    """float: log-probs under the behaviour policy."""
    advantage: Tensor
    """float: of the token's turn."""
    turn: Tensor
    """int64: turn occurrence, as ``learner.loss.units`` numbers them; -1 where nothing counts."""
    row: Tensor
    """int64: row of the forward pass."""
    weight: Tensor
    """float: aggregation weight (``learner.packing.rows``), with the tree's w_PER."""
    correction: Tensor
    """float: off-policy weight (``learner.loss.correction``), without gradient."""
    reference: Tensor | None = None
    """float: log-probs under the reference policy, without gradient."""
    entropy: Tensor | None = None
    """float: of the policy over the whole vocabulary, nats; carries the gradient."""
    multiplier: Tensor | None = None
    """float: of the surrogate's loss, the product of all token weights, without gradient."""
    min_p: MinP | None = None
    """Of the policy, without gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffPolicyTokens:
    """The action tokens of one forward pass, as the correction reads them."""

    numerator: Tensor
    """float: log-probs of prox, or of the policy being trained where ``correction.numerator`` says so."""
    mu: Tensor
    """float: log-probs under the behaviour policy."""
    advantage: Tensor
    """float: of the token's turn."""
    turn: Tensor
    """int64: turn occurrence, as ``learner.loss.units`` numbers them; -1 where nothing counts."""
    row: Tensor
    """int64: row of the forward pass."""
