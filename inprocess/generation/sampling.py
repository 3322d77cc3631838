"""The next tokens of all rows at once, and their log-probs under the distributions that sampled them.

Shapes: B rows, V vocabulary, K stop tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.engines.transformers.sampling import truncate
from inprocess.generation.requests import Request


class Sampler:
    """How each row of a batch is sampled, and what ends its action.

    Args:
        requests: one for each row.
        generator: of the noise of rows without a seed of their own.
    """

    def __init__(self, requests: Sequence[Request], generator: torch.Generator) -> None:
        self._generator = generator
        self._settings = [request.sampling for request in requests]
        device = generator.device
        temperatures = [s.temperature for s in self._settings]
        self._all_greedy = not any(temperatures)
        self._greedy = [row for row, t in enumerate(temperatures) if t == 0] if not self._all_greedy else []
        plain = all(t in (0.0, 1.0) for t in temperatures)
        self._temperature = None if plain else torch.tensor([t or 1.0 for t in temperatures], device=device)[:, None]
        self._cuts = any(s.top_k or s.top_p < 1.0 for s in self._settings)
        self._own = [(row, r.generator) for row, r in enumerate(requests) if r.generator is not None]
        most = max((len(s.stop_token_ids) for s in self._settings), default=0)
        stops = [[*s.stop_token_ids, *[-1] * (most - len(s.stop_token_ids))] for s in self._settings]
        self._stops_BK = np.array(stops, dtype=np.int64).reshape(len(requests), most)

    def draw(self, logits_BV: Tensor) -> tuple[Tensor, np.ndarray]:
        """int64[B] tokens, and their log-probs, float32[B] (greedy: at temperature 1)."""
        if self._temperature is not None:
            logits_BV = logits_BV / self._temperature
        if self._cuts:
            logits_BV = truncate(logits_BV, self._settings)
        logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
        scores_BV = logprobs_BV
        if not self._all_greedy:
            # Gumbel-max: the largest of log p - log E, E exponential, is a sample of p.
            noise_BV = torch.empty_like(logprobs_BV).exponential_(generator=self._generator)
            for row, generator in self._own:
                noise_BV[row].exponential_(generator=generator)
            if self._greedy:
                noise_BV[self._greedy] = 1.0
            scores_BV = logprobs_BV - noise_BV.log_()
        tokens_B = scores_BV.argmax(-1)
        return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0].cpu().numpy()

    def stopped(self, tokens_B: np.ndarray) -> np.ndarray:
        """bool[B]: rows whose token is one that ends their action."""
        ended: np.ndarray = (tokens_B[:, None] == self._stops_BK).any(-1)
        return ended
