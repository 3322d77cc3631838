"""The estimate in words: what each GPU of a configuration will hold, and what would help where that is too much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from atpo_async.models.memory.advice import Advice, advice, with_all
from atpo_async.models.memory.cards import Card, cards, machine_bytes
from atpo_async.models.memory.engine import WORKSPACE_BYTES, least_bytes, token_bytes, weight_bytes
from atpo_async.models.memory.parts import GB, gb, total
from atpo_async.models.memory.shape import ModelShape, shape_of
from atpo_async.models.sources import looks_like_hub_name

BUFFER_BYTES = 0.5 * GB
LEARNER_BYTES = 1.0 * GB
"""Of a learner's process without a model, on a CPU."""
ENGINE_BYTES = {"vllm": 2.9 * GB}
"""Of an actor's processes beside weights and keys, on a CPU; with another engine as a learner's."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is printed."""

    lines: tuple[str, ...]
    too_full: tuple[int, ...] = ()
    """Numbers of the GPUs that will not hold what is on them."""


def estimate(config: Config, *, gpus: Mapping[int, float] | float, engine: str) -> Estimate:
    """Of every GPU that the configuration uses.

    Args:
        gpus: bytes of each GPU by its number, or of every one.
        engine: the actors', ``auto`` resolved.
    """
    shape, why_not = _shape(config)
    if shape is None:
        return Estimate((f"memory: cannot be estimated: {why_not}",))
    found = _found(config, shape, gpus, engine)
    lines = [
        f"memory, estimated (1 GB = 2^30 bytes): {config.model.path}, {shape.parameters / 1e9:.2f} billion parameters "
        f"in {shape.layers} layers"
    ]
    for alike in _alike(found):
        lines += _lines_of(config, shape, alike)
        if not alike[0].fits:
            tried = advice(config, shape, alike[0], card_bytes=gpus, engine=engine)
            lines += [f"  would help: {one.sentence()}" for one in tried]
            lines += _together(config, shape, alike[0], tried, gpus=gpus, engine=engine)
    return Estimate(tuple(lines), tuple(card.number for card in found if not card.fits))


def at_the_start(config: Config, *, gpus: Mapping[int, float], engine: str) -> str | None:
    """One line about the fullest GPU of this machine; a warning, with what would help, where it will not fit.  None
    where no GPU is used or the model's size is not known."""
    shape, _ = _shape(config)
    found = [] if shape is None else _found(config, shape, gpus, engine)
    if shape is None or not found:
        return None
    fullest = max(found, key=lambda card: (card.missing, card.needed / card.num_bytes))
    text = f"memory, estimated: GPU {_who([fullest])}: {fullest.verdict()}"
    if fullest.fits:
        return text
    helps = [one.sentence() for one in advice(config, shape, fullest, card_bytes=gpus, engine=engine)]
    return "; ".join([f"warning: {text}", *helps, "`atpo doctor CONFIG` has the whole of it"])


def of_this_machine(config: Config, *, engine: str) -> tuple[str, float] | None:
    """(what a run on the CPU takes, in words; GB), or None where the model's size is not known before it is made.

    Weights, gradients, states and activations are counted; what processes take beside them is as it was measured.
    """
    shape, _ = _shape(config)
    if shape is None:
        return None
    learner = total(tuple(machine_bytes(config, shape))) + LEARNER_BYTES * config.learner.num_processes
    keys = config.actor.kv_cache_gb * GB if engine == "vllm" else 0.0
    actors = config.actor.count * (ENGINE_BYTES.get(engine, LEARNER_BYTES) + keys + weight_bytes(shape, config))
    whole = learner + actors + BUFFER_BYTES
    return f"about {gb(whole)} GB: learner {gb(learner)}, actors {gb(actors)}, buffer {gb(BUFFER_BYTES)}", whole / GB


def _found(config: Config, shape: ModelShape, gpus: Mapping[int, float] | float, engine: str) -> list[Card]:
    """Without GPUs that are not there: the check of the machine names those."""
    return [card for card in cards(config, shape, card_bytes=gpus, engine=engine) if card.num_bytes]


def _shape(config: Config) -> tuple[ModelShape | None, str]:
    """The model's shape, or why it is not known."""
    if not config.model.path:
        return None, "model.path is empty, and the policy of the warm start is made at the first start of a run"
    try:
        shape = shape_of(config.model.path)
    except SetupError as exc:
        return None, str(exc)
    name = config.model.path
    way_out = "; fetch it first (hf download)" if looks_like_hub_name(name) else "; name a model folder"
    return shape, f"model.path = {name!r} is neither here nor in the Hub's cache{way_out}"


def _alike(found: Sequence[Card]) -> list[list[Card]]:
    """Cards that hold the same amounts, together."""
    groups: dict[tuple[object, ...], list[Card]] = {}
    for card in found:
        key = (card.num_bytes, card.shortage, *(part.num_bytes for part in card.parts))
        groups.setdefault(key, []).append(card)
    return list(groups.values())


def _who(alike: Sequence[Card]) -> str:
    numbers = ", ".join(str(card.number) for card in alike)
    roles = ", ".join(role for card in alike for role in card.roles)
    return f"{numbers} ({roles})"


def _together(
    config: Config, shape: ModelShape, card: Card, tried: Sequence[Advice], *, gpus: Mapping[int, float] | float,
    engine: str,
) -> list[str]:  # fmt: skip
    """Whether all of the settings are enough, where no single one is."""
    if any(one.fits for one in tried):
        return []
    if not tried:
        return ["  no setting helps: take a smaller model, or a larger card"]
    then = cards(with_all(config, tried), shape, card_bytes=gpus, engine=engine)
    after = next(c for c in then if c.number == card.number)
    return [f"  all of these together: {after.verdict()}"]


def _lines_of(config: Config, shape: ModelShape, alike: Sequence[Card]) -> list[str]:
    card = alike[0]
    lines = [f"GPU {_who(alike)}: {card.verdict()}"]
    width = max((len(part.name) for part in card.parts), default=0)
    for part in card.parts:
        lines.append(f"  {part.name:{width}}  {gb(part.num_bytes):>6} GB")
    if any(part.name.startswith("engine") for part in card.parts):
        keys = config.model.max_context_tokens * token_bytes(shape, config)
        lines.append(
            f"  the engine needs {gb(least_bytes(shape, config))} GB at the least: weights "
            f"{gb(weight_bytes(shape, config))}, keys of one context of {config.model.max_context_tokens:,} tokens "
            f"{gb(keys)}, workspace {gb(WORKSPACE_BYTES)}"
        )
    return lines
