"""Groups of trees with roles: when a group, or a tree, is of use, and the metrics of each role.  Pure.

A group is one tree to the buffer, a forest: it is leased, ends, is drawn, ages, leaves and is resumed as a whole.
"""

from __future__ import annotations

import numpy as np

from atpo_async.core.credit import ROLES, CreditRule, TreeArrays, by_role
from atpo_async.core.credit.roles import SYNTHESIZER
from buffer.counters import RunCounters
from buffer.trees.index import TreeEntry


def unusable(tree: TreeEntry, *, least_leaves: int = 2) -> str | None:
    """Why a pruned tree cannot be trained on; None if it can.  A single leaf cannot be compared with others.

    A group needs a synthesizer that came to its end, and a role with two leaves.
    """
    roles = tree.roles[tree.is_leaf]
    if not len(roles) or (roles.any() and not (roles == SYNTHESIZER).any()):
        return "no_leaf"
    return None if np.bincount(roles).max() >= least_leaves else "one_leaf"


def count_roles(counters: RunCounters, tree: TreeEntry, arrays: TreeArrays, rule: CreditRule) -> None:
    """Metrics of a group by role: mean reward and success of its leaves, and whether these earned different returns."""
    since, judged, success = counters.since, tree.judged, tree.success
    for role, at, own in by_role(arrays):
        name = f"team/{ROLES[role]}"
        since.mean(f"{name}/reward", float(own.reward[own.is_leaf].mean()))
        since.mean(f"{name}/signal", float(rule.credit(own).has_signal))
        if judged[at].any():
            since.mean(f"{name}/success", float(success[at].sum()) / int(np.count_nonzero(judged[at])))
