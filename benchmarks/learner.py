"""What a training step costs: trees packed against flat rows, and against the loop one would write with transformers.

Every figure is a ratio of two sides that take turns in one process: each round runs every side once, in an order that
changes from round to round, after a round that warms them up.  Shown are the median over the rounds and the range.

  packing   the learner's own step (``Trainer.train``) with ``learner.packing = "tree"`` and ``"flat"`` on the same
            batch: same model, same loss, one optimizer step.  Beside it the speed-up that counting operations predicts.
  bare      the packed step against a loop without a learner: as many tokens in plain causal rows as long as a leaf's
            path, forward, cross entropy, backward, clip, AdamW.
  attention each way in which the device can compute attention over packed trees, against its first choice.
  memory    peak memory of each side and by ``learner.pack_tokens``, each in a process of its own.
  gpu       tokens/s and model-FLOP utilisation; needs CUDA.

On CUDA every part runs in bfloat16, unless ``--learner.mixed_precision no`` says otherwise.

Trees are made up, by the growth rule of the real ones: M chains, then L rounds of K siblings at random turns that are
no leaves; lengths vary by a quarter.  Every token is random, and its behaviour log-prob is the policy's own.

    .venv/bin/python benchmarks/learner.py [--part packing bare] [--shape m10 m2-long] [--markdown]
    .venv/bin/python benchmarks/learner.py --part gpu --model 4b --learner.gradient_checkpointing true

Dotted options are those of the configuration (``--learner.micro_batch_tokens 4096``).  While others load the machine,
ratios of processor time say more than those of the clock: ``--cpu-time --threads 1``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

# A script's own folder comes first on the path, and there this file would be taken for the package `learner`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.expansion.candidates import sibling_parent
from actors.expansion.strategies.random import select
from atpo_async.config import Config, SearchConfig, load, split_options
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.errors import AtpoError, ConfigError, SetupError
from atpo_async.core.tree import ROOT as PROMPT
from atpo_async.core.tree import Turn, TurnTree, spans_of
from atpo_async.wire.messages import Batch, BatchTree
from atpo_async.wire.records import TurnRecords
from learner.loss.correction import Tempering
from learner.packing.attention import Way, to_device, ways
from learner.packing.credited import CreditedTree, Normaliser
from learner.packing.rows import MicroBatch, leaf_rows, micro_batches
from learner.packing.tree import tree_micro_batches
from learner.policy.accelerator import make_accelerator
from learner.policy.model import Policy
from learner.training.optimizer_steps import Attempt, OptimizerSteps
from learner.training.passes import Part, Pass, Planner
from learner.training.trainer import Trainer

PARTS = ("packing", "bare", "attention", "memory", "gpu")
CHILD_TIMEOUT_S = 600.0

# --- trees


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How trees are made; lengths in tokens."""

    rollouts: int
    """M: chains from the prompt."""
    rounds: int
    """L."""
    branches: int
    """K: new siblings in each round."""
    turns: int
    """Of each chain."""
    prompt: int
    observation: int
    """What stands between two actions."""
    action: int
    spread: float = 0.25
    """Lengths of observations and actions are uniform within this share of their mean."""

    def __post_init__(self) -> None:
        for name in ("rollouts", "turns", "prompt", "action"):
            if getattr(self, name) < 1:
                raise ValueError(f"a tree's {name} must be >= 1, got {getattr(self, name)}")
        for name in ("rounds", "branches", "observation"):
            if getattr(self, name) < 0:
                raise ValueError(f"a tree's {name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.spread < 1:
            raise ValueError(f"the spread of lengths must be in [0, 1), got {self.spread:g}")
        if self.leaves < 2:
            raise ValueError("a tree of one leaf has no signal: its step would be empty; M + L * K must be >= 2")

    @property
    def leaves(self) -> int:
        return self.rollouts + self.rounds * self.branches

    @property
    def path(self) -> int:
        """Mean tokens from the first of the prompt to the end of a leaf."""
        return self.prompt + self.turns * self.action + (self.turns - 1) * self.observation

    def scaled(self, factor: float) -> Shape:
        """The same trees with all lengths times ``factor``, each one token or more."""
        lengths = {name: max(1, round(getattr(self, name) * factor)) for name in ("prompt", "observation", "action")}
        return replace(self, **lengths)


PAPER = Shape(rollouts=10, rounds=2, branches=6, turns=5, prompt=300, observation=250, action=191)
"""M, L and K of the paper; paths of 2,255 tokens, as in the cost model of ALGORITHM's reference values."""
BRANCHY = replace(PAPER, rollouts=2, rounds=4, branches=5)
"""As many leaves of two chains."""
SHAPES = {
    "m10": PAPER,
    "m2": BRANCHY,
    "m10-long": replace(PAPER, prompt=4000),
    "m2-long": replace(BRANCHY, prompt=4000),
}
DEMO = replace(PAPER, turns=4, prompt=10, observation=5, action=6)
"""The demo's lengths, the paper's M, L and K."""


def grow(shape: Shape, *, tree_id: str, vocab_size: int, rng: np.random.Generator) -> BatchTree:
    """One tree of random tokens; the same generator state gives the same tree.

    Its leaves earn 0 or 1, not all the same.  Behaviour log-probs are those of a uniform policy.
    """
    turns: list[Turn] = []
    prompt = rng.integers(0, vocab_size, shape.prompt).astype(np.int32)

    def tokens(mean: int) -> np.ndarray:
        few, many = round(mean * (1 - shape.spread)), round(mean * (1 + shape.spread))
        return rng.integers(0, vocab_size, int(rng.integers(few, many + 1))).astype(np.int32)

    def chain(parent: int, level: int, observation: np.ndarray, round_number: int) -> None:
        for depth in range(level, shape.turns):
            if depth > level:
                observation = tokens(shape.observation)
            action = tokens(shape.action)
            action = action if len(action) else np.zeros(1, dtype=np.int32)
            last = depth + 1 == shape.turns
            # The first two leaves differ, so that every tree has a signal.
            leaves = sum(turn.is_leaf for turn in turns)
            reward = float(leaves if leaves < 2 else rng.integers(0, 2)) if last else None
            turns.append(
                Turn(
                    run="benchmark", tree_id=tree_id, turn_id=len(turns) + 1, parent_id=parent, lease_epoch=0,
                    expansion_round=round_number, observation=observation, action=action,
                    logprobs=np.full(len(action), -np.log(vocab_size), dtype=np.float32),
                    spans=spans_of(np.zeros(len(action), dtype=np.int64)), end="done" if last else "continue",
                    reward=reward, success=None if reward is None else reward > 0, generate_s=0.0, environment_s=0.0,
                )
            )  # fmt: skip
            parent = len(turns)

    nothing = np.zeros(0, dtype=np.int32)
    for _ in range(shape.rollouts):
        chain(PROMPT, 0, nothing, 0)
    for round_number in range(1, shape.rounds + 1):
        tree = TurnTree(tree_id, 0, prompt, tuple(turns))
        chosen = select(tree, shape.branches, rng, SearchConfig())
        for turn_id in chosen:
            level = max(0, len(tree.path(turn_id)) - 1)
            observation = nothing if turn_id == PROMPT else tree[turn_id].observation
            chain(sibling_parent(tree, turn_id), level, observation, round_number)
    made = BatchTree(
        tree_id=tree_id, task_index=0, prompt=prompt, turns=TurnRecords.of(()), failed_branches=0,
        probability=1.0, weight=1.0, uses=1,
    )  # fmt: skip
    # Decoded, as the learner's intake hands trees on, so that no decoding is timed.
    return msgspec.structs.replace(made, turns=tuple(turns))


def grow_batch(shape: Shape, *, num_trees: int, vocab_size: int, seed: int, config: Config) -> Batch:
    """A whole batch for one rank."""
    rng = np.random.default_rng(seed)
    trees = tuple(grow(shape, tree_id=f"tree-{i}", vocab_size=vocab_size, rng=rng) for i in range(num_trees))
    size = Normaliser.of([CreditedTree.of(tree, credit_rule(config.credit)) for tree in trees])
    return Batch(
        batch_id=0, step=0, num_trees=size.num_trees, num_leaves=size.num_leaves,
        num_action_tokens=size.num_action_tokens, num_turn_tokens=size.num_turn_tokens, trees=trees, metrics={},
    )  # fmt: skip


def sampled_by(model: nn.Module, batch: Batch, config: Config, device: torch.device) -> Batch:
    """The same batch with the policy's own log-probs as behaviour log-probs: on policy, every ratio about 1.

    ``model``: the policy, in its wrappers where it has some.

    With others the importance weights would mask turns, or the guard would take every step twice.
    """
    trees = [CreditedTree.of(tree, credit_rule(config.credit)) for tree in batch.trees]
    rows = leaf_rows(
        trees, version=0, max_lag=0, aggregation="token-mean", normaliser=Normaliser.of(trees), keep_idle=True
    )
    found: dict[int, np.ndarray] = {}
    for item in micro_batches(rows, max_tokens=config.learner.micro_batch_tokens, version=0):
        with torch.no_grad():
            tokens, predictor, target = (
                torch.from_numpy(values).to(device) for values in (item.tokens, item.predictor, item.target)
            )
            logp = model(tokens=tokens, predictor=predictor, target=target)
        values = logp.float().cpu().numpy()
        for number in np.unique(item.number[item.counted]).tolist():
            found[number] = values[item.counted & (item.number == number)]
    numbered = iter(range(len(found)))
    replaced = tuple(
        msgspec.structs.replace(
            tree,
            turns=tuple(msgspec.structs.replace(turn, logprobs=found[next(numbered)]) for turn in item.tree),
        )
        for tree, item in zip(batch.trees, trees, strict=True)
    )
    return msgspec.structs.replace(batch, trees=replaced)


# --- the cost model


@dataclass(frozen=True)
class Work:
    """What a layout asks of the model."""

    tokens: float
    """That pass through the layers; the last of a path only needs predicting."""
    pairs: float
    """Of a query and a key it sees."""
    scored: float = 0.0
    """Tokens whose distribution over the vocabulary is computed."""

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.scored + other.scored)


