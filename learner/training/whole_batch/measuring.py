"""Measures for loss terms and token weights what the whole batch decides, and keeps the small state of each.

The state (running numbers, such as a mean over all batches so far) belongs to the run: a checkpoint holds it, and a
resumed run goes on with it.  It moves once a batch, when the batch has been trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atpo_async.core.loss_traits import Needs
from learner.loss.parts.loading import ObjectiveParts, TermPart, WeightPart
from learner.loss.protocols import Measured, MinP, Now, StartTokens
from learner.training.passes import Pass
from learner.training.reductions import Reductions
from learner.training.whole_batch import chance
from learner.training.whole_batch.statistics import GatheredStatistics

ENTROPY, LOG_MASS, TOP_LOGP = "entropy", "log_mass", "top_logp"
"""Names in ``Pass.start``."""


@dataclass(slots=True, kw_only=True)
class Measuring:
    """What the terms and token weights know of the batch under way and of those before it; the same on every rank."""

    parts: ObjectiveParts
    reductions: Reductions
    num_steps: int
    step: int = 0
    state: dict[str, dict[str, float]] = field(default_factory=dict)
    """Label of a part -> its numbers."""
    _found: dict[str, Measured] = field(default_factory=dict)

    def begin(self, step: int) -> None:
        """The learner's batch ``step`` begins; nothing is known of it yet."""
        self.step, self._found = step, {}

    def measure(self, passes: Sequence[Pass]) -> None:
        """Measure the batch, once its passes have the numbers of its start.  Every rank calls it.

        Raises ConfigError where a part's own measure breaks the protocol.
        """
        self._found = {}
        if not passes:
            return  # no rank has any
        statistics = GatheredStatistics(self.reductions)
        for part in self.parts.all:
            if part.traits.measure is None:
                continue
            tokens = _once(passes, [self.start_of(item, part) for item in passes])
            if statistics.count(tokens.turn >= 0):
                self._found[part.label] = part.measure(tokens, statistics, self.now(part))

    def now(self, part: TermPart | WeightPart) -> Now:
        """What the part is told of the batch."""
        found = self._found.get(part.label)
        return Now(
            step=self.step,
            num_steps=self.num_steps,
            measured={} if found is None else found.values,
            state=self.state.get(part.label, {}),
        )

    def start_of(self, item: Pass, part: TermPart | WeightPart) -> StartTokens:
        """The tokens of a pass at the batch's start, with what the part needs of them."""
        needs, start = part.needs, item.start
        assert item.prox is not None
        return StartTokens(
            logp=item.prox,
            mu=item.mu,
            advantage=item.advantage,
            turn=item.turn,
            row=item.row,
            entropy=start[ENTROPY] if needs.entropy else None,
            min_p=MinP(log_mass=start[LOG_MASS], top_logp=start[TOP_LOGP]) if needs.min_p is not None else None,
            reference=item.reference if needs.reference else None,
            random=_random(item, part.label) if needs.random else None,
        )

    def multiplier(self, item: Pass) -> Tensor | None:
        """The product of all token weights for each token of a pass; fixed once it is known.  None without any."""
        product: Tensor | None = None
        for weight in self.parts.weights:
            if weight.label not in item.multipliers:
                item.multipliers[weight.label] = weight(self.start_of(item, weight), self.now(weight)).detach()
            own = item.multipliers[weight.label]
            product = own if product is None else product * own
        return product

    def conclude(self) -> None:
        """The batch has been trained on: its part of the state is kept.  Numbers that are not finite, of a batch that
        was refused, are not."""
        for label, found in self._found.items():
            if found.state is not None and all(math.isfinite(value) for value in found.state.values()):
                self.state[label] = {name: float(value) for name, value in found.state.items()}

    @property
    def metrics(self) -> dict[str, float]:
        """What was measured of the batch, where it is finite."""
        return {
            f"{label}/{name}": float(value)
            for label, found in self._found.items()
            for name, value in found.values.items()
            if math.isfinite(value)
        }

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """From a checkpoint; a part that it holds nothing of begins anew."""
        self.state = {str(label): {str(n): float(v) for n, v in own.items()} for label, own in state.items()}


def named_lines(scored: Tensor, needs: Needs) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the further lines of ``Policy.forward`` by their names in ``Pass.start``."""
    names = [*([ENTROPY] if needs.entropy else []), *([LOG_MASS, TOP_LOGP] if needs.min_p is not None else [])]
    if not names:
        return scored, {}
    return scored[0], dict(zip(names, scored[1:], strict=True))


def arguments(needs: Needs) -> dict[str, Any]:
    """Arguments of ``Policy.forward`` with which it gives what is needed of the batch's start."""
    return {
        **({"with_entropy": True} if needs.entropy else {}),
        **({} if needs.min_p is None else {"min_p": needs.min_p}),
    }


def _random(item: Pass, label: str) -> Tensor:
    assert item.keys is not None
    return torch.from_numpy(chance.uniform(item.keys, label)).to(item.mu)


def _once(passes: Sequence[Pass], starts: Sequence[StartTokens]) -> StartTokens:
    """The tokens of all passes that are counted there, each turn's once; turns and rows numbered through."""
    chosen = [item.counted & (item.turn >= 0) for item in passes]

    def joined(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([found[where] for found, where in zip(values, chosen, strict=True)])

    def maybe(values: Sequence[Tensor | None]) -> Tensor | None:
        given = [found for found in values if found is not None]
        return joined(given) if given and len(given) == len(values) else None

    min_p = [start.min_p for start in starts if start.min_p is not None]
    return StartTokens(
        logp=joined([start.logp for start in starts]),
        mu=joined([start.mu for start in starts]),
        advantage=joined([start.advantage for start in starts]),
        turn=joined(_numbered([start.turn for start in starts])),
        row=joined(_numbered([start.row for start in starts])),
        entropy=maybe([start.entropy for start in starts]),
        min_p=MinP(log_mass=joined([m.log_mass for m in min_p]), top_logp=joined([m.top_logp for m in min_p]))
        if min_p
        else None,
        reference=maybe([start.reference for start in starts]),
        random=maybe([start.random for start in starts]),
    )


def _numbered(indices: Sequence[Tensor]) -> list[Tensor]:
    """Each pass's numbers after those of the passes before it."""
    found, first = [], 0
    for index in indices:
        found.append(torch.where(index < 0, index, index + first))
        first += int(index.max()) + 1 if index.numel() else 0
    return found
