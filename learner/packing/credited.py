"""The advantage of each turn of a tree, and the weight of each of its tokens in the mean over the loss.

Source: ALGORITHM, sections 2 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from msgspec import structs

from atpo_async.core.credit import EQUAL_SHARES, CreditRule, TreeArrays, branch_prob, leaves_below, role_weights
from atpo_async.core.credit.marks import Sums
from atpo_async.core.tree import Turn, TurnTree
from atpo_async.core.vocabulary import Aggregation
from atpo_async.wire.messages import BatchTree
from learner.packing.arrays import F64


def whole_tree(sampled: BatchTree) -> TurnTree:
    """A tree of a batch, without unfinished chains."""
    return TurnTree(
        sampled.tree_id, sampled.task_index, sampled.prompt, _rewarded(sampled), sampled.failed_branches
    ).pruned()


@dataclass(frozen=True, slots=True, eq=False)
class CreditedTree:
    """A pruned tree with the advantage of each of its turns."""

    tree: TurnTree
    weight: float
    """w_PER."""
    advantages: F64
    """float64[turns], in the order of ``tree.turns``."""
    signal: bool
    """Whether its chains earned different returns, or the advantage mode compares none."""
    sums: Sums = field(default_factory=dict)
    """What the advantage mode says of it, for metrics."""
    batch_std: float | None = None
    """Of the leaf rewards of its batch, where they are divided by it."""

    @classmethod
    def of(cls, sampled: BatchTree, rule: CreditRule, *, batch_std: float | None = None) -> CreditedTree:
        """Before anything was measured of it; where the rule's modes read that, ``recredited`` uses it."""
        tree = whole_tree(sampled)
        credit = rule.credit(tree, batch_std=batch_std)
        return cls(tree, sampled.weight, credit.advantages, credit.has_signal, credit.sums, batch_std)

    def recredited(self, ratio: F64 | None, rule: CreditRule, *, reference: F64 | None = None) -> CreditedTree:
        """The same tree, credited with what was measured of its turns.

        Args:
            ratio: float64[turns], rho_n, prox over mu; None where nothing reads it.
            rule: of the run.
            reference: float64[turns], nats, prox over the reference; None where nothing reads it.
        """
        credit = rule.credit(TreeArrays.of(self.tree), ratio=ratio, reference=reference, batch_std=self.batch_std)
        return replace(self, advantages=credit.advantages, sums=credit.sums)

    @property
    def num_leaves(self) -> int:
        return sum(turn.is_leaf for turn in self.tree)

    @property
    def num_action_tokens(self) -> int:
        """Over all leaf rows: a shared turn counts once for each."""
        return sum(len(turn.action) for leaf in self.tree.leaves() for turn in self.tree.path(leaf.turn_id))

    @property
    def num_turn_tokens(self) -> int:
        """Action tokens, each turn once."""
        return sum(len(turn.action) for turn in self.tree)


def _rewarded(sampled: BatchTree) -> tuple[Turn, ...]:
    """The turns with the rewards that were known only when their tree was closed."""
    late = {each.turn_id: each.reward for each in sampled.leaf_rewards}
    return tuple(
        structs.replace(turn, reward=late[turn.turn_id]) if turn.turn_id in late and turn.is_leaf else turn
        for turn in sampled.turns
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Normaliser:
    """The denominators of the loss's mean: of the whole batch over all ranks, whatever a rank or micro-batch holds.

    Masked turns stay in the mean: a leaf whose stale half is masked counts half, not double.
    """

    num_trees: int
    num_leaves: int
    num_action_tokens: int
    """Over all leaf rows."""
    num_turn_tokens: int
    """Each turn once."""
    role_shares: Mapping[int, float] = field(default_factory=lambda: EQUAL_SHARES)
    """Of a group of trees: the share of each role in its weight, by index in ``core.credit.ROLES``."""

    @classmethod
    def of(cls, trees: Sequence[CreditedTree]) -> Normaliser:
        """Of these trees alone."""
        return cls(
            num_trees=len(trees),
            num_leaves=sum(t.num_leaves for t in trees),
            num_action_tokens=sum(t.num_action_tokens for t in trees),
            num_turn_tokens=sum(t.num_turn_tokens for t in trees),
        )

    def row_weights(self, tree: TurnTree, aggregation: Aggregation) -> dict[int, dict[int, float]]:
        """Leaf id -> turn id on its path -> weight of each of that turn's tokens in that leaf's row.

        Added up over the leaves under a turn they are the turn weights of ALGORITHM, section 5
        (``atpo_async.core.credit.turn_weights``).
        """
        arrays = TreeArrays.of(tree)
        below = dict(zip((t.turn_id for t in tree), leaves_below(arrays).tolist(), strict=True))
        share = dict(zip((t.turn_id for t in tree), branch_prob(arrays).tolist(), strict=True))
        factors = role_weights(arrays, aggregation, self.role_shares).tolist()
        factor = dict(zip((t.turn_id for t in tree), factors, strict=True))
        weights: dict[int, dict[int, float]] = {}
        for leaf in tree.leaves():
            path = tree.path(leaf.turn_id)
            row_tokens = sum(len(turn.action) for turn in path)
            weights[leaf.turn_id] = {
                turn.turn_id: factor[leaf.turn_id]
                * self._weight(aggregation, row_tokens, below[turn.turn_id], share[leaf.turn_id])
                for turn in path
            }
        return weights

    def _weight(self, aggregation: Aggregation, row_tokens: int, leaves: int, share: float) -> float:
        match aggregation:
            case "seq-mean-token-mean":
                return 1.0 / (self.num_leaves * row_tokens)
            case "seq-mean-token-sum":
                return 1.0 / self.num_leaves
            case "token-mean":
                return 1.0 / self.num_action_tokens
            case "unique-token-mean":
                return 1.0 / (self.num_turn_tokens * leaves)
            case "branch-prob":
                return share / (self.num_trees * row_tokens)
            case "branch-prob-token-sum":
                return share / self.num_trees
