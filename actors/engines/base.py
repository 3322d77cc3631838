"""The Engine protocol: tokens in, tokens out, versions per token, weights swapped while requests are in flight.

``actor.engine`` names a built-in engine or a user's own: a class or function that is called with ``EngineSettings``,
and with ``actor.engine_options`` by keyword, and returns an ``Engine``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from atpo_async.core.tree import VersionSpan
from atpo_async.core.vocabulary import Precision
from atpo_async.wire.messages import WeightsManifest

Tokens = Sequence[int] | np.ndarray
OnRunning = Callable[[], None]


def ignore() -> None:
    """Default for ``on_running``: does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """The settings of an engine, from the configuration.

    Args:
        model: Hugging Face folder of the policy, with safetensors.
        max_model_len: longest prompt plus action, tokens.
        max_num_seqs: requests that run at once; more wait in the engine.
        dtype: precision of the engine.
        device: ``auto``, ``cpu`` or ``cuda``, with or without a number.
        num_threads: of the model on a CPU; None for half the cores, since other roles share them.
        seed: of the engine's sampling; every actor of a run has another one.
        swap_deadline_s: a swap that takes longer fails the engine.
        initial_version: of the weights in ``model``.
        kv_cache_gb: vLLM on a CPU: size of the KV cache, GiB.
        gpu_memory_utilization: vLLM on a GPU: share of its memory for weights and KV cache.
        tensor_parallel_size: vLLM: processes that share the model.
        clear_cache_on_swap: vLLM: recompute the keys and values of requests in flight with the new weights.
        stop_strings: requests may have stop strings: an engine loads the tokenizer of ``model`` for them.
    """

    model: Path
    max_model_len: int
    max_num_seqs: int = 64

    dtype: Precision = "float32"
    device: str = "auto"
    num_threads: int | None = None
    seed: int = 0
    swap_deadline_s: float = 60.0
    initial_version: int = 0

    kv_cache_gb: float = 1.0
    gpu_memory_utilization: float = 0.85
    tensor_parallel_size: int = 1
    clear_cache_on_swap: bool = True

    stop_strings: bool = False

    @property
    def cpu_threads(self) -> int:
        return self.num_threads or max(1, (os.cpu_count() or 2) // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample one action.  ``temperature`` 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 for no limit."""
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    """The token that ends the action; it is part of the action."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the action as soon as its decoded tokens contain one, special tokens' own texts included.  The
    action is what was sampled, never encoded again: its last token may reach beyond the text that ended it."""
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One finished request."""

    token_ids: np.ndarray
    """int32[T], T >= 1, stop token included."""
    logprobs: np.ndarray
    """float32[T], nats: under the distribution that sampled (after temperature, top-p, top-k)."""
    spans: tuple[VersionSpan, ...]
    stop_reason: Literal["stop", "length"]
    cached_prompt_tokens: int
    """Prompt tokens served from the prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The policy's log-probs of tokens that it did not sample."""

    logprobs: np.ndarray
    """float32[T], nats, at temperature 1: of each token of the continuation, given the context and those before it."""
    version: int
    """Of the weights, the same for all of them."""
    cached_prompt_tokens: int = 0
    """Tokens of the context served from the prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapReport:
    version: int
    pause_s: float
    """From pause to resume: how long generation stood still."""
    load_s: float
    """Of it, to load them."""
    probe_s: float = 0.0
    """Of it, to score the probe."""
    read_s: float = 0.0
    """Before it, to read the file while generation went on."""
    probe_error: float
    """Nats: how far the engine's log-probs of the probe differ from the learner's, as noise on the logits
    (``actors.engines.probe``)."""
    in_flight: int
    """Requests that were running when the swap began; they go on with the new weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine started."""

    version: int
    in_flight: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    finished_requests: int
    failed_requests: int
    scored_requests: int = 0
    """Not among the finished ones; their contexts and continuations count as prompt tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """Verified weights on local storage: ``manifest.tensors`` describes the layout of the payload at ``path``."""

    path: Path
    manifest: WeightsManifest


class Engine(Protocol):
    """A policy that generates.  All methods belong to one event loop.

    An engine whose ``generate`` honours ``Sampling.stop_strings`` has the attribute ``supports_stop_strings = True``;
    without it no environment is taken that has any.
    """

    async def start(self) -> None:
        """Load the model and warm up.  Raises SetupError if the model or the device is not there."""

    async def generate(
        self, prompt: Tokens, sampling: Sampling, *, request_id: str, on_running: OnRunning = ignore
    ) -> Generation:
        """Sample one action after ``prompt``.  Raises GenerationFailed; cancelling it aborts the request.

        ``on_running`` is called once, when the request has left the queue: a limit on an action begins then.
        """

    async def swap(self, weights: WeightsFile) -> SwapReport:
        """Load other weights while requests are in flight, then reproduce the manifest's probe.

        Requests in flight keep their tokens and go on under the new weights.

        Raises:
            WeightsRejected: a tensor is missing or has another shape, or the version is older.  Nothing was touched:
                the engine goes on with the weights it has.
            ProbeMismatch: naming the version, and the tensor that was not taken up or what the probe is off by.  The
                old weights are gone and the new ones not to be trusted: requests wait, those in flight too, until
                another ``swap``, which may be to the same version, has been reproduced.
            WaitTimeout: it took longer than the engine allows.
            EngineDead: the new weights were not taken up whole.

        After the last two, and after being cancelled, every request fails with EngineDead.
        """

    async def score(self, token_ids: Tokens) -> np.ndarray:
        """float32[len - 1]: log-prob of each token given the ones before it, at temperature 1."""

    def stats(self) -> EngineStats: ...

    async def close(self) -> None:
        """End every process the engine started.  Idempotent."""


class ScoringEngine(Engine, Protocol):
    """An engine that also tells how probable given tokens are to it: what ``search.turn_reward`` needs.

    The built-in ones do.  A user's may: one without ``score_continuation`` is asked by its ``score``, which computes
    the whole context each time (``actors.engines.checked``).
    """

    async def score_continuation(
        self, context: Tokens, continuation: Tokens, *, request_id: str, on_running: OnRunning = ignore
    ) -> Scored:
        """The log-probs of ``continuation`` after ``context``, all under one version of the weights.

        It is admitted, counted and cancelled as a request of ``generate`` is, and begins from what is cached of the
        context.  Where other weights are taken up meanwhile, all of it is computed under these.

        Args:
            context: at least one token.
            continuation: at least one; both together at most ``EngineSettings.max_model_len`` - 1 tokens.
            request_id: for errors.
            on_running: called once, when the request has left the queue.

        Raises:
            GenerationFailed: too many tokens or too few, one that the model does not have, or the engine failed.
            EngineDead: as ``generate``.
        """
