"""The policy's complete weights and outputs, however ``accelerate`` has wrapped and sharded it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from atpo_async.models import causal_lm
from atpo_async.models.adapters import Adapters
from learner.policy.model import Policy


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Of every tensor that an engine needs, from before ``accelerate`` wraps the policy, which may untie some."""

    names: tuple[str, ...]
    """Aliases of tied ones too."""
    first: Mapping[str, str]
    """Of a tied tensor's further names -> the first that it has."""

    @classmethod
    def of(cls, policy: Policy) -> TensorNames:
        """Tied tensors are those that lie at the same place."""
        at: dict[int, str] = {}
        first: dict[str, str] = {}
        state = policy.hf.state_dict()
        own = state if policy.lora is None else policy.lora.split(state)[0]
        for name, tensor in own.items():
            key = tensor.data_ptr()
            if key in at:
                first[name] = at[key]
            else:
                at[key] = name
        return cls(tuple(own), first)


@dataclass(slots=True, kw_only=True)
class WholePolicy:
    """Weights and answers of the policy.  Where it is sharded every rank calls each method."""

    policy: Policy
    """Inside the wrappers."""
    names: TensorNames
    model: Any
    """The policy in the wrappers that ``accelerate`` put around it."""
    accelerator: Accelerator
    sharded: bool
    """No rank holds all of a parameter."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor an engine needs, whole: tied ones under each of their names, adapters merged in (those on the
        CPU)."""
        own, pairs = self._held()
        if pairs is None:
            return own
        merged = {f"{layer}.weight" for layer in pairs.layers}
        return {name: pairs.whole(name, tensor).cpu() if name in merged else tensor for name, tensor in own.items()}

    @property
    def adapter_scale(self) -> float | None:
        """Where ``published`` are adapters alone, how often their products count."""
        lora = self.policy.lora
        return lora.scale if lora is not None and lora.travels_alone else None

    def published(self) -> Mapping[str, Tensor]:
        """On rank 0, ``tensors`` under the names, and in the shapes, of the files in ``model.path``; or adapters, as
        ``learner.lora.publish`` says."""
        own, pairs = self._held()
        if not self.accelerator.is_main_process:
            return own
        published = causal_lm.published(self.policy.hf, own)
        if self.policy.lora is None or pairs is None:
            return published
        return self.policy.lora.for_engines(published, pairs)

    def adapters(self) -> Adapters:
        """The adapters, whole.  Raises ValueError where there are none."""
        _, pairs = self._held()
        if pairs is None:
            raise ValueError("the policy has no adapters")
        return pairs

    def _held(self) -> tuple[dict[str, Tensor], Adapters | None]:
        """The model's own tensors, whole, tied ones under each of their names; and its adapters, where it has any.  On
        ranks that do not gather nothing of use."""
        lora, pairs = self.policy.lora, None
        if not self.sharded:
            found: dict[str, Tensor] = {k: v.detach() for k, v in self.policy.hf.state_dict().items()}
        else:
            gathered = self.accelerator.get_state_dict(self.model)
            found = {str(k).removeprefix("hf."): v for k, v in gathered.items()}
        if lora is not None:
            found, pairs = lora.split(found)
        if self.sharded and not self.accelerator.is_main_process:
            return found, pairs
        own = {name: found[name] if name in found else found[self.names.first[name]] for name in self.names.names}
        return own, pairs

    def probe(self, tokens_ST: np.ndarray) -> np.ndarray:
        """float32[S * (T - 1)]: log-prob of each token but the first of its sequence, under the weights now, at
        temperature 1.

        With adapters the weights are the merged ones, rounded as engines hold them: an engine's error on the probe is
        then that of its arithmetic and of what it did not take up.
        """
        lora = self.policy.lora
        tokens = torch.from_numpy(tokens_ST.astype(np.int64))
        target = tokens[:, 1:].reshape(-1)
        inputs = {"tokens": tokens[:, :-1], "predictor": torch.arange(len(target)), "target": target}
        with contextlib.nullcontext() if lora is None else lora.as_in_engines():
            scored = self._answer(self.policy.logprobs, inputs | {"temperature": 1.0})
        result: np.ndarray = scored.float().cpu().numpy()
        return result

    def next_tokens(self, tokens_ST: Tensor, waiting_times_SV: Tensor) -> Tensor:
        """int64[S]: a token to follow each sequence, at temperature 1.

        Args:
            tokens_ST: int64, the sequences so far.
            waiting_times_SV: exponential numbers for each token of the vocabulary.
        """
        last = torch.arange(1, len(tokens_ST) + 1) * tokens_ST.shape[1] - 1
        inputs = {"tokens": tokens_ST, "predictor": last, "waiting_times": waiting_times_SV}
        return self._answer(self.policy.sampled, inputs).cpu()

    def _answer(self, method: Callable[..., Tensor], inputs: dict[str, Any]) -> Tensor:
        """The policy's answer without gradient."""
        with torch.no_grad():
            # Sharded parameters are whole only inside the wrapper's forward; elsewhere leave autocast out.
            score = self.model if self.sharded else method
            answer: Tensor = score(**send_to_device(inputs, self.accelerator.device))
        return answer
