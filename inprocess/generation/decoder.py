"""The model of the generation: it decodes all requests together, a token of each in every forward pass.

Nothing else runs meanwhile, and weights change between batches only.  So a context's keys and values hold for as long
as the weights do: chains of one prompt share what was computed for it, turns go on where the turn before has ended, and
branches begin where their tree has been.

Shapes: B rows of a pass, T tokens fed to each, L columns attended over, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.engines.base import EngineSettings
from actors.engines.common.checks import pick_device
from actors.engines.common.stop_strings import StopStrings
from actors.engines.transformers import attention, check
from atpo_async.core.errors import SetupError
from atpo_async.models import causal_lm
from inprocess.generation.forward import MergedForward, NotLaidOut
from inprocess.generation.requests import Request, ScoreRequest
from inprocess.generation.rows import Rows, bytes_of
from inprocess.generation.sampling import Sampler
from inprocess.generation.table import KeyValueTable

log = logging.getLogger("inprocess")

PREFILL_TOKENS = 8192
"""Most tokens in one forward pass that reads prompts, padding included."""

COMPARED_TOKENS = 16
"""Of the text whose log-probs are compared whenever there are other weights."""

LARGEST_DIFFERENCE = 1e-3
"""Nats by which they may differ from the model's; seen: 1e-5."""

LEFT_SHARE = 0.25
"""A batch is left when so few of its requests go on: they wait for others, which make the next passes worth more."""


