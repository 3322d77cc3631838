"""Fleets of GPUs: the parameters of the model for them, each with its source, and how a number of GPUs is divided.

One shape is measured on an H100, Qwen3-0.6B's; what was not measured is said to be assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from atpo_async.config import StalenessConfig
from benchmarks.model_parts.parameters import Buffer, EngineRate, Fleet, Known, Learner, Links, Tools, Trees

SEATS = 128
TOKENS_PER_S = 12_000.0
"""Of one engine with ``SEATS`` requests in it."""
ALONE_S = 4e-3
"""Seconds a token of a request that is alone in its engine."""
STEP_S, STEP_TREES = 6.45, 16
"""One H100 trains on so many trees in so many seconds."""
EFFICIENCY = 0.9
"""Of several learner ranks, of each."""
WRITE_S, FETCH_S, PAUSE_S = 2.85, 1.4, 0.6
VERSION_BYTES = 1.19e9
DELTA_SHARE = 0.1
HOST_BYTES_PER_S = 3.1e9
GPUS_PER_HOST = 8
TURNS_PER_S = 29_000.0
"""That one buffer takes."""
COMMIT_S = 3.1e-3
MOST_TREES = 64
"""That an actor grows at once."""

BATCHES = {8: 64, 64: 256, 512: 1024}
"""GPUs -> trees of a batch."""

KNOWN: tuple[Known, ...] = (
    Known(
        what="engine, one GPU", kind="measured", source="H100, a run of this project, engine and learner on one card",
        value=f"{TOKENS_PER_S:,.0f} tokens/s with {SEATS} requests in flight",
    ),
    Known(
        what="engine, one request alone", kind="assumed", source="no measurement; engines are full where it matters",
        value=f"{1e3 * ALONE_S:g} ms a token, linear in between",
    ),
    Known(
        what="learner step, one GPU", kind="measured", source="H100, benchmarks/learner.py, 203,000 tokens, 12 % MFU",
        value=f"{STEP_S} s for {STEP_TREES} trees of 12 leaves × 4 turns",
    ),
    Known(
        what="several learner ranks", kind="assumed", source="no measurement",
        value=f"{EFFICIENCY:g} of as many single ones",
    ),
    Known(
        what="tree", kind="derived", source="the trees of that measurement: 12.7 thousand tokens each",
        value="6 chains of 4 turns and 6 branches of 1 to 4; 128 sampled tokens a turn on average, exponential",
    ),
    Known(what="trees without a signal", kind="assumed", source="the demo's task: 0.1 to 0.6", value="0.2"),
    Known(
        what="a version until it is announced", kind="measured", source="H100, bf16; beside the next step",
        value=f"{WRITE_S} s",
    ),
    Known(what="to fetch and verify it", kind="measured", source="H100, same host", value=f"{FETCH_S} s"),
    Known(what="engine's pause for it", kind="measured", source="H100: 0.4 to 0.8 s", value=f"{PAUSE_S} s"),
    Known(
        what="bytes of a version", kind="measured", source="0.6B's shape in bf16",
        value=f"{VERSION_BYTES / 1e9:.2f} GB; a difference {DELTA_SHARE:g} of it at the most",
    ),
    Known(
        what="network of a host", kind="assumed", source="25 Gbit/s Ethernet",
        value=f"{HOST_BYTES_PER_S / 1e9:g} GB/s for {GPUS_PER_HOST} GPUs; one copy a host",
    ),
    Known(
        what="one buffer", kind="measured", source="benchmarks/transport.py: turns of 4 KB, two cores, durable",
        value=f"{TURNS_PER_S:,.0f} turns/s, {1e3 * COMMIT_S:g} ms until committed",
    ),
    Known(
        what="tool", kind="assumed", source="0.3 s as in benchmarks/async_speedup.py; 3 s: a sandbox",
        value="log-normal, sigma 1, mean 0.3 or 3 s; a chain's last turn asks none",
    ),
    Known(
        what="trees of a batch", kind="assumed", source="choice",
        value=", ".join(f"{trees} with {gpus} GPUs" for gpus, trees in BATCHES.items()),
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A number of GPUs, divided."""

    gpus: int
    learner: int
    max_lag: int
    latency_s: float = 0.3
    shards: int = 1
    deltas: bool = True
    """Versions travel as differences."""
    publish_every: int = 1

    @property
    def actors(self) -> int:
        return self.gpus - self.learner

    @property
    def trees(self) -> int:
        """Of a batch."""
        return BATCHES[self.gpus]


def engine() -> EngineRate:
    return EngineRate(first_s=ALONE_S, more_s=(SEATS / TOKENS_PER_S - ALONE_S) / SEATS, seats=SEATS)


def trees() -> Trees:
    return Trees(
        chains=6, branches=6, chain_turns=(4,), branch_turns=(1, 2, 3, 4), action_tokens=128.0, exponential=True,
        no_signal=0.2,
    )  # fmt: skip


def step_s(plan: Plan) -> float:
    ranks = plan.learner * (EFFICIENCY if plan.learner > 1 else 1.0)
    return STEP_S * plan.trees / STEP_TREES / ranks


def fleet(plan: Plan) -> Fleet:
    """The model of a plan.  Raises ValueError where a role has no GPU."""
    if not 1 <= plan.learner < plan.gpus:
        raise ValueError(f"{plan.learner} of {plan.gpus} GPUs for the learner leave none for the learner or actors")
    pending = plan.trees * (plan.max_lag + 1)
    hosts = math.ceil(plan.actors / GPUS_PER_HOST)
    return Fleet(
        trees=trees(), engine=engine(), actors=plan.actors,
        slots=max(1, min(MOST_TREES, math.ceil(pending / plan.actors))),
        tools=Tools(latency_s=plan.latency_s),
        buffer=Buffer(turn_s=1 / TURNS_PER_S, commit_s=COMMIT_S, shards=plan.shards),
        learner=Learner(step_s=step_s(plan), write_s=WRITE_S),
        links=Links(
            version_bytes=VERSION_BYTES * (DELTA_SHARE if plan.deltas else 1.0), uplink=HOST_BYTES_PER_S,
            downlink=HOST_BYTES_PER_S, copies=hosts, verify_s=FETCH_S, pause_s=PAUSE_S,
        ),
        staleness=StalenessConfig(
            trees_per_batch=plan.trees, max_lag=plan.max_lag, publish_every=plan.publish_every
        ),
    )  # fmt: skip


def balance(plan: Plan) -> float:
    """Learner GPUs at which full engines and a busy learner make as much: a first guess, without any waits."""
    sampled = plan.trees / (1 - trees().no_signal) * trees().turns * trees().action_tokens
    # l ranks: step = STEP * B / 16 / (0.9 l); actors: sampled / (rate * (G - l)).
    learning, sampling = STEP_S * plan.trees / STEP_TREES / EFFICIENCY, sampled / TOKENS_PER_S
    return plan.gpus * learning / (learning + sampling)


def splits(plan: Plan, shares: Sequence[float] = (0.5, 0.75, 1.0, 1.25)) -> list[Plan]:
    """Plans with other numbers of learner GPUs, around ``balance``."""
    guess = balance(plan)
    found = sorted({min(max(round(guess * share), 1), plan.gpus - 1) for share in shares})
    return [replace(plan, learner=each) for each in found]
