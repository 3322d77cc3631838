"""The engine on plain transformers: for machines without vLLM, and for quick tests.

One worker thread owns the model.  Between two steps the event loop admits, drops and swaps; a step gives every active
request its next token.  Keys and values live in slots: a row of a table for each request, kept after the request
ends, so that a later prompt that begins with the same tokens (a chain's next turn) starts from them.

Shapes: B requests of a step, T tokens fed to each, L longest context, V vocabulary.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from actors.engines.base import EngineStats, Generation, Sampling, SwapReport, WeightsFile
from actors.engines.common.admission import Queue
from actors.engines.common.checks import (
    TIED_HEAD,
    check_model_folder,
    check_token_ids,
    check_weights,
    pick_device,
)
from actors.engines.probe import Probe, check_probe_fits, sequences_of
from atpo_async.core.errors import EngineDead, GenerationFailed, ProbeMismatch, SetupError, WaitTimeout, WeightsRejected
from atpo_async.core.tree import VersionSpan
from atpo_async.models import causal_lm
from atpo_async.status import waits

log = logging.getLogger("atpo.actor")


PREFILL_TOKENS = 8192
"""Most tokens of prompts in one forward pass, padding included."""

CLOSE_S = 5.0
"""How long close() waits for the worker thread."""

R = TypeVar("R")


@dataclass(eq=False, slots=True)
class _Request:
    prompt: list[int]
    sampling: Sampling
    request_id: str
    done: asyncio.Future[Generation]
    generator: torch.Generator | None
    slot: int = -1
    cached_prompt_tokens: int = 0
    action: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)
    """(version, first token) of each span so far."""

    def tokens(self) -> list[int]:
        return self.prompt + self.action


class _SlotCache:
    """Keys and values of all slots; stands in for transformers' Cache during one forward pass.

    ``rows`` int64[B] are the slots of the batch, ``columns`` int64[B, T] where each fed token goes (padding goes to
    the last column, which nothing attends to), ``length`` how many columns are attended over.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.width = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.rows = self.columns = torch.empty(0, dtype=torch.long)
        self.length = 0

    def widen(self, width: int) -> None:
        """Room for ``width`` tokens in every slot, besides the padding's column."""
        if width <= self.width:
            return
        for table in (self.keys, self.values):
            for layer, old in enumerate(table):
                new = old.new_zeros(old.shape[0], width + 1, *old.shape[2:])
                new[:, : self.width] = old[:, : self.width]
                table[layer] = new
        self.width = width

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, heads, T, D] of one layer; give back [B, heads, L, D] of all its tokens."""
        found = []
        for table, states in ((self.keys, key_states), (self.values, value_states)):
            if len(table) == layer_idx:
                table.append(states.new_zeros(self.num_slots, self.width + 1, states.shape[1], states.shape[3]))
            table[layer_idx][self.rows[:, None], self.columns] = states.transpose(1, 2)
            found.append(table[layer_idx][self.rows, : self.length].transpose(1, 2))
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length - self.columns.shape[1]


class TransformersEngine:
    """Engine on transformers, batched over requests.

    Args:
        model_path: Hugging Face model folder with safetensors.
        dtype: precision of the engine.
        device: ``auto``, ``cpu`` or ``cuda``.
        max_batch: requests that run at once; more wait.
        max_model_len: longest prompt plus action, tokens.
        initial_version: version of the weights in ``model_path``.
        num_threads: threads of the model on a CPU; None for half the cores, since other roles share them.
        seed: of the engine's sampling.
        swap_deadline_s: a swap that takes longer fails the engine.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        dtype: str = "float32",
        device: str = "auto",
        max_batch: int = 64,
        max_model_len: int,
        initial_version: int = 0,
        num_threads: int | None = None,
        seed: int = 0,
        swap_deadline_s: float = 60.0,
    ) -> None:
        self._model_path = Path(model_path)
        self._dtype = dtype
        self._asked_device = device
        self._max_batch = max_batch
        self._max_model_len = max_model_len
        self._version = initial_version
        self._num_threads = num_threads or max(1, (os.cpu_count() or 2) // 2)
        self._seed = seed
        self._swap_deadline_s = swap_deadline_s
        self._model: Any = None
        self._cache = _SlotCache(max_batch)
        self._held: list[list[int]] = [[] for _ in range(max_batch)]
        """The tokens whose keys and values each slot holds."""
        self._dead: str | None = "the engine was not started"
        self._queue = Queue(max_batch)
        self._unproven = False
        """The weights in the model failed the probe: nothing is generated until others have passed it."""
        self._waiting: list[_Request] = []
        self._active: list[_Request] = []
        self._work = asyncio.Event()
        self._between_steps = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transformers-engine")
        self._stuck = False
        """The thread did not come back in time; waiting for it would block the event loop."""
        self._stepper: asyncio.Task[None] | None = None
        self._prompt_tokens = self._cached_prompt_tokens = self._generated_tokens = 0
        self._finished = self._failed = 0

    async def start(self) -> None:
        """Load the model.  Raises SetupError if the folder or the device is not there."""
        check_model_folder(self._model_path)
        await self._in_thread(self._build)
        self._dead = None
        self._stepper = asyncio.create_task(self._step_to_the_end(), name="transformers-engine-steps")

    async def generate(
        self,
        prompt: Sequence[int] | np.ndarray,
        sampling: Sampling,
        *,
        request_id: str,
        on_running: Callable[[], None] = lambda: None,
    ) -> Generation:
        """Sample one action after ``prompt``.  Raises GenerationFailed; cancelling it frees the request's slot."""
        self._check_alive(request_id)
        tokens = np.asarray(prompt).tolist()
        if not 1 <= len(tokens) < self._max_model_len:
            self._failed += 1
            raise GenerationFailed(
                f"request {request_id}: a prompt of {len(tokens)} tokens; this engine takes 1 to "
                f"{self._max_model_len - 1}"
            )
        try:
            check_token_ids(tokens, vocab_size=self._model.config.get_text_config().vocab_size, request_id=request_id)
        except GenerationFailed:
            self._failed += 1
            raise
        generator = None
        if sampling.seed is not None:
            generator = torch.Generator(self._device).manual_seed(sampling.seed)
        request = _Request(tokens, sampling, request_id, asyncio.get_running_loop().create_future(), generator)
        self._waiting.append(request)
        self._work.set()
        try:
            with self._queue.entered(on_running):
                return await request.done
        except GenerationFailed:
            self._failed += 1
            raise

    async def swap(self, weights: WeightsFile) -> SwapReport:
        """Take up other weights between two steps, and reproduce the manifest's probe before the next one.

        Requests in flight keep their tokens; their keys and values are computed anew.  WeightsRejected changes nothing:
        the engine goes on.  After ProbeMismatch requests wait for a swap that succeeds.  WaitTimeout fails every
        request with EngineDead.
        """
        self._check_alive("swap")
        manifest = weights.manifest
        check_probe_fits(manifest, max_model_len=self._max_model_len)
        await asyncio.to_thread(check_weights, weights, self._shapes(), current=self._version)
        try:
            async with asyncio.timeout(self._swap_deadline_s):
                return await self._swap(weights)
        except TimeoutError as exc:
            reason = (
                f"the engine waited over {self._swap_deadline_s:g} s for a step to end and for the model to take up "
                f"weights version {manifest.version}"
            )
            # The thread cannot be interrupted: it may be in the middle of a step or of these weights.
            self._fail(reason)
            self._stuck = True
            raise WaitTimeout(reason) from exc

    async def _swap(self, weights: WeightsFile) -> SwapReport:
        manifest = weights.manifest
        began = time.perf_counter()
        async with self._between_steps:
            self._check_alive("swap")
            in_flight = len(self._active) + len(self._waiting)
            try:
                load_began = time.perf_counter()
                await self._in_thread(lambda: self._load(weights))
                load_s = time.perf_counter() - load_began
                error = self._probe.judge(manifest, await self._in_thread(lambda: self._score(sequences_of(manifest))))
            except WeightsRejected:
                raise
            except ProbeMismatch:
                self._unproven = True
                raise
            except BaseException as exc:
                # Cancelled in the middle counts too: nobody knows which weights these are.
                cancelled = isinstance(exc, asyncio.CancelledError)
                reason = "out of time, or cancelled" if cancelled else exc or type(exc).__name__
                self._fail(f"the swap to version {manifest.version} failed: {reason}")
                raise
            self._held = [[] for _ in self._held]
            self._version = manifest.version
            self._unproven = False
            self._work.set()
        return SwapReport(
            version=manifest.version,
            pause_s=time.perf_counter() - began,
            load_s=load_s,
            probe_error=error,
            in_flight=in_flight,
        )

    async def score(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32[len - 1]: log-prob of each token given the ones before it, at temperature 1."""
        self._check_alive("score")
        async with self._between_steps:
            return await self._in_thread(lambda: self._score(np.asarray(token_ids)[None]))

    def stats(self) -> EngineStats:
        return EngineStats(
            version=self._version,
            in_flight=len(self._active) + len(self._waiting),
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            generated_tokens=self._generated_tokens,
            finished_requests=self._finished,
            failed_requests=self._failed,
        )

    @property
    def is_dead(self) -> bool:
        """True before start(), after close(), after a failed swap and once its steps have ended."""
        return self._dead is not None

    async def close(self) -> None:
        """End the worker thread.  Idempotent; requests in flight fail."""
        self._fail("the engine was closed")
        if self._stepper is not None:
            self._stepper.cancel()
            await asyncio.wait([self._stepper])
            self._stepper = None
        if not self._stuck:
            # In a thread: a step that does not come back must hold up neither the loop nor the actor's end.
            ending = threading.Thread(target=self._thread.shutdown, name="engine-end", daemon=True)
            ending.start()
            await asyncio.to_thread(ending.join, CLOSE_S)
        self._model = None

    # --- on the event loop -----------------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[], R]) -> R:
        with waits.waiting("the engine's thread", "a step, a load or a score", on=waits.ENGINE):
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _step_to_the_end(self) -> None:
        """Whatever ends the steps ends the engine: its requests fail at once, and it says that it is dead."""
        try:
            await self._step_forever()
        except asyncio.CancelledError:
            self._fail("its steps were cancelled, and not by close()")
            raise
        except BaseException as exc:
            log.exception("the engine's steps ended")
            self._fail(f"its steps ended: {type(exc).__name__}: {exc}")
            if not isinstance(exc, Exception):
                raise

    async def _step_forever(self) -> None:
        """Waits for: a request.  Unblocked by: generate(); held up by: swap() and score(), one step at most."""
        while True:
            await self._work.wait()
            async with self._between_steps:
                self._drop_cancelled()
                self._admit()
                if not self._active or self._unproven:
                    self._work.clear()
                    continue
                batch = list(self._active)
                try:
                    await self._in_thread(lambda batch=batch: self._step(batch))  # type: ignore[misc]
                except Exception as exc:
                    if self._dead is not None:
                        return
                    # What the slots hold now is unknown; the requests end alone, the engine goes on.
                    for request in batch:
                        self._end(request, GenerationFailed(f"request {request.request_id}: {exc!r}"), keep_slot=False)
                    continue
                if self._dead is not None:
                    # A swap gave up waiting for this step, and has failed its requests.
                    return
                for request in batch:
                    if (reason := self._stop_reason(request)) is not None:
                        self._end(request, self._generation(request, reason), keep_slot=True)

    def _drop_cancelled(self) -> None:
        self._waiting = [request for request in self._waiting if not request.done.done()]
        self._active = [request for request in self._active if not request.done.done()]

    def _admit(self) -> None:
        """Give each waiting request, first come first served, the free slot that holds most of its prompt."""
        taken = {request.slot for request in self._active}
        free = [slot for slot in range(self._max_batch) if slot not in taken]
        while free and self._waiting:
            request = self._waiting.pop(0)
            # The last prompt token is always computed: its output is the first token's distribution.
            shared = {slot: _common_prefix(self._held[slot], request.prompt[:-1]) for slot in free}
            # Nothing to reuse anywhere: the slot whose content is the shortest is the smallest loss.
            best = max(free, key=lambda slot: (shared[slot], -len(self._held[slot])))
            free.remove(best)
            request.slot, request.cached_prompt_tokens = best, shared[best]
            self._held[best] = self._held[best][: shared[best]]
            self._active.append(request)

    def _stop_reason(self, request: _Request) -> str | None:
        if request.action[-1] in request.sampling.stop_token_ids:
            return "stop"
        full = len(request.prompt) + len(request.action) >= self._max_model_len
        return "length" if full or len(request.action) >= request.sampling.max_tokens else None

    def _generation(self, request: _Request, reason: str) -> Generation:
        ends = [start for _, start in request.starts[1:]] + [len(request.action)]
        return Generation(
            token_ids=np.array(request.action, dtype=np.int32),
            logprobs=np.array(request.logprobs, dtype=np.float32),
            spans=tuple(VersionSpan(v, start, end) for (v, start), end in zip(request.starts, ends, strict=True)),
            stop_reason="stop" if reason == "stop" else "length",
            cached_prompt_tokens=request.cached_prompt_tokens,
        )

    def _end(self, request: _Request, result: Generation | GenerationFailed, *, keep_slot: bool) -> None:
        self._active.remove(request)
        if not keep_slot:
            self._held[request.slot] = []
        if request.done.done():
            return
        if isinstance(result, GenerationFailed):
            request.done.set_exception(result)
            return
        self._finished += 1
        self._prompt_tokens += len(request.prompt)
        self._cached_prompt_tokens += request.cached_prompt_tokens
        self._generated_tokens += len(request.action)
        request.done.set_result(result)

    def _check_alive(self, what: str) -> None:
        if self._dead is not None:
            raise EngineDead(f"{what}: the transformers engine is dead: {self._dead}")

    def _fail(self, reason: str) -> None:
        self._dead = self._dead or reason
        requests, self._active, self._waiting = self._active + self._waiting, [], []
        for request in requests:
            if not request.done.done():
                request.done.set_exception(EngineDead(f"request {request.request_id}: {self._dead}"))

    # --- in the worker thread --------------------------------------------------------------------------------------

    def _build(self) -> None:
        from actors.engines.transformers import attention, check

        device = pick_device(self._asked_device)
        if device == "cpu":
            torch.set_num_threads(self._num_threads)
        # SDPA takes a boolean mask of any shape; the flash kernels do not.
        model, checkpoint = causal_lm.load(
            self._model_path, dtype=causal_lm.torch_dtype(self._dtype), attn_implementation="sdpa"
        )
        self._published = dict(checkpoint.shapes)
        if model._can_set_attn_implementation():
            model.set_attn_implementation(attention.NAME)
        self._device = torch.device(device)
        self._model = model.to(self._device).eval().requires_grad_(False)
        self._generator = torch.Generator(self._device).manual_seed(self._seed)
        rows = min(2, self._max_batch)
        fault = check.fault(
            self._model, self._next_logits, dtype=self._dtype, max_tokens=self._max_model_len, rows=rows
        )
        if fault is not None:
            raise SetupError(
                f"model.path = {str(self._model_path)!r}: the transformers engine cannot generate with "
                f"{type(model).__name__} as it is: {fault}; use --actor.engine vllm"
            )
        self._probe = Probe(device=device, dtype=self._dtype)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """What a published version must bring: every tensor of the model's files."""
        return self._published

    def _is_tied(self) -> bool:
        head = self._model.get_output_embeddings()
        return head is not None and head.weight is self._model.get_input_embeddings().weight

    @torch.no_grad()
    def _load(self, weights: WeightsFile) -> None:
        """Raises WeightsRejected before any tensor is changed, ProbeMismatch if one is not what it should be after."""
        manifest = weights.manifest
        incoming = _read(weights)
        try:
            incoming = causal_lm.taken_up(self._model, incoming)
        except ValueError as exc:
            raise WeightsRejected(f"weights version {manifest.version}: {exc}") from exc
        held = self._model.state_dict()
        if self._is_tied() and TIED_HEAD in incoming:
            embeddings = next(n for n, t in held.items() if n != TIED_HEAD and _same(t, held[TIED_HEAD]))
            if not torch.equal(incoming[TIED_HEAD], incoming[embeddings]):
                raise WeightsRejected(
                    f"weights version {manifest.version}: {TIED_HEAD} differs from {embeddings}, "
                    f"but the model {self._model_path} ties them"
                )
        for name, tensor in incoming.items():
            self._copy(held[name], tensor, name)
        held = self._model.state_dict()
        if wrong := [name for name, tensor in incoming.items() if not _same_bits(held[name], tensor)]:
            raise ProbeMismatch(
                f"weights version {manifest.version}: after the load {wrong[0]} is not what the learner published "
                f"({len(wrong)} of {len(incoming)} tensors are not)"
            )

    def _copy(self, held: torch.Tensor, tensor: torch.Tensor, name: str) -> None:
        held.copy_(tensor)

    @torch.no_grad()
    def _score(self, tokens_ST: np.ndarray) -> np.ndarray:
        """float32[S * (T - 1)]."""
        # A copy: arrays from the wire are read-only, which torch warns about.
        tokens = torch.tensor(np.array(tokens_ST, dtype=np.int64), device=self._device)
        logits = self._model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        found: np.ndarray = torch.log_softmax(logits, dim=-1).gather(2, tokens[:, 1:, None]).reshape(-1).cpu().numpy()
        return found

    @torch.no_grad()
    def _step(self, batch: list[_Request]) -> None:
        """One more token for every request: those with a prompt to read in padded groups, all others together."""
        pending = {request: request.tokens()[len(self._held[request.slot]) :] for request in batch}
        decoding = [request for request in batch if len(pending[request]) == 1]
        reading = sorted((r for r in batch if len(pending[r]) > 1), key=lambda r: len(pending[r]))
        while reading:
            # Sorted by length, so the last one taken sets the group's width.
            size = 1
            while size < len(reading) and (size + 1) * len(pending[reading[size]]) <= PREFILL_TOKENS:
                size += 1
            group, reading = reading[:size], reading[size:]
            self._forward(group, [pending[request] for request in group])
        if decoding:
            self._forward(decoding, [pending[request] for request in decoding])

    def _forward(self, group: list[_Request], fed: list[list[int]]) -> None:
        begins = [len(self._held[request.slot]) for request in group]
        logits_BV = self._next_logits([request.slot for request in group], begins, fed)
        tokens, logprobs = self._sample(group, logits_BV.float())
        for request, token, logprob, read in zip(group, tokens, logprobs, fed, strict=True):
            self._held[request.slot].extend(read)
            if not request.starts or request.starts[-1][0] != self._version:
                request.starts.append((self._version, len(request.action)))
            request.action.append(token)
            request.logprobs.append(logprob)

    def _next_logits(self, slots: list[int], begins: list[int], fed: list[list[int]]) -> torch.Tensor:
        """float[B, V] after the last token fed to each slot; their keys and values are in the slots afterwards.

        Args:
            slots: of the batch.
            begins: how many tokens each slot holds before these.
            fed: what comes next in each, one token at least.
        """
        longest = max(map(len, fed))
        length = max(begin + len(tokens) for begin, tokens in zip(begins, fed, strict=True))
        if length > self._cache.width:
            # By doubling, so that a long chain does not copy the table at every step.
            self._cache.widen(min(self._max_model_len, max(length, 2 * self._cache.width, 64)))
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

        self._cache.rows = tensor(np.array(slots))
        self._cache.columns = tensor(np.where(is_token_BT, positions_BT, self._cache.width))
        self._cache.length = length
        logits_BV: torch.Tensor = self._model(
            input_ids=tensor(ids),
            attention_mask=tensor(mask_BTL)[:, None],
            position_ids=tensor(positions_BT),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits_BV

    def _sample(self, group: list[_Request], logits_BV: torch.Tensor) -> tuple[list[int], list[float]]:
        """Tokens and their log-probs under the distribution that sampled them (greedy: at temperature 1)."""
        settings = [request.sampling for request in group]
        temperature = torch.tensor([s.temperature or 1.0 for s in settings], device=logits_BV.device)
        logits_BV = logits_BV / temperature[:, None]
        if any(s.top_k or s.top_p < 1.0 for s in settings):
            logits_BV = _truncate(logits_BV, settings)
        logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
        # Gumbel-max: the largest of log p - log E, E exponential, is a sample of p.
        noise_BV = torch.empty_like(logits_BV).exponential_(generator=self._generator)
        for row, request in enumerate(group):
            if request.generator is not None:
                noise_BV[row].exponential_(generator=request.generator)
            if request.sampling.temperature == 0:
                noise_BV[row] = 1.0
        tokens_B = torch.argmax(logprobs_BV - noise_BV.log(), dim=-1)
        found_B = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
        return tokens_B.tolist(), found_B.tolist()


def _truncate(logits_BV: torch.Tensor, settings: Sequence[Sampling]) -> torch.Tensor:
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


def _common_prefix(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _same_bits(held: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether every number is the same, NaN too."""
    bits = {4: torch.int32, 2: torch.int16}[held.element_size()]
    return torch.equal(held.contiguous().view(bits), given.to(held.device, held.dtype).view(bits))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _read(weights: WeightsFile) -> dict[str, torch.Tensor]:
    """Every tensor of the file.  Raises WeightsRejected if it cannot be read."""
    manifest = weights.manifest
    try:
        payload = torch.from_file(str(weights.path), shared=False, size=manifest.total_bytes, dtype=torch.uint8)
    except (OSError, RuntimeError) as exc:
        raise WeightsRejected(f"weights version {manifest.version}: cannot read {weights.path}: {exc}") from exc
    found: dict[str, torch.Tensor] = {}
    for spec in manifest.tensors:
        # A copy, because a tensor may begin anywhere in the file and views need alignment.
        raw = payload[spec.offset : spec.offset + spec.nbytes].clone()
        found[spec.name] = raw.view(causal_lm.torch_dtype(spec.dtype)).view(spec.shape)
    return found
