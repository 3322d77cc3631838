"""Trees to token batches: flat rows, one per finished leaf, padded into micro-batches.  Pure, numpy.

Source: ALGORITHM, section 5.  A row is a leaf's path: prompt, then each turn's observation and action.  A turn that
several leaves share appears in each of their rows; the flat weights below make the sum over rows the mean over leaves.

Shapes: B rows of a micro-batch, T its longest row, N action tokens of it that count.  Another layout (a whole tree in
one pass) gives the same ``MicroBatch`` with ``position_ids`` and ``attention_mask`` set and each turn once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from atpo_async.config import CreditConfig
from atpo_async.credit import credit
from atpo_async.messages import BatchTree
from atpo_async.tree import Turn, TurnTree, is_fresh, lag_versions

Aggregation = Literal["seq-mean-token-mean", "seq-mean-token-sum", "token-mean"]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class CreditedTree:
    """A pruned tree with what each of its turns is worth."""

    tree: TurnTree
    weight: float
    """w_PER."""
    advantages: F64
    """float64[turns], in the order of ``tree.turns``."""

    @classmethod
    def of(cls, sampled: BatchTree, settings: CreditConfig) -> CreditedTree:
        tree = TurnTree(
            sampled.tree_id, sampled.task_index, sampled.prompt, sampled.turns, sampled.failed_branches
        ).pruned()
        worth = credit(
            tree,
            value_mode=settings.value_mode,
            advantage_mode=settings.advantage_mode,
            normalise=settings.normalise_leaves,
        )
        return cls(tree, sampled.weight, worth.advantages)

    @property
    def num_leaves(self) -> int:
        return sum(turn.is_leaf for turn in self.tree)

    @property
    def num_action_tokens(self) -> int:
        """Over all leaf rows: a shared turn counts once for each."""
        return sum(len(turn.action) for leaf in self.tree.leaves() for turn in self.tree.path(leaf.turn_id))


def priority(advantages: F64, *, max_share: float) -> float:
    """p = eta max|A| + (1 - eta) mean|A| over the tree's turns (ALGORITHM, section 4, Priorities)."""
    if not len(advantages):
        return 0.0
    size = np.abs(advantages)
    return float(max_share * size.max() + (1 - max_share) * size.mean())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One leaf's path.  K action tokens that count (those of fresh turns)."""

    tokens: NDArray[np.int32]
    """int32[L]: prompt, observations, actions."""
    at: I64
    """int64[K]: where in ``tokens`` each action token stands; it is predicted from the place before."""
    mu: F64
    """float64[K]: behaviour log-probs."""
    advantage: F64
    version: I64
    """int64[K]: that sampled the token."""
    turn: I64
    """int64[K]: turn of the batch; the same number in every row that shares the turn."""
    weight: float
    """Of each token of this row, w_PER included."""

    @property
    def has_signal(self) -> bool:
        return self.weight != 0 and bool(np.any(self.advantage))


@dataclass(frozen=True, slots=True, kw_only=True)
class Normaliser:
    """Size of what the loss is a mean over: the whole batch over all ranks, whatever a rank or micro-batch holds."""

    num_leaves: int
    num_action_tokens: int

    def row_weight(self, aggregation: Aggregation, row_tokens: int) -> float:
        """Weight of each action token of a leaf row with ``row_tokens`` of them, masked ones included.

        Masked turns stay in the mean: a leaf whose stale half is masked counts half, not double.
        """
        if aggregation == "seq-mean-token-mean":
            return 1.0 / (self.num_leaves * row_tokens)
        return 1.0 / (self.num_leaves if aggregation == "seq-mean-token-sum" else self.num_action_tokens)


