"""A few of the trees that were trained on, readable, for the run's report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from atpo_async.config import CreditConfig
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.tree import TurnTree
from atpo_async.report.tree_samples import TreeTurn, append_tree_sample
from atpo_async.wire.messages import Batch, BatchTree


def is_sampled(step: int, *, num_steps: int, wanted: int) -> bool:
    """Whether the batch of ``step`` gives a tree: the first does, then one every ``num_steps / wanted``."""
    return wanted > 0 and (step - 1) % max(1, num_steps // wanted) == 0


def decoder(folder: Path) -> Callable[[np.ndarray], str]:
    """Token ids to words, by the tokenizer in ``folder``; without one the ids themselves."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):
        return lambda token_ids: " ".join(map(str, token_ids.tolist()))
    return lambda token_ids: str(tokenizer.decode(token_ids.tolist()))


def write_sample(
    path: Path, batch: Batch, *, step: int, version: int, settings: CreditConfig, decode: Callable[[np.ndarray], str]
) -> None:
    """Append the batch's richest tree: the one with most turns.  An empty batch has none."""
    if not batch.trees:
        return
    chosen = max(batch.trees, key=lambda tree: (len(tree.turns), tree.tree_id))
    append_tree_sample(
        path,
        tree_id=chosen.tree_id,
        step=step,
        version=version,
        task=chosen.task_index,
        prompt=decode(chosen.prompt),
        turns=_turns(chosen, settings, decode),
    )


def _turns(chosen: BatchTree, settings: CreditConfig, decode: Callable[[np.ndarray], str]) -> list[TreeTurn]:
    tree = TurnTree(chosen.tree_id, chosen.task_index, chosen.prompt, tuple(chosen.turns)).pruned()
    worth = credit_rule(settings).credit(tree)
    return [
        TreeTurn(
            id=turn.turn_id,
            parent=turn.parent_id,
            entropy=turn.entropy,
            value=float(value),
            reward=turn.reward,
            action=decode(turn.action),
            observation=decode(turn.observation),
            round=turn.expansion_round,
            versions=tuple(sorted({span.version for span in turn.spans})),
            turn_reward=turn.turn_reward,
            rewards=turn.rewards,
            success=turn.success,
            end=turn.end,
        )
        for turn, value in zip(tree, worth.values, strict=True)
    ]
