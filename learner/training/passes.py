"""A batch's trees cut into optimizer steps, and each of these into forward passes on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from atpo_async.config import Config
from atpo_async.core.credit.roles import PROPOSER, SYNTHESIZER
from atpo_async.wire.messages import Batch
from learner.imitation.rows import imitated_rows, normaliser_of
from learner.loss.tokens import OffPolicyTokens
from learner.loss.units import counted
from learner.packing import lengths
from learner.packing.attention import Way, to_device, ways
from learner.packing.credited import CreditedTree, Normaliser
from learner.packing.lengths import Width
from learner.packing.rows import MicroBatch, Row, idle_micro_batch, leaf_rows, micro_batches
from learner.packing.tree import tree_micro_batches
from learner.policy.model import Policy
from learner.policy.precision import computed_in
from learner.training.reductions import Reductions
from learner.training.whole_batch import chance


@dataclass(slots=True, kw_only=True)
class Pass:
    """A micro-batch on its device.  Fields that ``MicroBatch`` has too are what they are there."""

    inputs: dict[str, Any]
    """Arguments of the model."""
    occurrence: Tensor | None
    mu: Tensor
    advantage: Tensor
    weight: Tensor
    turn: Tensor
    row: Tensor
    number: Tensor
    counted: Tensor
    lag: Tensor
    prox: Tensor | None = None
    """Once it is known; before that the pass's own log-probs are it."""
    reference: Tensor | None = None
    start: dict[str, Tensor] = field(default_factory=dict)
    """Further numbers of each token at the batch's start, by name, once they are measured."""
    multipliers: dict[str, Tensor] = field(default_factory=dict)
    """Label of a token weight -> its multiplier for each token, once it is known."""
    keys: chance.U64 | None = None
    """uint64[M], on the host: of the tokens' random numbers, where some part of the objective draws any."""
    imitated: bool = False
    """Its rows are imitated ones (``learner.imitation.rows``), not those of the batch's trees."""

    def spread(self, scored: Tensor) -> Tensor:
        """A number for each scored token (last dimension) -> for each place of the loss."""
        return scored if self.occurrence is None else scored[..., self.occurrence]

    def against_mu(self, numerator: Tensor) -> OffPolicyTokens:
        """The tokens as the correction reads them."""
        return OffPolicyTokens(numerator=numerator, mu=self.mu, advantage=self.advantage, turn=self.turn, row=self.row)


@dataclass(slots=True, kw_only=True)
class Part:
    """The trees of one optimizer step."""

    trees: list[CreditedTree]
    passes: list[Pass]
    """Those of the trees first, then those of the chains."""
    chains: list[CreditedTree]
    """Rows that are imitated, as trees of one chain."""
    row_tokens: int
    """Of the flat layout, whatever the layout is."""
    longest_path: int
    """Tokens of the longest row: a pass holds one at the least."""

    def hand_out(self) -> None:
        """To its passes, the advantages that its trees have now."""
        advantage = np.concatenate([np.zeros(0), *(tree.advantages for tree in self.trees)])
        for item in self.tree_passes:
            found = torch.from_numpy(advantage).to(item.advantage)
            item.advantage = found[item.number]

    @property
    def tree_passes(self) -> list[Pass]:
        """Those of the trees: credit is theirs, what a row that is imitated is worth is settled."""
        return [item for item in self.passes if not item.imitated]

    @property
    def largest_pass(self) -> int:
        """Padded tokens."""
        return max((item.inputs["tokens"].numel() for item in self.passes), default=0)


