"""A request of the decoder: a context, how its action is sampled, and what there is of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from actors.engines.base import Generation, Sampling
from atpo_async.core.tree import VersionSpan

StopReason = Literal["stop", "length"]


@dataclass(eq=False, slots=True)
class Request:
    """One action to be sampled."""

    prompt: np.ndarray
    """int32[P]."""
    sampling: Sampling
    most: int
    """Tokens of the action, at most."""
    version: int
    """Of the weights, which do not change before its end."""
    generator: torch.Generator | None = None
    """Of a request with a seed of its own."""
    row: int = -1
    cached: int = 0
    """Tokens of the prompt whose keys and values were there."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: StopReason | None = None
    """Why the action is complete; None while it is not."""

    def pending(self, held: int) -> np.ndarray:
        """int32[T]: tokens that a row with the first ``held`` of them lacks."""
        if held >= len(self.prompt):
            return np.array(self.tokens[held - len(self.prompt) :], dtype=np.int32)
        if not self.tokens:
            return self.prompt[held:]
        return np.concatenate([self.prompt[held:], np.array(self.tokens, dtype=np.int32)])

    @property
    def length(self) -> int:
        """Tokens of the context and of the action so far."""
        return len(self.prompt) + len(self.tokens)

    def generation(self) -> Generation:
        """Of a request that is complete."""
        assert self.reason is not None
        return Generation(
            token_ids=np.array(self.tokens, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            spans=(VersionSpan(self.version, 0, len(self.tokens)),),
            stop_reason=self.reason,
            cached_prompt_tokens=self.cached,
        )


@dataclass(frozen=True, eq=False, slots=True)
class ScoreRequest:
    """Tokens whose log-probs are wanted."""

    context: np.ndarray
    """int32[P], P >= 1."""
    continuation: np.ndarray
    """int32[T], T >= 1."""
