"""Trains on one batch: trees -> forward passes -> loss -> optimizer steps, in step on every rank.

The loss is a mean over the global batch, whatever part of it a rank or a micro-batch holds.  With ``minibatches`` > 1
each optimizer step's loss is the mean over its own leaves; with ``epochs`` > 1 the parts come round again.

Quantities of the whole batch (the exponent that keeps the effective sample size, M2PO's threshold, ratios for the tree
trace, quantiles for loss terms and token weights) are measured in a pass without gradient before the first step.  The
guard against a collapsed effective sample size needs no such pass: it checks after the backward passes, and repeats
them, tempered, where it must.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from atpo_async.config import Config
from atpo_async.config.credit_rule import credit_rule
from atpo_async.config.loss_rules import needs_log_probs
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.priorities import tree_priority
from atpo_async.wire.messages import Batch
from learner.batches.intake import Sifted, sift
from learner.imitation.intake import sift_rows
from learner.imitation.rows import imitated
from learner.implicit import reward_model
from learner.kernels.install import PRECISIONS, Installed, install
from learner.kernels.variants import raise_limit
from learner.loss.correction import Temperings
from learner.loss.parts.loading import ObjectiveParts, load_parts
from learner.memory.fitting import Fitting
from learner.memory.made_up import made_up
from learner.memory.measuring import CudaMeter, choose_layers, share_of_engines
from learner.policy import compilation, precision
from learner.policy.accelerator import is_sharded
from learner.policy.frozen import hold_in_half
from learner.policy.half import HalfPolicy, is_for
from learner.policy.model import Policy, is_tied
from learner.policy.optimizer import make_optimizer, state_bytes
from learner.policy.packing_check import layout_for, small_pass
from learner.policy.whole import TensorNames, WholePolicy
from learner.training.batch_credit import BatchCredit
from learner.training.fitted import FittedBatch
from learner.training.optimizer_steps import BatchTotals, OptimizerSteps, UpdateHistory
from learner.training.pass_loss import PassLoss
from learner.training.passes import Part, Planner, split
from learner.training.reductions import Reductions
from learner.training.report import Abandoned, StepReport
from learner.training.step_metrics import StepMetrics

log = logging.getLogger("atpo.learner")


class Trainer:
    """The policy, its optimizer, and how a batch changes them.

    Args:
        memory_file: where the size of a pass that fits is kept over restarts; None: nowhere.

    Raises:
        ConfigError, SetupError: the surrogate, the correction or a mode of credit cannot be loaded.
        SetupError: Accelerate unties the policy's output head from its embeddings.
    """

    def __init__(
        self, config: Config, *, accelerator: Accelerator, policy: Policy, memory_file: Path | None = None
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.policy = policy
        self.reductions = Reductions(accelerator)
        self._credit = credit_rule(config.credit)
        parts = load_parts(config)
        if self._credit.measures and config.correction.prox == "interpolate":
            raise ConfigError(needs_log_probs(self._credit.measuring_setting))
        self._credited = BatchCredit(self._credit, self.reductions, accelerator.device)
        self._vocab_size = int(policy.hf.config.vocab_size)
        sharded = is_sharded(accelerator)
        layers, self.compiled = compilation.chosen(
            policy.hf, config.learner, device=accelerator.device, sharded=sharded
        )
        # Before the policy is copied or wrapped: its reference computes what it does.
        self.kernels = self._install(policy, compiled=layers)
        policy.compiled_head = self.kernels.compiled_head
        names = TensorNames.of(policy)
        # A copy in half precision is made on the device, and before anything wraps the policy.
        self.half = HalfPolicy(_placed(policy, accelerator), trains=True) if is_for(config, policy, sharded) else None
        wants_reference = bool(config.objective.kl_coef) or self._credit.reads_reference or parts.needs.reference
        wants_frozen = wants_reference and policy.lora is None
        frozen = _frozen_copy(policy, accelerator, in_half=self.half is not None) if wants_frozen else None
        begun = reward_model.begun(config, policy, accelerator)
        optimizer = make_optimizer(policy, config.learner, device=accelerator.device, sharded=sharded)
        tied = is_tied(policy)
        precision.keep_outputs(accelerator)
        if self.half is None:
            self.model, self.optimizer = accelerator.prepare(policy, optimizer)
        else:
            # Its ranks exchange gradients themselves, once an optimizer step.
            self.model = accelerator.prepare_model(policy, evaluation_mode=True)
            self.optimizer = accelerator.prepare_optimizer(optimizer)
            self.half.begin_alike(num_ranks=accelerator.num_processes)
        self._run = self.half or self.model
        self.implicit = reward_model.of(config, begun, accelerator, self.reductions)
        self.whole = WholePolicy(policy=policy, names=names, model=self.model, accelerator=accelerator, sharded=sharded)
        # On the device, and through the wrappers that change the policy's arithmetic: what is tried is what trains.
        wrapped = sharded or config.learner.mixed_precision != "no"
        layout, self.layout_reason = layout_for(policy, config, self._run if wrapped else None)
        _check_tied(policy, tied, config)
        without_adapters = None if self.trained.lora is None else self.trained.lora.without(self._run)
        self._loss = PassLoss(
            config=config,
            accelerator=accelerator,
            model=self._run,
            reference=(frozen or without_adapters) if wants_reference else None,
            reductions=self.reductions,
            parts=parts,
        )
        self.fitting = Fitting(config, hf=self.trained.hf, accelerator=accelerator, file=memory_file)
        self.planner = Planner(
            config=config,
            policy=policy,
            layout=layout,
            keep_idle=self._keeps_idle(parts),
            draws=parts.needs.random or self._loss.row_parts.needs.random,
            reductions=self.reductions,
            device=accelerator.device,
            micro_batch_tokens=self.fitting.micro_batch_tokens,
        )
        self.steps = OptimizerSteps(
            config=config,
            total_updates=(config.learner.schedule_steps or config.run.steps) * self.updates_per_batch,
            accelerator=accelerator,
            model=self.model,
            optimizer=self.optimizer,
            loss=self._loss,
            reductions=self.reductions,
            half=self.half,
        )
        self._metrics = StepMetrics(config, loss=self._loss, reductions=self.reductions)
        raise_limit()
        self.compilations = compilation.Compilations()
        if layers:
            self._compile()

    def _install(self, policy: Policy, *, compiled: list[nn.Module]) -> Installed:
        settings = self.config.learner
        return install(
            policy.hf,
            settings.kernels,
            device=self.accelerator.device,
            dtypes=PRECISIONS[settings.mixed_precision],
            compiled=compiled,
        )

    def _compile(self) -> None:
        """Compile the layers that compute the passes, and try them in a small one.

        Raises:
            SetupError: they do not compile and ``learner.compile = "on"``.
        """
        by_runs = self.layout == "tree" and self.planner.way == "varlen"
        layers = compilation.layers(self.trained.hf)
        fault = compilation.compile_layers(layers, self._small_pass, by_runs=by_runs)
        if fault is None:
            return
        if self.config.learner.compile == "on":
            raise SetupError(
                f"learner.compile = 'on', but the layers of {type(self.policy.hf).__name__} in model.path = "
                f"{self.config.model.path!r} do not compile ({fault}); use --learner.compile off"
            )
        self.compiled = f"none: they do not compile ({fault})"
        self.kernels = self._install(self.trained, compiled=[])

    def _small_pass(self) -> None:
        """A pass of the kind that training has, with a gradient and, where it needs both, without.  Nothing changes."""
        item = self.planner.on_device(small_pass(self.policy, self.layout))
        if self._measures_first:
            with torch.no_grad():
                self._run(**item.inputs)
        logp = self._run(**item.inputs)
        precision.check_outputs(logp)
        self.accelerator.backward(logp.sum() * 0.0)
        self.optimizer.zero_grad()

    @property
    def trained(self) -> Policy:
        """The policy whose layers compute the passes: how they do it (checkpointing, compilation) is set there."""
        return self.policy if self.half is None else self.half.policy

    @property
    def history(self) -> UpdateHistory:
        """Updates taken and left out so far."""
        return self.steps.history

    @property
    def objective_state(self) -> dict[str, dict[str, float]]:
        """Running numbers of the loss terms and token weights, by their labels; a checkpoint holds them."""
        return self._loss.measuring.state

    def restore_objective(self, state: dict[str, dict[str, float]]) -> None:
        """From a checkpoint."""
        self._loss.measuring.restore(state)

    @property
    def layout(self) -> str:
        """Of the trees in a forward pass."""
        return self.planner.layout

    @property
    def updates_per_batch(self) -> int:
        return self.config.learner.minibatches * self.config.learner.epochs

    def _keeps_idle(self, parts: ObjectiveParts) -> bool:
        """Whether turns without an advantage have passes all the same."""
        objective = self.config.objective
        other_terms = bool(objective.kl_coef or objective.entropy_coef or parts.all)
        return self._credit.measures or self.implicit is not None or other_terms

    @property
    def _measures_first(self) -> bool:
        """Whether log-probs of the whole batch must be known before its first optimizer step."""
        prox = self.config.correction.prox
        recompute = prox == "recompute" or (prox == "auto" and self.updates_per_batch > 1)
        parts = self._loss.parts.measures_first or self._loss.row_parts.measures_first
        measured = self._loss.correction.needs_batch or parts
        return recompute or self._credit.measures or measured or self.implicit is not None

    def warm_up(self) -> None:
        """A pass on made-up rows, so that the first batch does not pay for allocation and lazy set-up, and the choice
        of layers that are computed twice, where it is left to the learner.

        Weights, optimizer and generators of random numbers stay as they are.  Every rank calls it.
        """
        if not any(layer._compiled_call_impl is not None for layer in compilation.layers(self.trained.hf)):
            # Compiled layers have had a pass; these rows would only have another graph made.
            self._made_up_pass(min(4096, self.planner.micro_batch_tokens), longest=64)
        if self.fitting.selects_layers:
            self._choose_layers()
        self.optimizer.zero_grad()

    def _choose_layers(self) -> None:
        """As many layers are computed twice as the largest pass needs.  On a CPU none is: all memory is the host's."""
        device = self.accelerator.device
        if device.type != "cuda":
            log.info("learner.gradient_checkpointing = 'auto' computes no layer twice on a CPU")
            return
        meter = CudaMeter(
            device,
            set_aside=state_bytes(self.optimizer, self.config.learner.optimizer)
            + (0.0 if self.implicit is None else self.implicit.bytes_to_come),
            engines=share_of_engines(self.config, self.accelerator.process_index),
        )
        longest = self.config.model.max_context_tokens
        self._made_up_pass(64, longest=longest)  # gradients are there from the second pass of a step on
        choose_layers(
            self.fitting,
            meter,
            lambda tokens: self._made_up_pass(tokens, longest=longest),
            lambda value: max(self.reductions.gather(value)),
        )
        self.planner.micro_batch_tokens = self.fitting.micro_batch_tokens

    def _made_up_pass(self, tokens: int, *, longest: int) -> None:
        """Forward and backward of made-up tokens; every gradient is 0."""
        logp = self._run(**self.planner.on_device(made_up(tokens, longest=longest, layout=self.layout)).inputs)
        precision.check_outputs(logp)
        self.accelerator.backward(logp.sum() * 0.0)

    def train(self, batch: Batch, *, version: int, should_stop: Callable[[], bool] = lambda: False) -> StepReport:
        """Train on this rank's share of a batch.  Every rank calls it for every batch, with a share or without.

        Args:
            batch: its trees may be empty.
            version: of the weights now; lag is measured against it.
            should_stop: asked between forward passes, in a run of one process only (ranks must stay in step).

        Raises:
            Abandoned: ``should_stop`` said so before any weight changed.
            ConfigError: a result of a user's own surrogate or correction breaks the protocol.
        """
        settings = self.config
        if self.half is not None:
            self.half.is_stale = True  # a checkpoint may have been loaded since
        self._loss.begin(batch.step)
        sifted = sift(batch, version=version, vocab_size=self._vocab_size, max_lag=settings.staleness.max_lag)
        trees = self._credited.of(sifted.batch)
        order = np.random.default_rng((settings.run.seed, batch.step, self.accelerator.process_index))
        shares = split(trees, settings.learner.minibatches, order)
        rows = sift_rows(batch, version=version, vocab_size=self._vocab_size, max_lag=settings.imitation.max_lag)
        chains = [imitated(row, coef=settings.imitation.coef_at(batch.step)) for row in rows.rows]
        own = split(chains, settings.learner.minibatches, order)
        parts = [self.planner.plan(*share, batch, version) for share in zip(shares, own, strict=True)]
        fitted = FittedBatch(
            fitting=self.fitting, planner=self.planner, model=self.model, parts=parts, batch=batch, version=version
        )
        if self._measures_first:
            fitted.run(lambda: self._measured_first(parts))
        paid = self._paid(parts, fitted, should_stop)
        tempering = fitted.run(lambda: self._decided_by_the_batch(parts)) if self._measures_first else None
        if self._credit.measures or self.implicit is not None:
            trees = [tree for part in parts for tree in part.trees]
        totals = BatchTotals(fault=self._all_refused(len(trees), sifted))
        sums = torch.zeros(self._loss.num_sums, dtype=torch.float64, device=self.accelerator.device)
        for _ in range(settings.learner.epochs):
            for part in parts:
                if part.passes:
                    # Once a weight has changed, the batch is trained on to its end.
                    stop = (lambda: False) if totals.losses or self.implicit is not None else should_stop
                    sums += fitted.run(partial(self._step, part, totals, tempering, stop))
        if totals.losses:
            self._loss.measuring.conclude()
        self.compilations.after_batch(tuple(item.inputs["tokens"].shape) for part in parts for item in part.passes)
        scaler = self.accelerator.scaler
        return StepReport(
            metrics={
                **paid,
                **self._metrics.of_trees(trees, version),
                **self._credited.of_trees(trees),
                **self._metrics.of_sums(sums),
                **self._metrics.of_tokens(totals, sum(part.row_tokens for part in parts)),
                "pack/compilations": max(self.reductions.gather(self.compilations.total)),
                **self._metrics.of_updates(
                    totals, self.history, fp16_scale=None if scaler is None else scaler.get_scale()
                ),
                **self._metrics.of_rows(parts, totals, version=version, num_dropped=rows.num_dropped),
                **self._metrics.of_dropped(sifted.metrics()),
                **self.fitting.metrics,
            },
            priorities={
                tree.tree.tree_id: tree_priority(tree.advantages, max_share=settings.buffer.priority_max_share)
                for tree in trees
            }
            | dict.fromkeys((tree_id for ids in sifted.dropped.values() for tree_id in ids), 0.0),
            trained=frozenset(tree.tree.tree_id for tree in trees),
            fault=totals.fault,
            warnings=(*sifted.messages, *rows.messages),
        )

    def _paid(self, parts: list[Part], fitted: FittedBatch, should_stop: Callable[[], bool]) -> dict[str, float]:
        """Let the implicit reward model, where there is one, learn from the batch and pay its turns.  Returns metrics.

        Raises:
            Abandoned: ``should_stop`` said so before any weight changed.
        """
        if self.implicit is None:
            return {}
        if self.accelerator.num_processes == 1 and should_stop():
            raise Abandoned
        return self.implicit.pay(parts, fitted)

    def _step(
        self, part: Part, totals: BatchTotals, tempering: Temperings | None, should_stop: Callable[[], bool]
    ) -> Tensor:
        """The optimizer step of a part with its passes as they are now."""
        return self.steps.take(part.passes, totals, tempering, should_stop)

    def _measured_first(self, parts: list[Part]) -> None:
        """Measure the log-probs that the first step needs of the whole batch, and credit by them."""
        for part in parts:
            self._loss.measure_start(part.passes)
            if self._credit.reads_reference or self._loss.parts.needs.reference:
                self._loss.measure_reference(part.tree_passes)
        if self._credit.measures:
            self._credited.again(parts)

    def _decided_by_the_batch(self, parts: list[Part]) -> Temperings | None:
        """What the whole batch decides of its passes' log-probs and advantages: numbers of the objective's parts, and
        the tempering."""
        self._loss.measure([item for part in parts for item in part.passes])
        correction = self._loss.correction
        if correction.needs_batch or correction.guards_ess:
            return self._loss.temper_by_prox([item for part in parts for item in part.passes])
        return None

    def _all_refused(self, num_kept: int, sifted: Sifted) -> str | None:
        """Why a batch without an update counts as a skipped one: over all ranks no tree of it was fit to train on.

        Once in a while that is bad luck; batch after batch it is a wrong tokenizer or a broken environment, and the run
        should stop.  Trees that are only too old are no such sign.
        """
        unfit = [len(ids) for reason, ids in sifted.dropped.items() if reason != "all_stale"]
        kept, refused = self.reductions.sum(np.array([num_kept, sum(unfit)], dtype=np.float64)).tolist()
        if kept or not refused:
            return None
        reason = f"trees were all unfit to train on, {int(refused)} of them; the log names each"
        self.steps.count_as_skipped(reason)
        return reason


