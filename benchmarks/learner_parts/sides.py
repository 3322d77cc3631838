"""The sides of a comparison: the learner's own trainer, timed, and a loop without a learner."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from atpo_async.wire.messages import Batch
from benchmarks.learner_parts.cost import Work, run_of
from benchmarks.learner_parts.trees import DEMO
from learner.loss.correction import Temperings
from learner.packing.attention import Way, to_device
from learner.packing.credited import CreditedTree
from learner.packing.rows import MicroBatch
from learner.policy.accelerator import make_accelerator
from learner.policy.model import Policy, policy_of
from learner.policy.optimizer import make_optimizer
from learner.training.optimizer_steps import Attempt, OptimizerSteps
from learner.training.passes import Part, Pass, Planner
from learner.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Qwen3 model with random weights."""

    vocab: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def make(self, *, seed: int = 0, device: str = "cpu") -> Qwen3ForCausalLM:
        torch.manual_seed(seed)
        settings = Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
        with torch.device(device):
            return Qwen3ForCausalLM(settings).float().eval()


SIZES = {
    "small": Size(vocab=4096, width=384, inner=1024, layers=4, heads=6, kv_heads=3, head_dim=64),
    "demo": Size(vocab=128, width=128, inner=256, layers=4, heads=4, kv_heads=4, head_dim=32),
    "0.6b": Size(vocab=151936, width=1024, inner=3072, layers=28, heads=16, kv_heads=8, head_dim=128),
    "1.7b": Size(vocab=151936, width=2048, inner=6144, layers=28, heads=16, kv_heads=8, head_dim=128),
    "4b": Size(vocab=151936, width=2560, inner=9728, layers=36, heads=32, kv_heads=8, head_dim=128),
}
TOY = ("the demo's model and lengths", SIZES["demo"], DEMO, 64)
"""A case of its own, whatever is asked for: many small trees, where what is no matrix product weighs most."""
Layout = Literal["tree", "flat"]
Times = dict[str, float]
"""Seconds: of the step as a whole, and of what is timed inside it."""


