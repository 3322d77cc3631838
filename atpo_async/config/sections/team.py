"""Teams: groups of trees with roles, of which proposers write cues and a synthesizer answers from them.

Source: Rhombus (Findings of ACL 2026, 1956): one shared model, roles by prompt, trained together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from atpo_async.config.sections.base import Section

if TYPE_CHECKING:
    from atpo_async.config.schema import Config


class TeamConfig(Section):
    """A group for each task: G teams of N proposers and one synthesizer each (docs/methods.md, "Rhombus")."""

    proposers: int = Field(0, ge=0, le=64, description="N, of each team; 0: no teams, a task is a tree")
    teams: int = Field(4, ge=2, le=256, description="G, of each training task; an evaluation has one")
    pooled: int = Field(
        0, ge=0, le=4096, description="P proposers, of which each team reads N at random; 0: N of its own for each team"
    )
    cue_tokens: int = Field(256, ge=1, description="of a cue that the synthesizer is shown; what is longer is cut")
    cue_penalty: float = Field(
        0.5, ge=0, le=1e9, description="taken off a proposer's own reward for a cue twice as long; in proportion below"
    )
    local_share: float = Field(
        0.5, ge=0, le=1, description="mu: a proposer earns mu of its own reward and 1 - mu of its teams'"
    )
    proposer_weight: float = Field(0.5, ge=0, le=1, description="of the proposers together in a group's loss")

    @property
    def on(self) -> bool:
        """Whether tasks are solved by teams."""
        return self.proposers > 0

    @property
    def pool(self) -> int:
        """Proposers of a training group."""
        return self.pooled or self.proposers * self.teams

    @property
    def max_leaves(self) -> int:
        """Chains of a training group."""
        return self.pool + self.teams


def fault_of_team(config: Config) -> str | None:
    """What contradicts teams, and the way out; None where nothing does, or there are none."""
    team = config.team
    if not team.on:
        return None
    if team.pooled and team.pooled < team.proposers:
        return (
            f"team.pooled = {team.pooled} proposers are fewer than the team.proposers = {team.proposers} that each "
            "team reads: raise it, or set it to 0, where every team has its own"
        )
    if team.pooled % team.proposers:
        return (
            f"team.pooled = {team.pooled} is no multiple of team.proposers = {team.proposers}: a pool has as many "
            f"proposers for each seat of a team; use {team.pooled - team.pooled % team.proposers + team.proposers}"
        )
    if team.cue_tokens * team.proposers >= config.model.max_context_tokens:
        return (
            f"team.proposers = {team.proposers} cues of up to team.cue_tokens = {team.cue_tokens} fill "
            f"model.max_context_tokens = {config.model.max_context_tokens}: the synthesizer has no space to act; lower "
            "team.cue_tokens"
        )
    for clashes, setting, why, way_out in _of_trees_alone(config):
        if clashes:
            return f"{setting} with team.proposers = {team.proposers}: {why}; use {way_out}"
    return None


def _of_trees_alone(config: Config) -> tuple[tuple[bool, str, str, str], ...]:
    """(whether it is so, the setting, why a group cannot have it, the way out) of settings for single trees."""
    search, credit, buffer = config.search, config.credit, config.buffer
    return (
        (
            buffer.ready == "partial", "buffer.ready = 'partial'",
            "what a proposer has earned is known only when the group is closed", "--buffer.ready complete",
        ),
        (
            search.turn_reward != "none", f"search.turn_reward = {search.turn_reward!r}",
            "what a turn tells of the right answer is measured under one prompt, and a team has several",
            "--search.turn_reward none, or let the environment pay turns (StepResult.turn_reward)",
        ),
        (
            search.prune_duplicates, "search.prune_duplicates = true",
            "it closes branches, and a member of a team is none", "--search.prune_duplicates false",
        ),
        (
            config.imitation.rows > 0, f"imitation.rows = {config.imitation.rows}",
            "a leaf is kept by how much better it did than its tree, and a group has several", "--imitation.rows 0",
        ),
        (
            credit.normalise_leaves == "batch", "credit.normalise_leaves = 'batch'",
            "rewards of both roles would have one deviation", "--credit.normalise_leaves true",
        ),
        (
            credit.whiten_advantages, "credit.whiten_advantages = true",
            "advantages of both roles would have one mean", "--credit.whiten_advantages false",
        ),
        (
            credit.advantage_mode in ("preference", "optimal_value"),
            f"credit.advantage_mode = {credit.advantage_mode!r}",
            "it compares what was said to one prompt, and members of a role may have several", "node_value",
        ),
    )  # fmt: skip
