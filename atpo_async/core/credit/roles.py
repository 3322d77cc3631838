"""Groups of trees with roles: credit by role, and how much each role weighs in the loss.

Source: Rhombus (Findings of ACL 2026, 1956): GRPO with rewards normalised by role.  A group is one forest: the chains
of its proposers and those of its synthesizers, which share no turn.  What the source leaves open, above all how the
roles weigh, is stated in docs/methods.md, "Rhombus".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

import numpy as np

from atpo_async.core.credit.tree_arrays import F64, I64, TreeArrays
from atpo_async.core.vocabulary import Role

ROLES: tuple[Role, ...] = get_args(Role)
"""By index in ``TreeArrays.role``; the first one stands outside groups."""
PROPOSER, SYNTHESIZER = ROLES.index("proposer"), ROLES.index("synthesizer")

EQUAL_SHARES: Mapping[int, float] = {PROPOSER: 0.5, SYNTHESIZER: 0.5}


def by_role(arrays: TreeArrays) -> list[tuple[int, I64, TreeArrays]]:
    """(role, int64[n] positions, that role's chains alone) for each role of a group, in the order of ``ROLES``."""
    found = []
    for role in np.unique(arrays.role).tolist():
        at = np.flatnonzero(arrays.role == role)
        place = np.full(len(arrays) + 1, -1, dtype=np.int64)
        place[at] = np.arange(len(at))
        own = replace(
            arrays, parent=place[arrays.parent[at]], is_leaf=arrays.is_leaf[at], reward=arrays.reward[at],
            entropy=arrays.entropy[at], num_action_tokens=arrays.num_action_tokens[at],
            turn_reward=arrays.turn_reward[at], reference=arrays.reference[at], role=np.zeros(len(at), dtype=np.int64),
        )  # fmt: skip
        found.append((role, at, own))
    return found


def outcome_share(arrays: TreeArrays, share: F64) -> F64:
    """float64[N]: weights ``share`` of leaves, of a group only those of its synthesizers, which decide its outcome.

    They sum to 1 as before; to 0 where a group has no synthesizer's leaf.
    """
    if not arrays.role.any():
        return share
    own = np.where(arrays.role == SYNTHESIZER, share, 0.0)
    total = float(own.sum())
    return own / total if total > 0 else own


def role_factors(arrays: TreeArrays, mass: F64, shares: Mapping[int, float] = EQUAL_SHARES) -> F64:
    """float64[N]: by which the loss's weights of each role are multiplied, so that they sum to the role's share.

    Args:
        arrays: of one tree or group.
        mass: float64[N], what each turn weighs in the loss without roles, all its tokens together.
        shares: role -> its share of the group's weight.  Where a group lacks a role, the others keep theirs in
            proportion, so that the group weighs what it did.

    All 1 outside groups.
    """
    factors = np.ones(len(arrays))
    if not arrays.role.any():
        return factors
    present = {role: float(mass[arrays.role == role].sum()) for role in np.unique(arrays.role).tolist()}
    whole = sum(shares.get(role, 0.0) for role, own in present.items() if own > 0)
    total = sum(present.values())
    for role, own in present.items():
        if own > 0 and whole > 0:
            factors[arrays.role == role] = shares.get(role, 0.0) / whole * total / own
    return factors
