"""The next token of each request, and its log-prob under the distribution that sampled it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.engines.base import Sampling
from actors.engines.transformers.requests import Request


def sample(
    group: Sequence[Request], logits_BV: torch.Tensor, generator: torch.Generator
) -> tuple[list[int], list[float]]:
    """Tokens and their log-probs under the distribution that sampled them (greedy: at temperature 1)."""
    settings = [request.sampling for request in group]
    temperature = torch.tensor([s.temperature or 1.0 for s in settings], device=logits_BV.device)
    logits_BV = logits_BV / temperature[:, None]
    if any(s.top_k or s.top_p < 1.0 for s in settings):
        logits_BV = truncate(logits_BV, settings)
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    # Gumbel-max: the largest of log p - log E, E exponential, is a sample of p.
    noise_BV = torch.empty_like(logits_BV).exponential_(generator=generator)
    for row, request in enumerate(group):
        if request.generator is not None:
            noise_BV[row].exponential_(generator=request.generator)
        if request.sampling.temperature == 0:
            noise_BV[row] = 1.0
    tokens_B = torch.argmax(logprobs_BV - noise_BV.log(), dim=-1)
    found_B = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
    return tokens_B.tolist(), found_B.tolist()


def truncate(logits_BV: torch.Tensor, settings: Sequence[Sampling]) -> torch.Tensor:
    """Top-k, then top-p of what is left: all other logits become -inf."""
    vocabulary = logits_BV.shape[-1]
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    k_B1 = torch.tensor([[s.top_k or vocabulary] for s in settings], device=logits_BV.device)
    p_B1 = torch.tensor([[s.top_p] for s in settings], device=logits_BV.device)
    sorted_BV = sorted_BV.masked_fill(torch.arange(vocabulary, device=logits_BV.device)[None] >= k_B1, -torch.inf)
    probabilities_BV = sorted_BV.softmax(dim=-1)
    # The token that crosses p stays; the most likely one always does.
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    drop_BV = (before_BV >= p_B1) & (p_B1 < 1.0)
    drop_BV[:, 0] = False
    sorted_BV = sorted_BV.masked_fill(drop_BV, -torch.inf)
    return torch.empty_like(sorted_BV).scatter_(1, order_BV, sorted_BV)
