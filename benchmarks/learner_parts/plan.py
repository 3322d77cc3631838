"""What is measured, and both layouts of one batch against one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from atpo_async.config import Config
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.errors import SetupError
from atpo_async.wire.messages import Batch
from benchmarks.learner_parts.cost import Flops, flat_work, tree_work, work_of
from benchmarks.learner_parts.sides import SIZES, Size, TimedTrainer, Times, clock
from benchmarks.learner_parts.tables import Ratio, column, interleave
from benchmarks.learner_parts.trees import Shape, grow_batch, sampled_by
from learner.packing.attention import to_device
from learner.packing.credited import CreditedTree, Normaliser
from learner.packing.rows import leaf_rows
from learner.packing.tree import tree_micro_batches


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    config: Config
    options: tuple[str, ...]
    """Those of the configuration, as they were given."""
    device: str
    model: str
    shapes: dict[str, Shape]
    trees: int
    rounds: int
    threads: int
    seed: int
    cpu_time: bool

    @property
    def size(self) -> Size:
        return SIZES[self.model]


def made_for(trainer: TimedTrainer, plan: Plan, shape: Shape, trees: int) -> Batch:
    """A batch as the trainer's policy would have sampled it."""
    vocab_size = int(trainer.policy.hf.config.vocab_size)
    batch = grow_batch(shape, num_trees=trees, vocab_size=vocab_size, seed=plan.seed, config=plan.config)
    return sampled_by(trainer.model, batch, plan.config, trainer.accelerator.device)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Both layouts on the same batch."""

    taken: dict[str, list[Times]]
    tokens: dict[str, float]
    """Padded."""
    token_ratio: float
    predicted: float

    def speed_up(self, name: str) -> Ratio:
        return Ratio.of(column(self.taken["flat"], name), column(self.taken["tree"], name))


def compare(trainer: TimedTrainer, batch: Batch, rounds: int) -> Compared:
    """Raises SetupError if the layouts' gradients differ: then they did different work."""
    config = trainer.config
    sides: dict[str, Callable[[], Times]] = {
        "tree": partial(trainer.timed, batch, "tree"),
        "flat": partial(trainer.timed, batch, "flat"),
        "layout": partial(layout_alone, batch, config, trainer.accelerator.device),
    }
    taken = interleave(sides, rounds)
    check_layouts(trainer)
    flops = Flops.of(trainer.policy.hf)
    rows, tree = work_of(batch, flat_work), work_of(batch, tree_work)
    return Compared(
        taken=taken,
        tokens=dict(trainer.forward_tokens_of),
        token_ratio=rows.tokens / tree.tokens,
        predicted=flops(rows) / flops(tree),
    )


def check_layouts(trainer: TimedTrainer) -> None:
    """Raises SetupError if the last steps of both layouts had different gradients: then they did different work."""
    packed, flat = (trainer.grad_norms_of[layout] for layout in ("tree", "flat"))
    if not abs(packed - flat) <= (1e-3 if trainer.config.learner.mixed_precision == "no" else 0.05) * flat:
        raise SetupError(f"the two layouts disagree: gradient norm {packed:.6g} packed, {flat:.6g} flat")


def layout_alone(batch: Batch, config: Config, device: torch.device) -> Times:
    """What the tree layout takes, without the rows, which the flat one needs too."""
    trees = [CreditedTree.of(tree, credit_rule(config.credit)) for tree in batch.trees]
    aggregation, size = config.objective.aggregation, Normaliser.of(trees)
    rows = leaf_rows(trees, version=0, max_lag=0, aggregation=aggregation, normaliser=size)
    settings = config.learner
    began = clock()
    for item in tree_micro_batches(
        rows, max_tokens=settings.micro_batch_tokens, pack_tokens=settings.pack_tokens, version=0
    ):
        if item.layout is not None:
            to_device(item.layout, device)
    return {"step": clock() - began}
