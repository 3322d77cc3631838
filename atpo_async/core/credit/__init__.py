"""Credit assignment: what each turn of a tree is worth, and the weights of leaves and turns."""

from atpo_async.core.credit.rewards import normalised_leaves
from atpo_async.core.credit.rule import AdvantageMode, Credit, CreditRule, ValueMode, reads_ratio
from atpo_async.core.credit.tree_arrays import TreeArrays, has_signal
from atpo_async.core.credit.weights import branch_prob, leaf_tokens, leaves_below, turn_weights

__all__ = [
    "AdvantageMode",
    "Credit",
    "CreditRule",
    "TreeArrays",
    "ValueMode",
    "branch_prob",
    "has_signal",
    "leaf_tokens",
    "leaves_below",
    "normalised_leaves",
    "reads_ratio",
    "turn_weights",
]