def run_of(depth: float, tokens: float) -> Work:
    """Consecutive tokens that begin ``depth`` tokens below the root."""
    return Work(tokens, tokens * depth + tokens * (tokens + 1) / 2)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward pass; the backward pass has twice as many, whatever the layout."""

    token: float
    """Of the layers' matrices."""
    pair: float
    """Of attention, all layers and heads: the product for the score and the one for the value."""
    scored: float = 0.0
    """Of the output head."""

    @classmethod
    def of(cls, hf: Any) -> Flops:
        """Counted from a transformers model."""
        config = hf.config
        matrices = sum(m.weight.numel() for m in hf.base_model.modules() if isinstance(m, nn.Linear))
        channels = config.num_attention_heads * config.head_dim
        return cls(
            token=2.0 * matrices,
            pair=4.0 * config.num_hidden_layers * channels,
            scored=2.0 * config.vocab_size * config.hidden_size,
        )

    def __call__(self, work: Work) -> float:
        return self.token * work.tokens + self.pair * work.pairs + self.scored * work.scored


QWEN3_4B = Flops(token=2 * 4.0e9, pair=4.0 * 36 * 32 * 128)
"""4.0e9 parameters (output head included, for every token), 36 layers of 32 heads of 128 channels."""


def expected(prompt: float, suffix: float, *, chains: int, branches: int) -> tuple[Work, Work]:
    """(flat, tree) of a tree whose paths are ``prompt + suffix`` long and whose branches fork half-way on average.

    Attention in the limit of long rows, n * n / 2 pairs, as the reference values of ALGORITHM, section 5, have it.
    """

    def pairs(begin: float, end: float) -> float:
        return (end * end - begin * begin) / 2

    path = prompt + suffix
    fork = path - suffix / 2
    flat = Work((chains + branches) * path, (chains + branches) * pairs(0, path))
    tree = Work(
        prompt + chains * suffix + branches * suffix / 2,
        pairs(0, prompt) + chains * pairs(prompt, path) + branches * pairs(fork, path),
    )
    return flat, tree


