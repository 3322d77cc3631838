"""Makes the chat policy of passage_qa from nothing: tokenizer, Qwen3 model, and a warm start on a demonstrator's chats.

What comes out is an ordinary model folder (config.json, generation_config.json, model.safetensors, tokenizer files
with a chat template) that vLLM and transformers load, and ``warm_start.json``, which records how it was made.

torch is imported only when there is something to make: to see that nothing changed takes no time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from atpo_async.core.errors import SetupError
from atpo_async.environments.passage_qa.recipe import HEAD, RECIPE_VERSION, Recipe, policy_folder
from atpo_async.environments.policy_folder import Progress, WarmStartReport, command, lr_factor, make_once

if TYPE_CHECKING:
    import torch

    from atpo_async.environments.passage_qa.rehearsal import Played

MODULE = "atpo_async.environments.passage_qa.warm_start"


def make_policy(
    path: Path,
    recipe: Recipe,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> WarmStartReport:
    """Make the policy at ``path`` unless the same recipe has made it already.

    Args:
        path: the model folder; ``policy_folder`` gives one that no other recipe claims.
        recipe: what to make.
        device: where to train; ``auto`` is Accelerate's choice.
        num_threads: torch threads while training; None for one: batches are so small that a second thread gains
            little, and where other programs run beside it, it costs more than it gains.
        progress: called every ten steps.

    Raises:
        SetupError: ``path`` holds something else, or cannot be written.
    """

    def make(folder: Path) -> dict[str, Any]:
        return _make(folder, recipe, device=device, num_threads=num_threads, progress=progress)

    return make_once(path, recipe, RECIPE_VERSION, make)


def _make(
    folder: Path, recipe: Recipe, *, device: str, num_threads: int | None, progress: Progress | None
) -> dict[str, Any]:
    """Build, train and save the model; returns what goes into its record."""
    import torch
    import transformers

    from atpo_async.environments.passage_qa.rehearsal import make_tokenizer

    began = time.monotonic()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads or 1)
    try:
        # The caller's generator is left as it was.
        with torch.random.fork_rng(), tempfile.TemporaryDirectory(prefix="atpo-rehearsal-") as aside:
            make_tokenizer(folder, recipe.towns, scratch=Path(aside))
            torch.manual_seed(recipe.seed)
            model = new_model(folder, recipe)
            loss = _train(model, folder, recipe, scratch=Path(aside), device=device, progress=progress)
    finally:
        torch.set_num_threads(threads_before)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return {
        "loss": loss,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "duration_s": round(time.monotonic() - began, 3),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def new_model(folder: Path, recipe: Recipe) -> Any:
    """A random ``Qwen3ForCausalLM`` with tied embeddings for the tokenizer in ``folder``, float32."""
    from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=2 * recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.width // HEAD,
            num_key_value_heads=recipe.width // HEAD,
            head_dim=HEAD,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.08,  # as of hopqa's policy: names are told apart sooner
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    ).float()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return model


def _train(
    model: Any, folder: Path, recipe: Recipe, *, scratch: Path, device: str, progress: Progress | None
) -> float:  # fmt: skip
    """Train on demonstrations; returns the mean loss of the last tenth of the steps, in nats per action token."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError("learner.device = 'cuda' but torch finds no GPU here; use 'auto' or 'cpu'")
    accelerator = Accelerator(cpu=device == "cpu")
    model, *optimizers = accelerator.prepare(model, *_optimizers(model, recipe))
    peaks = (recipe.matrix_lr, recipe.lr)
    model.train()
    losses = [0.0] if recipe.steps == 0 else []
    for step, played in enumerate(conversations(folder, recipe, scratch=scratch)):
        rows, is_action = send_to_device(batch_of(played, model.config.pad_token_id), accelerator.device)
        logits = model(input_ids=rows[:, :-1]).logits.float()
        token_losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        loss = (token_losses * is_action[:, 1:]).sum() / is_action[:, 1:].sum()
        model.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * lr_factor(step, recipe.steps)
            optimizer.step()
        losses.append(loss.item())
        if progress is not None and (step + 1) % 10 == 0:
            progress(step + 1, recipe.steps, sum(losses[-10:]) / 10)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def _optimizers(model: Any, recipe: Recipe) -> list[Any]:
    """Muon for the layers' matrices, AdamW for the rest."""
    import torch

    matrices: list[Any] = []
    others: list[Any] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def conversations(folder: Path, recipe: Recipe, *, scratch: Path) -> Iterator[list[Played]]:
    """What each step learns from."""
    from atpo_async.environments.passage_qa.rehearsal import Rehearsal

    rng = Random(recipe.seed)
    for easy, steps in ((True, range(recipe.num_easy_steps)), (False, range(recipe.num_easy_steps, recipe.steps))):
        if not steps:
            continue
        rehearsal = Rehearsal(folder, recipe.towns, recipe.questions(easy=easy), folder=scratch)
        for step in steps:
            first = (step - steps.start) * recipe.batch_size
            yield rehearsal.play(range(first, first + recipe.batch_size), rng, recipe.habits_at(step))


def batch_of(played: Sequence[Played], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64[B, L] tokens, padded at the right, and float32[B, L], 1 where the token belongs to an action."""
    import torch

    longest = max(len(each.ids) for each in played)
    rows = torch.full((len(played), longest), pad, dtype=torch.int64)
    is_action = torch.zeros(len(played), longest)
    for at, each in enumerate(played):
        rows[at, : len(each.ids)] = torch.from_numpy(each.ids.astype("int64"))
        is_action[at, : len(each.ids)] = torch.from_numpy(each.is_action.astype("float32"))
    return rows, is_action


def main(argv: Sequence[str] | None = None) -> int:
    """Make a policy by hand, as a process of its own (``atpo_async/environments/policy_folder.py``)."""
    return command(MODULE, Recipe, make_policy, policy_folder, argv)


if __name__ == "__main__":
    raise SystemExit(main())
