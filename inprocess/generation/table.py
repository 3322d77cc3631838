"""Keys and values of all rows, in tables that grow; a forward pass reads a run of rows in place.

Shapes: L layers, S rows, C columns (column = position), B rows of a pass, T tokens fed to each, H heads, D channels.
What one head attends over lies in one piece: with a token's heads side by side torch's attention on a CPU takes twice
as long for one query a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIRST_ROWS, FIRST_COLUMNS = 64, 64
"""Of the tables at first; they grow by doubling."""


class KeyValueTable:
    """Stands in for transformers' Cache during a forward pass (``at`` says of which rows).

    Args:
        max_rows: that the tables may have.
        max_columns: positions of the longest context.
        device: a CPU gives memory when it is first written to: there the tables are whole from the beginning.
    """

    def __init__(self, *, max_rows: int, max_columns: int, device: torch.device) -> None:
        self.max_rows, self.max_columns = max_rows, max_columns
        self._device = device
        is_whole = device.type == "cpu"
        self.num_rows = max_rows if is_whole else min(FIRST_ROWS, max_rows)
        self._columns = max_columns if is_whole else min(FIRST_COLUMNS, max_columns)
        self._tables: list[tuple[Tensor, Tensor]] = []
        """Of each layer keys and values [S, H, C + 1, D]; padding is written to the last column."""
        self._begin = self._end = 0
        self._rows_N = self._columns_N = torch.empty(0, dtype=torch.long)
        self._places_NH = torch.empty(0, 0, dtype=torch.long)
        """Of the tokens fed in the tables as one long list of heads; made by the first layer of a pass."""
        self._length = 0

    def ensure(self, *, rows: int, columns: int) -> None:
        """Make space for so many rows and positions.  Raises ValueError past the limits."""
        if rows > self.max_rows or columns > self.max_columns:
            raise ValueError(f"{rows} rows of {columns} positions; at most {self.max_rows} of {self.max_columns}")
        if rows <= self.num_rows and columns <= self._columns:
            return
        old_rows, old_columns = self.num_rows, self._columns
        self.num_rows = _grown(old_rows, rows, self.max_rows)
        self._columns = _grown(old_columns, columns, self.max_columns)
        for layer, tables in enumerate(self._tables):
            grown = [
                table.new_zeros(self.num_rows, table.shape[1], self._columns + 1, table.shape[3]) for table in tables
            ]
            for new, table in zip(grown, tables, strict=True):
                new[:old_rows, :, :old_columns] = table[:, :, :old_columns]
            self._tables[layer] = (grown[0], grown[1])

    def at(self, begin: int, end: int, positions_BT: Tensor, is_token_BT: Tensor, *, length: int) -> None:
        """The next forward pass feeds rows ``begin:end``.

        Args:
            positions_BT: int64[B, T], where each fed token goes.
            is_token_BT: bool[B, T]; the others are padding.
            length: columns that are attended over.
        """
        self._begin, self._end, self._length = begin, end, length
        self._columns_N = torch.where(is_token_BT, positions_BT, self._columns).reshape(-1)
        rows = torch.arange(begin, end, device=positions_BT.device)
        self._rows_N = rows.repeat_interleave(positions_BT.shape[1])
        self._places_NH = self._places_NH[:0]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [B, H, T, D] of one layer; give back views [B, H, length, D] of all its tokens."""
        return self.store(
            layer_idx, key_states.transpose(1, 2).flatten(0, 1), value_states.transpose(1, 2).flatten(0, 1)
        )

    def store(self, layer: int, keys_NHD: Tensor, values_NHD: Tensor) -> tuple[Tensor, Tensor]:
        """As ``update``, of [B * T, H, D]."""
        if len(self._tables) == layer:
            self._tables.append((self._new(keys_NHD), self._new(values_NHD)))
        heads = keys_NHD.shape[1]
        if self._places_NH.shape != (len(keys_NHD), heads):
            numbers_H = torch.arange(heads, device=keys_NHD.device)
            first_N = self._rows_N * (heads * (self._columns + 1)) + self._columns_N
            self._places_NH = first_N[:, None] + numbers_H * (self._columns + 1)
        found = []
        for table, states in zip(self._tables[layer], (keys_NHD, values_NHD), strict=True):
            table.view(-1, table.shape[-1]).index_copy_(0, self._places_NH.reshape(-1), states.flatten(0, 1))
            found.append(table[self._begin : self._end, :, : self._length])
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def copy(self, sources: Sequence[int], targets: Sequence[int], *, columns: int) -> None:
        """Copy the first ``columns`` of rows into other rows, as they were before any was copied."""
        if not sources or columns == 0:
            return
        taken, given = torch.tensor(sources), torch.tensor(targets)
        for tables in self._tables:
            for table in tables:
                part = table[:, :, :columns]
                part.index_copy_(0, given.to(part.device), part.index_select(0, taken.to(part.device)))

    def swap(self, ones: Sequence[int], others: Sequence[int], *, columns: int) -> None:
        """Exchange the first ``columns`` of rows, pair by pair; no row is in two pairs."""
        self.copy([*ones, *others], [*others, *ones], columns=columns)

    def _new(self, states: Tensor) -> Tensor:
        shape = (self.num_rows, states.shape[1], self._columns + 1, states.shape[2])
        if self._device.type != "cpu":
            return states.new_zeros(shape)
        # Zeros that are read before they are written take no memory either; torch would write them.
        empty = np.zeros((*shape[:-1], shape[-1] * states.element_size()), dtype=np.uint8)
        return torch.from_numpy(empty).view(states.dtype)


def _grown(size: int, needed: int, most: int) -> int:
    if needed <= size:
        return size
    return min(most, max(needed, 2 * size))
