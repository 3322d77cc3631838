"""The small policy of ledger_qa: a Qwen3 model made from nothing and warm-started on faulty demonstrations.

It learns the form of both roles' actions, to look a name up, and to compare notes, with the demonstrator's mistakes
(``world.Habits``), which reinforcement learning has to remove.  torch is imported only when there is something to make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Unpack

from atpo_async.environments.hopqa.world import save_tokenizer
from atpo_async.environments.ledger_qa.world import END, PAD, Habits, Ledgers
from atpo_async.environments.policy_folder import (
    Making,
    WarmStartReport,
    command,
    fingerprint_of,
    make_once,
)
from atpo_async.environments.policy_training import (
    TrainingRecipe,
    check_rates,
    make_model,
    matrix_optimizers,
    new_qwen3,
)

if TYPE_CHECKING:
    import torch

RECIPE_VERSION = 1
"""Of the recipe; raise it when the same settings would give another model (architecture, demonstrations, optimizer)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(TrainingRecipe):
    """Everything that decides what the model becomes."""

    noise: float = 0.25
    layers: int = 3
    width: int = 96
    batch_size: int = 24
    """Tasks, each with a row for every member."""
    ledgers: int = 2
    entries: int = 4
    num_names: int = 6
    """As of the environment's world."""
    matrix_lr: float = 2e-2
    """Muon's."""

    def __post_init__(self) -> None:
        TrainingRecipe.__post_init__(self)
        check_rates(self, "matrix_lr")
        _ = self.world  # refuse what it refuses before anything is made

    @property
    def world(self) -> Ledgers:
        return Ledgers(seed=self.seed, ledgers=self.ledgers, entries=self.entries, num_names=self.num_names)

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that differ where settings do."""
        return fingerprint_of(self, RECIPE_VERSION)


def policy_folder(root: Path, recipe: Recipe) -> Path:
    """Where a recipe's model belongs: ``<root>/ledger_qa-<fingerprint>``."""
    return root / f"ledger_qa-{recipe.fingerprint}"


def make_policy(path: Path, recipe: Recipe, **making: Unpack[Making]) -> WarmStartReport:
    """Make the policy at ``path`` unless the same recipe has made it already.

    Raises:
        SetupError: ``path`` holds something else, or cannot be written.
    """
    return make_once(path, recipe, RECIPE_VERSION, lambda folder: _make(folder, recipe, **making))


def _make(folder: Path, recipe: Recipe, **making: Unpack[Making]) -> dict[str, Any]:
    """Build, train and save the model; returns what goes into its record."""
    ids = {word: i for i, word in enumerate(recipe.world.words)}
    rng = Random(recipe.seed)
    save_tokenizer(recipe.world, folder)
    return make_model(
        folder,
        recipe,
        model=lambda: new_qwen3(recipe, vocab_size=len(ids), pad=ids[PAD], end=ids[END]),
        optimizers=lambda model: matrix_optimizers(model, matrix_lr=recipe.matrix_lr, lr=recipe.lr),
        batches=lambda model: (demonstration_batch(recipe, step, rng) for step in range(recipe.steps)),
        **making,
    )


def demonstration_batch(recipe: Recipe, step: int, rng: Random) -> tuple[torch.Tensor, torch.Tensor]:
    """int64[B, L] tokens, padded at the right, and float32[B, L], 1 where the token belongs to an action: of each task
    every proposer, and a synthesizer that reads right notes."""
    import torch

    world, habits = recipe.world, Habits(noise=recipe.noise)
    ids = {word: i for i, word in enumerate(world.words)}
    said: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for index in range(step * recipe.batch_size, (step + 1) * recipe.batch_size):
        task = world.task("demo", index)
        every = range(world.ledgers)
        said += [(task.read_by(ledger), habits.proposal(task, ledger, rng)) for ledger in every]
        notes = tuple((task.digit(ledger),) for ledger in every)
        said.append((task.read_from(notes), habits.synthesis(task, rng)))
    rows = [[ids[word] for word in (*prompt, *action)] for prompt, action in said]
    masks = [[0.0] * len(prompt) + [1.0] * len(action) for prompt, action in said]
    longest = max(len(row) for row in rows)
    return (
        torch.tensor([row + [ids[PAD]] * (longest - len(row)) for row in rows]),
        torch.tensor([mask + [0.0] * (longest - len(mask)) for mask in masks]),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Make a policy by hand, as a process of its own (``atpo_async/environments/policy_folder.py``)."""
    return command("atpo_async.environments.ledger_qa.warm_start", Recipe, make_policy, policy_folder, argv)


if __name__ == "__main__":
    raise SystemExit(main())
