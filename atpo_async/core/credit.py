"""Credit: leaf rewards -> values -> advantages; leaf and turn weights.  Pure, float64.

Source: AT2PO (arXiv 2601.04767), section 3, and its published code where the two differ; ALGORITHM, section 2, the tree
traces section 4.  Shapes: N turns of a tree in an order that puts parents before children; the root (the prompt) is no
turn and is kept apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from numpy.typing import NDArray

from atpo_async.core.tree import ROOT, TurnTree
from atpo_async.core.vocabulary import Aggregation, LeafWeights

if TYPE_CHECKING:
    from atpo_async.config import CreditConfig

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

ValueMode = Literal[
    "child_mean", "leaf_mean", "child_softmax", "child_entropy_linear", "tree_trace", "tree_trace_selfnorm"
]
AdvantageMode = Literal["node_value", "diff_parent", "diff_global", "diff_localglobal"]

STD_FLOOR = 1e-6
"""Added to the standard deviation of leaf rewards (published code)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeArrays:
    """The shape of a tree and what credit needs of its turns.  Every chain must end in a leaf (``TurnTree.pruned``)."""

    parent: I64
    """int64[N]: position of the parent, below the turn's own; -1 for first turns."""
    is_leaf: NDArray[np.bool_]
    """bool[N]."""
    reward: F64
    """float64[N]; only leaves are read."""
    entropy: F64
    """float64[N], nats: H(n)."""
    num_action_tokens: I64
    """int64[N]."""

    def __post_init__(self) -> None:
        count = len(self.parent)
        if not np.all(self.parent < np.arange(count)):
            raise ValueError("credit needs parents before their children")
        has_child = np.zeros(count, dtype=bool)
        has_child[self.parent[self.parent >= 0]] = True
        if not np.array_equal(has_child, ~self.is_leaf):
            odd = np.flatnonzero(has_child == self.is_leaf).tolist()
            raise ValueError(f"credit needs a pruned tree: turns at {odd} are neither leaves nor lead to one")

    def __len__(self) -> int:
        return len(self.parent)

    @classmethod
    def of(cls, tree: TurnTree) -> TreeArrays:
        """Of a pruned tree, in the order of ``tree.turns``.

        Raises:
            ValueError: a chain ends without a finished leaf, or a leaf has no reward.
        """
        position = {turn.turn_id: i for i, turn in enumerate(tree)}
        position[ROOT] = -1
        unrewarded = [turn.turn_id for turn in tree if turn.is_leaf and turn.reward is None]
        if unrewarded:
            raise ValueError(f"tree {tree.tree_id}: leaves {unrewarded} have no reward")
        return cls(
            parent=np.array([position[t.parent_id] for t in tree], dtype=np.int64),
            is_leaf=np.array([t.is_leaf for t in tree], dtype=bool),
            reward=np.array([0.0 if t.reward is None else t.reward for t in tree], dtype=np.float64),
            entropy=np.array([t.entropy for t in tree], dtype=np.float64),
            num_action_tokens=np.array([len(t.action) for t in tree], dtype=np.int64),
        )

    def with_reward(self, reward: F64) -> TreeArrays:
        """The same tree with other leaf rewards (float64[N])."""
        return TreeArrays(
            parent=self.parent,
            is_leaf=self.is_leaf,
            reward=reward,
            entropy=self.entropy,
            num_action_tokens=self.num_action_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Credit:
    """What each turn of a tree is credited with."""

    values: F64
    """float64[N]: V(n)."""
    root_value: float
    """V of the prompt: the tree's baseline."""
    advantages: F64
    """float64[N]: A(n); all zero for a tree without signal."""


def has_signal(arrays: TreeArrays) -> bool:
    """Whether the finished leaves earned different rewards; without that there is nothing to learn from a tree."""
    rewards = arrays.reward[arrays.is_leaf]
    return bool(len(rewards) and np.any(rewards != rewards[0]))


def normalised_leaves(arrays: TreeArrays, *, weights: F64 | None = None) -> F64:
    """float64[N]: ``(r - mean) / (std + 1e-6)`` on the leaves, 0 elsewhere; population moments.

    Args:
        arrays: the tree.
        weights: float64[N] leaf weights that sum to 1 (``branch_prob``); equal ones where None.
    """
    leaf = arrays.is_leaf
    rewards = arrays.reward[leaf]
    q = np.full(len(rewards), 1.0 / max(len(rewards), 1)) if weights is None else weights[leaf]
    mean = float(np.sum(q * rewards))
    std = float(np.sqrt(np.sum(q * (rewards - mean) ** 2)))
    out = np.zeros(len(arrays))
    out[leaf] = (rewards - mean) / (std + STD_FLOOR)
    return out


def values(
    arrays: TreeArrays, *, mode: ValueMode = "child_mean", ratio: F64 | None = None, trace_cap: float = 1.0
) -> tuple[F64, float]:
    """V(n) of every turn and of the root: a leaf's is its reward, an inner turn's comes from its children.

    Args:
        arrays: the tree.
        mode: ALGORITHM, section 2; the tree traces, section 4.
        ratio: float64[N], rho_n of the tree traces: the policy's probability of the turn over that of the behaviour
            policy.  None where nothing is known of it: the traces are then ``child_mean``.
        trace_cap: c-bar, the largest ratio that counts; infinity for none.

    Returns:
        (float64[N], V(root)).
    """
    if mode == "leaf_mean":
        return _leaf_means(arrays)
    if mode == "tree_trace" or mode == "tree_trace_selfnorm":
        plain, baseline = values(arrays)
        if ratio is None:
            return plain, baseline
        weight = np.minimum(ratio, trace_cap)
        return traced(arrays, weight, baseline) if mode == "tree_trace" else _weighted_children(arrays, weight)
    return _weighted_children(arrays, _child_weights(arrays, mode))


def traced(arrays: TreeArrays, weight: F64, baseline: float) -> tuple[F64, float]:
    """V(n) = b + mean over the children of weight_c (V(c) - b): what a child says counts as far as its ratio reaches.

    Args:
        arrays: the tree.
        weight: float64[N], min(rho, c-bar) of each turn.
        baseline: b, what is believed of a turn whose children say nothing.
    """
    gain, count = np.zeros(len(arrays) + 1), np.zeros(len(arrays) + 1)
    value = np.zeros(len(arrays))
    for i in range(len(arrays) - 1, -1, -1):
        value[i] = arrays.reward[i] if arrays.is_leaf[i] else baseline + gain[i] / count[i]
        gain[arrays.parent[i]] += weight[i] * (value[i] - baseline)
        count[arrays.parent[i]] += 1
    return value, float(baseline + gain[-1] / count[-1]) if count[-1] else 0.0


def _weighted_children(arrays: TreeArrays, weight: F64) -> tuple[F64, float]:
    """V(n) = sum of weight_c V(c) over sum of weight_c; the plain mean where no child has weight."""
    # The buffer does this for every tree that ends, and one number at a time lists are several times faster than
    # arrays.  One slot more for the root: index -1 is the last one.
    length = len(arrays)
    weighted, total, plain, count = ([0.0] * (length + 1) for _ in range(4))
    parents, leaf, reward = arrays.parent.tolist(), arrays.is_leaf.tolist(), arrays.reward.tolist()
    own = weight.tolist()
    value = [0.0] * length
    for i in range(length - 1, -1, -1):
        parent = parents[i]
        mean = weighted[i] / total[i] if total[i] > 0 else plain[i] / max(count[i], 1.0)
        worth = reward[i] if leaf[i] else mean
        value[i] = worth
        weighted[parent] += own[i] * worth
        total[parent] += own[i]
        plain[parent] += worth
        count[parent] += 1
    return np.array(value), weighted[-1] / total[-1] if total[-1] > 0 else plain[-1] / max(count[-1], 1.0)


def _child_weights(arrays: TreeArrays, mode: ValueMode) -> F64:
    """float64[N]: a turn's weight among its siblings, not normalised."""
    if mode == "child_mean":
        return np.ones(len(arrays))
    # Among siblings only differences matter for the exponential; the largest of each family keeps it in range.
    families = arrays.parent + 1
    if mode == "child_softmax":
        largest = np.full(len(arrays) + 1, -np.inf)
        np.maximum.at(largest, families, arrays.entropy)
        weight: F64 = np.exp(arrays.entropy - largest[families])
        return weight
    # A family of certain actions has no entropy to weigh by: its weights are all zero, and the plain mean is taken.
    return np.maximum(arrays.entropy, 0.0)


def _leaf_means(arrays: TreeArrays) -> tuple[F64, float]:
    sums = np.append(np.where(arrays.is_leaf, arrays.reward, 0.0), 0.0)
    counts = np.append(arrays.is_leaf.astype(np.float64), 0.0)
    for i in range(len(arrays) - 1, -1, -1):
        sums[arrays.parent[i]] += sums[i]
        counts[arrays.parent[i]] += counts[i]
    mean = sums / np.maximum(counts, 1.0)
    return mean[:-1], float(mean[-1])


def advantages(arrays: TreeArrays, value: F64, root_value: float, *, mode: AdvantageMode = "node_value") -> F64:
    """float64[N]: A(n) from V(n) and V(root)."""
    if mode == "node_value":
        return value.copy()
    to_parent: F64 = value - np.append(value, root_value)[arrays.parent]
    to_root: F64 = value - root_value
    if mode == "diff_parent":
        return to_parent
    return to_root if mode == "diff_global" else to_parent + to_root


def credit(
    tree: TurnTree | TreeArrays,
    *,
    value_mode: ValueMode = "child_mean",
    advantage_mode: AdvantageMode = "node_value",
    normalise: bool = True,
    leaf_weights: LeafWeights = "uniform",
    ratio: F64 | None = None,
    trace_cap: float = 1.0,
) -> Credit:
    """Values and advantages of a pruned tree, in the order of its turns.

    Args:
        tree: without unfinished chains.
        value_mode, advantage_mode: ALGORITHM, section 2; the tree traces, section 4.
        normalise: leaf rewards to mean 0 and standard deviation 1 inside the tree first.
        leaf_weights: under which weights of the leaves those moments are taken.
        ratio, trace_cap: of the tree traces (``values``); other modes do not read them.

    Raises:
        ValueError: a ratio is missing, negative or not finite; a tree as ``TreeArrays.of`` refuses it.
    """
    arrays = TreeArrays.of(tree) if isinstance(tree, TurnTree) else tree
    if ratio is not None:
        _check_ratio(ratio, [turn.turn_id for turn in tree] if isinstance(tree, TurnTree) else range(len(arrays)))
    if normalise:
        weights = branch_prob(arrays) if leaf_weights == "branch-prob" else None
        arrays = arrays.with_reward(normalised_leaves(arrays, weights=weights))
    value, root = values(arrays, mode=value_mode, ratio=ratio, trace_cap=trace_cap)
    if not has_signal(arrays):
        # Exactly zero: un-normalised equal rewards would otherwise push every action up or down alike.
        return Credit(values=value, root_value=root, advantages=np.zeros(len(arrays)))
    return Credit(values=value, root_value=root, advantages=advantages(arrays, value, root, mode=advantage_mode))


def credit_as(tree: TurnTree | TreeArrays, settings: CreditConfig, *, ratio: F64 | None = None) -> Credit:
    """``credit`` with the settings of a configuration."""
    return credit(
        tree,
        value_mode=cast(ValueMode, settings.value_mode),
        advantage_mode=cast(AdvantageMode, settings.advantage_mode),
        normalise=settings.normalise_leaves,
        leaf_weights=settings.leaf_weights,
        ratio=ratio,
        trace_cap=settings.trace_cap,
    )


def _check_ratio(ratio: F64, names: Sequence[int]) -> None:
    if len(ratio) != len(names):
        raise ValueError(
            f"credit got {len(ratio)} turn ratios for {len(names)} turns; give one for each turn, in order"
        )
    bad = np.flatnonzero(~(np.isfinite(ratio) & (ratio >= 0)))
    if len(bad):
        raise ValueError(
            f"turn {names[int(bad[0])]} has the ratio {ratio[bad[0]]}; expected finite and not negative: bound the "
            "log-ratio before exp()"
        )


def branch_prob(arrays: TreeArrays) -> F64:
    """float64[N]: q_i on the leaves, 0 elsewhere: the product over the path of 1 / (children of the parent).

    They sum to 1; the mean of leaf rewards under them is the ``child_mean`` value of the root.
    """
    families = np.bincount(arrays.parent + 1, minlength=len(arrays) + 1)
    share = (1.0 / np.maximum(families, 1)).tolist()
    reach = [1.0] * (len(arrays) + 1)
    for i, parent in enumerate(arrays.parent.tolist()):
        reach[i] = reach[parent] * share[parent + 1]
    return np.where(arrays.is_leaf, reach[:-1], 0.0)


def leaves_below(arrays: TreeArrays) -> I64:
    """int64[N]: L_n, the leaves under each turn, a leaf itself counted."""
    return _sum_below(arrays, arrays.is_leaf.astype(np.float64)).astype(np.int64)


def leaf_tokens(arrays: TreeArrays) -> I64:
    """int64[N]: T_i on the leaves, the action tokens on the path that ends there; 0 elsewhere."""
    depth = np.zeros(len(arrays) + 1, dtype=np.int64)
    for i in range(len(arrays)):
        depth[i] = depth[arrays.parent[i]] + arrays.num_action_tokens[i]
    return np.where(arrays.is_leaf, depth[:-1], 0)


def turn_weights(
    arrays: TreeArrays,
    *,
    aggregation: Aggregation = "seq-mean-token-mean",
    num_leaves: int | None = None,
    num_action_tokens: int | None = None,
    num_turn_tokens: int | None = None,
    num_trees: int = 1,
) -> F64:
    """float64[N]: ω_n, with which one pass over the tree equals the flat loss (ALGORITHM, section 5).

    Args:
        arrays: the tree.
        aggregation: how the flat loss averages.
        num_leaves: N, of the whole batch; this tree's own where None.
        num_action_tokens: ΣT_i, of the whole batch; this tree's own where None.
        num_turn_tokens: action tokens, each turn once, of the whole batch; this tree's own where None.
        num_trees: of the whole batch.
    """
    leaves = int(arrays.is_leaf.sum()) if num_leaves is None else num_leaves
    tokens = leaf_tokens(arrays)
    by_token = np.where(arrays.is_leaf, 1.0 / np.maximum(tokens, 1), 0.0)
    match aggregation:
        case "seq-mean-token-mean":
            return _sum_below(arrays, by_token / leaves)
        case "seq-mean-token-sum":
            return leaves_below(arrays) / leaves
        case "token-mean":
            return leaves_below(arrays) / (int(tokens.sum()) if num_action_tokens is None else num_action_tokens)
        case "unique-token-mean":
            total = int(arrays.num_action_tokens.sum()) if num_turn_tokens is None else num_turn_tokens
            return np.full(len(arrays), 1.0 / total)
        case "branch-prob":
            return _sum_below(arrays, branch_prob(arrays) * by_token / num_trees)
        case "branch-prob-token-sum":
            return _sum_below(arrays, branch_prob(arrays) / num_trees)


def _sum_below(arrays: TreeArrays, own: F64) -> F64:
    """float64[N]: each turn's own number and those of all turns under it."""
    sums = np.append(own, 0.0)
    for i in range(len(arrays) - 1, -1, -1):
        sums[arrays.parent[i]] += sums[i]
    below: F64 = sums[:-1]
    return below
