"""The metrics of one batch, from what all ranks have added up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from atpo_async.config import Config
from atpo_async.core.schedule import Schedule, coefficient
from atpo_async.core.tree import lag_versions
from learner.batches.intake import REASONS
from learner.imitation import loss as imitated_loss
from learner.packing.credited import CreditedTree
from learner.packing.staleness import Staleness
from learner.training.optimizer_steps import BatchTotals, UpdateHistory
from learner.training.pass_loss import PassLoss
from learner.training.passes import Part
from learner.training.reductions import Reductions


class StepMetrics:
    """Computes the metrics of a batch; the same on every rank."""

    def __init__(self, config: Config, *, loss: PassLoss, reductions: Reductions) -> None:
        self._config = config
        self._loss = loss
        self._reductions = reductions

    def of_trees(self, trees: Sequence[CreditedTree], version: int) -> dict[str, float]:
        """The ages of the turns that were trained on."""
        max_lag = self._config.staleness.max_lag
        staleness = Staleness.of(trees, version=version, max_lag=max_lag).to_vector()
        counts = Staleness.from_vector(self._reductions.sum(staleness))
        served = [max(0, lag_versions(turn, current=version)) for tree in trees for turn in tree.tree]
        served_max = max(self._reductions.gather(max(served, default=-1)))
        out = counts.metrics()
        if served_max >= 0:
            # Over all turns of the batch, those masked too: lag/max is within max_lag by construction.
            out["lag/served_max"] = served_max
        out["tokens/trained"] = counts.action_tokens
        return out

    def of_sums(self, sums: Tensor) -> dict[str, float]:
        """The metrics of the passes' diagnostics."""
        return self._loss.summary(self._reductions.sum_of(sums))

    def of_tokens(self, totals: BatchTotals, row_tokens: int) -> dict[str, float]:
        """The sizes of the forward passes."""
        forward, rows = self._reductions.sum(np.array([totals.forward_tokens, row_tokens], dtype=np.float64)).tolist()
        out = {"tokens/forward": forward}
        if rows:
            # Below 1: what the tree layout saves; above: what padding and repeated prefixes cost.
            out["pack/token_ratio"] = forward / (rows * self._config.learner.epochs)
        return out

    def of_updates(self, totals: BatchTotals, history: UpdateHistory, *, fp16_scale: float | None) -> dict[str, float]:
        """The metrics of the optimizer steps, and of the run so far."""
        out: dict[str, float] = {"train/updates": history.updates, "guard/skipped_updates": history.skips.total}
        if fp16_scale is not None:
            out["guard/fp16_overflows"] = history.overflows
            out["guard/fp16_scale"] = fp16_scale
        if totals.grad_norms:
            out["grad_norm"] = float(np.mean(totals.grad_norms))
        if totals.losses:
            out["train/loss"] = float(np.mean(totals.losses))
            out["lr"] = totals.lr
            out |= self._of_tempering(totals)
            if self._config.objective.kl_coef:
                out["loss/kl_reference"] = float(np.mean(totals.kl))
            if self._config.objective.entropy_coef:
                out["loss/entropy"] = float(np.mean(totals.entropy))
            for number, term in enumerate(self._loss.parts.terms):
                out[f"loss/{term.label}"] = float(np.mean([each[number] for each in totals.terms]))
            out |= self._loss.measuring.metrics
        return out | self._of_schedules()

    def _of_schedules(self) -> dict[str, float]:
        """The coefficients that move, as they were for this batch."""
        settings = self._config.objective
        given = {"kl_coef": settings.kl_coef, "entropy_coef": settings.entropy_coef}
        return {
            f"objective/{name}": coefficient(value, self._loss.measuring.step)
            for name, value in given.items()
            if isinstance(value, Schedule)
        }

    def _of_tempering(self, totals: BatchTotals) -> dict[str, float]:
        correction = self._loss.correction
        scale = min(t.trees.scale for t in totals.tempering)
        tempered = self._config.correction.exponent != "ess" and correction.guards_ess and scale < 1
        out = {"is/exponent_scale": scale, "guard/tempered": float(tempered)}
        if self._config.imitation.rows:
            out["imitation/exponent_scale"] = min(t.rows.scale for t in totals.tempering)
        measured = [t.trees.measured for t in totals.tempering if t.trees.measured is not None]
        if measured:
            out[correction.traits.measured_as] = min(measured)
        return out

    def of_rows(
        self, parts: Sequence[Part], totals: BatchTotals, *, version: int, num_dropped: int
    ) -> dict[str, float]:
        """The metrics of the rows that are imitated; none where nothing is."""
        if not self._config.imitation.rows:
            return {}
        none = torch.zeros(len(imitated_loss.SUMS), dtype=torch.float64, device=self._loss.accelerator.device)
        chains = [chain for part in parts for chain in part.chains]
        passes = [item for part in parts for item in part.passes]
        return imitated_loss.metrics(
            chains, passes, torch.stack([none, *totals.rows]).sum(0), totals.losses,
            version=version, num_dropped=num_dropped,
            coef=self._config.imitation.coef_at(self._loss.measuring.step),
            reductions=self._reductions,
        )  # fmt: skip

    def of_dropped(self, own: dict[str, float]) -> dict[str, float]:
        """Trees left out, by reason, over all ranks; reasons that no rank has are left out."""
        total = self._reductions.sum(np.array([own.get(f"dropped/{reason}", 0.0) for reason in REASONS])).tolist()
        return {f"dropped/{reason}": count for reason, count in zip(REASONS, total, strict=True) if count}
