"""Who reads whom in a group of teams, and what a proposer earns by it.  Pure.

Source: Rhombus (Findings of ACL 2026, 1956), a hybrid of a local and a shared reward; how much of either, and how a
cue's length counts, the source leaves open (docs/methods.md, "Rhombus").
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from atpo_async.config import TeamConfig
from atpo_async.core.bounds import MAX_REWARD_PARTS
from atpo_async.core.tree import LeafReward, Turn

PROPOSER_RIGHT, GAP, CUE_TOKENS, PROPOSER_REWARD = "proposer_right", "team_gap", "cue_tokens", "proposer_reward"
"""Metrics of a team, as named parts of its synthesizer's reward: whether a proposer of it was right, that less its
synthesizer's own success, mean tokens of its cues, mean reward of its proposers before the team's is added."""


class Proposal(NamedTuple):
    """A proposer's chain that came to its end."""

    leaf: Turn
    """Its last turn; the reward is the proposer's own."""
    cue: np.ndarray
    """int32[C], not cut; empty where it gave none."""


def dealt(
    pool: int, num_teams: int, *, seats: int, there: Container[int], rng: np.random.Generator
) -> list[tuple[int, ...] | None]:
    """The proposers of each team, one of each seat; None for a team that lacks one.

    Proposer ``number`` has the seat ``number % seats``.  With as many proposers as the teams have seats each team has
    its own.  With fewer they are drawn: at each seat every proposer is dealt once, in random order, before any is dealt
    again, so that all take part in about as many teams.

    Args:
        pool: proposers of the group, a multiple of ``seats``.
        num_teams: teams.
        seats: proposers of a team.
        there: those that came to their end; a pool is dealt among them.
        rng: decides the order.
    """
    if pool == num_teams * seats:
        own = [tuple(range(team * seats, (team + 1) * seats)) for team in range(num_teams)]
        return [team if all(number in there for number in team) else None for team in own]
    columns: list[list[int]] = []
    for seat in range(seats):
        # Drawn over the whole seat first, so that who is missing changes no one else's order.
        orders = [rng.permutation(np.arange(seat, pool, seats)).tolist() for _ in range(num_teams)]
        columns.append([number for order in orders for number in order if number in there][:num_teams])
    if not all(columns):
        return [None] * num_teams
    return [tuple(column[team] for column in columns) for team in range(num_teams)]


def hybrid_rewards(
    proposals: Mapping[int, Proposal],
    teams: Mapping[int, Sequence[int]],
    earned: Mapping[int, float],
    *,
    local_share: float,
) -> tuple[LeafReward, ...]:
    """r_j = mu * l_j + (1 - mu) * R for each proposer: R is the mean reward of the teams that read it.

    One that no finished team has read is given the mean of all finished teams, which tells it neither way.  None where
    no team came to its end.

    Args:
        proposals: by number; l_j is the reward of its leaf.
        teams: number of a synthesizer -> the proposers that it read.
        earned: number -> reward of the chain's leaf, of those that came to their end.
        local_share: mu.
    """
    finished = {number: earned[number] for number in teams if number in earned}
    if not finished:
        return ()
    every = float(np.mean(list(finished.values())))
    found = []
    for number, proposal in sorted(proposals.items()):
        own = [reward for team, reward in finished.items() if number in teams[team]]
        shared = float(np.mean(own)) if own else every
        local = proposal.leaf.reward or 0.0
        found.append(LeafReward(proposal.leaf.turn_id, local_share * local + (1.0 - local_share) * shared))
    return tuple(found)


def shortened_by(turn: Turn, cue: np.ndarray, team: TeamConfig) -> Turn:
    """A proposer's last turn, less ``team.cue_penalty`` for a cue twice as long as ``team.cue_tokens``, in proportion
    between, and no more beyond."""
    over = min(max(len(cue) - team.cue_tokens, 0) / team.cue_tokens, 1.0)
    if not over:
        return turn
    return msgspec.structs.replace(turn, reward=(turn.reward or 0.0) - team.cue_penalty * over)


def synthesis_parts(turn: Turn, proposals: Sequence[Proposal]) -> Turn:
    """A synthesizer's last turn with the metrics of its team, where its own parts leave space for them."""
    told = [each.leaf.success for each in proposals if each.leaf.success is not None]
    parts = {
        CUE_TOKENS: float(np.mean([len(each.cue) for each in proposals])),
        PROPOSER_REWARD: float(np.mean([each.leaf.reward or 0.0 for each in proposals])),
    }
    if told:
        parts[PROPOSER_RIGHT] = float(any(told))
        if turn.success is not None:
            parts[GAP] = float(any(told)) - float(turn.success)
    rewards = {**parts, **turn.rewards}
    return turn if len(rewards) > MAX_REWARD_PARTS else msgspec.structs.replace(turn, rewards=rewards)
