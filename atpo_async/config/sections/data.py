"""Turns between generation and training: how old they may be, how they are stored, assembled and sampled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from atpo_async.config import doors
from atpo_async.config.sections.base import Options, Section, named
from atpo_async.core.vocabulary import WeightsOver


class StalenessConfig(Section):
    """How old data may be, in learner versions, measured when the data are consumed."""

    max_lag: int = Field(8, ge=0, description="turns older than this are masked, trees older than this dropped")
    max_uses: int = Field(1, ge=1, description="how often a tree may be served")
    exact_lag: int | None = Field(
        None,
        ge=0,
        description="a batch's trees are exactly this old, for studies; generation and training then take turns",
    )
    trees_per_batch: int = Field(16, ge=1, description="trees of one learner batch, over all ranks")
    publish_every: int = Field(1, ge=1, description="learner batches between two published versions")
    max_oversampling: float = Field(
        4.0,
        ge=1,
        description="serve a short batch once this many times trees_per_batch came without enough signal",
    )

    @property
    def max_trees_pending(self) -> int:
        """Outstanding plus ready trees that admission allows (ARCHITECTURE.md, versions and lag); a batch or more."""
        return max(self.trees_per_batch, math.ceil(self.trees_per_batch * (self.max_lag + 1) / self.max_uses))

    @property
    def least_max_lag(self) -> int:
        """The least ``max_lag`` that ``publish_every`` and ``max_uses`` allow; with less a run would stall.

        Weights are up to ``publish_every - 1`` versions behind when a tree begins, and a tree admitted into a batch
        that lacks one is used for the last time up to ``max_uses - 1`` batches later.
        """
        return (self.publish_every - 1) + (self.max_uses - 1)


class BufferConfig(Section):
    """Assembly, priorities, eviction, leases."""

    sampling: Annotated[str, named(doors.SAMPLING)] = Field("prioritized", description="how a batch's trees are chosen")
    sampling_options: Options = Field(default_factory=dict, description="passed to the sampling")
    ready: Literal["complete", "partial"] = "complete"
    partial_min_leaves: int = Field(2, ge=2)
    priority_exponent: float = Field(0.6, ge=0, description="a in P_i ~ p_i^a")
    weight_exponent: float = Field(0.4, ge=0, le=1, description="beta at the first step, annealed to 1")
    weight_exponent_steps: int = Field(0, ge=0, description="steps of the annealing; 0 for all of run.steps")
    weights_over: WeightsOver = Field(
        "max", description="w_PER divided by the batch maximum, by its mean under P, or by nothing"
    )
    priority_max_share: float = Field(0.9, ge=0, le=1, description="eta: share of max|A| in the priority")
    keep_share: float = Field(
        1.0, gt=0, le=1, description="of the trees that end, those whose chains' returns differ most; 1: all (StarPO-S)"
    )
    keep_by: Literal["trees", "variance"] = Field(
        "trees", description="keep_share is of the trees, or of the sum of their variances (RAGEN-2)"
    )
    freshness: float = Field(1.0, gt=0, le=1, description="priority factor per version of lag")
    max_bytes: int = Field(
        1 << 30, ge=1024 * 1024, description="turns in the journal on disk; past it the oldest ready trees go"
    )
    max_trees: int | None = Field(None, ge=1, description="ready trees held; past it the oldest go; none for no limit")
    shards: int = Field(
        1, ge=1, le=64, description="processes that share the buffer's trees, under one front; for more turns a second"
    )
    journal_dir: Path | None = Field(None, description="folder for the journals of runs; none: in the run's folder")
    journal_sync: bool = Field(True, description="commits reach the disk; false: they survive kill -9, not a power cut")
    follower: bool = Field(False, description="serve followers, which copy the journal to other machines")
    follower_wait: bool = Field(
        False, description="acknowledge only what a follower has on disk: nothing is lost with this machine's disk"
    )
    commit_ms: float = Field(2.0, ge=0, le=1000, description="how long a commit gathers messages before it is written")
    lease_lifetime_s: float = Field(120.0, gt=0)
    max_reissues: int = Field(3, ge=0, description="a task given up after that many lost leases")
