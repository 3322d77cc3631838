"""Counters of an engine's requests, as its statistics report them."""

from __future__ import annotations

from actors.engines.base import EngineStats, Generation, Scored


class RequestCounters:
    """Totals since the engine started."""

    def __init__(self) -> None:
        self._prompt_tokens = self._cached_prompt_tokens = self._generated_tokens = 0
        self._finished = self._failed = self._scored = 0

    def finished(self, num_prompt_tokens: int, generation: Generation) -> None:
        self._finished += 1
        self._prompt_tokens += num_prompt_tokens
        self._cached_prompt_tokens += generation.cached_prompt_tokens
        self._generated_tokens += len(generation.token_ids)

    def scored(self, num_context_tokens: int, scored: Scored) -> None:
        """A continuation after ``num_context_tokens`` was scored: all of both was read, but for what was cached."""
        self._scored += 1
        self._prompt_tokens += num_context_tokens + len(scored.logprobs)
        self._cached_prompt_tokens += scored.cached_prompt_tokens

    def failed(self) -> None:
        self._failed += 1

    def stats(self, *, version: int, in_flight: int) -> EngineStats:
        return EngineStats(
            version=version, in_flight=in_flight,
            prompt_tokens=self._prompt_tokens, cached_prompt_tokens=self._cached_prompt_tokens,
            generated_tokens=self._generated_tokens,
            finished_requests=self._finished, failed_requests=self._failed,
            scored_requests=self._scored,
        )  # fmt: skip
