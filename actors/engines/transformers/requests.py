"""A request of the transformers engine: an action to sample and when it is complete, or tokens to score."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from actors.engines.base import Generation, Sampling, Scored
from actors.engines.common.stop_strings import StopStrings
from atpo_async.core.tree import VersionSpan


@dataclass(eq=False, slots=True)
class Request:
    prompt: list[int]
    sampling: Sampling
    request_id: str
    done: asyncio.Future[Generation]
    generator: torch.Generator | None
    """Of a request with a seed of its own."""
    slot: int = -1
    cached_prompt_tokens: int = 0
    action: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)
    """(version, first token) of each span so far."""
    stop_strings: StopStrings | None = None
    """Set where the sampling has any."""

    def tokens(self) -> list[int]:
        return self.prompt + self.action

    def add(self, token: int, logprob: float, *, version: int) -> None:
        """One more token of the action, sampled with the weights of ``version``."""
        if not self.starts or self.starts[-1][0] != version:
            self.starts.append((version, len(self.action)))
        self.action.append(token)
        self.logprobs.append(logprob)

    def stop_reason(self, *, max_model_len: int) -> Literal["stop", "length"] | None:
        """Why the action is complete; None while it is not."""
        if self.action[-1] in self.sampling.stop_token_ids:
            return "stop"
        if self.stop_strings is not None and self.stop_strings.ended(self.action, self.sampling.stop_strings):
            return "stop"
        full = len(self.prompt) + len(self.action) >= max_model_len
        return "length" if full or len(self.action) >= self.sampling.max_tokens else None

    def result(self, *, max_model_len: int) -> Generation | None:
        """The action; None while it is not complete."""
        reason = self.stop_reason(max_model_len=max_model_len)
        return None if reason is None else self.generation(reason)

    def generation(self, reason: Literal["stop", "length"]) -> Generation:
        ends = [start for _, start in self.starts[1:]] + [len(self.action)]
        return Generation(
            token_ids=np.array(self.action, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            spans=tuple(VersionSpan(v, start, end) for (v, start), end in zip(self.starts, ends, strict=True)),
            stop_reason=reason,
            cached_prompt_tokens=self.cached_prompt_tokens,
        )


@dataclass(eq=False, slots=True)
class ScoreRequest:
    """Tokens whose log-probs are asked for.  One step answers it."""

    prompt: list[int]
    """The context."""
    continuation: list[int]
    request_id: str
    done: asyncio.Future[Scored]
    slot: int = -1
    cached_prompt_tokens: int = 0
    scored: Scored | None = None

    def tokens(self) -> list[int]:
        """What is read: the last token is only predicted."""
        return self.prompt + self.continuation[:-1]

    def add(self, logprobs: np.ndarray, *, version: int) -> None:
        """float32[T], of the continuation under the weights of ``version``."""
        self.scored = Scored(logprobs=logprobs, version=version, cached_prompt_tokens=self.cached_prompt_tokens)

    def result(self, *, max_model_len: int) -> Scored | None:
        return self.scored


AnyRequest = Request | ScoreRequest
