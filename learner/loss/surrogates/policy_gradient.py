"""``policy-gradient``: log pi alone; with ``correction.action = "topr"`` TOPR (arXiv 2503.14286)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import SurrogateTraits, declares
from learner.loss.protocols import SurrogateTerms, SurrogateTokens

if TYPE_CHECKING:
    from atpo_async.config import ObjectiveConfig


@declares(SurrogateTraits())
def surrogate(tokens: SurrogateTokens, settings: ObjectiveConfig) -> SurrogateTerms:
    """-A log pi."""
    return SurrogateTerms(loss=-tokens.advantage * tokens.logp)