def flat_work(tree: BatchTree) -> Work:
    """Each leaf's path as a row of its own."""
    whole = TurnTree(tree.tree_id, tree.task_index, tree.prompt, tuple(tree.turns))
    total = Work(0, 0)
    for leaf in whole.leaves():
        path = whole.path(leaf.turn_id)
        length = len(tree.prompt) + sum(len(turn.observation) + len(turn.action) for turn in path)
        total += run_of(0, length - 1) + Work(0, 0, sum(len(turn.action) for turn in path))
    return total


def tree_work(tree: BatchTree) -> Work:
    """Each token of the tree once; siblings share equal observations."""
    whole = TurnTree(tree.tree_id, tree.task_index, tree.prompt, tuple(tree.turns))
    end = {PROMPT: len(tree.prompt)}
    total = run_of(0, len(tree.prompt))
    shared: set[tuple[int, bytes]] = set()
    for turn in whole:
        begin = end[turn.parent_id]
        observed = begin + len(turn.observation)
        key = (turn.parent_id, turn.observation.tobytes())
        if key not in shared:
            shared.add(key)
            total += run_of(begin, len(turn.observation))
        end[turn.turn_id] = observed + len(turn.action)
        total += run_of(observed, len(turn.action) - turn.is_leaf) + Work(0, 0, len(turn.action))
    return total


