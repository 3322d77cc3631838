"""An actor's report: the metrics of an interval, from the counters of its engine, links and weights."""

from __future__ import annotations

from collections.abc import Callable

from actors.engines.base import Engine
from actors.environments import Environments
from actors.weights.fetcher import WeightsFetcher
from atpo_async.run.metrics import Aggregator
from atpo_async.status import waits


class Interval:
    """The metrics since the last report.

    Args:
        slots: trees that the actor may grow at once, now.
        waited_s: seconds that senders have waited for the window of a link, in all.
        engine, environments, weights: whose counters are read.
        metrics: metrics that the actor has added itself.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        slots: Callable[[], int],
        engine: Engine,
        environments: Environments,
        waited_s: Callable[[], float],
        weights: WeightsFetcher,
        metrics: Aggregator,
        clock: Callable[[], float],
    ) -> None:
        self._slots, self._metrics, self._clock = slots, metrics, clock
        self._engine, self._environments = engine, environments
        self._waited, self._weights = waited_s, weights
        self._stats, self._began = engine.stats(), clock()
        self._waited_s = waited_s()

    def end(self, *, trees: int) -> dict[str, float]:
        """The metrics of the interval that ends now; ``trees`` are grown at this moment."""
        now, stats, before = self._clock(), self._engine.stats(), self._stats
        generated = stats.generated_tokens - before.generated_tokens
        prompt = stats.prompt_tokens - before.prompt_tokens
        if generated > 0:
            waits.progress("tokens", generated)
        slots, waited_s = self._slots(), self._waited()
        self._metrics.add("time/actor_wait_s", (waited_s - self._waited_s) / slots)
        self._waited_s = waited_s
        metrics = self._metrics.flush()
        # Chains of one tree wait together for space in the window: a slot waited no longer than the interval.
        metrics["time/actor_wait_s"] = min(metrics["time/actor_wait_s"], now - self._began)
        # One number per swap is what a reader looks for; mean and p95 of one value add nothing.
        if "engine/probe_error/max" in metrics:
            metrics["engine/probe_error"] = metrics.pop("engine/probe_error/max")
            metrics.pop("engine/probe_error/mean", None)
            metrics.pop("engine/probe_error/p95", None)
        metrics["time/actor_interval_s"] = now - self._began
        metrics["tokens/generated_per_s"] = generated / (now - self._began)
        if prompt > 0:
            metrics["engine/prefix_hit_share"] = (stats.cached_prompt_tokens - before.cached_prompt_tokens) / prompt
        metrics["engine/in_flight"] = float(stats.in_flight)
        metrics["actor/trees_in_flight"] = float(trees)
        metrics["actor/slots"] = float(slots)
        metrics |= self._weights.take_counts()
        metrics |= self._environments.take_counts()
        self._stats, self._began = stats, now
        return metrics
