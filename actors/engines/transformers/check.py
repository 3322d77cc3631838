"""Checks that a model gives the same probabilities for text read in parts, as the engine reads it, and in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from actors.engines.transformers.attention import windows_of, windows_seen

CHECKED_TOKENS = 48
LONGEST_WINDOW = 256
"""A window up to this is crossed by the text that is compared; of longer ones only what layers say is compared."""

TOLERANCE = {"float32": 0.005, "float16": 0.25, "bfloat16": 0.25}
"""Probability (total variation) by which the next token may differ; seen: 1e-5 in float32."""


@torch.no_grad()
def fault(
    model: Any,
    next_logits: Callable[[list[int], list[int], list[list[int]]], torch.Tensor],
    *,
    dtype: str,
    max_tokens: int,
    rows: int,
) -> str | None:
    """Why tokens would be sampled from another distribution than the model's own; None where they are not.

    Args:
        model: the transformers model.
        next_logits: the engine's way: slots, tokens they hold, tokens fed to each -> float[B, V].
        dtype: of the engine.
        max_tokens: of the longest context.
        rows: sequences read side by side, 1 or 2, in slots 0 and 1; what these hold afterwards means nothing.
    """
    vocabulary, device = int(model.get_input_embeddings().weight.shape[0]), model.device
    tokens = (np.arange(2 * max_tokens).reshape(2, max_tokens) * 7 + 3) % vocabulary
    seen: dict[int, int | None] = {}
    token = windows_seen.set(seen)
    worst, done = 0.0, (0, 0)
    try:
        windows = windows_of(model.config, max_tokens=max_tokens)
        crossed = [window + 8 for window in windows if window is not None and window <= LONGEST_WINDOW]
        for part in _part_ends(min(max_tokens, max([*crossed, CHECKED_TOKENS]))):
            fed = [tokens[row, done[row] : part[row]].tolist() for row in range(rows)]
            ours = next_logits(list(range(rows)), list(done[:rows]), fed).float().softmax(-1)
            for row in range(rows):
                whole = torch.from_numpy(tokens[row : row + 1, : part[row]]).to(device)
                expected = model(input_ids=whole, use_cache=False).logits[0, -1].float().softmax(-1)
                worst = max(worst, float((ours[row] - expected).abs().sum()) / 2)
            done = part
    except Exception as exc:
        return f"{type(exc).__name__}: {str(exc).strip().splitlines()[0] if str(exc).strip() else 'no word'}"
    finally:
        windows_seen.reset(token)
    if wrong := [i for i, window in enumerate(windows) if window is not None and seen.get(i) != window]:
        return f"layer {wrong[0]} does not pass its attention its window of {windows[wrong[0]]} tokens"
    if not worst <= TOLERANCE[dtype]:
        return f"after text read in parts the next token's probabilities differ by {worst:.2g} from text in one piece"
    return None


def _part_ends(length: int) -> list[tuple[int, int]]:
    """Where two sequences of at most ``length`` tokens are cut: two parts of several tokens, then one of one."""
    if length < 8:
        return [(1, 1), (2, 2)]
    return [(length // 4, length // 3), (length // 2, length - 2), (length // 2 + 1, length - 1)]
