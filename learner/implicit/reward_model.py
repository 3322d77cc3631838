"""An implicit process reward model, trained beside the policy: iStar (arXiv 2509.19199), arithmetic in ``pairs``.

For each batch, before the policy's first optimizer step: the model scores every turn, takes one optimizer step on the
preference loss over the batch's pairs of chains, scores every turn again, and pays the turns by these scores.

pi_old is the proximal policy, the learner's own weights when the batch began, and not mu: both sides of a reward are
computed alike then, and no reward holds what an engine rounds, or how stale a turn is.  On data of the present weights
the two are one.  Turns that are too old to be trained on have no score: they count 0 in their chains' sums, and are
paid nothing.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from atpo_async.config import Config
from atpo_async.core.credit import TreeArrays
from atpo_async.core.credit.tree_arrays import F64
from atpo_async.core.errors import SetupError
from atpo_async.status import waits
from learner.implicit.pairs import Pairs, pairs_of, step_advantages
from learner.memory.out_of_memory import explained
from learner.policy.accelerator import is_sharded
from learner.policy.half import HalfPolicy, is_for
from learner.policy.model import Policy
from learner.policy.optimizer import state_bytes
from learner.training.fitted import FittedBatch
from learner.training.passes import Part, Pass
from learner.training.reductions import Reductions


def begun(config: Config, policy: Policy, accelerator: Accelerator) -> Policy | None:
    """What the model begins as, where there is to be one: a copy of the policy, which nothing has wrapped yet.

    Raises:
        SetupError: no such model can be trained beside this policy.
    """
    if not config.implicit_reward.enabled:
        return None
    off = "set --implicit_reward.enabled false"
    if is_sharded(accelerator):
        raise SetupError(
            f"implicit_reward.enabled = true with learner.accelerate_config = {config.learner.accelerate_config!r}: a "
            f"second model is not sharded here; train with whole copies (no accelerate_config), or {off}"
        )
    if policy.lora is not None:
        raise SetupError(
            f"implicit_reward.enabled = true with learner.lora.rank = {config.learner.lora.rank}: the reward model is "
            f"trained with all its weights, which adapters are there to avoid; set --learner.lora.rank 0, or {off}"
        )
    return copy.deepcopy(policy)


@dataclass(frozen=True, slots=True)
class _Scores:
    """Of the turns of a part."""

    log_ratio: F64
    """float64[turns]: sum over a turn's tokens of log pi_phi - log pi_old."""
    known: NDArray[np.bool_]
    """bool[turns]: it has tokens that are trained on, and a finite score."""


