"""Credit assignment: what each turn of a tree is worth, and the weights of leaves and turns."""

from atpo_async.core.credit.marks import needs_no_comparison, reads_ratio, reads_reference
from atpo_async.core.credit.returns import has_signal, reads_turn_rewards
from atpo_async.core.credit.rewards import Moments, normalised_leaves
from atpo_async.core.credit.roles import EQUAL_SHARES, ROLES, by_role, outcome_share, role_factors
from atpo_async.core.credit.rule import AdvantageMode, Credit, CreditRule, ValueMode
from atpo_async.core.credit.tree_arrays import TreeArrays
from atpo_async.core.credit.weights import branch_prob, leaf_tokens, leaves_below, role_weights, turn_weights

__all__ = [
    "EQUAL_SHARES",
    "ROLES",
    "AdvantageMode",
    "Credit",
    "CreditRule",
    "Moments",
    "TreeArrays",
    "ValueMode",
    "branch_prob",
    "by_role",
    "has_signal",
    "leaf_tokens",
    "leaves_below",
    "needs_no_comparison",
    "normalised_leaves",
    "outcome_share",
    "reads_ratio",
    "reads_reference",
    "reads_turn_rewards",
    "role_factors",
    "role_weights",
    "turn_weights",
]
