"""vLLM's sampling parameters for the engine's requests, and the log-probs in its answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from actors.engines.base import Sampling


class SamplingParamsCache:
    """vLLM clones them for each request, so one object serves all with the same settings."""

    def __init__(self) -> None:
        self._made: dict[Sampling, Any] = {}

    def of(self, sampling: Sampling) -> Any:
        if (params := self._made.get(sampling)) is None:
            if len(self._made) >= 256:
                # Only per-request seeds make so many.
                self._made.clear()
            params = self._made[sampling] = _params(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                seed=sampling.seed,
                logprobs=0,
                **_stopping(sampling.stop_strings),
            )
        return params


def _stopping(strings: tuple[str, ...]) -> dict[str, Any]:
    """vLLM's front end looks for them in the text; special tokens' own texts count, and no token is taken away."""
    if not strings:
        return {"detokenize": False}
    return {
        "detokenize": True,
        "stop": list(strings),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }


def scoring_params(*, from_cache: bool = False) -> Any:
    """For the log-probs of a prompt; one token is generated, and discarded.

    Args:
        from_cache: begin after what the prefix cache holds of the prompt, whose log-probs are then not filled in.
    """
    skips = {"skip_reading_prefix_cache": False} if from_cache else {}
    return _params(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False, **skips)


def _params(**settings: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(ignore_eos=True, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY, **settings)


def sampled_logprobs(completion: Any) -> np.ndarray:
    """float32[T] from vLLM's flat container: with ``logprobs=0`` one entry per token, the sampled one."""
    flat, tokens = completion.logprobs, completion.token_ids
    if len(flat.logprobs) == len(tokens):
        return np.array(flat.logprobs, dtype=np.float32)
    return np.array([flat[i][token].logprob for i, token in enumerate(tokens)], dtype=np.float32)
