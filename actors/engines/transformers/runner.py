"""The model of the transformers engine: loading it, a step of all active requests, scoring, taking up other weights.

Everything here runs in the engine's worker thread.

Shapes: B requests of a step, T tokens fed to each, K of them the last, L longest context, V vocabulary, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from actors.engines.base import EngineSettings, WeightsFile
from actors.engines.common.checks import pick_device
from actors.engines.common.stop_strings import StopStrings
from actors.engines.probe import Probe
from actors.engines.transformers import attention, check, loading
from actors.engines.transformers.requests import AnyRequest, Request, ScoreRequest
from actors.engines.transformers.sampling import sample
from actors.engines.transformers.slots import Slots
from atpo_async.core.errors import SetupError
from atpo_async.models import causal_lm

PREFILL_TOKENS = 8192
"""Most tokens of prompts in one forward pass, padding included."""

SCORED_LOGITS = 1 << 27
"""Most logits of one forward pass that scores, 512 MB of float32, where it has more than one request."""


class ModelRunner:
    """A model in memory, with the keys and values of its requests.  Raises SetupError where it cannot be used."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._device = torch.device(pick_device(settings.device))
        if self._device.type == "cpu":
            torch.set_num_threads(settings.cpu_threads)
        # SDPA takes a boolean mask of any shape; the flash kernels do not.
        model, checkpoint = causal_lm.load(
            settings.model, dtype=causal_lm.torch_dtype(settings.dtype), attn_implementation="sdpa"
        )
        self.shapes: dict[str, tuple[int, ...]] = dict(checkpoint.shapes)
        """What a published version must contain: every tensor of the model's files."""
        if model._can_set_attn_implementation():
            model.set_attn_implementation(attention.NAME)
        self.stop_strings = StopStrings.of_folder(settings.model) if settings.stop_strings else None
        self.model: Any = model.to(self._device).eval().requires_grad_(False)
        self.slots = Slots(settings.max_num_seqs)
        self.copy: loading.Copy = loading.copy_tensor
        self._generator = torch.Generator(self._device).manual_seed(settings.seed)
        self.probe = Probe(device=str(self._device), dtype=settings.dtype)
        fault = check.fault(
            self.model,
            self.next_logits,
            dtype=settings.dtype,
            max_tokens=settings.max_model_len,
            rows=min(2, settings.max_num_seqs),
        )
        if fault is not None:
            raise SetupError(
                f"model.path = {str(settings.model)!r}: the transformers engine cannot generate with "
                f"{type(model).__name__} as it is: {fault}; use --actor.engine vllm"
            )

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def seeded(self, seed: int) -> torch.Generator:
        """The source of randomness of a request with a seed of its own."""
        return torch.Generator(self._device).manual_seed(seed)

    def load(self, weights: WeightsFile) -> None:
        """Raises WeightsRejected before any tensor is changed, ProbeMismatch if one is not what it should be after."""
        loading.take_up(self.model, weights, self.copy, folder=self._settings.model)

    @torch.no_grad()
    def score(self, tokens_ST: np.ndarray) -> np.ndarray:
        """float32[S * (T - 1)]."""
        # A copy: arrays from the wire are read-only, which torch warns about.
        tokens = torch.tensor(np.array(tokens_ST, dtype=np.int64), device=self._device)
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        found: np.ndarray = torch.log_softmax(logits, dim=-1).gather(2, tokens[:, 1:, None]).reshape(-1).cpu().numpy()
        return found

    @torch.no_grad()
    def step(self, requests: Sequence[AnyRequest], *, version: int) -> None:
        """One more token for every request: those with a prompt to read in padded groups, all others together.

        What is to be scored is scored whole.
        """
        self._score_all([request for request in requests if isinstance(request, ScoreRequest)], version)
        batch = [request for request in requests if isinstance(request, Request)]
        pending = {request: self.slots.pending(request) for request in batch}
        decoding = [request for request in batch if len(pending[request]) == 1]
        reading = sorted((r for r in batch if len(pending[r]) > 1), key=lambda r: len(pending[r]))
        while reading:
            # Sorted by length, so the last one taken sets the group's width.
            size = 1
            while size < len(reading) and (size + 1) * len(pending[reading[size]]) <= PREFILL_TOKENS:
                size += 1
            group, reading = reading[:size], reading[size:]
            self._forward(group, [pending[request] for request in group], version)
        if decoding:
            self._forward(decoding, [pending[request] for request in decoding], version)

    def _forward(self, group: Sequence[Request], fed: list[list[int]], version: int) -> None:
        begins = [len(self.slots.held[request.slot]) for request in group]
        logits_BV = self.next_logits([request.slot for request in group], begins, fed)
        tokens, logprobs = sample(group, logits_BV.float(), self._generator)
        for request, token, logprob, read in zip(group, tokens, logprobs, fed, strict=True):
            self.slots.held[request.slot].extend(read)
            request.add(token, logprob, version=version)

    def _score_all(self, requests: list[ScoreRequest], version: int) -> None:
        """The continuations of all of them, side by side as far as memory for their logits goes."""
        pending = {request: self.slots.pending(request) for request in requests}
        waiting = sorted(requests, key=lambda request: len(pending[request]))
        while waiting:
            size, keep = 1, len(waiting[0].continuation)
            while size < len(waiting):
                wider = max(keep, len(waiting[size].continuation))
                fits = (size + 1) * len(pending[waiting[size]]) <= PREFILL_TOKENS
                if not fits or (size + 1) * wider * self.vocab_size > SCORED_LOGITS:
                    break
                size, keep = size + 1, wider
            group, waiting = waiting[:size], waiting[size:]
            self._score_group(group, [pending[request] for request in group], keep, version)

    def _score_group(self, group: list[ScoreRequest], fed: list[list[int]], keep: int, version: int) -> None:
        begins = [len(self.slots.held[request.slot]) for request in group]
        logits_BKV = self.last_logits([request.slot for request in group], begins, fed, keep=keep)
        for request, logits_KV, read in zip(group, logits_BKV, fed, strict=True):
            self.slots.held[request.slot].extend(read)
            count = len(request.continuation)
            tokens = torch.tensor(request.continuation, device=self._device)
            logprobs = torch.log_softmax(logits_KV[-count:].float(), dim=-1).gather(1, tokens[:, None])[:, 0]
            request.add(logprobs.cpu().numpy(), version=version)

    def next_logits(self, slots: list[int], begins: list[int], fed: list[list[int]]) -> torch.Tensor:
        """float[B, V] after the last token fed to each slot; as ``last_logits``."""
        return self.last_logits(slots, begins, fed, keep=1)[:, -1]

    def last_logits(self, slots: list[int], begins: list[int], fed: list[list[int]], *, keep: int) -> torch.Tensor:
        """float[B, K, V] after each of the last tokens fed to each slot; their keys and values are in the slots
        afterwards.

        Args:
            slots: of the batch.
            begins: how many tokens each slot holds before these.
            fed: what comes next in each, one token at least.
            keep: K, at most the longest of ``fed``; a slot that was fed less has no meaning in its first places.
        """
        longest = max(map(len, fed))
        length = max(begin + len(tokens) for begin, tokens in zip(begins, fed, strict=True))
        if length > self.slots.cache.width:
            # By doubling, so that a long chain does not copy the table at every step.
            self.slots.cache.widen(min(self._settings.max_model_len, max(length, 2 * self.slots.cache.width, 64)))
        # Padded on the left, so that every request's last token is in the same place.
        padding = np.array([longest - len(tokens) for tokens in fed])
        ids = np.array([[0] * (longest - len(tokens)) + tokens for tokens in fed])
        positions_BT = np.arange(longest)[None] - padding[:, None] + np.array(begins)[:, None]
        is_token_BT = np.arange(longest)[None] >= padding[:, None]
        positions_BT = np.where(is_token_BT, positions_BT, 0)
        # Padding sees column 0 like a first token would: a row with nothing to see would give NaN.
        mask_BTL = np.arange(length)[None, None] <= positions_BT[:, :, None]

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(self._device)

        cache = self.slots.cache
        cache.rows = tensor(np.array(slots))
        cache.columns = tensor(np.where(is_token_BT, positions_BT, cache.width))
        cache.length = length
        logits_BKV: torch.Tensor = self.model(
            input_ids=tensor(ids),
            attention_mask=tensor(mask_BTL)[:, None],
            position_ids=tensor(positions_BT),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits[:, -keep:]
        return logits_BKV