@dataclass(kw_only=True)
class Planner:
    """Plans the forward passes of a rank."""

    config: Config
    policy: Policy
    """Whose precision the numbers take."""
    layout: str
    """Of the trees in a pass: ``tree`` or ``flat``."""
    keep_idle: bool
    """Make passes for turns without an advantage too: they affect other terms or statistics, or may get one later."""
    draws: bool
    """Some part of the objective needs a random number for each token."""
    reductions: Reductions
    device: torch.device
    micro_batch_tokens: int
    """Padded tokens of a pass, at most: what the configuration says, or less where that ran out of memory."""

    def plan(self, trees: Sequence[CreditedTree], chains: Sequence[CreditedTree], batch: Batch, version: int) -> Part:
        """This rank's forward passes for one optimizer step: as many as every other rank, none if no rank has rows.

        Args:
            trees: of the step.
            chains: rows that are imitated beside them; they have passes of their own.
            batch: whose they are.
            version: being trained.
        """
        settings = self.config
        rows = leaf_rows(
            trees,
            version=version,
            max_lag=settings.staleness.max_lag,
            aggregation=settings.objective.aggregation,
            normaliser=self._normaliser(trees, batch),
            keep_idle=self.keep_idle,
        )
        keys = None
        if self.draws:
            every = [item.tree for item in (*trees, *chains)]
            keys = chance.turn_keys(every, seed=settings.run.seed, step=batch.step)
        passes = self._passes(rows, version, keys)
        if settings.imitation.rows:
            rows += (own := self._imitated(chains, trees, batch, version))
            for item in (more := self._passes(own, version, keys)):
                item.imitated = True
            passes += more
        return Part(
            trees=list(trees),
            passes=passes,
            chains=list(chains),
            row_tokens=sum(len(row.tokens) - 1 for row in rows),
            longest_path=max((len(row.tokens) - 1 for row in rows), default=0),
        )

    def _passes(self, rows: Sequence[Row], version: int, keys: chance.U64 | None) -> list[Pass]:
        """Rows in forward passes, as many on every rank; ``keys``: of the step's turns (``chance.turn_keys``)."""
        limit = self.micro_batch_tokens
        if self.layout == "tree":
            packed = tree_micro_batches(
                rows,
                max_tokens=limit,
                pack_tokens=self.config.learner.pack_tokens,
                version=version,
                width=self._width(limit),
            )
        else:
            packed = micro_batches(rows, max_tokens=limit, version=version, width=self._width(limit))
        count = int(max(self.reductions.gather(len(packed))))
        packed += [idle_micro_batch() for _ in range(count - len(packed))]
        passes = [self.on_device(item) for item in packed]
        if keys is not None:
            for item, made in zip(packed, passes, strict=True):
                made.keys = chance.token_keys(keys, item.number, item.turn)
        return passes

    def _imitated(
        self, chains: Sequence[CreditedTree], trees: Sequence[CreditedTree], batch: Batch, version: int
    ) -> list[Row]:
        """The rows that are imitated in the optimizer step of ``trees``."""
        normaliser = normaliser_of(batch) if self.config.learner.minibatches == 1 else self._counted(chains)
        return imitated_rows(
            chains,
            after=trees,
            version=version,
            max_lag=self.config.imitation.max_lag,
            aggregation=self.config.objective.aggregation,
            normaliser=normaliser,
            keep_idle=bool(self.config.imitation.clip_cov),  # rows worth 0 are part of the covariances
        )

    def plan_again(self, part: Part, batch: Batch, version: int) -> None:
        """Other passes for the same optimizer step, as ``micro_batch_tokens`` is now.

        They keep what was measured of their tokens at the batch's start: after an optimizer step nothing could measure
        it again.
        """
        former, part.passes = part.passes, self.plan(part.trees, part.chains, batch, version).passes
        for imitated in (False, True):
            if before := [item for item in former if item.imitated == imitated]:
                take_measured(before, [item for item in part.passes if item.imitated == imitated])

    def _normaliser(self, trees: Sequence[CreditedTree], batch: Batch) -> Normaliser:
        """The denominators of the mean loss of one optimizer step, over all ranks."""
        if self.config.learner.minibatches == 1:
            return Normaliser(
                num_trees=batch.num_trees,
                num_leaves=batch.num_leaves,
                num_action_tokens=batch.num_action_tokens,
                num_turn_tokens=batch.num_turn_tokens,
                role_shares=self.role_shares,
            )
        return self._counted(trees)

    def _counted(self, trees: Sequence[CreditedTree]) -> Normaliser:
        """Of these trees, and of those that other ranks have in the same optimizer step."""
        own = Normaliser.of(trees)
        counts = [own.num_trees, own.num_leaves, own.num_action_tokens, own.num_turn_tokens]
        total = [int(v) for v in self.reductions.sum(np.array(counts, dtype=np.float64))]
        return Normaliser(
            num_trees=total[0], num_leaves=total[1], num_action_tokens=total[2], num_turn_tokens=total[3],
            role_shares=self.role_shares,
        )  # fmt: skip

    @property
    def role_shares(self) -> dict[int, float]:
        """Of a group of trees: each role's share of its weight in the loss."""
        proposers = self.config.team.proposer_weight
        return {PROPOSER: proposers, SYNTHESIZER: 1.0 - proposers}

    @property
    def way(self) -> Way:
        """Of attention over packed trees."""
        dtype = computed_in(self.config.learner.mixed_precision)
        return self.policy.attention_way or ways(self.device, dtype)[0]

    def _width(self, limit: int) -> Width:
        """What rows are padded to, where something is compiled for their length."""
        if self.layout == "tree" and self.way == "flex":
            return lengths.few(limit)
        return lengths.aligned(limit) if self.device.type == "cuda" else lengths.exact

    def on_device(self, batch: MicroBatch) -> Pass:
        """In the policy's precision, float32 at the least."""
        dtype = next(self.policy.parameters()).dtype
        dtype = dtype if dtype == torch.float64 else torch.float32

        def number(values: Any) -> Tensor:
            return torch.from_numpy(values).to(dtype)

        inputs: dict[str, Any] = {
            "tokens": torch.from_numpy(batch.tokens),
            "predictor": torch.from_numpy(batch.predictor),
            "target": torch.from_numpy(batch.target),
        }
        rest: dict[str, Any] = {
            "occurrence": None if batch.occurrence is None else torch.from_numpy(batch.occurrence),
            "mu": number(batch.mu),
            "advantage": number(batch.advantage),
            "weight": number(batch.weight),
            "turn": torch.from_numpy(batch.turn),
            "row": torch.from_numpy(batch.row),
            "number": torch.from_numpy(batch.number),
            "counted": torch.from_numpy(batch.counted),
            "lag": torch.from_numpy(batch.lag),
        }
        inputs = send_to_device(inputs, self.device)
        if batch.layout is not None:
            inputs["layout"] = to_device(batch.layout, self.device, way=self.way)
        made = Pass(inputs=inputs, **send_to_device(rest, self.device))
        counted(made.turn, int(batch.turn.max(initial=-1)) + 1)
        counted(made.row, int(batch.row.max(initial=-1)) + 1)
        return made


