"""What the model of a fleet is told: shapes, rates and delays that can be measured, in seconds, tokens and bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from atpo_async.config import StalenessConfig
from benchmarks.slow_tool import draw_s


@dataclass(frozen=True, kw_only=True)
class Trees:
    """How a tree is grown: ``chains`` at once, and when all have ended, ``branches`` at once; ``rounds`` times."""

    chains: int
    branches: int
    rounds: int = 1
    chain_turns: tuple[int, ...]
    """Numbers of turns of initial chains, as observed; one is drawn for each chain."""
    branch_turns: tuple[int, ...] = (1,)
    """The same of branches: the turns after the fork."""
    action_tokens: float
    """Sampled tokens of a turn; drawn from an exponential distribution where ``exponential``, else always as many."""
    exponential: bool = False
    no_signal: float = 0.0
    """Share of trees whose chains all earn the same: they are no part of a batch."""

    @property
    def turns(self) -> float:
        """Expected turns of a tree."""
        mean = float(np.mean(self.chain_turns)), float(np.mean(self.branch_turns))
        return self.chains * mean[0] + self.rounds * self.branches * mean[1]

    def tokens(self, rng: np.random.Generator) -> float:
        return max(1.0, float(rng.exponential(self.action_tokens))) if self.exponential else self.action_tokens


@dataclass(frozen=True, kw_only=True)
class EngineRate:
    """How fast an engine samples with n requests in it: each gets a token every ``first_s + more_s * n`` seconds."""

    first_s: float
    more_s: float
    seats: int = 256
    """Requests that run at once; others wait."""
    request_s: float = 0.0
    """Of each request, whatever its length: its prompt, its way in and out."""

    def token_s(self, running: int) -> float:
        return self.first_s + self.more_s * running

    def tokens_per_s(self, running: int) -> float:
        return running / self.token_s(running)


@dataclass(frozen=True, kw_only=True)
class Tools:
    """A tool's log-normal latency, and what hosting adds to each turn."""

    latency_s: float = 0.0
    sigma: float = 1.0
    overhead_s: float = 0.0
    answers: bool = True
    """A chain's last turn asks no tool."""

    def wait_s(self, rng: np.random.Generator, *, last: bool) -> float:
        tool = 0.0 if last and self.answers else draw_s(rng, mean_s=self.latency_s, sigma=self.sigma)
        return self.overhead_s + tool


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A step, and the publication of its version."""

    step_s: float
    held_s: float = 0.0
    """Seconds after a step for which publishing holds the next one up (``weights/publish_s``)."""
    write_s: float = 0.0
    """Seconds from a step's end until its version is announced, beside the next step."""
    ask_s: float = 0.0
    """From asking for a batch that is there until it has it."""


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """One server, or several shards that share the turns evenly."""

    turn_s: float = 0.0
    """Service time of one turn in one shard."""
    commit_s: float = 0.0
    shards: int = 1


@dataclass(frozen=True, kw_only=True)
class Links:
    """The way of a version to the actors."""

    version_bytes: float = 0.0
    """What travels: of a delta, its bytes."""
    uplink: float = math.inf
    """Bytes a second that the learner's host sends, to all together."""
    downlink: float = math.inf
    """Bytes a second that an actor's host receives."""
    copies: int = 1
    """How many copies leave the learner: one a host, or one a relay."""
    hops: int = 1
    """Transfers one after another from the learner to an actor: 2 over one layer of relays."""
    verify_s: float = 0.0
    pause_s: float = 0.0
    """For which an engine stands still."""

    @property
    def delivery_s(self) -> float:
        """From the announcement to an engine that may take it up."""
        first = max(self.version_bytes * self.copies / self.uplink, self.version_bytes / self.downlink)
        return first + (self.hops - 1) * self.version_bytes / self.downlink + self.verify_s


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A run."""

    trees: Trees
    engine: EngineRate
    learner: Learner
    actors: int = 1
    slots: int = 8
    """Trees that an actor grows at once."""
    tools: Tools = field(default_factory=Tools)
    buffer: Buffer = field(default_factory=Buffer)
    links: Links = field(default_factory=Links)
    staleness: StalenessConfig = field(default_factory=StalenessConfig)

    def __post_init__(self) -> None:
        if self.actors < 1 or self.slots < 1:
            raise ValueError(f"a fleet needs actors and slots, got {self.actors} and {self.slots}")


@dataclass(frozen=True, kw_only=True)
class Known:
    """A parameter of a table: its value, and where it comes from."""

    what: str
    value: str
    kind: str
    """``measured``, ``derived`` from measured ones, or ``assumed``."""
    source: str


def table_of(known: Sequence[Known]) -> list[list[str]]:
    """Rows: what, value, kind, source."""
    return [[each.what, each.value, each.kind, each.source] for each in known]
