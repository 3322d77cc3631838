"""Slots: a row of keys and values for each request, which stays after the request ends.

A later prompt that begins with the same tokens, a chain's next turn, starts from them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from actors.engines.transformers.requests import AnyRequest


class Slots:
    """Which tokens each slot holds, and their keys and values.

    Args:
        num_slots: requests that run at once.
    """

    def __init__(self, num_slots: int) -> None:
        self.cache = SlotCache(num_slots)
        self.held: list[list[int]] = [[] for _ in range(num_slots)]
        """The tokens whose keys and values each slot holds."""

    def give(self, request: AnyRequest, free: Collection[int]) -> int:
        """The slot among ``free`` that holds most of the request's prompt; it is the request's from now on."""
        # The last prompt token is always computed: its output is the first token's distribution.
        shared = {slot: common_prefix(self.held[slot], request.prompt[:-1]) for slot in free}
        # Nothing to reuse anywhere: the slot whose content is the shortest is the smallest loss.
        best = max(free, key=lambda slot: (shared[slot], -len(self.held[slot])))
        request.slot, request.cached_prompt_tokens = best, shared[best]
        self.held[best] = self.held[best][: shared[best]]
        return best

    def pending(self, request: AnyRequest) -> list[int]:
        """The tokens of the request that its slot does not hold yet."""
        return request.tokens()[len(self.held[request.slot]) :]

    def forget(self, slot: int) -> None:
        """What the slot holds is unknown."""
        self.held[slot] = []

    def forget_all(self) -> None:
        """All keys and values are of other weights than those in use."""
        self.held = [[] for _ in self.held]


class SlotCache:
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
        """Make space for ``width`` tokens in every slot, besides the padding's column."""
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


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
