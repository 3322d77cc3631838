"""Makes the chat policy of passage_qa from nothing: tokenizer, Qwen3 model, and a warm start on a demonstrator's chats.

What comes out is an ordinary model folder (config.json, generation_config.json, model.safetensors, tokenizer files
with a chat template) that vLLM and transformers load, and ``warm_start.json``, which records how it was made.

torch is imported only when there is something to make: to see that nothing changed takes no time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Unpack

from atpo_async.environments.passage_qa.recipe import RECIPE_VERSION, Recipe, policy_folder
from atpo_async.environments.policy_folder import Making, WarmStartReport, command, make_once
from atpo_async.environments.policy_training import make_model, matrix_optimizers, new_chat_qwen3

if TYPE_CHECKING:
    import torch

    from atpo_async.environments.passage_qa.rehearsal import Played

MODULE = "atpo_async.environments.passage_qa.warm_start"


def make_policy(path: Path, recipe: Recipe, **making: Unpack[Making]) -> WarmStartReport:
    """Make the policy at ``path`` unless the same recipe has made it already.

    Args:
        path: the model folder; ``policy_folder`` gives one that no other recipe claims.
        recipe: what to make.
        making: without ``num_threads`` there is one thread: batches are so small that a second one gains little, and
            where other programs run beside it, it costs more than it gains.

    Raises:
        SetupError: ``path`` holds something else, or cannot be written.
    """
    return make_once(path, recipe, RECIPE_VERSION, lambda folder: _make(folder, recipe, **making))


def _make(folder: Path, recipe: Recipe, **making: Unpack[Making]) -> dict[str, Any]:
    """Build, train and save the model; returns what goes into its record."""
    from atpo_async.environments.passage_qa.rehearsal import make_tokenizer

    making["num_threads"] = making.get("num_threads") or 1
    with tempfile.TemporaryDirectory(prefix="atpo-rehearsal-") as aside:
        make_tokenizer(folder, recipe.towns, scratch=Path(aside))
        return make_model(
            folder,
            recipe,
            model=lambda: new_chat_qwen3(folder, recipe),
            optimizers=lambda model: matrix_optimizers(model, matrix_lr=recipe.matrix_lr, lr=recipe.lr),
            batches=lambda model: (
                batch_of(played, model.config.pad_token_id)
                for played in conversations(folder, recipe, scratch=Path(aside))
            ),
            **making,
        )


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