def leaf_rows(
    trees: Iterable[CreditedTree],
    *,
    version: int,
    max_lag: int,
    aggregation: Aggregation,
    normaliser: Normaliser,
) -> list[Row]:
    """One row for each finished leaf that has something to learn from.

    Turns older than ``max_lag`` at ``version`` are context only.  Rows in which nothing counts (all stale, or every
    advantage zero) are left out: they add exactly zero to the loss and its gradient.
    """
    rows: list[Row] = []
    first_turn = 0
    for item in trees:
        tree = item.tree
        number = {turn.turn_id: first_turn + i for i, turn in enumerate(tree)}
        advantage = {turn.turn_id: float(a) for turn, a in zip(tree, item.advantages, strict=True)}
        for leaf in tree.leaves():
            path = tree.path(leaf.turn_id)
            weight = item.weight * normaliser.row_weight(aggregation, sum(len(t.action) for t in path))
            row = _row(
                tree.prompt, path, number, advantage, weight, lambda t: is_fresh(t, current=version, max_lag=max_lag)
            )
            if row.has_signal:
                rows.append(row)
        first_turn += len(tree)
    return rows


def _row(
    prompt: NDArray[np.int32],
    path: Sequence[Turn],
    number: dict[int, int],
    advantage: dict[int, float],
    weight: float,
    counts: Callable[[Turn], bool],
) -> Row:
    tokens: list[NDArray[np.int32]] = [prompt]
    used: list[Turn] = []
    at: list[I64] = []
    length = len(prompt)
    for turn in path:
        tokens += [turn.observation, turn.action]
        length += len(turn.observation) + len(turn.action)
        if counts(turn):
            used.append(turn)
            at.append(np.arange(length - len(turn.action), length, dtype=np.int64))
    sizes = [len(turn.action) for turn in used]
    empty = np.zeros(0)
    return Row(
        tokens=np.concatenate(tokens).astype(np.int32, copy=False),
        at=np.concatenate([np.zeros(0, dtype=np.int64), *at]),
        mu=np.concatenate([empty, *(turn.logprobs for turn in used)]).astype(np.float64),
        advantage=np.repeat(np.array([advantage[t.turn_id] for t in used], dtype=np.float64), sizes),
        version=np.concatenate([empty, *(turn.token_versions() for turn in used)]).astype(np.int64),
        turn=np.repeat(np.array([number[t.turn_id] for t in used], dtype=np.int64), sizes),
        weight=weight,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """What one forward pass takes and what the loss needs of it."""

    tokens: I64
    """int64[B, T], padded on the right with 0."""
    position_ids: I64 | None
    """int64[B, T]; None for 0, 1, 2, …"""
    attention_mask: Mask | None
    """bool[B, 1, T, T]; None for plain causal attention.  Padding stands on the right, where no token looks."""
    predictor: I64
    """int64[N]: place in the flattened ``B * T`` from whose output the token is predicted."""
    target: I64
    """int64[N]: the token."""
    mu: F64
    advantage: F64
    weight: F64
    turn: I64
    """int64[N]: turn occurrences, from 0; two rows that share a turn hold two."""
    row: I64
    """int64[N]."""
    counted: Mask
    """bool[N]: false where another row has counted this turn already (diagnostics count a turn once)."""
    same_version: Mask
    """bool[N]: sampled by the version being trained (lag 0)."""

    @property
    def num_targets(self) -> int:
        return len(self.target)


def micro_batches(rows: Sequence[Row], *, max_tokens: int, version: int) -> list[MicroBatch]:
    """Rows by length into as few forward passes as ``max_tokens`` padded tokens allow; a longer row goes alone.

    The last token of a row only needs predicting, so it takes no place.
    """
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda r: -len(r.tokens)):
        # Longest first: the first row of a group decides its width.
        if not groups or (len(groups[-1]) + 1) * (len(groups[-1][0].tokens) - 1) > max_tokens:
            groups.append([])
        groups[-1].append(row)
    seen: set[int] = set()
    return [_padded(group, version, seen) for group in groups]


def idle_micro_batch() -> MicroBatch:
    """A forward pass without targets: its loss is zero and its gradient too.  Keeps ranks in step."""
    none = np.zeros(0)
    index = np.zeros(0, dtype=np.int64)
    flag = np.zeros(0, dtype=bool)
    return MicroBatch(
        tokens=np.zeros((1, 2), dtype=np.int64), position_ids=None, attention_mask=None, predictor=index, target=index,
        mu=none, advantage=none, weight=none, turn=index, row=index, counted=flag, same_version=flag,
    )  # fmt: skip


