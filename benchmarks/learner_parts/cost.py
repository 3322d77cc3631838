"""What a layout asks of a model, in tokens, pairs of places and floating-point operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from atpo_async.core.tree import ROOT as PROMPT
from atpo_async.core.tree import TurnTree
from atpo_async.wire.messages import Batch, BatchTree


@dataclass(frozen=True)
class Work:
    """What a layout asks of the model."""

    tokens: float
    """That pass through the layers; the last of a path only needs predicting."""
    pairs: float
    """Of a query and a key it sees."""
    scored: float = 0.0
    """Tokens whose distribution over the vocabulary is computed."""

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.scored + other.scored)


def run_of(depth: float, tokens: float) -> Work:
    """Consecutive tokens that begin ``depth`` tokens below the root."""
    return Work(tokens, tokens * depth + tokens * (tokens + 1) / 2)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward pass; the backward pass has twice as many, whatever the layout."""

    token: float
    """Of the layers' matrices."""
    pair: float
    """Of attention, all layers and heads: the product for the score and the one for the value."""
    scored: float = 0.0
    """Of the output head."""

    @classmethod
    def of(cls, hf: Any) -> Flops:
        """Counted from a transformers model."""
        config = hf.config
        matrices = sum(m.weight.numel() for m in hf.base_model.modules() if isinstance(m, nn.Linear))
        channels = config.num_attention_heads * config.head_dim
        return cls(
            token=2.0 * matrices,
            pair=4.0 * config.num_hidden_layers * channels,
            scored=2.0 * config.vocab_size * config.hidden_size,
        )

    def __call__(self, work: Work) -> float:
        return self.token * work.tokens + self.pair * work.pairs + self.scored * work.scored


QWEN3_4B = Flops(token=2 * 4.0e9, pair=4.0 * 36 * 32 * 128)
"""4.0e9 parameters (output head included, for every token), 36 layers of 32 heads of 128 channels."""


def expected(prompt: float, suffix: float, *, chains: int, branches: int) -> tuple[Work, Work]:
    """(flat, tree) of a tree whose paths are ``prompt + suffix`` long and whose branches fork half-way on average.

    Attention in the limit of long rows, n * n / 2 pairs, as the reference values of ALGORITHM, section 5, have it.
    """

    def pairs(begin: float, end: float) -> float:
        return (end * end - begin * begin) / 2

    path = prompt + suffix
    fork = path - suffix / 2
    flat = Work((chains + branches) * path, (chains + branches) * pairs(0, path))
    tree = Work(
        prompt + chains * suffix + branches * suffix / 2,
        pairs(0, prompt) + chains * pairs(prompt, path) + branches * pairs(fork, path),
    )
    return flat, tree


def flat_work(tree: BatchTree) -> Work:
    """Each leaf's path as a row of its own."""
    whole = TurnTree(tree.tree_id, tree.task_index, tree.prompt, tuple(tree.turns))
    total = Work(0, 0)
    for leaf in whole.leaves():
        path = whole.path(leaf.turn_id)
        length = len(tree.prompt) + sum(len(turn.observation) + len(turn.action) for turn in path)
        total += run_of(0, length - 1) + Work(0, 0, sum(len(turn.action) for turn in path))
    return total


def tree_work(tree: BatchTree) -> Work:
    """Each token of the tree once; siblings share equal observations."""
    whole = TurnTree(tree.tree_id, tree.task_index, tree.prompt, tuple(tree.turns))
    end = {PROMPT: len(tree.prompt)}
    total = run_of(0, len(tree.prompt))
    shared: set[tuple[int, bytes]] = set()
    for turn in whole:
        begin = end[turn.parent_id]
        observed = begin + len(turn.observation)
        key = (turn.parent_id, turn.observation.tobytes())
        if key not in shared:
            shared.add(key)
            total += run_of(begin, len(turn.observation))
        end[turn.turn_id] = observed + len(turn.action)
        total += run_of(observed, len(turn.action) - turn.is_leaf) + Work(0, 0, len(turn.action))
    return total


def work_of(batch: Batch, by_tree: Callable[[BatchTree], Work]) -> Work:
    return sum((by_tree(tree) for tree in batch.trees), Work(0, 0))