def _placed(policy: Policy, accelerator: Accelerator) -> Policy:
    placed: Policy = policy.to(accelerator.device)
    return placed


def _check_tied(policy: Policy, tied: bool, config: Config) -> None:
    """Raises SetupError where the output head was the embeddings (``tied``) and is no more."""
    if tied and not is_tied(policy):
        # A head of its own would be no parameter of the optimizer, and its gradient would never be zeroed.
        raise SetupError(
            f"accelerate untied the output head from the embeddings (learner.accelerate_config = "
            f"{config.learner.accelerate_config!r}): set fsdp_cpu_ram_efficient_loading to false there"
        )


def _frozen_copy(policy: Policy, accelerator: Accelerator, *, in_half: bool) -> Callable[..., Tensor]:
    """The policy as it was loaded from ``model.path``, whole on every rank."""
    if in_half:
        return HalfPolicy(_placed(policy, accelerator), trains=False)
    frozen = copy.deepcopy(policy).requires_grad_(False).eval()
    if is_sharded(accelerator):
        precision.cast_as_sharded(frozen, accelerator)
    elif next(policy.parameters()).dtype == torch.float32:
        # What a model folder holds are numbers of bfloat16 as a rule: the copy then takes half, and computes the same.
        now, before = hold_in_half(frozen.hf)
        log.info("the reference policy takes %.2f GB, %.0f %% of float32's", now / 2**30, 100 * now / before)
    return _placed(frozen, accelerator)
