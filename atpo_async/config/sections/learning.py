"""How a batch is learned from: credit, off-policy correction, objective, optimizer and checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from atpo_async.config import doors
from atpo_async.config.sections.base import Options, Section, TruthOrAuto, named, truth_or
from atpo_async.config.sections.coefficients import NonNegative, ScheduledOptions
from atpo_async.core.vocabulary import Aggregation, LeafWeights, Level, Precision, RatioLevel

ALL_LINEAR = "all-linear"
"""In ``learner.lora.targets``."""


def _one_is_a_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _is_a_url(value: str) -> str:
    """A URL that fsspec may know, without a password: the configuration is written down."""
    parts = urlsplit(value)
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", parts.scheme) or "://" not in value:
        given = "" if re.search("[@?=]", value) else f", got {value!r}"  # these may come with a secret
        raise _url_fault(f"expected a URL that fsspec knows, as file:///folder or s3://bucket/folder{given}")
    if parts.password is not None:
        raise _url_fault(
            "it holds a password, which would be written down with the configuration: leave credentials to the store's "
            "own settings (environment variables, ~/.config/fsspec)"
        )
    return value


def _url_fault(reason: str) -> PydanticCustomError:
    """Without the value: it may be secret in part."""
    return PydanticCustomError("door", "{reason}", {"reason": f"learner.checkpoint_url: {reason}"})


class CreditConfig(Section):
    """Rewards to advantages (ALGORITHM, section 2; the tree traces: section 4)."""

    value_mode: Annotated[str, named(doors.VALUE_MODE)] = Field(
        "child_mean", description="the traces weigh siblings of different versions by their turn ratios"
    )
    value_options: Options = Field(default_factory=dict, description="passed to the value mode")
    advantage_mode: Annotated[str, named(doors.ADVANTAGE_MODE)] = "node_value"
    advantage_options: Options = Field(default_factory=dict, description="passed to the advantage mode")
    normalise_leaves: Annotated[bool | Literal["tree", "batch"], truth_or("tree", "batch")] = Field(
        True, description="by the deviation of the tree's leaf rewards (true, tree), or of the whole batch's (Lite PPO)"
    )
    leaf_weights: LeafWeights = Field("uniform", description="weights under which leaf rewards are normalised")
    discount: float = Field(1.0, gt=0, le=1, description="gamma: what later turns earn counts that much less a turn")
    normalise_returns: Annotated[bool | Literal["turns", "first"], truth_or("turns", "first")] = Field(
        False,
        description="normalise the values of a tree's turns, in place of its leaf rewards (GTPO), by the moments of "
        "all turns' (true, turns) or of the first turns'",
    )
    advantage_scale: Literal["none", "sqrt-leaves"] = Field(
        "none", description="sqrt-leaves: divided by the square root of the leaves below the turn (TreeRL)"
    )
    whiten_advantages: bool = Field(
        False, description="to mean 0 and deviation 1 over the action tokens of all rows of the batch (TreePO)"
    )
    turn_rewards: Literal["plain", "normalised", "posterior"] = Field(
        "plain",
        description="normalised: rewards of turns that are no leaves to mean 0 and deviation 1 inside the tree, as "
        "leaf rewards are (IGPO); posterior: they count in chains only whose leaf earned above 0 (Posterior-GRPO)",
    )
    turn_reward_moments: Literal["separate", "joint"] = Field(
        "separate", description="of turn_rewards = normalised: apart from those of leaf rewards, or over both together"
    )
    turn_reward_scale: NonNegative = Field(
        1.0, description="multiplies what turns earn of their own; a number or a schedule (SPEAR: it fades)"
    )
    trace_cap: float = Field(1.0, gt=0, description="c-bar of the tree traces: the largest turn ratio that counts")


class CorrectionConfig(Section):
    """Off-policy correction (ALGORITHM, section 4): a weight without gradient for each token, turn, prefix or sequence.

    Each action's module in ``learner/loss/corrections/``, and ALGORITHM, define what it does with the exact weight
    exp(lambda S).
    """

    action: Annotated[str, named(doors.CORRECTION)] = "truncate"
    action_options: Options = Field(default_factory=dict, description="passed to the action")
    level: Level = Field("turn", description="prefix: the product over the path down to the turn, the turn included")
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
    """The policy objective: ATPO and related surrogates (ALGORITHM, section 3).

    Each surrogate is defined in its module in ``learner/loss/surrogates/`` and in ALGORITHM.
    """

    ratio_level: RatioLevel = "turn"
    surrogate: Annotated[str, named(doors.SURROGATE)] = "clip"
    surrogate_options: Options = Field(default_factory=dict, description="passed to the surrogate")
    terms: Annotated[tuple[Annotated[str, named(doors.TERM)], ...], BeforeValidator(_one_is_a_list)] = Field(
        (), description="losses by token beside the surrogate's"
    )
    term_options: dict[str, ScheduledOptions] = Field(
        default_factory=dict, description="a table for each term, passed to it; a number may be a schedule"
    )
    token_weights: Annotated[tuple[Annotated[str, named(doors.TOKEN_WEIGHT)], ...], BeforeValidator(_one_is_a_list)] = (
        Field((), description="multipliers of the surrogate's loss by token, fixed before a batch's first step")
    )
    token_weight_options: dict[str, ScheduledOptions] = Field(
        default_factory=dict, description="a table for each token weight, passed to it; a number may be a schedule"
    )
    clip_low: float = Field(3e-3, gt=0, le=1)
    clip_high: float = Field(4e-3, gt=0)
    dual_clip: float | None = Field(3.0, gt=1, description="bound for A < 0; none to switch it off")
    tv_limit: float = Field(0.2, gt=0, lt=1, description="probability, for surrogate = tv")
    aggregation: Aggregation = "seq-mean-token-mean"
    kl_coef: NonNegative = Field(0.0, description="of KL(policy || the weights of model.path); 0: no reference kept")
    kl_estimator: Literal["k2", "k3"] = Field("k3", description="both have a gradient that pulls to the reference")
    entropy_coef: NonNegative = Field(0.0, description="of the entropy bonus over the whole vocabulary")


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685): they alone are trained, over the weights of ``model.path``.

    Without dropout: a forward pass has to be a function of the weights, or ratios, probe and packing are all off.
    """

    rank: int = Field(0, ge=0, description="of the adapters; 0: all weights are trained, and there are none")
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="an adapter's product counts alpha / rank times")
    rslora: bool = Field(False, description="alpha / sqrt(rank) times instead (rsLoRA)")
    targets: Annotated[tuple[str, ...], BeforeValidator(_one_is_a_list)] = Field(
        (ALL_LINEAR,),
        min_length=1,
        description="layers that get one, by the end of their names (q_proj); all-linear: all but the output head",
    )
    init: str | None = Field(None, description="adapter folder (peft's format) to begin with, over the same model.path")
    publish: Literal["merged", "adapter"] = Field(
        "merged", description="what travels: whole merged weights, or the adapters, which actors merge"
    )


