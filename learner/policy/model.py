"""The policy on the learner's side: loading it, and its log-probs.

Shapes: B rows, T tokens, N action tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from atpo_async.models import causal_lm
from atpo_async.models.sources import model_folder
from learner.kernels.vocabulary import Scoring, Wanted
from learner.memory import checkpointed_layers
from learner.packing import attention
from learner.packing.attention import DeviceLayout, Way
from learner.policy.head import logits, scored
from learner.policy.lora import Lora, attach


class Policy(nn.Module):
    """A causal language model that gives log-probs of chosen tokens, and computes no other logits.

    Args:
        hf: the transformers model.
        temperature: that actions are sampled with; log-probs are under the tempered distribution.
        lora: its adapters, where those alone are trained.
    """

    def __init__(self, hf: Any, *, temperature: float = 1.0, lora: Lora | None = None) -> None:
        super().__init__()
        self.hf = hf
        self.lora = lora
        self.temperature = temperature
        self.compiled_head = False
        """Whether the numbers of the head are computed by compiled kernels (CUDA)."""
        self.attention_way: Way | None = None
        """Of attention over packed trees, once the packing check has chosen it; None: the device's first."""
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
        min_p: float | None = None,
    ) -> Tensor:
        """float32[N] (float64 in a float64 model): log-prob of each target; float[2, N] with entropies.

        ``min_p`` adds two lines without a gradient, the last ones: of the tokens whose probability is at least this
        share of the largest one, the log of their mass; and the largest log-prob.

        Args:
            tokens: int64[B, T], padded on the right.
            predictor: int64[N], place in the flattened B * T whose output predicts the target.
            target: int64[N].
            layout: of packed trees (``packing.attention.to_device``); None for plain causal rows.
            temperature: None for the policy's own.
            with_entropy: also the entropy, nats, of the whole tempered distribution each target was scored under.
            waiting_times: sample instead, as ``sampled`` does.
            min_p: above 0, at most 1.
        """
        if waiting_times is not None:
            return self.sampled(tokens, predictor, waiting_times)
        assert target is not None
        return self.logprobs(tokens, predictor, target, layout, temperature, with_entropy, min_p)

    def logprobs(
        self,
        tokens: Tensor,
        predictor: Tensor,
        target: Tensor,
        layout: DeviceLayout | None = None,
        temperature: float | None = None,
        with_entropy: bool = False,
        min_p: float | None = None,
    ) -> Tensor:
        """As ``forward``, without whatever Accelerate put around that (autocast)."""
        arranged = {} if layout is None else layout.model_arguments()
        hidden = self.hf.base_model(input_ids=tokens, use_cache=False, **arranged).last_hidden_state
        chosen = hidden.reshape(-1, hidden.shape[-1])[predictor]
        scoring = Scoring(
            scale=1.0 / (self.temperature if temperature is None else temperature),
            wanted=Wanted(entropy=with_entropy, min_p=min_p),
            compiled=self.compiled_head,
        )
        return scored(self.hf.get_output_embeddings(), chosen, target, scoring)

    def sampled(self, tokens: Tensor, predictor: Tensor, waiting_times: Tensor) -> Tensor:
        """int64[N]: a token that follows each place, sampled at temperature 1.

        Args:
            tokens, predictor: as ``forward``'s.
            waiting_times: float[N, V], exponential numbers: of p's tokens, each with its own rate, the first to come
                is a sample of p.
        """
        hidden = self.hf.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        chosen = hidden.reshape(-1, hidden.shape[-1])[predictor]
        found = logits(self.hf.get_output_embeddings(), chosen)[:, : waiting_times.shape[-1]]
        return (found - waiting_times.log()).argmax(-1)


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
    policy = policy_of(hf, config, folder)
    _check_head(policy, folder)
    return policy


def policy_of(hf: Any, config: Config, folder: Path) -> Policy:
    """The policy around a transformers model of ``folder``, made ready to train as ``config`` says.

    Raises SetupError where LoRA's settings do not fit the model.
    """
    if getattr(hf.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        # SDPA has no cap on attention logits, and transformers leaves it out there without a warning.
        hf.set_attn_implementation("eager")
    _switch_off_dropout(hf)
    lora = attach(hf, config, folder)
    if config.learner.gradient_checkpointing:
        checkpointed_layers.enable(hf, count=0 if config.learner.gradient_checkpointing == "auto" else None)
    else:
        hf.eval()
    return Policy(hf, temperature=config.search.temperature, lora=lora)


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


def is_tied(policy: Policy) -> bool:
    """Whether the output head and the embeddings are one parameter."""
    head, embeddings = policy.hf.get_output_embeddings(), policy.hf.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight
