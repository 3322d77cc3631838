"""Teams: groups of trees with roles, of which proposers write cues and a synthesizer answers from them.

Source: Rhombus (Findings of ACL 2026, 1956): one shared model, roles by prompt, trained together.
"""

from __future__ import annotations

from pydantic import Field

from atpo_async.config.sections.base import Section


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
