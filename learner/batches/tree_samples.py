"""A few of the trees that were trained on, readable, for the run's report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from atpo_async.config import CreditConfig
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.credit import CreditRule
from atpo_async.core.tree import Turn, TurnTree
from atpo_async.environments.messages.transcript import Transcriber
from atpo_async.environments.messages.types import Shown
from atpo_async.report.tree_samples import TreeTurn, append_tree_sample
from atpo_async.wire.messages import Batch


def is_sampled(step: int, *, num_steps: int, wanted: int) -> bool:
    """Whether the batch of ``step`` gives a tree: the first does, then one every ``num_steps / wanted``."""
    return wanted > 0 and (step - 1) % max(1, num_steps // wanted) == 0


class Readable:
    """Reads token ids of a run's policy: as text, and as messages where its chat format is known."""

    def __init__(self, folder: Path, *, renderer: str = "auto") -> None:
        self.transcriber = Transcriber.load(folder, renderer=renderer)

    def prompt(self, tree: TurnTree) -> tuple[str, tuple[Shown, ...]]:
        """The prompt as text and as messages."""
        return self.transcriber.text(tree.prompt), self.transcriber.prompt(tree.prompt)

    def turn(self, tree: TurnTree, turn: Turn) -> tuple[Shown, tuple[Shown, ...]]:
        """A turn's action, and its observation, as messages."""
        before = tree.context(turn.parent_id)
        context = np.concatenate([before, turn.observation])
        last = tree[turn.parent_id].action if turn.parent_id in tree else turn.observation[:0]
        return self.transcriber.action(context, turn.action), self.transcriber.observation(turn.observation, last)


def write_sample(
    path: Path, batch: Batch, *, step: int, version: int, settings: CreditConfig, readable: Readable
) -> None:
    """Append the batch's richest tree: the one with most turns.  An empty batch has none."""
    if not batch.trees:
        return
    chosen = max(batch.trees, key=lambda tree: (len(tree.turns), tree.tree_id))
    tree = TurnTree(chosen.tree_id, chosen.task_index, chosen.prompt, tuple(chosen.turns)).pruned()
    prompt, messages = readable.prompt(tree)
    append_tree_sample(
        path,
        tree_id=chosen.tree_id,
        step=step,
        version=version,
        task=chosen.task_index,
        prompt=prompt,
        messages=messages,
        turns=_turns(tree, credit_rule(settings).at(batch.step), readable),
    )


def _turns(tree: TurnTree, rule: CreditRule, readable: Readable) -> Iterator[TreeTurn]:
    text = readable.transcriber.text
    for turn, value in zip(tree, rule.credit(tree).values, strict=True):
        said, heard = readable.turn(tree, turn)
        yield TreeTurn(
            id=turn.turn_id,
            parent=turn.parent_id,
            entropy=turn.entropy,
            value=float(value),
            reward=turn.reward,
            action=text(turn.action),
            observation=text(turn.observation),
            round=turn.expansion_round,
            versions=tuple(sorted({span.version for span in turn.spans})),
            turn_reward=turn.turn_reward,
            rewards=turn.rewards,
            success=turn.success,
            end=turn.end,
            fingerprint=turn.fingerprint,
            said=said,
            heard=heard,
        )