def work_of(batch: Batch, by_tree: Callable[[BatchTree], Work]) -> Work:
    return sum((by_tree(tree) for tree in batch.trees), Work(0, 0))


# --- models and the sides


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
        self.grad_norms_of: dict[str, float] = {}
        """By layout, of the last step; as the padded tokens of its passes:"""
        self.forward_tokens_of: dict[str, float] = {}
        self._time_plans(self.planner)
        self._time_attempts(self.steps)

    def _time_plans(self, planner: Planner) -> None:
        plan, on_device = planner.plan, planner.on_device

        def timed_plan(trees: Sequence[CreditedTree], batch: Batch, version: int) -> Part:
            began = clock()
            part = plan(trees, batch, version)
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

        def timed_attempt(passes: list[Pass], tempering: Tempering, should_stop: Callable[[], bool]) -> Attempt:
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
    hf = size.make(device=accelerator.device.type)
    if config.learner.gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        hf.train()
    return TimedTrainer(config, accelerator=accelerator, policy=Policy(hf))


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
        if config.learner.gradient_checkpointing:
            self.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.hf.train()
        settings = config.learner
        self.optimizer = torch.optim.AdamW(
            self.hf.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
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


# --- taking turns


def interleave(sides: Mapping[str, Callable[[], Times]], rounds: int) -> dict[str, list[Times]]:
    """Every side once a round, the order shifted by one each round; a first round is thrown away."""
    names = list(sides)
    taken: dict[str, list[Times]] = {name: [] for name in names}
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times = sides[name]()
            if number > 0:
                taken[name].append(times)
    return taken


@dataclass(frozen=True)
class Ratio:
    """One number a round."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        return cls(tuple(a / b for a, b in zip(above, below, strict=True)))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def times(self, factor: float) -> Ratio:
        return Ratio(tuple(v * factor for v in self.values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.values):.2f} to {max(self.values):.2f})"

    def percent(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{100 * self.median:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def column(taken: Sequence[Times], name: str) -> list[float]:
    return [times[name] for times in taken]


def median(taken: Sequence[Times], name: str) -> float:
    return statistics.median(column(taken, name))


# --- tables


@dataclass(frozen=True)
class Table:
    title: str
    about: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def text(self) -> str:
        widths = [max(len(row[i]) for row in [self.head, *self.rows]) for i in range(len(self.head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [self.head, tuple("-" * width for width in widths), *self.rows]
        ]
        return "\n".join([self.title, self.about, "", *lines])

    def markdown(self) -> str:
        lines = ["| " + " | ".join(row) + " |" for row in [self.head, ("---",) * len(self.head), *self.rows]]
        return "\n".join([f"### {self.title}", "", self.about, "", *lines])


def machine(device: str, threads: int) -> str:
    """What the figures were taken on, in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    parts = [f"{os.cpu_count()} cores of {cpu}", f"torch {torch.__version__}", f"{threads} threads"]
    if device == "cuda":
        parts.insert(1, torch.cuda.get_device_name())
    load_1 = os.getloadavg()[0]
    return ", ".join([*parts, f"load average at the start {load_1:.1f}"])


def count(number: float) -> str:
    return f"{number:,.0f}"


# --- the parts


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
    packed, flat = (trainer.grad_norms_of[layout] for layout in ("tree", "flat"))
    if not abs(packed - flat) <= (1e-3 if config.learner.mixed_precision == "no" else 0.05) * flat:
        raise SetupError(f"the two layouts disagree: gradient norm {packed:.6g} packed, {flat:.6g} flat")
    flops = Flops.of(trainer.policy.hf)
    rows, tree = work_of(batch, flat_work), work_of(batch, tree_work)
    return Compared(
        taken=taken,
        tokens=dict(trainer.forward_tokens_of),
        token_ratio=rows.tokens / tree.tokens,
        predicted=flops(rows) / flops(tree),
    )


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


def packing(plan: Plan) -> list[Table]:
    rows, shares = [], []
    cases = [(name, plan.size, shape, plan.trees) for name, shape in plan.shapes.items()]
    for name, size, shape, trees in [*cases, TOY]:
        say(f"packing: {name}")
        trainer = make_trainer(size, plan.config)
        found = compare(trainer, made_for(trainer, plan, shape, trees), plan.rounds)
        whole = found.speed_up("step")
        rows.append(
            (
                name,
                f"{count(found.tokens['flat'])} / {count(found.tokens['tree'])}",
                f"{found.token_ratio:.2f}",
                f"{found.predicted:.2f}",
                str(found.speed_up("passes")),
                str(whole),
                str(whole.times(1 / found.predicted)),
                f"{full_length(name):.2f}" if name in SHAPES else "",
            )
        )
        shares.append(share_row(f"{name}, {trees} of {shape.leaves} leaves", found.taken))
    first = next(iter(plan.shapes.values()))
    return [
        Table(
            "Packed against flat",
            f"Model {plan.model}, {plan.trees} trees a step, 22 leaves (m10: M=10, L=2, K=6; m2: M=2, L=4, K=5), paths "
            f"of {count(first.path)} tokens in {next(iter(plan.shapes))}. Speed-up: seconds flat over seconds packed.",
            (
                "trees",
                "padded tokens, flat / packed",
                "token ratio",
                "predicted",
                "forward + backward",
                "whole step",
                "of the prediction (>= 0.85)",
                "predicted for 4B, full length",
            ),
            rows,
        ),
        Table(
            "What packing takes of the step it feeds",
            "Of the packed step: its rows, which flat training needs too, and their layout. Target for 64 trees: below "
            "5 %.",
            ("trees", "layout, ms", "rows and layout, ms", "step, ms", "share of the layout", "share of both"),
            shares,
        ),
    ]


def full_length(name: str) -> float:
    """Speed-up that the cost model gives the shape at its full length on Qwen3-4B."""
    shape = SHAPES[name]
    suffix = shape.path - shape.prompt
    flat, tree = expected(shape.prompt, suffix, chains=shape.rollouts, branches=shape.rounds * shape.branches)
    return QWEN3_4B(flat) / QWEN3_4B(tree)


def share_row(name: str, taken: Mapping[str, Sequence[Times]]) -> tuple[str, ...]:
    steps, both, alone = column(taken["tree"], "step"), column(taken["tree"], "plan"), column(taken["layout"], "step")
    return (
        name,
        *(f"{1000 * statistics.median(values):.1f}" for values in (alone, both)),
        count(1000 * statistics.median(steps)),
        Ratio.of(alone, steps).percent(),
        Ratio.of(both, steps).percent(),
    )


def bare(plan: Plan) -> list[Table]:
    rows = []
    cases = [(name, plan.size, shape, plan.trees) for name, shape in plan.shapes.items()]
    for name, size, shape, trees in [*cases, TOY]:
        say(f"bare: {name}")
        learner = make_trainer(size, plan.config)
        batch = made_for(learner, plan, shape, trees)
        work = work_of(batch, tree_work)
        loop = Bare(
            size, plan.config, tokens=int(work.tokens), row=shape.path - 1, scored=int(work.scored), seed=plan.seed
        )
        sides: dict[str, Callable[[], Times]] = {
            "learner": partial(learner.timed, batch, "tree"),
            "every": partial(loop.timed, every=True),
            "some": partial(loop.timed, every=False),
        }
        taken = interleave(sides, plan.rounds)
        # Tokens/s on each side: the rows do not come out at exactly as many tokens.
        seconds = {
            side: Ratio.of(column(taken[side], "step"), column(taken["learner"], "step")) for side in ("every", "some")
        }
        rate = work.tokens / loop.num_tokens
        flops = Flops.of(loop.hf)
        rows.append(
            (
                name,
                f"{count(work.tokens)} ({count(work.scored)} scored)",
                count(work.tokens / median(taken["learner"], "step")),
                str(seconds["every"].times(rate)),
                str(seconds["some"].times(rate)),
                str(seconds["some"].times(flops(work) / flops(loop.work))),
            )
        )
    return [
        Table(
            "The packed learner against a bare loop",
            "Tokens/s of the packed step over tokens/s of a loop that has as many tokens in plain causal rows as long "
            "as a leaf's path (`model(input_ids, labels=…)`, backward, clip, AdamW; same precision, same tokens a "
            "pass). The learner's side is the whole step: checks, credit, packing, ratios, correction, turn loss, "
            "diagnostics, clip, AdamW; a token counts once, however many leaves share it. It computes logits for "
            "action tokens only, so the second ratio has the bare loop predict only as many. A token of a tree is "
            "deeper than one of such rows on average and sees more: the third ratio is of operations/s.",
            (
                "trees",
                "tokens a step",
                "learner, tokens/s",
                "to bare, all predicted (>= 0.95)",
                "as many predicted",
                "the same, operations/s",
            ),
            rows,
        )
    ]


def attention(plan: Plan) -> list[Table]:
    device = torch.device(plan.device)
    first = ways(device)[0]
    every: list[Way] = [*ways(device), "dense"]  # the last can be had everywhere
    others = [way for way in dict.fromkeys(every) if way != first]
    rows = []
    for name, shape in plan.shapes.items():
        say(f"attention: {name}")
        trainer = make_trainer(plan.size, plan.config)
        batch = made_for(trainer, plan, shape, plan.trees)
        taken = interleave({way: partial(trainer.timed, batch, "tree", way) for way in (first, *others)}, plan.rounds)
        rows += [
            (name, way, str(Ratio.of(column(taken[way], "passes"), column(taken[first], "passes")))) for way in others
        ]
    return [
        Table(
            "Ways to compute attention over packed trees",
            f"Model {plan.model}: seconds forward and backward over those of {first!r}, the choice on this device.",
            ("trees", "way", f"to {first!r}"),
            rows,
        )
    ]


# --- memory: each side in a process of its own


def resident_mb(name: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, in MB; elsewhere than on Linux the peak for both."""
    status = Path("/proc/self/status")
    if not status.is_file():
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def peak_of(run: Callable[[], object], device: str) -> float:
    """Peak memory while ``run`` runs, above what is held before it, in MB."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    held = resident_mb("VmRSS")
    run()
    return resident_mb("VmHWM") - held


def child(plan: Plan, side: str) -> None:
    """Print the peak of two steps of one side, and how many tokens its passes held, as one line of JSON."""
    shape = next(iter(plan.shapes.values()))
    # The behaviour log-probs are made up here: a pass to find the real ones would leave its memory behind.  Without
    # the guard they change what the loss is, not what it takes.
    correction = plan.config.correction.model_copy(update={"ess_floor": 0.0})
    config = plan.config.model_copy(update={"correction": correction})
    batch = grow_batch(shape, num_trees=plan.trees, vocab_size=plan.size.vocab, seed=plan.seed, config=config)
    work = work_of(batch, tree_work)
    sizes: list[tuple[int, ...]] = []
    run: Callable[[], Times]
    if side == "bare":
        loop = Bare(
            plan.size, config, tokens=int(work.tokens), row=shape.path - 1, scored=int(work.scored), seed=plan.seed
        )
        sizes += [tuple(rows.shape) for rows in loop.passes]
        run = partial(loop.timed, every=False)
    else:
        trainer = make_trainer(plan.size, config)
        trainer.model.register_forward_pre_hook(
            lambda _module, _args, inputs: sizes.append(tuple(inputs["tokens"].shape)), with_kwargs=True
        )
        run = partial(trainer.timed, batch, "tree" if side == "tree" else "flat")
    peak_mb = peak_of(lambda: (run(), run()), plan.device)
    found = {
        "peak_mb": peak_mb,
        "widest": max(width for _, width in sizes),
        "most": max(rows * width for rows, width in sizes),
        "tokens": sum(rows * width for rows, width in sizes) / (1 if side == "bare" else 2),
        "step_s": run()["step"],
    }
    print(json.dumps(found))


def in_child(plan: Plan, shape: str, side: str, scale: float, **settings: object) -> dict[str, float]:
    """``child`` in a fresh process.  Raises SetupError with its last words."""
    words = [sys.executable, str(Path(__file__).resolve()), "--child", side, "--shape", shape, "--model", plan.model]
    numbers = {"scale": scale, "trees": plan.trees, "threads": plan.threads, "seed": plan.seed}
    for name, number in numbers.items():
        words += [f"--{name}", str(number)]
    words += ["--cpu-time"] if plan.cpu_time else []
    words += list(plan.options)
    for key, value in settings.items():
        words += [f"--learner.{key}", str(value)]
    words += ["--learner.device", plan.device]
    # Freed blocks then go back at once, and the peak is of what is held at one time.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"the {side} side did not end within {CHILD_TIMEOUT_S:g} s; take fewer --trees") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise SetupError(f"the {side} side ended with status {done.returncode}: {last}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(plan: Plan, scale: float) -> list[Table]:
    sides, lengths = [], []
    for name in plan.shapes:
        say(f"memory: {name}")
        found = {side: in_child(plan, name, side, scale) for side in ("tree", "flat", "bare")}
        sides.append(
            (
                name,
                *(f"{found[side]['peak_mb']:.0f} ({count(found[side]['most'])})" for side in found),
                f"{found['tree']['peak_mb'] / found['flat']['peak_mb']:.2f}",
                f"{found['tree']['peak_mb'] / found['bare']['peak_mb']:.2f}",
            )
        )
    name, shape = next(iter(plan.shapes.items()))
    several = replace(plan, trees=max(plan.trees, 3))  # more than one tree fits in the longer packs
    batch = grow_batch(shape, num_trees=several.trees, vocab_size=plan.size.vocab, seed=plan.seed, config=plan.config)
    largest = max(tree_work(tree).tokens for tree in batch.trees)
    for pack_tokens in (*(max(16, int(largest * share)) for share in (0.5, 1.0, 2.0)), None):
        say(f"memory: {pack_tokens} tokens a pack")
        one = in_child(several, name, "tree", scale, pack_tokens=pack_tokens)
        lengths.append(
            (
                "none" if pack_tokens is None else count(pack_tokens),
                count(one["widest"]),
                count(one["tokens"]),
                f"{one['peak_mb']:.0f}",
                f"{one['step_s']:.2f}",
            )
        )
    return [
        Table(
            "Peak memory of a step",
            "MB above what is held before the first step, two steps, each side in a process of its own; in brackets "
            "the padded tokens of its largest pass (learner.micro_batch_tokens = "
            f"{plan.config.learner.micro_batch_tokens}). Gradients and AdamW's moments are in all of them.",
            ("trees", "packed", "flat", "bare loop", "packed / flat", "packed / bare"),
            sides,
        ),
        Table(
            "Peak memory by pack length",
            f"{name}, {several.trees} trees of up to {count(largest)} tokens; shorter packs split trees and repeat "
            "their prefixes.",
            ("learner.pack_tokens", "widest row", "padded tokens a step", "peak, MB", "step, s"),
            lengths,
        ),
    ]


# --- only with a GPU

BF16_TFLOPS = {"H200": 989.0, "H100": 989.0, "GH200": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0}
"""Dense bfloat16 peak by what the device's name holds (the makers' data sheets)."""


def peak_tflops(given: float | None) -> float | None:
    name = torch.cuda.get_device_name()
    return given or next((peak for known, peak in BF16_TFLOPS.items() if known in name), None)


def gpu(plan: Plan, given_peak: float | None) -> list[Table]:
    """Not measured so far: no GPU was there."""
    peak = peak_tflops(given_peak)
    rows = []
    for name, shape in plan.shapes.items():
        say(f"gpu: {name}")
        trainer = make_trainer(plan.size, plan.config)
        batch = made_for(trainer, plan, shape, plan.trees)
        found = compare(trainer, batch, plan.rounds)
        work, flops = work_of(batch, tree_work), Flops.of(trainer.policy.hf)
        seconds = median(found.taken["tree"], "step")
        # Forward and backward once; what gradient checkpointing computes again is no work of the model's.
        utilisation = "" if peak is None else f"{100 * 3 * flops(work) / seconds / (peak * 1e12):.0f} %"
        rows.append((plan.model, name, count(work.tokens / seconds), utilisation, str(found.speed_up("step"))))
    return [
        Table(
            f"On a GPU, learner.mixed_precision = {plan.config.learner.mixed_precision}",
            f"Peak taken as {peak} TFLOPS." if peak else "No peak known for this device: give --peak-tflops.",
            ("model", "trees", "tokens/s packed", "model-FLOP utilisation", "packed over flat"),
            rows,
        )
    ]


# --- command line


def say(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Plan]:
    """Raises ConfigError, or ends with argparse's status 2, for what cannot be run."""
    rest, options = split_options(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, help="default: all that this machine can do")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), help="default: m10 and m2-long")
    parser.add_argument("--model", choices=list(SIZES), help="default: small on a CPU, 0.6b on a GPU")
    parser.add_argument("--scale", type=float, help="all lengths times this; default: 1/6 on a CPU, 1 on a GPU")
    parser.add_argument("--trees", type=int, default=1, help="of one step (packing's 64 small ones stay 64)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in bfloat16, where its name does not tell")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processors, not of the clock")
    parser.add_argument("--markdown", action="store_true", help="tables for docs/benchmarks.md")
    parser.add_argument("--child", choices=("tree", "flat", "bare"), help=argparse.SUPPRESS)
    args = parser.parse_args(rest)
    for name in ("trees", "rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(args, name)}")
    for name in ("scale", "peak_tflops"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
    if args.seed < 0:
        parser.error(f"--seed must be >= 0, got {args.seed}")
    # Tiny steps: the weights stay where the behaviour log-probs came from, whatever the number of rounds.
    fixed = {"learner.lr": "1e-9", "staleness.max_lag": "0"}
    config = load((), fixed | options)
    cuda = torch.cuda.is_available() and config.learner.device != "cpu"
    if cuda:
        config = load((), fixed | {"learner.mixed_precision": "bf16"} | options)
    if args.cpu_time and cuda:
        parser.error("--cpu-time does not see what a GPU does: leave it out, or add --learner.device cpu")
    if "gpu" in (args.part or ()) and not cuda:
        parser.error("--part gpu needs a CUDA device, and torch sees none that it may use: leave it out")
    args.part = args.part or [part for part in PARTS if cuda or part != "gpu"]
    args.scale = args.scale or (1.0 if cuda else 1 / 6)
    plan = Plan(
        config=config,
        options=tuple(word for key, value in options.items() for word in (f"--{key}", value)),
        device="cuda" if cuda else "cpu",
        model=args.model or ("0.6b" if cuda else "small"),
        shapes={name: SHAPES[name].scaled(args.scale) for name in args.shape or ("m10", "m2-long")},
        trees=args.trees,
        rounds=args.rounds,
        threads=args.threads,
        seed=args.seed,
        cpu_time=args.cpu_time,
    )
    return args, plan


def main(argv: Sequence[str]) -> int:
    try:
        args, plan = parse(argv)
        torch.set_num_threads(plan.threads)
        if args.cpu_time:
            clock.now = time.process_time
        if args.child:
            child(plan, args.child)
            return 0
        began = time.perf_counter()
        seconds = "processor time" if args.cpu_time else "wall clock"
        where = machine(plan.device, plan.threads)
        print(f"Machine: {where}; {plan.rounds} rounds, {seconds}, lengths x {args.scale:.3g}.\n")
        run: dict[str, Callable[[], list[Table]]] = {
            "packing": lambda: packing(plan),
            "bare": lambda: bare(plan),
            "attention": lambda: attention(plan),
            "memory": lambda: memory(plan, args.scale),
            "gpu": lambda: gpu(plan, args.peak_tflops),
        }
        for part in args.part:
            for table in run[part]():
                print((table.markdown() if args.markdown else table.text()) + "\n", flush=True)
        say(f"{time.perf_counter() - began:.0f} s")
    except ConfigError as exc:
        print(f"learner.py: {exc}", file=sys.stderr)
        return 2
    except AtpoError as exc:
        print(f"learner.py: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