class Clock:
    """Seconds, once the accelerator has done what it was given."""

    now: Callable[[], float] = staticmethod(time.perf_counter)

    def __call__(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.now()


clock = Clock()


class TimedTrainer(Trainer):
    """The learner's trainer, in either layout, with the seconds of its two large steps."""

    def __init__(self, config: Config, *, accelerator: Accelerator, policy: Policy) -> None:
        super().__init__(config, accelerator=accelerator, policy=policy)
        self.way: Way | None = None
        """Of attention over packed trees; None: the device's own choice."""
        self.plan_s = 0.0
        """Rows, layout, and what takes it to the device."""
        self.passes_s = 0.0
        """Forward and backward, the loss between them included."""
        self.largest_pass = 0
        """Padded tokens of the largest pass of the last step."""
        self.grad_norms_of: dict[str, float] = {}
        """By layout, of the last step; as the padded tokens of its passes:"""
        self.forward_tokens_of: dict[str, float] = {}
        self._time_plans(self.planner)
        self._time_attempts(self.steps)

    def _time_plans(self, planner: Planner) -> None:
        plan, on_device = planner.plan, planner.on_device

        def timed_plan(
            trees: Sequence[CreditedTree], chains: Sequence[CreditedTree], batch: Batch, version: int
        ) -> Part:
            began = clock()
            part = plan(trees, chains, batch, version)
            self.plan_s += clock() - began
            return part

        def placed(batch: MicroBatch) -> Pass:
            item = on_device(batch)
            if self.way is not None and batch.layout is not None:
                item.inputs["layout"] = to_device(batch.layout, self.accelerator.device, way=self.way)
            return item

        planner.plan, planner.on_device = timed_plan, placed  # type: ignore[method-assign]

    def _time_attempts(self, steps: OptimizerSteps) -> None:
        attempt = steps.attempt

        def timed_attempt(passes: list[Pass], tempering: Temperings, should_stop: Callable[[], bool]) -> Attempt:
            self.largest_pass = max((item.inputs["tokens"].numel() for item in passes), default=0)
            began = clock()
            found = attempt(passes, tempering, should_stop)
            self.passes_s += clock() - began
            return found

        steps.attempt = timed_attempt  # type: ignore[method-assign]

    def timed(self, batch: Batch, layout: Layout, way: Way | None = None) -> Times:
        """Train on ``batch`` once.  Raises SetupError if the step was skipped: its time would be another thing's."""
        self.planner.layout, self.way = layout, way
        self.plan_s = self.passes_s = 0.0
        began = clock()
        report = self.train(batch, version=0)
        step_s = clock() - began
        if report.fault is not None:
            raise SetupError(f"the benchmark's step was skipped ({report.fault}): its time means nothing")
        self.grad_norms_of[layout] = report.metrics["grad_norm"]
        self.forward_tokens_of[layout] = report.metrics["tokens/forward"]
        return {"step": step_s, "plan": self.plan_s, "passes": self.passes_s}


def make_trainer(size: Size, config: Config) -> TimedTrainer:
    """The learner on a model of this size.  Raises SetupError where that model cannot take packed trees."""
    config = config.model_copy(update={"learner": config.learner.model_copy(update={"packing": "tree"})})
    accelerator = make_accelerator(config)
    policy = policy_of(size.make(device=accelerator.device.type), config, Path("made-up"))
    return TimedTrainer(config, accelerator=accelerator, policy=policy)


class Bare:
    """A training loop without a learner: plain causal rows, cross entropy on the next token, AdamW.

    Args:
        tokens: of one step, all rows together.
        row: tokens of one row.
        scored: tokens that are predicted where not every one is.
    """

    def __init__(self, size: Size, config: Config, *, tokens: int, row: int, scored: int, seed: int = 0) -> None:
        self.config = config
        self.accelerator = make_accelerator(config)
        device = self.accelerator.device
        self.hf = size.make(device=device.type)
        if config.learner.gradient_checkpointing is True:
            self.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.hf.train()
        settings = config.learner
        self.optimizer = make_optimizer(self.hf, settings, device=device)
        num_rows = max(1, round(tokens / row))
        self.num_tokens = num_rows * row
        at_once = max(1, settings.micro_batch_tokens // row)
        rng = np.random.default_rng(seed)
        rows = torch.from_numpy(rng.integers(0, size.vocab, (num_rows, row))).to(device)
        self.passes = list(torch.split(rows, at_once))
        per_row = min(row - 1, max(1, round(scored / num_rows)))
        self.keep = torch.linspace(0, row - 2, per_row, device=device).long()

    @property
    def work(self) -> Work:
        """Of one step in which not every token is predicted."""
        rows = sum(len(rows) for rows in self.passes)
        row = run_of(0, self.num_tokens // rows)
        return Work(rows * row.tokens, rows * row.pairs, rows * len(self.keep))

    def loss(self, rows: Tensor, *, every: bool) -> Tensor:
        if every:
            found: Tensor = self.hf(input_ids=rows, labels=rows, use_cache=False).loss
            return found
        logits = self.hf(input_ids=rows, logits_to_keep=self.keep, use_cache=False).logits.float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, self.keep + 1].flatten())

    def _precision(self) -> AbstractContextManager[object]:
        if self.config.learner.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)

    def timed(self, *, every: bool) -> Times:
        """One step; ``every``: all tokens are predicted, as with ``labels=input_ids``."""
        began = clock()
        total = torch.zeros((), device=self.accelerator.device)
        for rows in self.passes:
            with self._precision():
                loss = self.loss(rows, every=every) * (len(rows) * rows.shape[1] / self.num_tokens)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.hf.parameters(), self.config.learner.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        total.item()
        return {"step": clock() - began}
