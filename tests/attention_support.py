"""Ways of the attention over packed trees that a CPU has, and parts so cheap that even small trees are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from learner.packing import attention_parts
from learner.packing.attention import Way

CPU = torch.device("cpu")
WAYS: list[Way] = ["parts", "dense"]


def largest_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def cheap_calls(put: Callable[[Any, str, Any], None]) -> None:
    put(attention_parts, "CALL_COST", 0)
    put(attention_parts, "JOIN_COST", 0)
    put(attention_parts, "LONGEST_BLOCK", 3)
    put(attention_parts, "_half", lambda size: -(-size // 2))
    attention_parts._chain_cost.cache_clear()
