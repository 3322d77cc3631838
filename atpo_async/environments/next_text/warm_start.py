"""Makes the chat policy of next_text's stories from nothing: tokenizer, Qwen3 model, a warm start on predictions.

What comes out is an ordinary model folder, and ``warm_start.json``, which records how it was made.  torch is imported
only when there is something to make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from atpo_async.environments.next_text.demonstrator import CAREFUL, Habits, demonstrate
from atpo_async.environments.next_text.environment import CLOSE, MIDDLE, NEXT, OPEN, SYSTEM, prompt
from atpo_async.environments.next_text.segments import Cut, Segment
from atpo_async.environments.next_text.stories import ITEMS, MIN_CONTEXT, PEOPLE, PLACES, story
from atpo_async.environments.passage_qa.tokenizer import save_tokenizer
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
    check_shares,
    make_model,
    matrix_optimizers,
    new_chat_qwen3,
)

if TYPE_CHECKING:
    import torch

    from atpo_async.environments.messages.chat_format import ChatFormat

MODULE = "atpo_async.environments.next_text.warm_start"
RECIPE_VERSION = 1
"""Raise it when the same settings would give another model."""
RENDERER = "qwen3"
CUT = Cut(min_context=MIN_CONTEXT, middle_share=0.25)
TOKENIZER_STORIES = 200
"""So many are written to train the tokenizer on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(TrainingRecipe):
    """Everything that decides what the model becomes."""

    steps: int = 300
    batch_size: int = 16
    mix_up_rate: float = 0.7
    """As of ``Habits``."""
    careful: float = 0.7
    """Share of the steps, the first, whose demonstrator makes next to no mistakes."""
    matrix_lr: float = 0.02
    """Muon's, of the layers' matrices."""

    def __post_init__(self) -> None:
        TrainingRecipe.__post_init__(self)
        check_rates(self, "matrix_lr")
        check_shares(self, "careful")
        _ = self.habits

    @property
    def habits(self) -> Habits:
        return Habits(noise=self.noise, mix_up_rate=self.mix_up_rate)

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that differ where settings do."""
        return fingerprint_of(self, RECIPE_VERSION)


def policy_folder(root: Path, recipe: Recipe) -> Path:
    """Where a recipe's model belongs: ``<root>/next_text-<fingerprint>``."""
    return root / f"next_text-{recipe.fingerprint}"


def make_policy(path: Path, recipe: Recipe, **making: Unpack[Making]) -> WarmStartReport:
    """Make the policy at ``path`` unless the same recipe has made it already.  Without ``num_threads`` by one thread.

    Raises SetupError: ``path`` holds something else, or cannot be written.
    """
    return make_once(path, recipe, RECIPE_VERSION, lambda folder: _make(folder, recipe, **making))


def _make(folder: Path, recipe: Recipe, **making: Unpack[Making]) -> dict[str, Any]:
    """Build, train and save the model; returns what goes into its record."""
    from atpo_async.environments.messages.chat_format import ChatFormat

    making["num_threads"] = making.get("num_threads") or 1
    make_tokenizer(folder)
    chat = ChatFormat.load(folder, renderer=RENDERER)
    return make_model(
        folder,
        recipe,
        model=lambda: new_chat_qwen3(folder, recipe),
        optimizers=lambda model: matrix_optimizers(model, matrix_lr=recipe.matrix_lr, lr=recipe.lr),
        batches=lambda model: batches(chat, recipe, model.config.pad_token_id),
        **making,
    )


def make_tokenizer(folder: Path) -> None:
    """Of the words of all stories; the marks and what stands in every prompt are one token each."""
    texts = [" ".join((*PEOPLE, *ITEMS, *PLACES))]
    texts += [" ".join(story(0, "demo", index)) for index in range(TOKENIZER_STORIES)]
    save_tokenizer(folder, texts, (SYSTEM, OPEN, CLOSE, f"\n\n{NEXT}", f"\n\n{MIDDLE}", " [...] "))


def segment(recipe: Recipe, index: int) -> Segment:
    """Of the demonstration ``index``: of stories that are neither trained nor evaluated on."""
    return CUT.segment(story(recipe.seed, "demo", index), seed=recipe.seed, index=index)


def batches(chat: ChatFormat, recipe: Recipe, pad: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One a step: int64[B, L] tokens, padded at the right, and float32[B, L], 1 where the token is an action's."""
    import torch

    rng = Random(recipe.seed)
    for step in range(recipe.steps):
        habits = CAREFUL if step < recipe.careful * recipe.steps else recipe.habits
        rows, masks = [], []
        for index in range(step * recipe.batch_size, (step + 1) * recipe.batch_size):
            wanted = segment(recipe, index)
            asked, action = chat.render(prompt(wanted)), chat.encode(demonstrate(wanted, rng, habits))
            rows.append(np.concatenate([asked, action]))
            masks.append(np.repeat([0.0, 1.0], [len(asked), len(action)]))
        longest = max(len(row) for row in rows)
        tokens, is_action = np.full((len(rows), longest), pad, dtype=np.int64), np.zeros((len(rows), longest))
        for at, (row, mask) in enumerate(zip(rows, masks, strict=True)):
            tokens[at, : len(row)], is_action[at, : len(row)] = row, mask
        yield torch.from_numpy(tokens), torch.from_numpy(is_action.astype(np.float32))


def main(argv: Sequence[str] | None = None) -> int:
    """Make a policy by hand, as a process of its own (``atpo_async/environments/policy_folder.py``)."""
    return command(MODULE, Recipe, make_policy, policy_folder, argv)


if __name__ == "__main__":
    raise SystemExit(main())
