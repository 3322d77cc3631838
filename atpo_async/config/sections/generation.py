"""How data are generated: the policy, the task, the search of a tree, actors and their engines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from atpo_async.config import doors
from atpo_async.config.sections.base import Options, Section, named
from atpo_async.config.sections.expansion import CHAINS_ONLY, ExpansionConfig
from atpo_async.core.vocabulary import Precision


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
        description="a longer observation fails its branch; 0: one over half the context that leaves no space to act",
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
