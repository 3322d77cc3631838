"""The policy on the learner's side: loading it, its log-probs, its optimizer, and Accelerate around them.

Shapes: B rows, T tokens, N action tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atpo_async.config import Config, LearnerConfig
from atpo_async.core.errors import SetupError
from atpo_async.models import causal_lm
from atpo_async.models.sources import model_folder
from learner.packing import attention
from learner.packing.attention import DeviceLayout
from learner.packing.rows import MicroBatch, Row, micro_batches
from learner.packing.tree import tree_micro_batches
from learner.policy import precision

MAX_LOGITS = 1 << 26
"""Logits held at once (256 MB in float32); more are recomputed in the backward pass, chunk by chunk."""

SHARDED: tuple[Any, ...] = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Where no rank holds whole parameters.  These paths have not been measured on GPUs."""


class Policy(nn.Module):
    """A causal language model that gives log-probs of chosen tokens, and computes no other logits.

    Args:
        hf: the transformers model.
        temperature: that actions are sampled with; log-probs are under the tempered distribution.
    """

    def __init__(self, hf: Any, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.hf = hf
        self.temperature = temperature
        self._no_split_modules = getattr(hf, "_no_split_modules", None)  # FSDP wraps by these
        attention.install(hf)

    def forward(
        self,
        tokens: Tensor,
        predictor: Tensor,
        target: Tensor | None = None,
        layout: DeviceLayout | None = None,
        temperature: float | None = None,
        with_entropy: bool = False,
        waiting_times: Tensor | None = None,
    ) -> Tensor:
        """float32[N] (float64 in a float64 model): log-prob of each target; float[2, N] with entropies.

        Args:
            tokens: int64[B, T], padded on the right.
            predictor: int64[N], place in the flattened B * T whose output predicts the target.
            target: int64[N].
            layout: of packed trees (``packing.attention.to_device``); None for plain causal rows.
            temperature: None for the policy's own.
            with_entropy: also the entropy, nats, of the whole tempered distribution each target was scored under.
            waiting_times: sample instead, as ``sampled`` does.
        """
        if waiting_times is not None:
            return self.sampled(tokens, predictor, waiting_times)
        assert target is not None
        return self.logprobs(tokens, predictor, target, layout, temperature, with_entropy)

    def logprobs(
        self,
        tokens: Tensor,
        predictor: Tensor,
        target: Tensor,
        layout: DeviceLayout | None = None,
        temperature: float | None = None,
        with_entropy: bool = False,
    ) -> Tensor:
        """As ``forward``, without whatever Accelerate put around that (autocast)."""
        arranged = {} if layout is None else layout.model_arguments()
        hidden = self.hf.base_model(input_ids=tokens, use_cache=False, **arranged).last_hidden_state
        chosen = hidden.reshape(-1, hidden.shape[-1])[predictor]
        head = self.hf.get_output_embeddings()
        scale = 1.0 / (self.temperature if temperature is None else temperature)
        score = _head_entropies if with_entropy else _head_logprobs
        # The entropy holds the log-probs of the whole vocabulary beside the logits.
        size = max(1, MAX_LOGITS // int(head.weight.shape[0]) // (1 + with_entropy))
        if len(chosen) <= size:
            return score(head, scale, chosen, target)
        parts = [
            checkpoint(score, head, scale, h, t, use_reentrant=False)
            for h, t in zip(torch.split(chosen, size), torch.split(target, size), strict=True)
        ]
        return torch.cat(parts, dim=-1)

    def sampled(self, tokens: Tensor, predictor: Tensor, waiting_times: Tensor) -> Tensor:
        """int64[N]: a token that follows each place, sampled at temperature 1.

        Args:
            tokens, predictor: as ``forward``'s.
            waiting_times: float[N, V], exponential numbers: of p's tokens, each with its own rate, the first to come
                is a sample of p.
        """
        hidden = self.hf.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        chosen = hidden.reshape(-1, hidden.shape[-1])[predictor]
        logits = _logits(self.hf.get_output_embeddings(), 1.0, chosen)[:, : waiting_times.shape[-1]]
        return (logits - waiting_times.log()).argmax(-1)


def _head_logprobs(head: Callable[[Tensor], Tensor], scale: float, hidden: Tensor, target: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(_logits(head, scale, hidden), target, reduction="none")


def _head_entropies(head: Callable[[Tensor], Tensor], scale: float, hidden: Tensor, target: Tensor) -> Tensor:
    """float[2, N]: log-probs of the targets, entropies."""
    logs = _logits(head, scale, hidden).log_softmax(-1)
    return torch.stack([logs.gather(-1, target[:, None])[:, 0], -(logs.exp() * logs).sum(-1)])


def _logits(head: Callable[[Tensor], Tensor], scale: float, hidden: Tensor) -> Tensor:
    logits = head(hidden)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return logits * scale if scale != 1.0 else logits


def load_policy(config: Config) -> Policy:
    """The policy of ``model.path`` in float32: masters are float32 whatever the engine's precision is.

    Raises:
        SetupError: the folder is missing or holds no causal language model, or its head is more than a matrix.
    """
    return open_policy(model_folder(config.model.path), config)


def open_policy(folder: Path, config: Config) -> Policy:
    """The policy in ``folder``, which a checkpoint may be.  Raises SetupError as ``causal_lm.load`` does."""
    # Attention is transformers' choice: SDPA wherever the model has it.
    hf, _ = causal_lm.load(folder, dtype=torch.float32)
    if getattr(hf.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        # SDPA has no cap on attention logits, and transformers leaves it out there without a warning.
        hf.set_attn_implementation("eager")
    _switch_off_dropout(hf)
    if config.learner.gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        hf.train()
    else:
        hf.eval()
    policy = Policy(hf, temperature=config.search.temperature)
    _check_head(policy, folder)
    return policy


def _switch_off_dropout(hf: Any) -> None:
    # With dropout the forward pass is no function of the weights: ratios, probe and tree packing would all be off.
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(hf.config, name):
            setattr(hf.config, name, 0.0)
    for module in hf.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _check_head(policy: Policy, folder: Path) -> None:
    """Models that cap or scale their logits outside the head would get wrong log-probs here: refuse them."""
    tokens = torch.arange(4).remainder(int(policy.hf.config.vocab_size))[None]
    with torch.no_grad():
        whole = policy.hf(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
        target = whole.argmax(-1)
        try:
            ours = policy.logprobs(tokens, torch.arange(4), target, temperature=1.0).float()
        except Exception as exc:
            raise SetupError(
                f"model.path = {str(folder)!r}: {type(policy.hf).__name__} does not let its body and its output head "
                f"be run one after the other ({type(exc).__name__}: {exc}); this learner needs that"
            ) from exc
    error = float((ours - whole.gather(-1, target[:, None])[:, 0]).abs().max())
    if not error < 1e-3:
        raise SetupError(
            f"model.path = {str(folder)!r}: {type(policy.hf).__name__} does more to its logits than the output head "
            f"(log-probs differ by {error:.2g}); this learner supports models whose head is one matrix"
        )


def layout_for(policy: Policy, config: Config, model: nn.Module | None = None) -> tuple[Literal["tree", "flat"], str]:
    """The layout of this policy's batches, and why: ``learner.packing``, as far as the model supports it.

    A model can if a small forked tree gets the same log-probs packed as flat, on the device where the policy is.

    Args:
        policy: the policy.
        config: the run's.
        model: the policy in its wrappers, where only those can run it (sharded parameters); every rank then calls this.

    Raises:
        SetupError: ``learner.packing = "tree"`` and the model cannot.
    """
    if config.learner.packing == "flat":
        return "flat", "learner.packing = 'flat'"
    obstacle = attention.obstacle(policy.hf, max_tokens=config.model.max_context_tokens)
    if obstacle is None:
        obstacle = _packing_fault(policy, model, config.learner.mixed_precision)
    if obstacle is None:
        return "tree", "packed trees get the log-probs of flat rows"
    if config.learner.packing == "tree":
        raise SetupError(
            f"learner.packing = 'tree', but {type(policy.hf).__name__} in model.path = {config.model.path!r} cannot "
            f"score packed trees: {obstacle}; use --learner.packing flat"
        )
    return "flat", obstacle


PACKING_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Nats between packed and flat log-probs, by dtype of the parameters."""

WRAPPED_TOLERANCE = {"no": 1e-3, "bf16": 0.1, "fp16": 0.02}
"""The same through wrappers that may cast, by ``learner.mixed_precision``."""


def _packing_fault(policy: Policy, model: nn.Module | None, mixed_precision: str) -> str | None:
    """The fault when a small tree is scored packed; None where there is none."""
    rows = _forked_rows(int(policy.hf.config.vocab_size))
    (flat,) = micro_batches(rows, max_tokens=1024, version=0)
    (packed,) = tree_micro_batches(rows, max_tokens=1024, pack_tokens=None, version=0)
    assert packed.layout is not None
    device, dtype = next((p.device, p.dtype) for p in policy.parameters())

    def score(batch: MicroBatch, layout: DeviceLayout | None) -> Tensor:
        tokens, predictor, target = (
            torch.from_numpy(values).to(device) for values in (batch.tokens, batch.predictor, batch.target)
        )
        run = policy.logprobs if model is None else model
        scored: Tensor = run(tokens, predictor, target, layout=layout).double()
        return scored if batch.occurrence is None else scored[torch.from_numpy(batch.occurrence).to(device)]

    tolerance = PACKING_TOLERANCE.get(dtype, 0.1) if model is None else WRAPPED_TOLERANCE[mixed_precision]
    with torch.no_grad():
        expected = score(flat, None)
        # How much wrong context changes: a model that hardly depends on its context must not pass for that reason.
        effect = float((score(packed, None) - expected).abs().max())
        for layout in attention.every_way(packed.layout, device):
            try:
                error = float((score(packed, layout) - expected).abs().max())
            except Exception as exc:
                return f"it raises {type(exc).__name__}: {str(exc).strip().splitlines()[0] if str(exc) else ''}"
            if not error <= min(tolerance, max(0.02 * effect, 1e-2 * tolerance)):
                return f"their log-probs differ from flat ones by {error:.2g} nats"
    return None


def _forked_rows(vocab_size: int) -> list[Row]:
    """Three rows of one length, depth first: a shared observation, two turns without one, a shared prefix."""
    parts = (
        ((0, 6, 6), (1, 10, 13), (3, 16, 16)),
        ((0, 6, 6), (1, 10, 13), (4, 16, 16)),
        ((0, 6, 6), (2, 10, 13), (5, 16, 18)),
    )
    rows = []
    for path in parts:
        tokens = np.zeros(21, dtype=np.int32)
        tokens[:6] = np.arange(6) * 5 + 3
        ends = [begin for _, begin, _ in path[1:]] + [len(tokens)]
        at, turn = [], []
        for (number, begin, action), end in zip(path, ends, strict=True):
            tokens[begin:end] = np.arange(begin, end) * 7 + np.where(np.arange(begin, end) < action, 0, 11 * number + 1)
            at.append(np.arange(action, end, dtype=np.int64))
            turn.append(np.full(end - action, number, dtype=np.int64))
        places, turns = np.concatenate(at), np.concatenate(turn)
        nothing = np.zeros(len(places))
        rows.append(
            Row(
                tokens=tokens % vocab_size, parts=np.array(path, dtype=np.int64), tree=0, at=places, mu=nothing,
                advantage=nothing, version=turns * 0, turn=turns, weight=nothing,
            )
        )  # fmt: skip
    return rows


def make_accelerator(config: Config) -> Accelerator:
    """Accelerate with this run's device, precision and deadlines.

    ``learner.device = "auto"`` takes CUDA where it is, else the CPU.

    Raises:
        SetupError: CUDA is asked for and absent; fp16 on a CPU; gradients would be divided.
    """
    settings = config.learner
    precision.leave_out_environment(settings)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SetupError("learner.device = 'cuda', but torch sees no CUDA device here; use --learner.device cpu")
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    precision.check_half_precision(settings.mixed_precision, on_cpu=on_cpu)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.links.give_up_s + 60)),
        ],
    )
    precision.check_accumulation(accelerator)
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type in SHARDED


def is_tied(policy: Policy) -> bool:
    """Whether the output head and the embeddings are one parameter."""
    head, embeddings = policy.hf.get_output_embeddings(), policy.hf.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def make_optimizer(policy: nn.Module, settings: LearnerConfig, *, sharded: bool = False) -> torch.optim.AdamW:
    """AdamW; norms and biases are decayed like the rest (the default decay is 0)."""
    return torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=not sharded,
    )
