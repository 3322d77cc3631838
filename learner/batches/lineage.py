"""Where the weights come from: a line of ``lineage.jsonl`` for each batch of each rank (``learner.lineage``)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atpo_async.ops.disk import until_written
from atpo_async.run.files import Appended
from atpo_async.wire.messages import Batch, BatchRow, BatchTree
from atpo_async.wire.records import TurnRecords

log = logging.getLogger("atpo.learner")

LINEAGE_FILE = "lineage.jsonl"


def write_start(path: Path, *, step: int, version: int, rank: int) -> None:
    """Append that a learner starts at ``step``: earlier lines of that step and later ones no longer count."""
    _append(path, {"starts_at": step, "rank": rank, "version": version})


def write_lineage(path: Path, batch: Batch, *, version: int, rank: int) -> None:
    """Append what a rank has trained on, one JSON object a line; the lines that still count made the weights."""
    line: dict[str, Any] = {
        "step": batch.step,
        "rank": rank,
        "version": version,
        "batch_id": batch.batch_id,
        "trees": [
            {"tree_id": t.tree_id, "task_index": t.task_index, "uses": t.uses, "turns": len(t.turns), "hash": _hash(t)}
            for t in batch.trees
        ],
    }
    if batch.rows:
        line["rows"] = [
            {"tree_id": r.tree_id, "leaf": r.leaf, "task_index": r.task_index, "uses": r.uses,
             "advantage": r.advantage, "hash": _hash(r)}
            for r in batch.rows
        ]  # fmt: skip
    _append(path, line)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Waits for: space on the disk, where it is full."""
    text = Appended(json.dumps(line, separators=(",", ":")).encode() + b"\n")
    until_written(str(path), lambda: text.write_to(path), log=log)


def _hash(tree: BatchTree | BatchRow) -> str:
    """Of the turns as they were recorded, 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for part in TurnRecords.of(tree.turns).parts:
        digest.update(part)
    return digest.hexdigest()
