"""The demo's policy: a small Qwen3 model made from nothing and warm-started on noisy demonstrations.

What comes out is an ordinary model folder (config.json, generation_config.json, model.safetensors, tokenizer files)
that vLLM and transformers load, and ``warm_start.json``, which records how it was made.  The demonstrations' faults
(``world.Habits``) are what reinforcement learning has to remove; copying names and the form of the
calls are learnt here.

torch is imported only when there is something to make: to see that nothing changed takes no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Unpack

from atpo_async.environments.hopqa.world import END, PAD, Habits, World, demonstrate, save_tokenizer
from atpo_async.environments.policy_folder import (
    Making,
    WarmStartReport,
    command,
    fingerprint_of,
    make_once,
)
from atpo_async.environments.policy_training import PolicyRecipe, make_model, new_qwen3

if TYPE_CHECKING:
    import torch

RECIPE_VERSION = 1
"""Of the recipe; raise it when the same settings would give another model (architecture, demonstrations, optimizer)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(PolicyRecipe):
    """Everything that decides what the model becomes."""

    def __post_init__(self) -> None:
        PolicyRecipe.__post_init__(self)
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


def make_policy(path: Path, recipe: Recipe, **making: Unpack[Making]) -> WarmStartReport:
    """Make the policy at ``path`` unless the same recipe has made it already.

    Args:
        path: the model folder; ``policy_folder`` gives one that no other recipe claims.
        recipe: what to make.
        making: without ``num_threads`` torch chooses.

    Raises:
        SetupError: ``path`` holds something else, or cannot be written.
    """
    return make_once(path, recipe, RECIPE_VERSION, lambda folder: _make(folder, recipe, **making))


def _make(folder: Path, recipe: Recipe, **making: Unpack[Making]) -> dict[str, Any]:
    """Build, train and save the model; returns what goes into its record."""
    import torch

    rng = Random(recipe.seed)
    save_tokenizer(recipe.world, folder)
    return make_model(
        folder,
        recipe,
        model=lambda: new_model(recipe),
        optimizers=lambda model: [
            torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
        ],
        batches=lambda model: (demonstration_batch(recipe, step, rng) for step in range(recipe.steps)),
        **making,
    )


def new_model(recipe: Recipe) -> Any:
    """A random ``Qwen3ForCausalLM`` with tied embeddings over the world's words, float32, from torch's generator."""
    ids = _token_ids(recipe.world)
    return new_qwen3(recipe, vocab_size=len(ids), pad=ids[PAD], end=ids[END])


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
