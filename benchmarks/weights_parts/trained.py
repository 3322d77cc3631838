"""Versions of a policy that the learner's own trainer has trained for real steps, kept in files."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import Tensor

from atpo_async.config import load
from atpo_async.core.errors import SetupError
from atpo_async.core.vocabulary import Precision
from atpo_async.wire.messages import TensorSpec

if TYPE_CHECKING:
    from benchmarks.learner_parts.sides import TimedTrainer

PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float32")
LR = 1e-6
WARM = 2
"""Steps before the base: AdamW's first one moves every weight by the whole learning rate."""
AFTER = (0, 1, 2, 8)
"""Steps after the base at which a version is kept."""
_DONE = "done"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Versions:
    """The kept versions of one model.

    Args:
        folder: of the files; those that are there are used again.
        model: name of its size.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder / model
        self.model = model

    def path(self, precision: Precision, steps: int) -> Path:
        return self.folder / f"{precision}-{steps}.bin"

    def layout(self, precision: Precision) -> tuple[TensorSpec, ...]:
        found: tuple[TensorSpec, ...] = msgspec.json.decode(
            (self.folder / f"{precision}.json").read_bytes(), type=tuple[TensorSpec, ...]
        )
        return found

    def tensors(self, precision: Precision, steps: int) -> dict[str, Tensor]:
        """As the trainer published them; mapped, not read."""
        raw = torch.from_numpy(np.memmap(self.path(precision, steps), dtype=np.uint8, mode="c"))
        return {
            spec.name: raw[spec.offset : spec.offset + spec.nbytes].view(_DTYPES[spec.dtype]).view(spec.shape)
            for spec in self.layout(precision)
        }

    def need(self, *, trees: int, over: Callable[[], bool]) -> None:
        """Train, unless that has been done.  Raises SetupError where the time was over before."""
        if (self.folder / _DONE).is_file():
            return
        # What only reads versions waits for none of this.
        from benchmarks.learner_parts.sides import SIZES, make_trainer
        from benchmarks.learner_parts.tables import say

        self.folder.mkdir(parents=True, exist_ok=True)
        cuda = torch.cuda.is_available()
        options = {"learner.lr": str(LR), "staleness.max_lag": "0", "model.dtype": "bfloat16", "actor.count": "0"}
        options |= {"learner.mixed_precision": "bf16"} if cuda else {"learner.device": "cpu"}
        trainer = make_trainer(SIZES[self.model], load((), options))
        for step in range(WARM + max(AFTER) + 1):
            after = step - WARM
            if after in AFTER:
                for precision in PRECISIONS:
                    self._keep(trainer, precision, after)
            if after < max(AFTER):
                if over():
                    raise SetupError("--limit-s was over before the policy had been trained")
                say(f"{self.model}: step {step + 1} of {WARM + max(AFTER)}")
                _train(trainer, seed=step, trees=trees)
        (self.folder / _DONE).touch()
        del trainer
        gc.collect()

    def _keep(self, trainer: TimedTrainer, precision: Precision, after: int) -> None:
        from learner.weights.staging import Stager

        staged = Stager(precision).stage(trainer.whole.published(), copied=False)
        if staged is None:
            raise AssertionError("nothing asked it to stop")
        with self.path(precision, after).open("wb") as file:
            for spec, data in staged.parts():
                file.seek(spec.offset)
                file.write(data)
            file.truncate(staged.total_bytes)
        (self.folder / f"{precision}.json").write_bytes(msgspec.json.encode(staged.specs))
        staged.release()


def _train(trainer: TimedTrainer, *, seed: int, trees: int) -> None:
    """One optimizer step on a batch of its own, as the policy would have sampled it."""
    from benchmarks.learner_parts import trees as made_up

    shape = made_up.SHAPES["m8"].scaled(1.0 if torch.cuda.is_available() else 1 / 32)
    vocab = int(trainer.policy.hf.config.vocab_size)
    batch = made_up.grow_batch(shape, num_trees=trees, vocab_size=vocab, seed=seed, config=trainer.config)
    trainer.timed(made_up.sampled_by(trainer.model, batch, trainer.config, trainer.accelerator.device), "tree")
