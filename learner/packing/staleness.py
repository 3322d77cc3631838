"""The ages of a batch's turns: counts that add up over ranks, and their metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from atpo_async.core.tree import is_fresh, lag_versions
from learner.packing.arrays import F64, I64
from learner.packing.credited import CreditedTree


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
        out["lag/p50"] = float(np.searchsorted(np.cumsum(self.by_lag), 0.5 * used))
        out["lag/p95"] = float(np.searchsorted(np.cumsum(self.by_lag), 0.95 * used))
        out["turns/multi_version_share"] = self.multi_version / used
        out["turns/zero_advantage_share"] = self.zero_advantage / used
        out.update({f"lag/turns_{k}": float(n) for k, n in enumerate(self.by_lag) if n})
        return out