class ImplicitReward:
    """The reward model and its optimizer, the same on every rank.

    Args:
        config: of the run.
        policy: a copy of the policy as it is loaded: the model begins with its weights.
        accelerator, reductions: of the learner.
    """

    def __init__(self, config: Config, policy: Policy, accelerator: Accelerator, reductions: Reductions) -> None:
        self._settings = settings = config.implicit_reward
        self._config = config
        self._accelerator, self._reductions = accelerator, reductions
        self.policy = policy
        self.updates = 0
        """Optimizer steps taken."""
        self.skipped = 0
        """Left out, as the gradient was not finite."""
        self.half: HalfPolicy | None = None
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=settings.lr, betas=settings.betas, eps=config.learner.eps,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        if is_for(config, policy, sharded=False):
            self.half = HalfPolicy(policy.to(accelerator.device), trains=True)
            # Its ranks exchange gradients themselves, as the policy's do.
            self.model: Any = accelerator.prepare_model(policy, evaluation_mode=True)
            self.optimizer: Any = accelerator.prepare_optimizer(optimizer)
            self.half.begin_alike(num_ranks=accelerator.num_processes)
        else:
            self.model, self.optimizer = accelerator.prepare(policy, optimizer)
        self._run: Callable[..., Tensor] = self.half or self.model

    @property
    def bytes_to_come(self) -> float:
        """What it takes on the device from its first optimizer step on, beside its weights: gradients and moments."""
        gradients = sum(p.numel() * p.element_size() for p in self.policy.parameters())
        return gradients + state_bytes(self.optimizer, "adamw")

    def pay(self, parts: Sequence[Part], fitted: FittedBatch) -> dict[str, float]:
        """Train on a batch, and add its step advantages to those that its trees and passes have.  Returns metrics.

        Every rank calls it, with equally many passes; the parts' proximal log-probs are known.

        Raises:
            SetupError: memory ran out in the optimizer's step.
        """
        if self.half is not None:
            self.half.is_stale = True  # a checkpoint may have been loaded since
        before = fitted.run(lambda: self._scored(parts))
        pairs = [
            [pairs_of(arrays, own, beta=self._settings.beta) for arrays, own, _ in _trees(part, scores)]
            for part, scores in zip(parts, before, strict=True)
        ]
        metrics, num_trees = self._of_pairs(pairs)
        if num_trees:
            gradients = [
                np.concatenate([np.zeros(0), *(each.gradient / num_trees for each in own)]) for own in pairs
            ]  # fmt: skip
            fitted.run(lambda: self._backward(parts, gradients))
            with explained("the reward model's step", self._config, self._accelerator.device):
                metrics |= self._step()
        after = fitted.run(lambda: self._scored(parts)) if num_trees else before
        for part, scores in zip(parts, after, strict=True):
            self._pay(part, scores)
        return metrics | self._of_rewards(after) | {"implicit/updates": self.updates, "implicit/skipped": self.skipped}

    # --- the passes

    def _scored(self, parts: Sequence[Part]) -> list[_Scores]:
        """Forward passes without a gradient."""
        device = self._accelerator.device
        found = []
        for part in parts:
            num_turns = sum(len(tree.tree) for tree in part.trees)
            total = torch.zeros(num_turns, dtype=torch.float64, device=device)
            tokens = torch.zeros(num_turns, dtype=torch.float64, device=device)
            with torch.no_grad():
                for item in part.tree_passes:
                    assert item.prox is not None
                    once = _once(item)
                    ratio = (item.spread(self._run(**item.inputs)) - item.prox).double()
                    total.index_add_(0, item.number, torch.where(once, ratio, 0.0))
                    tokens.index_add_(0, item.number, once.double())
                    waits.progress("micro-batches")
            sums = total.cpu().numpy()
            # What is not finite must not reach the policy: a model that has come to that pays nothing.
            known = (tokens.cpu().numpy() > 0) & np.isfinite(sums)
            found.append(_Scores(np.where(known, sums, 0.0), known))
        return found

    def _backward(self, parts: Sequence[Part], gradients: Sequence[F64]) -> None:
        """Let the loss's gradient be on the model's parameters; ``gradients``: by token, for each turn of a part."""
        accelerator, device = self._accelerator, self._accelerator.device
        self.optimizer.zero_grad()
        items = [(item, own) for part, own in zip(parts, gradients, strict=True) for item in part.tree_passes]
        # Data parallelism averages gradients over ranks; the loss is a sum over them, and so is what the copy does.
        ranks = accelerator.num_processes if self.half is None else 1
        for i, (item, own) in enumerate(items):
            exchanges = self.half is not None or i + 1 == len(items)
            with contextlib.nullcontext() if exchanges else accelerator.no_sync(self.model):
                logp = item.spread(self._run(**item.inputs))
                by_turn = torch.from_numpy(own).to(logp)
                loss = (torch.where(_once(item), by_turn[item.number], 0.0) * logp).sum()
                accelerator.backward(loss.to(device) * ranks)
            waits.progress("micro-batches")
        if self.half is not None and accelerator.num_processes > 1:
            self.half.sum_over_ranks()

    def _step(self) -> dict[str, float]:
        """One optimizer step, or none where the gradient is not finite."""
        norm = float(self._accelerator.clip_grad_norm_(self.model.parameters(), self._settings.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
            self.updates += 1
        else:
            self.skipped += 1
        self.optimizer.zero_grad()
        if self.half is not None:
            self.half.is_stale = True
        return {"implicit/grad_norm": norm} if math.isfinite(norm) else {}

    # --- what they come to

    def _pay(self, part: Part, scores: _Scores) -> None:
        """Step advantages to the trees of a part, and to its passes."""
        settings = self._settings
        part.trees = [
            replace(
                tree, advantages=tree.advantages + settings.alpha * step_advantages(settings.beta * ratio, known)
            )
            for tree, (_, ratio, known) in zip(part.trees, _trees(part, scores), strict=True)
        ]  # fmt: skip
        part.hand_out()

    def _of_pairs(self, pairs: Sequence[Sequence[Pairs]]) -> tuple[dict[str, float], int]:
        """Metrics, and the number of trees of the whole batch that have a pair: the loss is a mean over them."""
        own = [each for part in pairs for each in part if each.count]
        sums = [float(len(own)), sum(p.loss for p in own), sum(p.count for p in own), sum(p.right for p in own)]
        trees, loss, count, right = self._reductions.sum(np.array(sums, dtype=np.float64)).tolist()
        if not trees:
            return {"implicit/pairs": 0.0}, 0
        found = {"implicit/pairs": count, "implicit/loss": loss / trees, "implicit/accuracy": right / count}
        return found, int(trees)

    def _of_rewards(self, scores: Sequence[_Scores]) -> dict[str, float]:
        """Mean and standard deviation of r_n over the turns of the whole batch."""
        own = np.concatenate([np.zeros(0), *(self._settings.beta * each.log_ratio[each.known] for each in scores)])
        sums = np.array([len(own), own.sum(), np.square(own).sum()], dtype=np.float64)
        count, total, squares = self._reductions.sum(sums).tolist()
        if not count:
            return {}
        mean = total / count
        return {"implicit/reward_mean": mean, "implicit/reward_std": math.sqrt(max(0.0, squares / count - mean * mean))}


def of(
    config: Config, policy: Policy | None, accelerator: Accelerator, reductions: Reductions
) -> ImplicitReward | None:
    """The model that begins as ``policy``, if any."""
    return None if policy is None else ImplicitReward(config, policy, accelerator, reductions)


def _once(item: Pass) -> Tensor:
    """bool[M]: every token of the batch in one place."""
    return item.counted & (item.turn >= 0)


def _trees(part: Part, scores: _Scores) -> list[tuple[TreeArrays, F64, NDArray[np.bool_]]]:
    """The trees of a part, with the scores of their turns."""
    arrays = [TreeArrays.of(tree.tree) for tree in part.trees]
    if not arrays:
        return []
    ends = np.cumsum([len(each) for each in arrays])[:-1]
    return list(zip(arrays, np.split(scores.log_ratio, ends), np.split(scores.known, ends), strict=True))
