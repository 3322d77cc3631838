"""Which settings would save most memory on a GPU: each is tried in the estimate, and nothing is promised beyond it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atpo_async.config import Config
from atpo_async.models.memory.cards import Card, cards, fitting_share
from atpo_async.models.memory.parts import gb
from atpo_async.models.memory.settings import learner_memory
from atpo_async.models.memory.shape import ModelShape

MOST = 3
"""Settings that are named."""
LORA_RANK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One setting at another value."""

    setting: str
    value: str
    raw: Any
    saved: float
    """Bytes on that GPU, this setting alone; of an engine's share that is too small, those that it makes up for."""
    fits: bool
    """Whether it is enough by itself."""
    for_engine: bool = False
    """It leaves the engine more, on a card that has the space."""

    def sentence(self) -> str:
        """``--learner.optimizer adamw8bit saves 22.0 GB, and is enough``."""
        what = f"leaves the engine {gb(self.saved)} GB more" if self.for_engine else f"saves {gb(self.saved)} GB"
        return f"--{self.setting} {self.value} {what}{', and is enough' if self.fits else ''}"


def advice(
    config: Config, shape: ModelShape, card: Card, *, card_bytes: Mapping[int, float] | float, engine: str
) -> list[Advice]:
    """At most ``MOST`` settings that save memory on ``card``, the largest saving first."""
    found: dict[str, Advice] = {}
    # Where the card has the space and only the engine's share is too small, what else is saved does not help.
    share_alone = card.needed <= card.num_bytes
    absent = _absent(cards(config, shape, card_bytes=card_bytes, engine=engine))
    for setting, value in _candidates(config, shape, card):
        tried = _with(config, setting, value)
        if tried is None or (setting == "actor.tensor_parallel_size" and not isinstance(card_bytes, Mapping)):
            continue  # whether there is a second card like that is not known
        then = cards(tried, shape, card_bytes=card_bytes, engine=engine)
        if _absent(then) - absent:
            continue  # it would take a GPU that this machine lacks
        after = next(c for c in then if c.number == card.number)
        saved = card.missing - after.missing if share_alone else card.needed - after.needed
        one = Advice(
            setting=setting, value=_text(value), raw=value, saved=saved, fits=after.fits, for_engine=share_alone
        )
        best = found.get(setting)
        # Of several values of one setting: the first that is enough, else the one that saves most.
        if saved > 0 and (best is None or (not best.fits and saved > best.saved)):
            found[setting] = one
    return sorted(found.values(), key=lambda one: -one.saved)[:MOST]


def with_all(config: Config, tried: Sequence[Advice]) -> Config:
    """The configuration with every one of these settings."""
    for one in tried:
        config = _with(config, one.setting, one.raw) or config
    return config


def _absent(found: Sequence[Card]) -> set[int]:
    """Numbers of the GPUs that are used and not there."""
    return {card.number for card in found if not card.num_bytes}


def _candidates(config: Config, shape: ModelShape, card: Card) -> Iterator[tuple[str, Any]]:
    """(setting, value) to try, those that change least first; the trained result stays the same but for the last two
    of the learner."""
    learner = config.learner
    if any(role.startswith("learner") for role in card.roles):
        yield "learner.mixed_precision", "bf16"
        yield "learner.kernels", "liger"
        yield "learner.gradient_checkpointing", True
        tokens = learner.micro_batch_tokens // 2
        while tokens >= max(64, config.model.max_context_tokens):
            yield "learner.micro_batch_tokens", tokens
            tokens //= 2
        yield "learner.optimizer", "adamw8bit"
        if learner_memory(config, on_gpu=True).sharding != "parameters":  # there the learner refuses it
            yield "learner.optimizer", "offload"
        yield "learner.lora.rank", LORA_RANK
    if any(role.startswith("actor") for role in card.roles):
        yield from (("actor.gpu_memory_utilization", share) for share in _shares(config, shape, card))
        if not config.actor.gpus:
            yield "actor.tensor_parallel_size", 2 * config.actor.tensor_parallel_size
        yield "model.dtype", "bfloat16"
        seqs = config.actor.max_num_seqs // 2
        while seqs >= 8:
            yield "actor.max_num_seqs", seqs
            seqs //= 2
    elif config.learner.accelerate_config is not None and not learner.gpus:
        yield "learner.num_processes", 2 * learner.num_processes


def _shares(config: Config, shape: ModelShape, card: Card) -> list[float]:
    """Shares for the engine, in steps of 0.05: a larger one where it lacks some, else smaller ones to the least."""
    least = fitting_share(shape, config, card_bytes=card.num_bytes)
    if least is None:
        return []
    steps = range(round(20 * least), max(round(20 * least) + 1, int(20 * config.actor.gpu_memory_utilization)))
    return [step / 20 for step in reversed(steps)]


def _with(config: Config, dotted: str, value: Any) -> Config | None:
    """The configuration with one value changed; None where there is no such field, or it has that value."""
    *sections, name = dotted.split(".")
    chain: list[Any] = [config]
    for section in sections:
        if not hasattr(chain[-1], section):
            return None
        chain.append(getattr(chain[-1], section))
    if name not in type(chain[-1]).model_fields or getattr(chain[-1], name) == value:
        return None
    changed: Any = chain[-1].model_copy(update={name: value})
    for outer, section in zip(reversed(chain[:-1]), reversed(sections), strict=True):
        changed = outer.model_copy(update={section: changed})
    found: Config = changed
    return found


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
