"""Who is on which GPU, what they take together, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from atpo_async.config import Config
from atpo_async.models.memory.engine import engine_parts, least_bytes
from atpo_async.models.memory.learner import learner_parts
from atpo_async.models.memory.parts import Part, gb, total
from atpo_async.models.memory.settings import learner_memory
from atpo_async.models.memory.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU and what is on it."""

    number: int
    num_bytes: float
    parts: tuple[Part, ...]
    roles: tuple[str, ...]
    shortage: float = 0.0
    """Bytes by which an engine's share is below what it needs to start."""

    @property
    def needed(self) -> float:
        """Bytes of all parts."""
        return total(self.parts)

    @property
    def missing(self) -> float:
        """Bytes that are too few: on the card, or in an engine's share of it; 0 where all fits."""
        return max(0.0, self.needed + self.shortage - self.num_bytes, self.shortage)

    @property
    def fits(self) -> bool:
        return self.missing == 0

    def verdict(self) -> str:
        """One line: what is needed of what there is, and whether that fits."""
        of = f"about {gb(self.needed)} GB of {gb(self.num_bytes)} GB"
        if self.fits:
            return f"{of}, {gb(self.num_bytes - self.needed)} GB to spare"
        if self.needed <= self.num_bytes:
            return f"{of}, but the engine's share will not do: it lacks {gb(self.shortage)} GB for weights and keys"
        lacks = f"; the engine's share lacks {gb(self.shortage)} GB besides" if self.shortage else ""
        return f"{of}: will not fit, {gb(self.needed - self.num_bytes)} GB too much{lacks}"


def cards(config: Config, shape: ModelShape, *, card_bytes: Mapping[int, float] | float, engine: str) -> list[Card]:
    """Every GPU that the configuration uses, in order.

    Args:
        config: resolved; a role whose device is ``cpu`` is on no GPU.
        card_bytes: of each GPU by its number, or of every one.
        engine: the actors', ``auto`` resolved.
    """
    placed = places(config)
    found = []
    for number in sorted({gpu for _, gpus in placed for gpu in gpus}):
        size = card_bytes if isinstance(card_bytes, int | float) else card_bytes.get(number, 0.0)
        roles = tuple(role for role, gpus in placed if number in gpus)
        found.append(_card(config, shape, number=number, size=float(size), roles=roles, engine=engine))
    return found


def places(config: Config) -> list[tuple[str, tuple[int, ...]]]:
    """(role, the GPUs it is on), as the launcher shows them to it: a role without numbers sees all from 0 on."""
    learner, actor = config.learner, config.actor
    found: list[tuple[str, tuple[int, ...]]] = []
    if learner.device != "cpu":
        found += [
            (f"learner rank {i}", (learner.gpus[i] if learner.gpus else i,)) for i in range(learner.num_processes)
        ]
    if actor.device != "cpu":
        each = actor.tensor_parallel_size
        for i in range(actor.count):
            found.append((f"actor {i}", actor.gpus[i * each : (i + 1) * each] or tuple(range(each))))
    return found


def _card(config: Config, shape: ModelShape, *, number: int, size: float, roles: tuple[str, ...], engine: str) -> Card:
    parts: list[Part] = []
    shortage = 0.0
    for role in roles:
        if role.startswith("actor"):
            parts += engine_parts(shape, config, engine=engine, card_bytes=size, actor=int(role.split()[-1]))
            if engine != "transformers":
                shortage = max(0.0, least_bytes(shape, config) - config.actor.gpu_memory_utilization * size)
    for _ in [role for role in roles if role.startswith("learner")]:
        parts = [*_of_learner(config, shape, size=size, free=size - total(tuple(parts))), *parts]
    return Card(number=number, num_bytes=size, parts=tuple(parts), roles=roles, shortage=shortage)


def _of_learner(config: Config, shape: ModelShape, *, size: float, free: float) -> list[Part]:
    """A rank beside what else is on its GPU; ``auto`` checkpoints all layers where otherwise they would not fit."""
    memory = learner_memory(config, on_gpu=True)
    whole = learner_parts(shape, memory, checkpointed=memory.checkpointing is True, card_bytes=size)
    if memory.checkpointing != "auto" or total(tuple(whole)) <= free:
        return whole
    return learner_parts(shape, memory, checkpointed=True, card_bytes=size)


def fitting_share(shape: ModelShape, config: Config, *, card_bytes: float, contexts: int = 8) -> float | None:
    """The least ``actor.gpu_memory_utilization``, in steps of 0.05, for so many full contexts; None: above the card."""
    share = math.ceil(20 * least_bytes(shape, config, contexts=contexts) / card_bytes) / 20
    return share if share < 1 else None


def machine_bytes(config: Config, shape: ModelShape) -> list[Part]:
    """What the learner takes of a machine's own memory where it trains on the CPU: no allocator, no activations of a
    kernel's choice; every rank lies in the same memory."""
    memory = learner_memory(config, on_gpu=False)
    parts = learner_parts(shape, memory, checkpointed=memory.checkpointing is True)
    return [Part(part.name, part.num_bytes * memory.ranks) for part in parts]