class Decoder:
    """A model in memory, with the keys and values of its rows.  Raises SetupError where it cannot be used."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._device = torch.device(pick_device(settings.device))
        # SDPA takes a mask of any shape; the flash kernels do not.
        model, _ = causal_lm.load(
            settings.model, dtype=causal_lm.torch_dtype(settings.dtype), attn_implementation="sdpa"
        )
        if model._can_set_attn_implementation():
            model.set_attn_implementation(attention.NAME)
        self.model: Any = model.to(self._device).eval().requires_grad_(False)
        self._head: Any = model.get_output_embeddings()
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.stop_strings = StopStrings.of_folder(settings.model) if settings.stop_strings else None
        self._slides = True
        """A layer's window is cut out of a mask of bools; without one the mask is of numbers, which costs less."""
        most = self._most_rows(settings)
        self.max_active = min(settings.max_num_seqs, max(1, most // 3))
        """Requests that are decoded at once."""
        self.table = KeyValueTable(max_rows=most, max_columns=settings.max_model_len, device=self._device)
        self.rows = Rows(most)
        self._generator = torch.Generator(self._device).manual_seed(settings.seed)
        self.under_way: list[Request] = []
        """Requests that have begun and are not complete."""
        self._first = 0
        """Place of the first of a batch's rows, which stand side by side."""
        self._merged: MergedForward | None = None
        """Computes what the model does in fewer operations; None where the model itself is used."""
        self._check()
        try:
            self._merged = MergedForward(self.model, max_tokens=settings.max_model_len)
        except NotLaidOut as exc:
            log.info("generation uses %s as it is: %s", type(self.model).__name__, exc)
        else:
            self._compare()

    def _most_rows(self, settings: EngineSettings) -> int:
        """As many as ``actor.kv_cache_gb`` holds of the longest context, three at least."""
        text: Any = self.model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        channels = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        a_token = 2 * int(text.num_hidden_layers) * int(heads) * int(channels) * int(self.model.dtype.itemsize)
        space = int(settings.kv_cache_gb * 2**30)
        return max(3, space // (a_token * (settings.max_model_len + 1)))

    def _check(self) -> None:
        fault = check.fault(
            self.model,
            self._next_logits,
            dtype=self._settings.dtype,
            max_tokens=self._settings.max_model_len,
            rows=2,
        )
        if fault is not None:
            kind = type(self.model).__name__
            raise SetupError(
                f"model.path = {str(self._settings.model)!r}: generation in this process cannot use {kind} as it is: "
                f"{fault}; run it as `atpo train` does, with --actor.engine vllm"
            )
        windows = attention.windows_of(self.model.config, max_tokens=self._settings.max_model_len)
        self._slides = any(window is not None for window in windows)

    def seeded(self, seed: int) -> torch.Generator:
        """The source of randomness of a request with a seed of its own."""
        return torch.Generator(self._device).manual_seed(seed)

    def give_up(self, request: Request) -> None:
        """Of one under way nothing more is wanted; what its row holds stays for others."""
        self.under_way.remove(request)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy these weights, under the model's own names.  Raises ValueError for a tensor that is not one of them.

        No request may be under way.
        """
        assert not self.under_way
        held = self.model.state_dict()
        if missing := sorted(held.keys() - tensors.keys()):
            raise ValueError(f"tensor {missing[0]} is missing")
        for name, tensor in tensors.items():
            held[name].copy_(tensor)
        self.rows.forget_all()
        if self._merged is not None:
            self._merged.load()
            self._compare()

    @torch.inference_mode()
    def _compare(self) -> None:
        """Use the model itself from now on where its log-probs are not those of the merged weights.

        No row may hold anything.
        """
        length = min(COMPARED_TOKENS, self._settings.max_model_len)
        tokens_ST = ((np.arange(2 * length) * 7 + 3) % self.vocab_size).reshape(2, length)
        whole = self.model(input_ids=torch.from_numpy(tokens_ST).to(self._device), use_cache=False).logits
        worst, done = 0.0, 0
        for end in (length // 2, length):
            if end == done:
                continue
            ours = self._next_logits([0, 1], [done, done], tokens_ST[:, done:end].tolist())
            error = torch.log_softmax(ours, -1) - torch.log_softmax(whole[:, end - 1], -1)
            worst, done = max(worst, float(error.abs().max())), end
        if not worst <= LARGEST_DIFFERENCE:
            log.warning(
                "generation uses %s as it is: its log-probs differ from those of its merged weights by %.2g nats",
                type(self.model).__name__, worst,
            )  # fmt: skip
            self._merged = None

    @torch.inference_mode()
    def score(self, tokens_ST: np.ndarray) -> np.ndarray:
        """float32[S, T - 1]: log-prob of each token given the ones before it, at temperature 1."""
        tokens = torch.tensor(np.array(tokens_ST, dtype=np.int64), device=self._device)
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        found: np.ndarray = torch.log_softmax(logits, dim=-1).gather(2, tokens[:, 1:, None])[..., 0].cpu().numpy()
        return found

    @torch.inference_mode()
    def score_after(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
        """float32[T] of each continuation: its log-probs after its context, at temperature 1."""
        wholes = [np.concatenate([request.context, request.continuation]) for request in requests]
        found: list[np.ndarray] = []
        longest = max(map(len, wholes))
        size = max(1, PREFILL_TOKENS // longest)
        for begin in range(0, len(wholes), size):
            part = wholes[begin : begin + size]
            tokens_ST = np.zeros((len(part), longest), dtype=np.int64)
            for row, whole in enumerate(part):
                tokens_ST[row, : len(whole)] = whole  # what stands behind is seen by no token before it
            scores_ST = self.score(tokens_ST)
            for row, request in enumerate(requests[begin : begin + size]):
                first = len(request.context) - 1
                found.append(scores_ST[row, first : first + len(request.continuation)])
        return found

    # --- a batch -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def advance(self, new: Sequence[Request]) -> list[Request]:
        """Decode these and the requests under way until most of them are complete; returns those that are.

        Args:
            new: at most ``max_active`` with those under way.
        """
        leaders, followers = self._admit(new)
        followers.sort(key=lambda pair: self.rows.place[pair[0].row])
        requests = [*leaders, *(request for request, _ in followers)]
        self.rows.used_now(request.row for request in requests)
        # In the order of their places, from the first one on: their order in every array below.
        ordered = sorted(requests, key=lambda request: self.rows.place[request.row])
        sampler = Sampler(ordered, self._generator)
        logits_BV = self._read(leaders, [self.rows.place[lead.row] for _, lead in followers])
        # Not before they are read: until then a longer prompt must not begin with what they will hold.
        for request in leaders:
            if not request.tokens:
                self.rows.remember(request.row, bytes_of(request.prompt), len(request.prompt))
        self._decode(ordered, sampler, logits_BV)
        self.under_way = [request for request in ordered if request.reason is None]
        done = [request for request in requests if request.reason is not None]
        for request in done:
            # The action's last token was never fed.
            whole = np.concatenate([request.prompt, np.array(request.tokens, dtype=np.int32)])
            self.rows.remember(request.row, bytes_of(whole), len(whole) - 1)
        return done

    def _admit(self, new: Sequence[Request]) -> tuple[list[Request], list[tuple[Request, Request]]]:
        """Give rows to new requests, and put the rows of all requests side by side.

        Returns:
            The requests whose pending tokens are to be fed, with those under way, whose rows come first; and those
            with a prompt that one of these has too, each beside it.
        """
        rows, leaders = self.rows, list(self.under_way)
        taken = {request.row for request in leaders}
        first: dict[bytes, Request] = {}
        followers: list[tuple[Request, Request]] = []
        copies: list[tuple[int, int, int]] = []
        for request in new:
            context = bytes_of(request.prompt)
            if (twin := first.get(context)) is not None:
                # A row that is still to be copied from holds what its copy needs.
                request.row = rows.take(taken | {source for source, _, _ in copies})
                request.cached = len(request.prompt) - 1
                followers.append((request, twin))
            else:
                first[context] = request
                leaders.append(request)
                self._place(request, context, taken, copies)
            taken.add(request.row)
        self.table.ensure(rows=len(rows), columns=max((r.length for r in [*leaders, *new]), default=1))
        self._first = rows.best_begin([request.row for request in leaders], in_all=len(leaders) + len(followers))
        for part, after in ((leaders, 0), ([request for request, _ in followers], len(leaders))):
            ones, others = rows.gather([request.row for request in part], begin=self._first + after)
            held = max((rows.held[rows.row_at(place)] for place in [*ones, *others]), default=0)
            self.table.swap(ones, others, columns=held)
        if copies:
            sources, targets = ([rows.place[row] for row in pair] for pair in list(zip(*copies, strict=True))[:2])
            self.table.copy(sources, targets, columns=max(held for _, _, held in copies))
        return leaders, followers

    def _place(self, request: Request, context: bytes, taken: set[int], copies: list[tuple[int, int, int]]) -> None:
        """A row for a request: the one that holds its beginning and no more, or an empty one to copy that into."""
        rows = self.rows
        found = rows.longest(context)
        # The last prompt token is always computed: its output is the first token's distribution.
        held = 0 if found is None else min(found.held, len(request.prompt) - 1)
        request.cached = held
        if found is not None and found.row not in taken and rows.held[found.row] == held:
            request.row = found.row
            return
        sources = {source for source, _, _ in copies} | ({found.row} if found is not None else set())
        request.row = rows.take(taken | sources)
        if found is not None and held:
            copies.append((found.row, request.row, held))
        rows.held[request.row] = held

    def _read(self, leaders: Sequence[Request], twins: Sequence[int]) -> Tensor:
        """float[B, V] after what each request has: feed what the leaders' rows lack, and copy it for the others.

        Args:
            leaders: whose rows are the batch's first ones.
            twins: place of the leader that each following row is a copy of.
        """
        rows = self.rows
        ordered = sorted(leaders, key=lambda request: rows.place[request.row])
        fed = [request.pending(rows.held[request.row]) for request in ordered]
        begins = [rows.held[request.row] for request in ordered]
        parts, at = [], 0
        while at < len(ordered):
            end, widest = at + 1, len(fed[at])
            while end < len(ordered) and (end + 1 - at) * max(widest, len(fed[end])) <= PREFILL_TOKENS:
                widest = max(widest, len(fed[end]))
                end += 1
            parts.append(self._forward(self._first + at, begins[at:end], fed[at:end]))
            at = end
        for request, tokens in zip(ordered, fed, strict=True):
            rows.held[request.row] += len(tokens)
        logits_BV = torch.cat(parts) if len(parts) > 1 else parts[0]
        if not twins:
            return logits_BV
        first = self._first + len(ordered)
        targets = list(range(first, first + len(twins)))
        leading = [place - self._first for place in twins]
        lengths = [ordered[i].length for i in leading]
        self.table.copy(twins, targets, columns=max(lengths))
        for place, length in zip(targets, lengths, strict=True):
            rows.held[rows.row_at(place)] = length
        return torch.cat([logits_BV, logits_BV[leading]])

    def _decode(self, requests: Sequence[Request], sampler: Sampler, logits_BV: Tensor) -> None:
        """Sample until few requests go on; their tokens are with them afterwards."""
        count = len(requests)
        lengths_B = np.array([request.length for request in requests])
        begins_B = np.array([len(request.tokens) for request in requests])
        most_B = np.array([request.most for request in requests])
        made_B = begins_B.copy()
        goes_on_B = np.ones(count, dtype=bool)
        stops_B = np.zeros(count, dtype=bool)
        tokens: list[np.ndarray] = []
        logprobs: list[np.ndarray] = []
        while True:
            drawn_B, found_B = sampler.draw(logits_BV.float())
            token_B = drawn_B.cpu().numpy()
            tokens.append(token_B)
            logprobs.append(found_B)
            made_B += goes_on_B
            ended_B = goes_on_B & sampler.stopped(token_B)
            ended_B |= self._by_strings(requests, goes_on_B & ~ended_B, begins_B, tokens)
            stops_B |= ended_B
            goes_on_B &= ~ended_B & (made_B < most_B)
            if np.count_nonzero(goes_on_B) <= LEFT_SHARE * count:
                break
            positions_B = np.where(goes_on_B, lengths_B + len(tokens) - 1, lengths_B - 1)
            logits_BV = self._next(drawn_B, positions_B, goes_on_B)
        self._conclude(requests, made_B - begins_B, stops_B, goes_on_B, np.stack(tokens), np.stack(logprobs))

    def _conclude(
        self,
        requests: Sequence[Request],
        new_B: np.ndarray,
        stops_B: np.ndarray,
        goes_on_B: np.ndarray,
        tokens_NB: np.ndarray,
        logprobs_NB: np.ndarray,
    ) -> None:
        for i, request in enumerate(requests):
            number = int(new_B[i])
            request.tokens += tokens_NB[:number, i].tolist()
            request.logprobs += logprobs_NB[:number, i].tolist()
            # All but the last one were fed.
            self.rows.held[request.row] = request.length - 1
            if not goes_on_B[i]:
                request.reason = "stop" if stops_B[i] else "length"

    def _by_strings(
        self, requests: Sequence[Request], asked_B: np.ndarray, begins_B: np.ndarray, tokens: Sequence[np.ndarray]
    ) -> np.ndarray:
        """bool[B]: of the requests asked for, those whose action a stop string has ended."""
        ended = np.zeros(len(requests), dtype=bool)
        if self.stop_strings is None:
            return ended
        for i in np.flatnonzero(asked_B).tolist():
            strings = requests[i].sampling.stop_strings
            if strings:
                action = [*requests[i].tokens, *(int(step[i]) for step in tokens)]
                ended[i] = self.stop_strings.ended(action, strings)
        return ended

    # --- forward passes ----------------------------------------------------------------------------------------

    def _next(self, tokens_B: Tensor, positions_B: np.ndarray, is_token_B: np.ndarray) -> Tensor:
        """float[B, V] after one more token in each of the batch's rows; rows that do not go on give something."""
        self.table.ensure(rows=len(self.rows), columns=int(positions_B.max()) + 1)
        return self._run(self._first, tokens_B[:, None], positions_B[:, None], is_token_B[:, None])

    def _forward(self, begin: int, begins: Sequence[int], fed: Sequence[np.ndarray]) -> Tensor:
        """float[B, V] after the last token fed to each of the rows from the place ``begin`` on."""
        lengths_B = np.array([len(tokens) for tokens in fed])
        longest = int(lengths_B.max())
        ids_BT = np.zeros((len(fed), longest), dtype=np.int64)
        for row, tokens in enumerate(fed):
            ids_BT[row, : len(tokens)] = tokens
        column_T = np.arange(longest)
        is_token_BT = column_T < lengths_B[:, None]
        # Padding stands behind and sees what a token there would: a row with nothing to see would give NaN.
        positions_BT = np.minimum(np.array(begins)[:, None] + column_T, (np.array(begins) + lengths_B - 1)[:, None])
        return self._run(begin, torch.from_numpy(ids_BT).to(self._device), positions_BT, is_token_BT, lengths_B)

    def _run(
        self,
        begin: int,
        ids_BT: Tensor,
        positions_BT: np.ndarray,
        is_token_BT: np.ndarray,
        lengths_B: np.ndarray | None = None,
    ) -> Tensor:
        """float[B, V] after the last token of each row (``lengths_B``; the only one where None)."""
        length = int(positions_BT.max()) + 1
        positions = torch.from_numpy(positions_BT).to(self._device)
        self.table.at(
            begin, begin + len(ids_BT), positions, torch.from_numpy(is_token_BT).to(self._device), length=length
        )
        if self._merged is not None:
            return self._merged.run(self.table, ids_BT, positions_BT, None if lengths_B is None else lengths_B - 1)
        sees_BTL = torch.arange(length, device=self._device) <= positions[:, :, None]
        mask = sees_BTL[:, None]
        if not self._slides:
            mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill_(~mask, -torch.inf)
        hidden = self.model.base_model(
            input_ids=ids_BT,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.table,
            use_cache=True,
        ).last_hidden_state
        if lengths_B is None:
            hidden = hidden[:, 0]
        else:
            hidden = hidden[torch.arange(len(hidden)), torch.from_numpy(lengths_B - 1)]
        logits: Tensor = self._head(hidden)
        return logits

    def _next_logits(self, slots: list[int], begins: list[int], fed: list[list[int]]) -> Tensor:
        """As the engine's check of a model calls it: rows 0 to B - 1 hold ``begins`` tokens each."""
        end = max(begin + len(tokens) for begin, tokens in zip(begins, fed, strict=True))
        self.table.ensure(rows=len(slots), columns=end)
        return self._forward(0, begins, [np.array(tokens) for tokens in fed])
