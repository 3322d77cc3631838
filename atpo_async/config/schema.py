"""Configuration: pydantic models by concern, TOML in, dotted options on top, contradictions refused with their path.

Every field is also a dotted option (``--learner.lr 1e-5``).  Derived bounds are properties.  Unknown keys are refused.
Several files may be laid over one another, a recipe over a task's; "none" stands for no value, which TOML lacks.
Durations are seconds, sizes bytes unless the name says otherwise, staleness is counted in learner versions only.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from atpo_async.config import suggestions
from atpo_async.core.errors import ConfigError

BUILT_IN_ENVIRONMENTS = ("hopqa",)
"""Names that environment.name may have besides 'package.module:factory'."""


class Section(BaseModel):
    """Frozen, without unknown keys; one per concern."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read ``lr = true`` as 1; and ``dual_clip = "none"`` is none, in a file as in an option."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if value == "none" and type(None) in get_args(annotation):
            return None
        parts = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(part, bool) for part in parts) and not _takes(annotation, bool):
            raise PydanticCustomError("truth", "takes no truth value")
        return value


def _takes(annotation: Any, kind: type) -> bool:
    """Whether ``kind`` occurs in a field's annotation."""
    return annotation is kind or any(_takes(part, kind) for part in get_args(annotation))


class RunConfig(Section):
    """The run as a whole."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder name under run.dir")
    dir: Path = Field(Path("runs"), description="where run folders are made")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of tasks, sampling, model and search")
    steps: int = Field(100, ge=1, description="learner batches to train")
    max_tasks: int | None = Field(
        None, ge=1, description="training tasks 0 to max_tasks - 1, then the run ends; none for no end but run.steps"
    )


class ModelConfig(Section):
    """The policy: an ordinary Hugging Face model folder."""

    path: str = Field("", description="model folder, or the name of one in the local Hugging Face cache")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="the engine's precision")
    max_context_tokens: int = Field(512, ge=8, description="prompt, observations and actions of one path")
    warm_start: bool = Field(False, description="make and warm-start the environment's small policy if there is none")
    warm_start_steps: int = Field(300, ge=0, description="supervised steps of the warm start")


class EnvironmentConfig(Section):
    """The task."""

    name: str = Field("hopqa", description="a built-in environment, or 'package.module:factory'")
    options: dict[str, bool | int | float | str] = Field(default_factory=dict, description="passed to the environment")

    @field_validator("options")
    @classmethod
    def _finite(cls, options: dict[str, bool | int | float | str]) -> dict[str, bool | int | float | str]:
        # NaN is not itself: the run's own options would be another run's when it goes on.
        for name, value in options.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"{name} = {value} is no finite number; where a word is meant, quote it: '\"{value}\"'"
                )
        return options


class SearchConfig(Section):
    """One tree (ALGORITHM, section 1): M chains, then L rounds of K entropy-guided branches."""

    strategy: Literal["entropy", "random", "none"] = "entropy"
    initial_rollouts: int = Field(10, ge=1, description="M")
    rounds: int = Field(2, ge=0, description="L")
    branches: int = Field(6, ge=1, description="K, per round")
    sibling_penalty: float = Field(0.05, ge=0, description="alpha in H(n) - alpha * siblings")
    include_root: bool = Field(False, description="the prompt is a candidate too (the published code)")
    max_action_tokens: int = Field(64, ge=1)
    max_observation_tokens: int = Field(
        0,
        ge=0,
        description="a longer observation fails its branch; 0: one over half the context that leaves no room to act",
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
        return self.initial_rollouts + (0 if self.strategy == "none" else self.rounds * self.branches)


class CreditConfig(Section):
    """Leaf rewards to advantages (ALGORITHM, section 2; the tree traces: section 4)."""

    value_mode: Literal[
        "child_mean",
        "leaf_mean",
        "child_softmax",
        "child_entropy_linear",
        "tree_trace",
        "tree_trace_selfnorm",
    ] = Field("child_mean", description="the traces weigh siblings of different versions by their turn ratios")
    advantage_mode: Literal["node_value", "diff_parent", "diff_global", "diff_localglobal"] = "node_value"
    normalise_leaves: bool = True
    leaf_weights: Literal["uniform", "branch-prob"] = Field(
        "uniform", description="weights under which leaf rewards are normalised"
    )
    trace_cap: float = Field(1.0, gt=0, description="c-bar of the tree traces: the largest turn ratio that counts")


class StalenessConfig(Section):
    """Every knob that decides how old data may be; the unit is learner versions, measured when consumed."""

    max_lag: int = Field(8, ge=0, description="turns older than this are masked, trees older than this dropped")
    max_uses: int = Field(1, ge=1, description="how often a tree may be served")
    exact_lag: int | None = Field(
        None, ge=0, description="every batch exactly this old, for studies; generation and training then take turns"
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
        """Outstanding plus ready trees that admission allows (ARCHITECTURE.md, versions and lag); a batch at least."""
        return max(self.trees_per_batch, math.ceil(self.trees_per_batch * (self.max_lag + 1) / self.max_uses))

    @property
    def least_max_lag(self) -> int:
        """The least ``max_lag`` that ``publish_every`` and ``max_uses`` leave room for; below it a run would stall.

        Weights are up to ``publish_every - 1`` versions behind when a tree begins, and a tree admitted into a batch
        that lacks one is used for the last time up to ``max_uses - 1`` batches later.
        """
        return (self.publish_every - 1) + (self.max_uses - 1)


class BufferConfig(Section):
    """Assembly, priorities, eviction, leases."""

    ready: Literal["complete", "partial"] = "complete"
    partial_min_leaves: int = Field(2, ge=2)
    priority_exponent: float = Field(0.6, ge=0, description="a in P_i ~ p_i^a")
    weight_exponent: float = Field(0.4, ge=0, le=1, description="beta at the first step, annealed to 1")
    weight_exponent_steps: int = Field(0, ge=0, description="steps of the annealing; 0 for all of run.steps")
    weights_over: Literal["max", "mean", "none"] = Field(
        "max", description="w_PER divided by the batch maximum, by its mean under P, or by nothing"
    )
    priority_max_share: float = Field(0.9, ge=0, le=1, description="eta: share of max|A| in the priority")
    freshness: float = Field(1.0, gt=0, le=1, description="priority factor per version of lag")
    max_bytes: int = Field(
        1 << 30, ge=1024 * 1024, description="turns kept in the journal on disk; past it the oldest ready trees go"
    )
    max_trees: int | None = Field(None, ge=1, description="ready trees kept; past it the oldest go; none for no limit")
    journal_dir: Path | None = Field(None, description="folder for the journals of runs; none: in the run's folder")
    journal_sync: bool = Field(True, description="commits reach the disk; false: they survive kill -9, not a power cut")
    commit_ms: float = Field(2.0, ge=0, le=1000, description="how long a commit gathers messages before it is written")
    lease_lifetime_s: float = Field(120.0, gt=0)
    max_reissues: int = Field(3, ge=0, description="a task given up after that many lost leases")


class CorrectionConfig(Section):
    """Off-policy correction (ALGORITHM, section 4): a weight without gradient for each token, turn, prefix or sequence.

    ``truncate``: min(exp(lambda S), cap), and not below ``floor`` (truncated importance sampling).  ``mask``: 0 outside
    [floor, cap] (masked importance sampling).  ``icepop``: ``mask`` by token (IcePop, arXiv 2510.18855; published with
    floor 0.5, cap 5).  ``topr``: 1 where A >= 0, ``truncate`` where A < 0 (TOPR, arXiv 2503.14286; published with cap 1
    by sequence).  ``m2po``: by token, the largest log-ratios are masked until the mean of their squares over the batch
    is at most ``m2_limit``; the others are truncated as ever (M2PO, arXiv 2510.01161, without a cap: set a
    large one; all tokens count here, whatever the sign of A).
    """

    action: Literal["truncate", "mask", "icepop", "topr", "m2po", "none"] = "truncate"
    level: Literal["token", "turn", "prefix", "sequence"] = Field(
        "turn", description="prefix: the product over the path down to the turn, the turn included"
    )
    cap: float = Field(2.0, gt=0, description="C")
    floor: float = Field(0.0, ge=0, description="weights below are raised to it (truncate) or masked (mask)")
    exponent: Literal["fixed", "geometric", "ess"] = Field(
        "fixed",
        description="lambda: exponent_value, 1/T_n, or the largest <= 1 with ESS/N >= ess_target over the batch",
    )
    exponent_value: float = Field(1.0, gt=0, le=1, description="lambda of exponent = fixed; 1: the exact ratio")
    ess_target: float = Field(0.5, gt=0, le=1, description="tau of exponent = ess")
    ess_floor: float = Field(
        0.1, ge=0, lt=1, description="guard: a batch below this ESS/N has its exponent lowered to it; 0: off"
    )
    gate: float | None = Field(
        None, gt=0, description="nats: turns whose mean log-ratio is larger are masked, besides the action"
    )
    m2_limit: float = Field(0.04, gt=0, description="tau of m2po, nats squared")
    numerator: Literal["prox", "policy"] = Field(
        "prox", description="whose log-probs stand above mu's: the batch's start, or the weights being trained"
    )
    prox: Literal["auto", "recompute", "first-step", "interpolate"] = Field(
        "auto",
        description="proximal log-probs: a pass of their own, the first training pass, or between mu and the policy by "
        "version; auto: first-step where a batch is one optimizer step, else recompute",
    )
    accept_bias: bool = Field(False, description="allow an off-policy run without the correction")


class ObjectiveConfig(Section):
    """ATPO and its kin (ALGORITHM, section 3).

    ``clip``: PPO's clipped surrogate at ``ratio_level`` (token: GRPO, DAPO; turn: AT2PO; sequence: GSPO, arXiv
    2507.18071).  ``cispo``: the clipped ratio as a weight without gradient on log pi (CISPO, arXiv 2506.13585).
    ``policy-gradient``: log pi alone (TOPR).  ``tv``: no clip; tokens are masked that move away from mu and are
    further than ``tv_limit`` in probability already (DPPO, arXiv 2602.04879).
    """

    ratio_level: Literal["token", "turn", "sequence"] = "turn"
    surrogate: Literal["clip", "cispo", "policy-gradient", "tv"] = "clip"
    clip_low: float = Field(3e-3, gt=0, le=1)
    clip_high: float = Field(4e-3, gt=0)
    dual_clip: float | None = Field(3.0, gt=1, description="bound for A < 0; none to switch it off")
    tv_limit: float = Field(0.2, gt=0, lt=1, description="probability, for surrogate = tv")
    aggregation: Literal[
        "seq-mean-token-mean",
        "seq-mean-token-sum",
        "token-mean",
        "unique-token-mean",
        "branch-prob",
        "branch-prob-token-sum",
    ] = "seq-mean-token-mean"
    kl_coef: float = Field(0.0, ge=0, description="of KL(policy || the weights of model.path); 0: no reference kept")
    kl_estimator: Literal["k2", "k3"] = Field("k3", description="both have a gradient that pulls to the reference")
    entropy_coef: float = Field(0.0, ge=0, description="of the entropy bonus over the whole vocabulary")


class LearnerConfig(Section):
    """Optimizer, batches, checkpoints."""

    lr: float = Field(1e-6, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    schedule_steps: int | None = Field(
        None, ge=1, description="learner batches until the schedule's end; none: run.steps, and the curve follows it"
    )
    max_grad_norm: float = Field(1.0, gt=0)
    minibatches: int = Field(1, ge=1, description="parts of a batch, each an optimizer step")
    epochs: int = Field(1, ge=1, description="passes over a batch, each with its optimizer steps")
    packing: Literal["auto", "tree", "flat"] = Field(
        "auto", description="a tree in one pass, or each leaf its own row; auto: tree where the model's layers allow it"
    )
    pack_tokens: int | None = Field(
        None, ge=16, description="tokens that trees may fill of one row; none: the device's own measure"
    )
    micro_batch_tokens: int = Field(16384, ge=64, description="padded tokens of one forward pass")
    checkpoint_every: int = Field(50, ge=1, description="batches between checkpoints")
    keep_checkpoints: int = Field(2, ge=1)
    export_dtype: Literal["source", "float32", "bfloat16", "float16"] = Field(
        "source", description="precision of the trained policy in model/; source: as the folder that the run began with"
    )
    num_processes: int = Field(1, ge=1, description="ranks that the supervisor starts through accelerate launch")
    accelerate_config: str | None = Field(None, description="accelerate configuration file (FSDP, DeepSpeed, …)")
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = Field(None, ge=1, description="torch threads of each rank; none for torch's choice")
    gpus: tuple[int, ...] = Field(
        (), description="one for each rank, as nvidia-smi or CUDA_VISIBLE_DEVICES counts; empty: all"
    )
    max_grad_spike: float | None = Field(
        30.0, gt=1, description="guard: an update whose gradient norm is this many running medians is skipped"
    )
    max_skipped_updates: int = Field(5, ge=1, description="updates skipped in a row before the run stops")
    lineage: bool = Field(
        False, description="write lineage.jsonl: what each batch was trained on, with a hash of every tree"
    )
    tensorboard: bool = Field(False, description="also log through Accelerate's TensorBoard tracker")


class ActorConfig(Section):
    """Actors and their engines."""

    count: int = Field(1, ge=0, description="actors that the supervisor starts; 0: they join by hand")
    trees_in_flight: int = Field(8, ge=1)
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_num_seqs: int = Field(128, ge=1, description="requests the engine runs at once")
    kv_cache_gb: float = Field(1.0, gt=0, description="on a CPU")
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    tensor_parallel_size: int = Field(1, ge=1)
    num_threads: int | None = Field(None, ge=1, description="engine threads on a CPU; none for the engine's choice")
    clear_cache_on_swap: bool = Field(True, description="recompute keys and values under the new weights")
    report_every_s: float = Field(2.0, gt=0)
    gpus: tuple[int, ...] = Field(
        (), description="tensor_parallel_size for each of count actors, in order; empty: all are seen"
    )


class WeightsConfig(Section):
    """Weights from the learner to the actors."""

    chunk_bytes: int = Field(1 << 20, ge=4096, le=16 << 20)
    poll_s: float = Field(
        2.0, gt=0, description="actors ask for the newest version this often, besides the announcement"
    )
    shared_memory: bool = Field(True, description="actors on the learner's host map its file")
    probe_tokens: int = Field(1024, ge=2, description="that an engine must reproduce the log-probs of after each swap")
    probe_tolerance: float | None = Field(
        None,
        gt=0,
        description="nats of noise on the logits; none: by device, precision and the engine's earlier readings",
    )
    fetch_timeout_s: float = Field(120.0, gt=0)
    swap_timeout_s: float | None = Field(
        None, gt=0, description="for an engine to take up weights; none: 60, or half of links.give_up_s if that is less"
    )


class LinksConfig(Section):
    """Sockets.  Port 0: chosen at the start and written to the run folder."""

    host: str = Field("127.0.0.1", description="address to bind; other than loopback needs keys")
    actors_port: int = Field(0, ge=0, le=65535)
    learner_port: int = Field(0, ge=0, le=65535)
    weights_port: int = Field(0, ge=0, le=65535)
    announce_port: int = Field(0, ge=0, le=65535)
    keys_dir: Path | None = Field(None, description="folder with the CURVE keys")
    window: int = Field(256, ge=1, description="messages an actor may have unacknowledged")
    heartbeat_s: float = Field(2.0, gt=0)
    deadline_s: float = Field(60.0, gt=0, description="a wait past this is logged with who waits for whom")
    give_up_s: float = Field(600.0, gt=0, description="a wait past this stops the role loudly")
    max_message_bytes: int = Field(64 << 20, ge=1 << 16)


class EvalConfig(Section):
    """Greedy evaluation on held-out tasks."""

    every_steps: int = Field(20, ge=0, description="0: only at the start and the end")
    num_tasks: int = Field(200, ge=1)
    at_start: bool = True
    at_end: bool = True


class SupervisorConfig(Section):
    """Starting, watching, restarting, stopping."""

    max_restarts: int = Field(3, ge=0, description="of one role within restart_window_s")
    restart_window_s: float = Field(300.0, gt=0)
    backoff_s: float = Field(0.5, ge=0, description="before the first restart; doubles with every further one")
    max_backoff_s: float = Field(30.0, ge=0)
    sample_every_s: float = Field(2.0, gt=0, description="between two measurements of the roles' memory")
    stop_grace_s: float = Field(6.0, gt=0, description="between asking a role to stop and killing its process group")
    hang_s: float | None = Field(
        None, gt=0, description="a role stuck without progress for so long is restarted; none: 3/4 of links.give_up_s"
    )


class Config(Section):
    """Everything.  ``atpo config CONFIG`` prints it resolved."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    search: SearchConfig = SearchConfig()
    credit: CreditConfig = CreditConfig()
    staleness: StalenessConfig = StalenessConfig()
    buffer: BufferConfig = BufferConfig()
    correction: CorrectionConfig = CorrectionConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    learner: LearnerConfig = LearnerConfig()
    actor: ActorConfig = ActorConfig()
    weights: WeightsConfig = WeightsConfig()
    links: LinksConfig = LinksConfig()
    eval: EvalConfig = EvalConfig()
    supervisor: SupervisorConfig = SupervisorConfig()

    @property
    def swap_timeout_s(self) -> float:
        """Seconds in which an engine must have taken up a version."""
        return self.weights.swap_timeout_s or min(60.0, self.links.give_up_s / 2)

    @model_validator(mode="after")
    def _no_contradictions(self) -> Config:
        s = self.staleness
        if s.max_lag < s.least_max_lag:
            raise ValueError(
                f"staleness.max_lag = {s.max_lag} cannot hold with staleness.publish_every = {s.publish_every} and "
                f"staleness.max_uses = {s.max_uses}: a tree begins up to {s.publish_every - 1} versions behind and is "
                f"used for the last time {s.max_uses - 1} versions after the first; raise max_lag to at least "
                f"{s.least_max_lag}, or lower publish_every or max_uses"
            )
        if s.max_lag > 0 and s.exact_lag != 0 and self.correction.action == "none" and not self.correction.accept_bias:
            raise ValueError(
                f"correction.action = 'none' with staleness.max_lag = {s.max_lag} trains off-policy uncorrected: "
                "set --correction.action truncate, or --correction.accept_bias true if the bias is what you study"
            )
        if (self.search.top_p < 1 or self.search.top_k > 0) and not self.correction.accept_bias:
            raise ValueError(
                f"search.top_p = {self.search.top_p} with search.top_k = {self.search.top_k} samples from a cut "
                "distribution that the learner's log-probs are not of: every importance weight would be off; use "
                "top_p 1 and top_k 0, or --correction.accept_bias true"
            )
        if self.learner.minibatches > s.trees_per_batch:
            raise ValueError(
                f"learner.minibatches = {self.learner.minibatches} exceeds staleness.trees_per_batch = "
                f"{s.trees_per_batch}: a mini-batch holds at least one tree"
            )
        if self.search.max_leaves < 2:
            raise ValueError(
                f"search.initial_rollouts = {self.search.initial_rollouts} without branches gives trees of one leaf, "
                "which never have a signal; use at least 2"
            )
        if self.search.max_action_tokens >= self.model.max_context_tokens:
            raise ValueError(
                f"search.max_action_tokens = {self.search.max_action_tokens} must be below model.max_context_tokens = "
                f"{self.model.max_context_tokens}"
            )
        if self.swap_timeout_s >= self.links.give_up_s:
            raise ValueError(
                f"weights.swap_timeout_s = {self.swap_timeout_s:g} must be below links.give_up_s = "
                f"{self.links.give_up_s:g}: who waits for the new weights would give up before the swap does"
            )
        self._check_correction()
        self._check_exact_lag()
        self._check_max_tasks()
        if self.buffer.max_trees is not None and self.buffer.max_trees < s.trees_per_batch:
            raise ValueError(
                f"buffer.max_trees = {self.buffer.max_trees} is below staleness.trees_per_batch = {s.trees_per_batch}: "
                "no batch would ever be complete"
            )
        if self.buffer.ready == "partial" and self.buffer.partial_min_leaves > self.search.max_leaves:
            raise ValueError(
                f"buffer.partial_min_leaves = {self.buffer.partial_min_leaves} exceeds the {self.search.max_leaves} "
                "leaves that search grows"
            )
        self._check_gpus()
        ports = {
            f"links.{name}": port
            for name in ("actors_port", "learner_port", "weights_port", "announce_port")
            if (port := getattr(self.links, name))
        }
        for name, port in ports.items():
            twin = next((other for other in ports if other != name and ports[other] == port), None)
            if twin:
                raise ValueError(
                    f"{name} and {twin} are both {port}: each needs a port of its own, or 0 to have one picked"
                )
        return self

    def _check_correction(self) -> None:
        c = self.correction
        if c.action != "none" and c.floor >= c.cap:
            raise ValueError(f"correction.floor = {c.floor} must be below correction.cap = {c.cap}")
        if c.action in ("mask", "icepop") and not c.floor < 1 < c.cap:
            raise ValueError(
                f"correction.action = {c.action!r} with correction.floor = {c.floor} and correction.cap = {c.cap} "
                "would mask data that is not off-policy at all: ratios of 1 must lie between them"
            )
        if c.prox == "first-step" and self.learner.minibatches > 1:
            raise ValueError(
                f"correction.prox = 'first-step' with learner.minibatches = {self.learner.minibatches}: all but the "
                "first part would take updated weights for the batch's start; use --correction.prox auto or recompute"
            )
        if c.exponent == "ess" and c.ess_floor > c.ess_target:
            raise ValueError(
                f"correction.ess_floor = {c.ess_floor} is above correction.ess_target = {c.ess_target}, which decides "
                "with exponent = 'ess': lower the floor or raise the target"
            )
        if c.action in ("icepop", "m2po") and c.level != "token":
            raise ValueError(
                f"correction.action = {c.action!r} works by token, but correction.level = {c.level!r}: set "
                "--correction.level token"
            )
        if c.action == "m2po" and c.exponent == "ess":
            raise ValueError(
                "correction.action = 'm2po' bounds the batch by its own measure, correction.exponent = 'ess' by "
                "another: use --correction.exponent fixed"
            )
        idle = "exponent = 'ess'" if c.exponent == "ess" else f"gate = {c.gate}"
        if c.action == "none" and (c.exponent == "ess" or c.gate is not None):
            raise ValueError(
                f"correction.{idle} does nothing with correction.action = 'none': leave it out, or name another action"
            )
        if c.numerator == "policy" and self.objective.surrogate != "policy-gradient":
            raise ValueError(
                f"correction.numerator = 'policy' with objective.surrogate = {self.objective.surrogate!r} would count "
                "the policy's drift from prox twice: use --correction.numerator prox, or --objective.surrogate "
                "policy-gradient"
            )
        of_the_batch = "m2po" if c.action == "m2po" else "ess" if c.exponent == "ess" else None
        if of_the_batch and c.numerator == "policy":
            raise ValueError(
                f"{of_the_batch} is measured over the whole batch before its first step: correction.numerator = "
                "'policy' has no such number; use prox"
            )
        if c.prox == "interpolate" and (of_the_batch or self.credit.value_mode.startswith("tree_trace")):
            needs = of_the_batch or f"credit.value_mode = {self.credit.value_mode!r}"
            raise ValueError(
                f"correction.prox = 'interpolate' has no log-probs before the first step, and {needs} needs them: use "
                "recompute"
            )

    def _check_max_tasks(self) -> None:
        run, s = self.run, self.staleness
        if run.max_tasks is None:
            return
        least = -(-run.max_tasks * s.max_uses // s.trees_per_batch)
        if run.steps < least:
            raise ValueError(
                f"run.max_tasks = {run.max_tasks} with staleness.max_uses = {s.max_uses} may take {least} batches of "
                f"staleness.trees_per_batch = {s.trees_per_batch} trees, run.steps = {run.steps} would end before: set "
                f"--run.steps {least} or more"
            )

    def _check_exact_lag(self) -> None:
        s = self.staleness
        if s.exact_lag is None:
            return
        if s.max_lag < s.exact_lag:
            raise ValueError(
                f"staleness.exact_lag = {s.exact_lag} would be masked by staleness.max_lag = {s.max_lag}: raise max_lag"
                f" to {s.exact_lag}"
            )
        if s.max_uses != 1 or s.publish_every != 1 or self.buffer.ready != "complete":
            raise ValueError(
                f"staleness.exact_lag = {s.exact_lag} needs staleness.max_uses = 1, staleness.publish_every = 1 and "
                f"buffer.ready = 'complete', got {s.max_uses}, {s.publish_every} and {self.buffer.ready!r}"
            )
        if self.run.max_tasks is not None:
            raise ValueError(
                f"staleness.exact_lag = {s.exact_lag} ends with run.steps, not with run.max_tasks = "
                f"{self.run.max_tasks}: leave one of them out"
            )

    def _check_gpus(self) -> None:
        learner, actor = self.learner, self.actor
        if learner.gpus and len(learner.gpus) != learner.num_processes:
            raise ValueError(
                f"learner.gpus names {len(learner.gpus)} GPUs for learner.num_processes = {learner.num_processes}: "
                "each rank needs one"
            )
        needed = actor.count * actor.tensor_parallel_size
        if actor.gpus and len(actor.gpus) != needed:
            raise ValueError(
                f"actor.gpus names {len(actor.gpus)} GPUs, but actor.count = {actor.count} actors with "
                f"actor.tensor_parallel_size = {actor.tensor_parallel_size} need {needed}"
            )
        for path, gpus in (("learner.gpus", learner.gpus), ("actor.gpus", actor.gpus)):
            if len(set(gpus)) != len(gpus) or any(gpu < 0 for gpu in gpus):
                raise ValueError(f"{path} = {list(gpus)} must be different numbers from 0")
        shared = sorted(set(learner.gpus) & set(actor.gpus))
        if shared:
            raise ValueError(f"learner.gpus and actor.gpus both name GPU {shared[0]}: a GPU belongs to one role")
        for path, device, gpus in (
            ("learner", learner.device, learner.gpus),
            ("actor", actor.device, actor.gpus),
        ):
            if device == "cpu" and gpus:
                raise ValueError(f"{path}.device = 'cpu' contradicts {path}.gpus = {list(gpus)}")


STALENESS_KNOBS: tuple[tuple[str, str], ...] = (
    ("staleness.max_lag", "turns older than this when consumed are masked; trees older than this are dropped"),
    ("staleness.max_uses", "a tree is served at most this often"),
    ("staleness.trees_per_batch", "trees of one learner batch; one batch is one version"),
    ("staleness.exact_lag", "every batch exactly this many versions old; max_lag must allow it"),
    ("staleness.publish_every", "versions between two publications: the least lag is 0 to this minus 1"),
    ("staleness.max_oversampling", "bounds how many trees without signal one step may use up"),
    ("actor.count", "more actors, more trees under way at once"),
    ("actor.trees_in_flight", "trees one actor grows at once"),
    (
        "actor.clear_cache_on_swap",
        "whether requests in flight recompute their keys and values under new weights",
    ),
    ("weights.poll_s", "how late an actor may hear of a version when an announcement is lost"),
    ("learner.minibatches", "with learner.epochs: optimizer steps inside one version"),
    ("learner.epochs", "passes over a batch inside one version"),
    ("buffer.freshness", "priority factor per version of lag"),
    ("correction.action", "what is done about the lag that remains"),
    ("correction.level", "granularity of the importance weight"),
    ("correction.cap", "largest importance weight"),
    ("correction.exponent", "lambda of the importance weight; ess lowers it until ess_target holds"),
    ("correction.ess_floor", "effective sample size below which the exponent is lowered anyway"),
    ("correction.prox", "where the proximal policy's log-probs come from"),
    ("credit.value_mode", "the tree traces weigh siblings of different versions"),
)
"""Every knob that bears on staleness, with what it does; ``atpo config`` prints them in one table."""


def derived_bounds(config: Config) -> list[tuple[str, int | float | str, str]]:
    """(name, value, how it follows) of what the knobs imply together."""
    s, search = config.staleness, config.search
    effect: tuple[str, str] = ("asynchronous", "max_lag above 0")
    if s.exact_lag is not None:
        effect = (f"exactly {s.exact_lag} versions old", "staleness.exact_lag; generation and training take turns")
    elif s.max_lag == 0:
        effect = ("synchronous", "max_lag = 0: a batch is generated by the version that trains on it")
    return [
        ("leaves of a tree", search.max_leaves, "search.initial_rollouts + rounds * branches"),
        (
            "trees pending",
            s.max_trees_pending,
            "admission: trees_per_batch * (max_lag + 1) / max_uses, a batch or more",
        ),
        ("leaves pending", s.max_trees_pending * search.max_leaves, "trees pending * leaves of a tree"),
        ("trees under way", config.actor.count * config.actor.trees_in_flight, "actor.count * trees_in_flight"),
        (
            "optimizer steps a version",
            config.learner.minibatches * config.learner.epochs,
            "learner.minibatches * learner.epochs",
        ),
        ("greatest lag trained on", s.max_lag, "staleness.max_lag; older turns are masked"),
        ("in effect", *effect),
    ]


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML, each field with what it means."""
    lines: list[str] = []
    for name in Config.model_fields:
        section = getattr(config, name)
        lines.append(f"[{name}]")
        for field, about in type(section).model_fields.items():
            text = f"{field} = {_toml_value(getattr(section, field))}"
            lines.append(f"{text}  # {about.description}" if about.description else text)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(str(value), ensure_ascii=False)


def load(files: Path | str | Sequence[Path | str], overrides: Mapping[str, str] | None = None) -> Config:
    """Read TOML files (or the config.json of a run folder), later ones over earlier ones, and put overrides on top.

    Args:
        files: one file or several; tables are merged key by key.  None of them: the defaults.
        overrides: dotted path -> text: as it is for a field of text; else parsed as a TOML value where it is one.

    Raises:
        ConfigError: a file is missing or no TOML; a key is unknown; a value is out of range; values contradict.  Of
            several files it names the one that holds the value.
    """
    data, holders = _layered(files)
    for key, text in (overrides or {}).items():
        _put(data, key, text)
        holders[key] = f"--{key}"
    names = _paths(files)
    return build(data, source=str(names[-1]) if names else "configuration", holders=holders if len(names) > 1 else {})


def as_options(files: Path | str | Sequence[Path | str]) -> dict[str, str]:
    """What ``files`` set, as dotted path -> text: overrides with which ``load`` makes the same of another file."""
    known = fields()
    return {
        key: value if isinstance(value, str) and key in known else _toml_value(value)
        for key, value in _leaves(_layered(files)[0])
    }


def _paths(files: Path | str | Sequence[Path | str]) -> list[Path]:
    return [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]


def _layered(files: Path | str | Sequence[Path | str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The files' content, later ones over earlier ones; and dotted path -> the file that holds it."""
    data: dict[str, Any] = {}
    holders: dict[str, str] = {}
    for file in _paths(files):
        _lay(data, _read(file), str(file), holders)
    return data, holders


def _lay(onto: dict[str, Any], table: Mapping[str, Any], file: str, holders: dict[str, str], prefix: str = "") -> None:
    """Put ``table`` over ``onto``, key by key, and note in ``holders`` whose each key is now."""
    for key, value in table.items():
        dotted = f"{prefix}{key}"
        is_table = isinstance(value, Mapping)
        if key in onto and isinstance(onto[key], dict) != is_table:
            kinds = ("a section", "a value") if is_table else ("a value", "a section")
            raise ConfigError(f"{dotted} is {kinds[0]} in {file}, but {kinds[1]} in {holders[dotted]}: make them agree")
        holders[dotted] = file
        if is_table:
            _lay(onto.setdefault(key, {}), value, file, holders, f"{dotted}.")
        else:
            onto[key] = value


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in a nested mapping that is no table."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(file: Path) -> dict[str, Any]:
    """One file as it is.  Raises ConfigError."""
    try:
        text = file.read_text(encoding="utf-8")
        data = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"configuration {file} does not exist; configs/demo.toml is one to start from") from None
    except IsADirectoryError:
        raise ConfigError(f"configuration {file} is a folder; name a TOML file") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"configuration {file} is no valid {'JSON' if file.suffix == '.json' else 'TOML'}: {exc}"
        ) from None
    except OSError as exc:
        raise ConfigError(f"configuration {file} cannot be read: {exc.strerror}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"configuration {file} holds a {type(data).__name__}, no sections; name a run's config.json")
    return data


def build(
    data: Mapping[str, Any], *, source: str = "configuration", holders: Mapping[str, str] | None = None
) -> Config:
    """Validate a nested mapping.  Raises ConfigError with one line per fault, each with its dotted path.

    Args:
        data: sections and their fields.
        source: where all of it comes from.
        holders: dotted path -> where this one comes from, for the error to name; needed if there are several.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as exc:
        raise ConfigError("\n".join(_fault(e, source, holders or {}) for e in exc.errors())) from None


def _put(data: dict[str, Any], dotted: str, text: str) -> None:
    *parents, leaf = dotted.split(".")
    if not parents:
        raise ConfigError(f"option --{dotted} names no field; use --section.field, for instance --learner.lr 1e-5")
    here: Any = data
    for part in parents:
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            raise ConfigError(f"option --{dotted}: {part} is a value, not a section")
    here[leaf] = _option_value(dotted, text)


def _option_value(dotted: str, text: str) -> Any:
    """What the text of an option means for its field.  Raises ConfigError where there is none."""
    annotation = _annotation(dotted)
    value = parse_value(text)
    if value is None and type(None) in get_args(annotation):
        return None
    if _is_text(annotation):
        return text  # --run.name 7 is a name; "none" is a word of search.strategy
    if dotted == "environment.options":
        raise ConfigError(_one_by_one(text))
    if annotation is None:  # an option of the environment: whatever TOML has for those
        return value if isinstance(value, bool | int | float | str) else text
    if not text:
        raise ConfigError(f"--{dotted} needs a value")
    return text if value is None else value


def _one_by_one(text: str) -> str:
    """Why ``--environment.options TEXT`` is none, and what was meant where it can be told."""
    try:
        said = json.loads(text)
    except ValueError:
        said = parse_value(text)
    meant = "--environment.options.NAME VALUE"
    if isinstance(said, dict) and said:
        meant = " ".join(
            f"--environment.options.{name} {json.dumps(value) if isinstance(value, bool | int | float) else value}"
            for name, value in list(said.items())[:8]
        )
    return f"--environment.options {text[:80]}: options of the environment are given one by one: {meant}"


def _annotation(dotted: str) -> Any:
    """Of a field; None for an option of the environment, and for what is no field."""
    info = fields().get(dotted)
    return None if info is None else info.annotation


def _is_text(annotation: Any) -> bool:
    """Whether a field takes words: str, Path, or some words of its own; or none."""
    if get_origin(annotation) is Literal:
        return True
    if isinstance(annotation, UnionType):
        return all(part is type(None) or _is_text(part) for part in get_args(annotation))
    return annotation is str or annotation is Path


def parse_value(text: str) -> Any:
    """A TOML value, ``none`` for None, or the text itself."""
    if text.lower() in ("none", "null"):
        return None
    if text in ("True", "False"):
        return text == "True"
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _fault(error: Any, source: str, holders: Mapping[str, str]) -> str:
    path = ".".join(str(p) for p in error["loc"])
    value = error.get("input")
    kind = error["type"]
    holder = _holder(path, holders)
    where = f" in {holder}" if holder else ""
    if kind == "extra_forbidden":
        near = suggestions.near(path, fields()) if "." in path else suggestions.sections(path, Config.model_fields)
        meant = f"did you mean {', '.join(near)}?  K" if near else "k"
        known = f"{meant}nown in {_section_of(path)}: {_known(path)}"
        return f"{path}: unknown key (value {_cut(value)}) in {holder or source}; {known}"
    if kind == "value_error" and not path:
        return f"{error['ctx']['error']}{_sides(str(error['ctx']['error']), holders)}"
    bounds = {
        "greater_than_equal": ("ge", ">="),
        "greater_than": ("gt", ">"),
        "less_than_equal": ("le", "<="),
        "less_than": ("lt", "<"),
    }
    if kind in bounds:
        key, sign = bounds[kind]
        return f"{path} must be {sign} {_number(error['ctx'][key])}, got {_shown(value)}{where}"
    if kind in ("bool_parsing", "bool_type"):
        return f"{path} must be true or false, got {value!r}{where}"
    if kind == "string_pattern_mismatch" and path == "run.name":
        return (
            f"run.name is the name of a folder in run.dir: letters, digits, '.', '_' and '-', the first one a letter "
            f"or a digit; got {value!r}{where}"
        )
    if kind == "literal_error":
        return f"{path} must be one of {error['ctx']['expected']}, got {value!r}{where}"
    wanted = next((words for kinds, words in WANTED if kind in kinds), None)
    if wanted is not None:
        return f"{path} must be {wanted.format(section=path)}, got {_cut(value)}{where}"
    return f"{path}: {error['msg']}, got {_cut(value)}{where}"


WANTED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("int_parsing", "int_type", "int_from_float"), "a whole number"),
    (("float_parsing", "float_type", "finite_number"), "a number"),
    (("string_type",), "text"),
    (("tuple_type", "list_type"), "a list, as in [0, 1]"),
    (("model_type", "model_attributes_type", "dict_type"), "a section, [{section}]"),
)
"""Kinds of pydantic's errors -> what it wanted, in a user's words."""


def _cut(value: Any) -> str:
    """A value in a few words: a whole section may be unknown."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _number(value: float) -> str:
    """Whole numbers whole, in groups that people read and a configuration takes: 1_048_576."""
    return f"{int(value):_}" if math.isfinite(value) and value == int(value) else f"{value:g}"


def _shown(value: Any) -> str:
    return _number(value) if type(value) is int else repr(value)


def _holder(path: str, holders: Mapping[str, str]) -> str | None:
    """Who holds a dotted path, or what it is a part of."""
    while path and path not in holders:
        path = path.rpartition(".")[0]
    return holders.get(path)


def _sides(message: str, holders: Mapping[str, str]) -> str:
    """Who holds the fields that a contradiction names."""
    named = dict.fromkeys(re.findall(r"(?<![\w.-])[a-z]+\.[a-z_]+", message))
    known = [f"{name}: {holders[name]}" for name in named if name in holders]
    return f"  ({'; '.join(known)})" if known else ""


def _section_of(path: str) -> str:
    section = path.rpartition(".")[0]
    return f"[{section}]" if section else "the file"


def _known(path: str) -> str:
    model: type[BaseModel] = Config
    for part in path.split(".")[:-1]:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return ", ".join(model.model_fields)


def get(config: Config, dotted: str) -> Any:
    """The value of a dotted field.  Raises ConfigError naming near matches where there is none."""
    here: Any = config
    for part in dotted.split("."):
        if not isinstance(here, BaseModel) or part not in type(here).model_fields:
            raise ConfigError(unknown_option(dotted))
        here = getattr(here, part)
    return here


def unknown_option(name: str) -> str:
    """One line that names an option that is no field, and the ones the user may have meant."""
    if name in Config.model_fields:
        first = next(field for field in fields() if field.startswith(f"{name}."))
        return f"--{name}: is a section and takes no value; name a field of it, for instance --{first}"
    near = suggestions.near(name, fields())
    if near:
        return f"--{name}: unknown option; did you mean {', '.join('--' + field for field in near)}?"
    return f"--{name}: unknown option; `atpo config CONFIG` lists every field"


_TRUTHS = frozenset({"true", "false", "yes", "no", "on", "off", "1", "0"})


def split_options(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take dotted options (``--a.b value``, ``--a.b=value``) out of a command line.

    Returns what is left, in order, and dotted path -> text.  A truth value may be left out: then it is true.  Raises
    ConfigError for an option that is no field, or lacks its value; and where a truth value is followed by a word that
    can neither be one nor a file.
    """
    rest: list[str] = []
    options: dict[str, str] = {}
    known = fields()
    i = 0
    while i < len(argv):
        word = argv[i]
        i += 1
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            rest.append(word)
            continue
        name = name.replace("-", "_")
        if name not in known and not name.startswith("environment.options."):
            raise ConfigError(unknown_option(name))
        if not equals:
            annotation = _annotation(name)
            given = i < len(argv) and not argv[i].startswith("--")
            if annotation is bool:
                # The next word may be the configuration file; the command comes before all options but by chance.
                if given and rest and argv[i].lower() not in _TRUTHS and not _may_be_a_path(argv[i]):
                    raise ConfigError(
                        f"--{name} {argv[i]}: {argv[i]!r} is neither true nor false, nor a file here; --{name} alone "
                        f"is true, --{name} false is not"
                    )
                given = given and argv[i].lower() in _TRUTHS
            if given:
                value = argv[i]
                i += 1
            elif annotation is bool or annotation is None:
                value = "true"
            else:
                raise ConfigError(f"--{name} needs a value")
        options[name] = value
    return rest, options


def _may_be_a_path(word: str) -> bool:
    return any(sign in word for sign in "./\\") or Path(word).exists()


def fields(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> pydantic FieldInfo of every leaf field."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.update(fields(annotation, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = info
    return found
