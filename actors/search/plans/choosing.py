"""Which plan a tree grows by."""

from __future__ import annotations

from actors.search.plans.base import Ground, Plan
from actors.search.plans.online import Online
from actors.search.plans.rounds import Rounds
from actors.search.plans.waves import Waves


def plan_of(ground: Ground) -> Plan:
    """By ``search.expand`` and ``search.strategy``; an evaluation's tree, which has no strategy, by rounds."""
    expansion = ground.expansion
    if expansion is not None and expansion.goes_on_from_states:
        return Waves(ground, expansion)
    if expansion is not None and expansion.is_online:
        return Online(ground)
    return Rounds(ground)
