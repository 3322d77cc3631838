"""The demo's policy: a small Qwen3 model made from nothing and warm-started on noisy demonstrations.

What comes out is an ordinary model folder (config.json, generation_config.json, model.safetensors, tokenizer files)
that vLLM and transformers load, and ``warm_start.json``, which records how it was made.  The demonstrations' faults
(``world.Habits``) are what reinforcement learning has to remove; copying names and the form of the
calls are learnt here.

torch is imported only when there is something to make: to see that nothing changed takes no time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.environments.hopqa.world import END, PAD, Habits, World, demonstrate, save_tokenizer
from atpo_async.environments.policy_folder import (
    Progress,
    WarmStartReport,
    command,
    fingerprint_of,
    lr_factor,
    make_once,
)

if TYPE_CHECKING:
    import torch

RECIPE_VERSION = 1
"""Of the recipe; raise it when the same settings would give another model (architecture, demonstrations, optimizer)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides what the model becomes."""

    seed: int = 0
    """Of the world, the model and the order of the examples."""
    steps: int = 200
    min_hops: int = 3
    max_hops: int = 3
    num_names: int = 64
    num_relations: int = 10
    """As of ``World``."""
    noise: float = 0.38
    mixed_up: int = 2
    mix_up_rate: float = 0.7
    """As of ``Habits``."""
    lr: float = 4e-3
    batch_size: int = 32
    layers: int = 4
    width: int = 128

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1), ("layers", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"warm start: {name} must be >= {least}, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ConfigError(f"warm start: lr must be > 0, got {self.lr}")
        if self.width < 32 or self.width % 32:
            raise ConfigError(f"warm start: width must be a multiple of 32 (the head size), got {self.width}")
        if not 0 <= self.mixed_up <= self.num_relations // 2:
            raise ConfigError(
                f"warm start: mixed_up must be 0 to {self.num_relations // 2} (half of num_relations), "
                f"got {self.mixed_up}"
            )
        _ = self.world, self.habits  # refuse what these refuse before anything is made

    @property
    def world(self) -> World:
        return World(
            seed=self.seed, min_hops=self.min_hops, max_hops=self.max_hops,
            num_names=self.num_names, num_relations=self.num_relations,
        )  # fmt: skip

    @property
    def habits(self) -> Habits:
        return Habits(noise=self.noise, mixed_up=self.mixed_up, mix_up_rate=self.mix_up_rate)

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that differ where settings do."""
        return fingerprint_of(self, RECIPE_VERSION)


def recipe_for(*, seed: int, steps: int | None = None, options: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that fits an environment's options (``environment.options``); its other options are left aside.

    Raises ConfigError for values out of range.
    """
    given = dict(options or {})
    chosen: dict[str, Any] = {"seed": seed}
    if "hops" in given:
        chosen |= {"min_hops": given["hops"], "max_hops": given["hops"]}
    for key in ("seed", "min_hops", "max_hops", "num_names", "num_relations"):
        if key in given:
            chosen[key] = given[key]
    if steps is not None:
        chosen["steps"] = steps
    return Recipe(**chosen)


def policy_folder(root: Path, recipe: Recipe) -> Path:
    """Where a recipe's model belongs: ``<root>/hopqa-<fingerprint>``."""
    return root / f"hopqa-{recipe.fingerprint}"


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
        num_threads: torch threads while training; None for torch's choice.
        progress: called every ten steps.

    Raises:
        SetupError: ``path`` holds something else, or cannot be written.
    """

    def make(folder: Path) -> dict[str, Any]:
        return _make(folder, recipe, device=device, num_threads=num_threads, progress=progress)

    return make_once(path, recipe, RECIPE_VERSION, make)


def _make(
    folder: Path,
    recipe: Recipe,
    *,
    device: Literal["auto", "cpu", "cuda"],
    num_threads: int | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Build, train and save the model; returns what goes into its record."""
    import torch
    import transformers

    began = time.monotonic()
    threads_before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        # The caller's generator is left as it was.
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            model = new_model(recipe)
            loss = _train(model, recipe, device=device, progress=progress)
    finally:
        torch.set_num_threads(threads_before)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    save_tokenizer(recipe.world, folder)
    return {
        "loss": loss,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "duration_s": round(time.monotonic() - began, 3),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def new_model(recipe: Recipe) -> Any:
    """A random ``Qwen3ForCausalLM`` with tied embeddings over the world's words, float32, from torch's generator."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    ids = _token_ids(recipe.world)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(ids),
            hidden_size=recipe.width,
            intermediate_size=2 * recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.width // 32,
            num_key_value_heads=recipe.width // 32,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            # A width this small needs more than the usual 0.02: telling names apart, and copying them, is learnt three
            # times sooner.
            initializer_range=0.08,
            pad_token_id=ids[PAD],
            eos_token_id=ids[END],
            bos_token_id=None,
        )
    ).float()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=ids[PAD], eos_token_id=ids[END]
    )
    return model


def _train(model: Any, recipe: Recipe, *, device: str, progress: Progress | None) -> float:
    """Train on demonstrations; returns the mean loss of the last tenth of the steps, in nats per action token."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError("learner.device = 'cuda' but torch finds no GPU here; use 'auto' or 'cpu'")
    accelerator = Accelerator(cpu=device == "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    trained, optimizer = accelerator.prepare(model, optimizer)
    trained.train()
    rng, losses = Random(recipe.seed), [0.0] if recipe.steps == 0 else []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * lr_factor(step, recipe.steps)
        rows, is_action = send_to_device(demonstration_batch(recipe, step, rng), accelerator.device)
        logits = trained(input_ids=rows[:, :-1]).logits.float()
        token_losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        loss = (token_losses * is_action[:, 1:]).sum() / is_action[:, 1:].sum()
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if progress is not None and (step + 1) % 10 == 0:
            progress(step + 1, recipe.steps, sum(losses[-10:]) / 10)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def demonstration_batch(recipe: Recipe, step: int, rng: Random) -> tuple[torch.Tensor, torch.Tensor]:
    """int64[B, L] tokens, padded at the right, and float32[B, L], 1 where the token belongs to an action."""
    import torch

    world, ids = recipe.world, _token_ids(recipe.world)
    rows: list[list[int]] = []
    masks: list[list[float]] = []
    for index in range(step * recipe.batch_size, (step + 1) * recipe.batch_size):
        task = world.task("demo", index)
        row = [ids[word] for word in task.question]
        mask = [0.0] * len(row)
        for seen, action in demonstrate(task, rng, recipe.habits):
            row += [ids[word] for word in (*seen, *action)]
            mask += [0.0] * len(seen) + [1.0] * len(action)
        rows.append(row)
        masks.append(mask)
    longest = max(len(row) for row in rows)
    return (
        torch.tensor([row + [ids[PAD]] * (longest - len(row)) for row in rows]),
        torch.tensor([mask + [0.0] * (longest - len(mask)) for mask in masks]),
    )


def _token_ids(world: World) -> dict[str, int]:
    """The tokenizer numbers words as the world lists them."""
    return {word: i for i, word in enumerate(world.words)}


def main(argv: Sequence[str] | None = None) -> int:
    """Make a policy by hand, as a process of its own (``atpo_async/environments/policy_folder.py``)."""
    return command("atpo_async.environments.hopqa.warm_start", Recipe, make_policy, policy_folder, argv)


if __name__ == "__main__":
    raise SystemExit(main())
