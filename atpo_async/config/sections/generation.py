"""How data are generated: the policy, the task, the search of a tree, actors and their engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from atpo_async.config import doors
from atpo_async.config.sections.base import Options, Section, named
from atpo_async.config.sections.expansion import CHAINS_ONLY, ExpansionConfig
from atpo_async.core.vocabulary import Precision

if TYPE_CHECKING:
    from atpo_async.config.schema import Config


class ModelConfig(Section):
    """The policy: an ordinary Hugging Face model folder."""

    path: str = Field("", description="model folder, or the name of one in the local Hugging Face cache")
    dtype: Precision = Field("float32", description="the engine's precision")
    max_context_tokens: int = Field(512, ge=8, description="prompt, observations and actions of one path")
    warm_start: bool = Field(False, description="make and warm-start the environment's small policy if there is none")
    warm_start_steps: int = Field(300, ge=0, description="supervised steps of the warm start")


class SearchConfig(ExpansionConfig):
    """One tree (ALGORITHM, section 1): M chains, then L rounds of K branches, or as many as they end."""

    strategy: Annotated[str, named(doors.STRATEGY)] = Field("entropy", description="which turns are branched from")
    strategy_options: Options = Field(default_factory=dict, description="passed to the strategy")
    initial_rollouts: int = Field(10, ge=1, description="M")
    rounds: int = Field(2, ge=0, description="L")
    branches: int = Field(6, ge=1, description="K, per round")
    sibling_penalty: float = Field(0.05, ge=0, description="alpha in H(n) - alpha * siblings")
    include_root: bool = Field(False, description="the prompt is a candidate too (the published code)")
    max_action_tokens: int = Field(64, ge=1)
    max_observation_tokens: int = Field(
        0,
        ge=0,
        description="a longer answer fails its branch; 0: one over half the context that leaves no space to act",
    )
    truncated_reward: float = Field(
        0.0, ge=-1e9, le=1e9, description="of a chain that runs out of context over its turns (end length_limit)"
    )
    overlong_buffer: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="B: a chain's reward falls over the last B action tokens before L (DAPO); below 1: a share of L; "
        "0: off",
    )
    overlong_tokens: int = Field(0, ge=0, description="L, action tokens of a path; 0: model.max_context_tokens")
    overlong_penalty: float = Field(1.0, gt=0, le=1e9, description="subtracted from the reward at L and beyond")
    turn_reward: Literal["none", "information-gain"] = Field(
        "none",
        description="information-gain: what a turn adds to the policy's probability of the right answer (IGPO), beside "
        "the environment's own; training trees, turns that are no leaves",
    )
    information_gain: Literal["probability", "log-prob"] = Field(
        "probability", description="of the answer: the geometric mean over its tokens, or that mean's logarithm"
    )
    one_version_gains: bool = Field(
        False, description="where other weights came between the two scores of a gain, the earlier one is taken again"
    )
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 for no limit")
    generate_timeout_s: float = Field(
        120.0, gt=0, description="one action, from when the engine has begun it; past it the branch fails"
    )
    step_timeout_s: float = Field(60.0, gt=0, description="one environment step; past it the branch fails")

    @property
    def max_leaves(self) -> int:
        """M + L*K (M without branching)."""
        return self.initial_rollouts + (0 if self.strategy in CHAINS_ONLY else self.rounds * self.branches)


class TeamConfig(Section):
    """Teams: for each task a group of trees, of G teams with N proposers and one synthesizer each, all one policy.

    Source: Rhombus (Findings of ACL 2026, 1956); docs/methods.md, "Rhombus".
    """

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


class ActorConfig(Section):
    """Actors and their engines."""

    count: int = Field(1, ge=0, description="actors that the supervisor starts; 0: they join by hand")
    trees_in_flight: int = Field(
        0, ge=0, description="trees one actor grows at once; 0: as many as keep the engine's batch full, adapted"
    )
    engine: Annotated[str, named(doors.ENGINE)] = Field("auto", description="auto: vllm where it is installed")
    engine_options: Options = Field(default_factory=dict, description="passed to the engine")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_num_seqs: int = Field(128, ge=1, description="requests the engine runs at once")
    kv_cache_gb: float = Field(1.0, gt=0, description="on a CPU")
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    tensor_parallel_size: int = Field(1, ge=1)
    num_threads: int | None = Field(None, ge=1, description="engine threads on a CPU; none for the engine's choice")
    clear_cache_on_swap: bool = Field(True, description="recompute keys and values under the new weights")
    report_every_s: float = Field(2.0, gt=0)
    leave_s: float = Field(
        20.0,
        ge=0,
        description="an actor asked to end has so long for its turns under way (supervised: stop_grace_s / 3 at most)",
    )
    gpus: tuple[int, ...] = Field(
        (), description="tensor_parallel_size for each of count actors, in order; empty: all are seen"
    )


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
        (
            buffer.keep_share < 1, f"buffer.keep_share = {buffer.keep_share:g}",
            "trees are kept by the spread of one kind of reward, and a group has two", "--buffer.keep_share 1",
        ),
        (
            config.implicit_reward.enabled, "implicit_reward.enabled = true",
            "its model tells better chains of one prompt from worse, and a group has several prompts",
            "--implicit_reward.enabled false",
        ),
    )  # fmt: skip
