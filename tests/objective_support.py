"""Action tokens by hand, for the terms and token weights of the objective."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from atpo_async.config import Config, build
from learner.loss.loading import load_surrogate
from learner.loss.objective import Loss, PassTerm, atpo_loss
from learner.loss.parts.loading import ObjectiveParts, load_parts
from learner.loss.protocols import Measured, MinP, Now, StartTokens
from learner.loss.tokens import ActionTokens
from learner.training.reductions import Reductions
from learner.training.whole_batch.statistics import GatheredStatistics


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def statistics() -> GatheredStatistics:
    """Of one rank."""
    alone: Any = SimpleNamespace(num_processes=1)
    return GatheredStatistics(Reductions(alone))


def start_tokens(logp: Any, advantage: Any, **others: Any) -> StartTokens:
    """Each token is a turn of its own."""
    logp = tensor(logp)
    min_p = others.pop("min_p", None)
    return StartTokens(
        logp=logp,
        mu=logp,
        advantage=tensor(advantage),
        turn=torch.arange(len(logp)),
        row=torch.zeros(len(logp), dtype=torch.long),
        min_p=None if min_p is None else MinP(log_mass=tensor(min_p[0]), top_logp=tensor(min_p[1])),
        **{name: tensor(values) for name, values in others.items()},
    )


def parts_of(objective: dict[str, Any], **sections: Any) -> tuple[Config, ObjectiveParts]:
    config = build({"objective": objective, **sections})
    return config, load_parts(config)


def measured(parts: ObjectiveParts, start: StartTokens, now: Now | None = None) -> Measured:
    """What the only part measures of a batch that is these tokens."""
    (part,) = parts.all
    return part.measure(start, statistics(), now or Now(step=0, num_steps=100))


def loss_of(
    config: Config, parts: ObjectiveParts, start: StartTokens, logp: Any, now: Now, *, weight: Any = None,
    entropy: Any = None,
) -> tuple[Loss, Tensor, Tensor | None]:  # fmt: skip
    """The objective of these tokens; its gradient by log-prob and by entropy."""
    logp = tensor(logp).requires_grad_()
    entropy = None if entropy is None else tensor(entropy).requires_grad_()
    multiplier = None
    for part in parts.weights:
        multiplier = part(start, now)
    found = atpo_loss(
        ActionTokens(
            logp=logp, prox=start.logp, mu=start.mu, advantage=start.advantage, turn=start.turn, row=start.row,
            weight=torch.ones_like(logp) if weight is None else tensor(weight), correction=torch.ones_like(logp),
            entropy=entropy, multiplier=multiplier,
        ),
        config.objective,
        load_surrogate(config.objective),
        step=now.step,
        further=[
            PassTerm(label=term.label, corrected=term.traits.corrected, compute=term, start=start, now=now)
            for term in parts.terms
        ],
    )  # fmt: skip
    if entropy is None:
        return found, torch.autograd.grad(found.loss, logp)[0], None
    of_logp, of_entropy = torch.autograd.grad(found.loss, [logp, entropy], allow_unused=True)
    return found, of_logp, of_entropy
