"""What contradicts in the settings that shape rewards and choose trees: of a chain's length, of a tree's spread."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atpo_async.config.schema import Config
    from atpo_async.config.sections.generation import SearchConfig


def overlong_range(search: SearchConfig, max_context_tokens: int) -> tuple[int, int] | None:
    """(L, B) in action tokens of a path; None where its length costs a chain nothing."""
    if not search.overlong_buffer:
        return None
    limit = search.overlong_tokens or max_context_tokens
    buffer = search.overlong_buffer
    return limit, math.ceil(buffer * limit if buffer < 1 else buffer)


def overlong_fault(config: Config) -> str | None:
    """Why the reward of long chains cannot be shaped so; None where it can."""
    found = overlong_range(config.search, config.model.max_context_tokens)
    if found is None:
        return None
    limit, buffer = found
    if buffer > limit:
        return (
            f"search.overlong_buffer = {buffer} exceeds search.overlong_tokens = {limit}: every chain would be "
            f"punished; lower it to {limit} at most, or give a share of it, as 0.2"
        )
    if limit > config.model.max_context_tokens:
        return (
            f"search.overlong_tokens = {limit} exceeds model.max_context_tokens = {config.model.max_context_tokens}, "
            "which no chain reaches: lower it, or leave it out for that length"
        )
    return None


def keep_share_fault(config: Config) -> str | None:
    """Why trees cannot be kept by their spread so; None where they can."""
    buffer, most = config.buffer, config.staleness.max_oversampling
    if buffer.keep_share >= 1.0:
        return None
    said = f"buffer.keep_share = {buffer.keep_share:g}"
    if buffer.ready == "partial":
        return (
            f"{said} with buffer.ready = 'partial': a tree is served before it is known how its chains differ; set "
            "--buffer.ready complete, or --buffer.keep_share 1"
        )
    if buffer.keep_by == "trees" and most * buffer.keep_share < 1.0:
        return (
            f"{said} with staleness.max_oversampling = {most:g} would make every batch short: of that many times "
            f"trees_per_batch trees too few are kept; set --staleness.max_oversampling {1 / buffer.keep_share:.3g} or "
            "more, or raise keep_share"
        )
    return None
