"""How a small policy is made from nothing: what every recipe settles, the model, and training on demonstrations.

Imports torch only when there is something to make.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.environments.policy_folder import Progress, lr_factor

if TYPE_CHECKING:
    import torch

HEAD = 32
"""Size of an attention head."""


def check_rates(recipe: TrainingRecipe, *names: str) -> None:
    """Raises ConfigError where one of these fields is not above 0."""
    for name in names:
        if getattr(recipe, name) <= 0:
            raise ConfigError(f"warm start: {name} must be > 0, got {getattr(recipe, name)}")


def check_shares(recipe: TrainingRecipe, *names: str) -> None:
    """Raises ConfigError where one of these fields is not from 0 to 1."""
    for name in names:
        if not 0 <= getattr(recipe, name) <= 1:
            raise ConfigError(f"warm start: {name} must be from 0 to 1, got {getattr(recipe, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecipe:
    """What decides what a policy becomes, whatever its task is.  Raises ConfigError."""

    seed: int = 0
    """Of the task, the model and the order of the examples."""
    steps: int = 200
    noise: float = 0.38
    """Of the demonstrator: share of its actions with a slip."""
    lr: float = 4e-3
    """AdamW's."""
    batch_size: int = 32
    layers: int = 4
    width: int = 128

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1), ("layers", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"warm start: {name} must be >= {least}, got {getattr(self, name)}")
        check_rates(self, "lr")
        if self.width < HEAD or self.width % HEAD:
            raise ConfigError(f"warm start: width must be a multiple of {HEAD} (the head size), got {self.width}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRecipe(TrainingRecipe):
    """The same, for a task in a world of facts (``hopqa``)."""

    min_hops: int = 3
    max_hops: int = 3
    num_names: int = 64
    num_relations: int = 10
    """As of the environment's world."""
    mixed_up: int = 2
    mix_up_rate: float = 0.7
    """As of the demonstrator's ``Habits``."""

    def __post_init__(self) -> None:
        TrainingRecipe.__post_init__(self)
        if not 0 <= self.mixed_up <= self.num_relations // 2:
            raise ConfigError(
                f"warm start: mixed_up must be 0 to {self.num_relations // 2} (half of num_relations), "
                f"got {self.mixed_up}"
            )


@contextlib.contextmanager
def torch_as_it_was(num_threads: int | None) -> Iterator[None]:
    """Runs the block with so many threads (None: torch's choice); the caller's threads and generator stay as they
    were."""
    import torch

    threads_before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads_before)


def new_qwen3(recipe: TrainingRecipe, *, vocab_size: int, pad: int, end: int) -> Any:
    """A random ``Qwen3ForCausalLM`` with tied embeddings, float32, from torch's generator.

    Args:
        recipe: its ``layers`` and ``width``.
        vocab_size: tokens.
        pad: token id.
        end: id of the token that ends an action.
    """
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=recipe.width,
            intermediate_size=2 * recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.width // HEAD,
            num_key_value_heads=recipe.width // HEAD,
            head_dim=HEAD,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            # A width this small needs more than the usual 0.02: telling names apart, and copying them, is learnt three
            # times sooner.
            initializer_range=0.08,
            pad_token_id=pad,
            eos_token_id=end,
            bos_token_id=None,
        )
    ).float()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=pad, eos_token_id=end
    )
    return model


def new_chat_qwen3(folder: Path, recipe: TrainingRecipe) -> Any:
    """As ``new_qwen3``, for the tokenizer in ``folder``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return new_qwen3(recipe, vocab_size=len(tokenizer), pad=tokenizer.pad_token_id, end=tokenizer.eos_token_id)


def make_model(
    folder: Path,
    recipe: TrainingRecipe,
    *,
    model: Callable[[], Any],
    optimizers: Callable[[Any], Sequence[torch.optim.Optimizer]],
    batches: Callable[[Any], Iterable[tuple[torch.Tensor, torch.Tensor]]],
    device: str = "auto",
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a model by ``recipe`` and write it into ``folder``; returns what goes into its record.

    Args:
        folder: takes the model's files.
        recipe: its seed is torch's while the model is made and trained.
        model: a random one.
        optimizers, batches: of the model, as ``train`` takes them.
        device, progress: as of ``train``.
        num_threads: of torch; None: its choice.
    """
    import torch
    import transformers

    with torch_as_it_was(num_threads):
        torch.manual_seed(recipe.seed)
        made = model()
        loss = train(made, optimizers(made), batches(made), steps=recipe.steps, device=device, progress=progress)
    transformers.utils.logging.disable_progress_bar()
    made.save_pretrained(folder)
    return {
        "loss": loss,
        "num_parameters": sum(p.numel() for p in made.parameters()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def matrix_optimizers(model: Any, *, matrix_lr: float, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest: a policy this small learns to copy several times sooner so."""
    import torch

    matrices: list[Any] = []
    others: list[Any] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    model: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    steps: int,
    device: str,
    progress: Progress | None,
) -> float:
    """Train on demonstrations; returns the mean loss of the last tenth of the steps, in nats per action token.

    Args:
        model: changed in place.
        optimizers: of its parameters, each with its highest learning rate.
        batches: one a step: int64[B, L] tokens and float32[B, L], 1 where the token belongs to an action.
        steps: in all.
        device: ``auto`` (Accelerate's choice), ``cpu`` or ``cuda``.
        progress: called every ten steps.

    Raises:
        SetupError: there is no such device.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError("learner.device = 'cuda' but torch finds no GPU here; use 'auto' or 'cpu'")
    accelerator = Accelerator(cpu=device == "cpu")
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    model, *prepared = accelerator.prepare(model, *optimizers)
    model.train()
    losses = [0.0] if steps == 0 else []
    for step, batch in enumerate(batches):
        rows, is_action = send_to_device(batch, accelerator.device)
        logits = model(input_ids=rows[:, :-1]).logits.float()
        token_losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        loss = (token_losses * is_action[:, 1:]).sum() / is_action[:, 1:].sum()
        model.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(prepared, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * lr_factor(step, steps)
            optimizer.step()
        losses.append(loss.item())
        if progress is not None and (step + 1) % 10 == 0:
            progress(step + 1, steps, sum(losses[-10:]) / 10)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)