def take_measured(former: Sequence[Pass], passes: Sequence[Pass]) -> None:
    """Give passes the proximal log-probs and the other numbers of the batch's start that former passes over the same
    turns have, if all of those have them."""
    known = [item.prox for item in former if item.prox is not None]
    if not former or len(known) < len(former):
        return
    # Each turn is counted once, its tokens in order.
    number, order = torch.cat([item.number[item.counted] for item in former]).sort(stable=True)
    places = [
        order[
            torch.searchsorted(number, item.number)
            + torch.arange(item.turn.numel(), device=item.turn.device)
            - torch.searchsorted(item.turn, item.turn)
        ]
        for item in passes
    ]

    def taken(values: Sequence[Tensor]) -> list[Tensor]:
        once = torch.cat([found[item.counted] for found, item in zip(values, former, strict=True)])
        return [once[at] for at in places]

    for item, prox in zip(passes, taken(known), strict=True):
        item.prox = prox
    for name in former[0].start:
        for item, values in zip(passes, taken([each.start[name] for each in former]), strict=True):
            item.start[name] = values


def split(trees: Sequence[CreditedTree], parts: int, order: np.random.Generator) -> list[list[CreditedTree]]:
    """Trees into the parts of a batch, one an optimizer step, as ``order`` falls."""
    if parts == 1:
        return [list(trees)]
    shuffled = [trees[i] for i in order.permutation(len(trees))]
    return [shuffled[i::parts] for i in range(parts)]
