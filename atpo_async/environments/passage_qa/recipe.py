"""What decides the policy of passage_qa: its size, the towns it practises in, the demonstrator's habits, training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atpo_async.environments.passage_qa.demonstrator import CAREFUL, Habits
from atpo_async.environments.passage_qa.world import Question, Towns
from atpo_async.environments.policy_folder import fingerprint_of
from atpo_async.environments.policy_training import PolicyRecipe, check_rates, check_shares

RECIPE_VERSION = 1
"""Raise it when the same settings would give another model (architecture, tokenizer, demonstrations, optimizer)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(PolicyRecipe):
    """Everything that decides what the model becomes."""

    steps: int = 220
    min_hops: int = 2
    batch_size: int = 16
    num_towns: int = 8
    """As of ``Towns``."""
    easy: float = 0.2
    """Share of the steps, the first, whose questions have one hop: conversations are short and copying is learnt."""
    careful: float = 0.64
    """Share of the steps, the first, whose demonstrator makes next to no mistakes; after them it has its habits."""
    matrix_lr: float = 0.02
    """Muon's, of the layers' matrices: a policy of this size learns to copy several times sooner with it."""

    def __post_init__(self) -> None:
        PolicyRecipe.__post_init__(self)
        check_rates(self, "matrix_lr")
        check_shares(self, "easy", "careful")
        _ = self.towns, self.habits  # refuse what these refuse before anything is made

    @property
    def towns(self) -> Towns:
        """Where the demonstrator plays: other facts than those that are trained and evaluated on."""
        return Towns(
            seed=self.seed, num_towns=self.num_towns, min_hops=self.min_hops, max_hops=self.max_hops,
            num_names=self.num_names, num_relations=self.num_relations, rehearsal=True,
        )  # fmt: skip

    @property
    def habits(self) -> Habits:
        return Habits(noise=self.noise, mixed_up=self.mixed_up, mix_up_rate=self.mix_up_rate)

    def habits_at(self, step: int) -> Habits:
        """Of the demonstrator whose conversations step ``step`` learns from."""
        return CAREFUL if step < self.careful * self.steps else self.habits

    def questions(self, *, easy: bool) -> list[Question]:
        """Of all steps of one kind, in their order."""
        num_easy = self.batch_size * self.num_easy_steps
        if easy:
            towns = Towns(
                seed=self.seed, num_towns=self.num_towns, min_hops=1, max_hops=1, num_names=self.num_names,
                num_relations=self.num_relations, rehearsal=True,
            )  # fmt: skip
            return [towns.question("demo", index) for index in range(num_easy)]
        return [self.towns.question("demo", index) for index in range(num_easy, self.batch_size * self.steps)]

    @property
    def num_easy_steps(self) -> int:
        return min(self.steps, round(self.easy * self.steps))

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that differ where settings do."""
        return fingerprint_of(self, RECIPE_VERSION)


def policy_folder(root: Path, recipe: Recipe) -> Path:
    """Where a recipe's model belongs: ``<root>/passage_qa-<fingerprint>``."""
    return root / f"passage_qa-{recipe.fingerprint}"
