"""Made-up trees: their shapes, how they grow, and what a policy says of their actions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec
import numpy as np
import torch
from torch import nn

from actors.expansion.candidates import sibling_parent
from actors.expansion.strategies.random import select
from atpo_async.config import Config, SearchConfig
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.tree import ROOT as PROMPT
from atpo_async.core.tree import Turn, TurnTree, spans_of
from atpo_async.wire.messages import Batch, BatchTree
from atpo_async.wire.records import TurnRecords
from learner.packing.credited import CreditedTree, Normaliser
from learner.packing.rows import leaf_rows, micro_batches


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How trees are made; lengths in tokens."""

    rollouts: int
    """M: chains from the prompt."""
    rounds: int
    """L."""
    branches: int
    """K: new siblings in each round."""
    turns: int
    """Of each chain."""
    prompt: int
    observation: int
    """What stands between two actions."""
    action: int
    spread: float = 0.25
    """Lengths of observations and actions are uniform within this share of their mean."""

    def __post_init__(self) -> None:
        for name in ("rollouts", "turns", "prompt", "action"):
            if getattr(self, name) < 1:
                raise ValueError(f"a tree's {name} must be >= 1, got {getattr(self, name)}")
        for name in ("rounds", "branches", "observation"):
            if getattr(self, name) < 0:
                raise ValueError(f"a tree's {name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.spread < 1:
            raise ValueError(f"the spread of lengths must be in [0, 1), got {self.spread:g}")
        if self.leaves < 2:
            raise ValueError("a tree of one leaf has no signal: its step would be empty; M + L * K must be >= 2")

    @property
    def leaves(self) -> int:
        return self.rollouts + self.rounds * self.branches

    @property
    def path(self) -> int:
        """Mean tokens from the first of the prompt to the end of a leaf."""
        return self.prompt + self.turns * self.action + (self.turns - 1) * self.observation

    def scaled(self, factor: float) -> Shape:
        """The same trees with all lengths times ``factor``, each one token or more."""
        lengths = {name: max(1, round(getattr(self, name) * factor)) for name in ("prompt", "observation", "action")}
        return replace(self, **lengths)


PAPER = Shape(rollouts=10, rounds=2, branches=6, turns=5, prompt=300, observation=250, action=191)
"""M, L and K of the paper; paths of 2,255 tokens, as in the cost model of ALGORITHM's reference values."""
BRANCHY = replace(PAPER, rollouts=2, rounds=4, branches=5)
"""As many leaves of two chains."""
AGENT = Shape(rollouts=8, rounds=2, branches=2, turns=4, prompt=512, observation=200, action=128)
"""12 leaves of four turns: what the part ``gpu`` takes, 16 trees a step."""
SHAPES = {
    "m10": PAPER,
    "m2": BRANCHY,
    "m10-long": replace(PAPER, prompt=4000),
    "m2-long": replace(BRANCHY, prompt=4000),
    "m8": AGENT,
}
DEMO = replace(PAPER, turns=4, prompt=10, observation=5, action=6)
"""The demo's lengths, the paper's M, L and K."""


def grow(shape: Shape, *, tree_id: str, vocab_size: int, rng: np.random.Generator) -> BatchTree:
    """One tree of random tokens; the same generator state gives the same tree.

    Its leaves earn 0 or 1, not all the same.  Behaviour log-probs are those of a uniform policy.
    """
    turns: list[Turn] = []
    prompt = rng.integers(0, vocab_size, shape.prompt).astype(np.int32)

    def tokens(mean: int) -> np.ndarray:
        few, many = round(mean * (1 - shape.spread)), round(mean * (1 + shape.spread))
        return rng.integers(0, vocab_size, int(rng.integers(few, many + 1))).astype(np.int32)

    def chain(parent: int, level: int, observation: np.ndarray, round_number: int) -> None:
        for depth in range(level, shape.turns):
            if depth > level:
                observation = tokens(shape.observation)
            action = tokens(shape.action)
            action = action if len(action) else np.zeros(1, dtype=np.int32)
            last = depth + 1 == shape.turns
            # The first two leaves differ, so that every tree has a signal.
            leaves = sum(turn.is_leaf for turn in turns)
            reward = float(leaves if leaves < 2 else rng.integers(0, 2)) if last else None
            turns.append(
                Turn(
                    run="benchmark", tree_id=tree_id, turn_id=len(turns) + 1, parent_id=parent, lease_epoch=0,
                    expansion_round=round_number, observation=observation, action=action,
                    logprobs=np.full(len(action), -np.log(vocab_size), dtype=np.float32),
                    spans=spans_of(np.zeros(len(action), dtype=np.int64)), end="done" if last else "continue",
                    reward=reward, success=None if reward is None else reward > 0, generate_s=0.0, environment_s=0.0,
                )
            )  # fmt: skip
            parent = len(turns)

    nothing = np.zeros(0, dtype=np.int32)
    for _ in range(shape.rollouts):
        chain(PROMPT, 0, nothing, 0)
    for round_number in range(1, shape.rounds + 1):
        tree = TurnTree(tree_id, 0, prompt, tuple(turns))
        chosen = select(tree, shape.branches, rng, SearchConfig())
        for turn_id in chosen:
            level = max(0, len(tree.path(turn_id)) - 1)
            observation = nothing if turn_id == PROMPT else tree[turn_id].observation
            chain(sibling_parent(tree, turn_id), level, observation, round_number)
    made = BatchTree(
        tree_id=tree_id, task_index=0, prompt=prompt, turns=TurnRecords.of(()), failed_branches=0,
        probability=1.0, weight=1.0, uses=1,
    )  # fmt: skip
    # Decoded, as the learner's intake hands trees on, so that no decoding is timed.
    return msgspec.structs.replace(made, turns=tuple(turns))


def grow_batch(shape: Shape, *, num_trees: int, vocab_size: int, seed: int, config: Config) -> Batch:
    """A whole batch for one rank."""
    rng = np.random.default_rng(seed)
    trees = tuple(grow(shape, tree_id=f"tree-{i}", vocab_size=vocab_size, rng=rng) for i in range(num_trees))
    size = Normaliser.of([CreditedTree.of(tree, credit_rule(config.credit)) for tree in trees])
    return Batch(
        batch_id=0, step=0, num_trees=size.num_trees, num_leaves=size.num_leaves,
        num_action_tokens=size.num_action_tokens, num_turn_tokens=size.num_turn_tokens, trees=trees, metrics={},
    )  # fmt: skip


def sampled_by(model: nn.Module, batch: Batch, config: Config, device: torch.device) -> Batch:
    """The same batch with the policy's own log-probs as behaviour log-probs: on policy, every ratio about 1.

    ``model``: the policy, in its wrappers where it has some.

    With others the importance weights would mask turns, or the guard would take every step twice.
    """
    trees = [CreditedTree.of(tree, credit_rule(config.credit)) for tree in batch.trees]
    rows = leaf_rows(
        trees, version=0, max_lag=0, aggregation="token-mean", normaliser=Normaliser.of(trees), keep_idle=True
    )
    found: dict[int, np.ndarray] = {}
    for item in micro_batches(rows, max_tokens=config.learner.micro_batch_tokens, version=0):
        with torch.no_grad():
            tokens, predictor, target = (
                torch.from_numpy(values).to(device) for values in (item.tokens, item.predictor, item.target)
            )
            logp = model(tokens=tokens, predictor=predictor, target=target)
        values = logp.float().cpu().numpy()
        for number in np.unique(item.number[item.counted]).tolist():
            found[number] = values[item.counted & (item.number == number)]
    numbered = iter(range(len(found)))
    replaced = tuple(
        msgspec.structs.replace(
            tree,
            turns=tuple(msgspec.structs.replace(turn, logprobs=found[next(numbered)]) for turn in item.tree),
        )
        for tree, item in zip(batch.trees, trees, strict=True)
    )
    return msgspec.structs.replace(batch, trees=replaced)