def _padded(rows: list[Row], version: int, seen: set[int]) -> MicroBatch:
    width = max(len(row.tokens) for row in rows) - 1
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    occurrences: list[I64] = []
    counted: list[Mask] = []
    next_occurrence = 0
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens) - 1] = row.tokens[:-1]
        present, local = np.unique(row.turn, return_inverse=True)
        occurrences.append(local.astype(np.int64) + next_occurrence)
        next_occurrence += len(present)
        counted.append(np.array([turn not in seen for turn in present.tolist()], dtype=bool)[local])
        seen.update(present.tolist())
    sizes = [len(row.at) for row in rows]
    return MicroBatch(
        tokens=tokens,
        position_ids=None,
        attention_mask=None,
        predictor=np.concatenate([row.at - 1 + i * width for i, row in enumerate(rows)]),
        target=np.concatenate([row.tokens[row.at] for row in rows]).astype(np.int64),
        mu=np.concatenate([row.mu for row in rows]),
        advantage=np.concatenate([row.advantage for row in rows]),
        weight=np.repeat([row.weight for row in rows], sizes),
        turn=np.concatenate(occurrences),
        row=np.repeat(np.arange(len(rows), dtype=np.int64), sizes),
        counted=np.concatenate(counted),
        same_version=np.concatenate([row.version for row in rows]) == version,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Staleness:
    """Counts over the turns of a batch, additive over ranks."""

    by_lag: I64
    """int64[max_lag + 1]: turns trained on, by version lag."""
    stale: int
    """Turns over ``max_lag``, masked."""
    multi_version: int
    zero_advantage: int
    action_tokens: int
    """Of turns trained on, each turn once."""
    stale_tokens: int

    @classmethod
    def of(cls, trees: Iterable[CreditedTree], *, version: int, max_lag: int) -> Staleness:
        by_lag = np.zeros(max_lag + 1, dtype=np.int64)
        stale = multi = zero = tokens = stale_tokens = 0
        for item in trees:
            for turn, advantage in zip(item.tree, item.advantages, strict=True):
                if not is_fresh(turn, current=version, max_lag=max_lag):
                    stale += 1
                    stale_tokens += len(turn.action)
                    continue
                by_lag[max(0, lag_versions(turn, current=version))] += 1
                multi += turn.oldest_version != turn.newest_version
                zero += advantage == 0
                tokens += len(turn.action)
        return cls(
            by_lag=by_lag, stale=stale, multi_version=multi, zero_advantage=zero, action_tokens=tokens,
            stale_tokens=stale_tokens,
        )  # fmt: skip

    def to_vector(self) -> F64:
        """float64[5 + max_lag + 1], to be added over ranks."""
        head = [self.stale, self.multi_version, self.zero_advantage, self.action_tokens, self.stale_tokens]
        return np.concatenate([np.array(head, dtype=np.float64), self.by_lag.astype(np.float64)])

    @classmethod
    def from_vector(cls, vector: F64) -> Staleness:
        stale, multi, zero, tokens, stale_tokens = (int(v) for v in vector[:5])
        return cls(
            by_lag=vector[5:].astype(np.int64), stale=stale, multi_version=multi, zero_advantage=zero,
            action_tokens=tokens, stale_tokens=stale_tokens,
        )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """``lag/*`` by turn trained on, ``turns/*`` shares; shares of nothing are left out.

        ``lag/turns_<k>`` counts the turns at lag k, for a histogram.
        """
        used = int(self.by_lag.sum())
        out: dict[str, float] = {"turns/count": used, "turns/stale": self.stale, "tokens/stale": self.stale_tokens}
        if used + self.stale:
            out["turns/stale_share"] = self.stale / (used + self.stale)
        if not used:
            return out
        lags = np.arange(len(self.by_lag))
        out["lag/mean"] = float((lags * self.by_lag).sum() / used)
        out["lag/max"] = float(lags[self.by_lag > 0].max())
        out["lag/p95"] = float(np.searchsorted(np.cumsum(self.by_lag), 0.95 * used))
        out["turns/multi_version_share"] = self.multi_version / used
        out["turns/zero_advantage_share"] = self.zero_advantage / used
        out.update({f"lag/turns_{k}": float(n) for k, n in enumerate(self.by_lag) if n})
        return out