class LearnerConfig(Section):
    """Optimizer, batches, checkpoints."""

    lr: float = Field(1e-6, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    optimizer: Literal["adamw", "adamw8bit", "offload"] = Field(
        "adamw", description="adamw8bit: moments in 2 bytes a parameter, not 8 (torchao); offload: 8 on the host"
    )
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
    checkpoint_url: Annotated[str, AfterValidator(_is_a_url)] | None = Field(
        None, description="where checkpoints and the policy go too, by fsspec: s3://bucket/folder, file:///folder"
    )
    export_dtype: Precision | Literal["source"] = Field(
        "source", description="precision of the trained policy in model/; source: as the folder that the run began with"
    )
    num_processes: int = Field(1, ge=1, description="ranks that the supervisor starts through accelerate launch")
    accelerate_config: str | None = Field(None, description="accelerate configuration file, for FSDP2")
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: TruthOrAuto = Field(
        False,
        description="layers compute their activations again in the backward pass; auto: as many as memory asks for",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="each layer by torch.compile, once for passes of any length; auto: on CUDA, unless sharded"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "liger", "none"] = Field(
        "auto", description="norms, rotary embedding and SwiGLU by Liger-Kernel; auto: on CUDA, where it is installed"
    )
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
    lora: LoraConfig = LoraConfig()
    tensorboard: bool = Field(False, description="the same as a metrics sink 'tensorboard'")
