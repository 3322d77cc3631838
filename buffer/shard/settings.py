"""The configuration of one shard, from the run's.  Pure."""

from __future__ import annotations

import math
from typing import Any

from atpo_async.config import Config
from atpo_async.core.naming.shards import WHOLE, Shard


def of_shard(config: Config, shard: Shard) -> Config:
    """A run's configuration as one shard of its buffer has it: limits are divided, and the front draws the batches."""
    if shard == WHOLE:
        return config
    buffer, count = config.buffer, shard.count
    update: dict[str, Any] = {
        "max_bytes": buffer.max_bytes // count,
        # Rounded up: together they hold a batch, as ``max_trees`` does.
        "max_trees": None if buffer.max_trees is None else math.ceil(buffer.max_trees / count),
        "sampling": "uniform",
        "sampling_options": {},
    }
    return config.model_copy(update={"buffer": buffer.model_copy(update=update)})
