"""Users' samplers: made by name, tried before the run begins, and checked at every draw."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from atpo_async.config.doors import SAMPLING
from atpo_async.config.sections.data import BufferConfig
from atpo_async.core.errors import AtpoError, SetupError
from atpo_async.core.texts import of_error
from buffer.pool.sampler import F64, I64, Sampler

Result = TypeVar("Result")

_TRIED = 9
"""Trees of the trial before the run."""


class SamplerFault(AtpoError):
    """A sampler failed, or what it returned is no choice of trees; the message names the field of the configuration."""


def sampler_of(buffer: BufferConfig) -> Sampler:
    """The sampler that ``buffer.sampling`` names.

    Raises:
        ConfigError: there is none of that name, it does not take its options, or it lacks a method.
        SetupError: it cannot be imported or made, or what it draws in a trial is no choice of trees.
    """
    name = buffer.sampling

    def made() -> Sampler:
        found: Sampler = SAMPLING.make(name, buffer.priority_exponent, options=buffer.sampling_options)
        return found

    if ":" not in name:
        return made()
    try:
        _try(CheckedSampler(made(), name))
    except SamplerFault as exc:
        raise SetupError(f"{exc} (in a trial before the run)") from exc
    return CheckedSampler(made(), name)


def _try(sampler: Sampler) -> None:
    """Call every method of a sampler once.  Raises SamplerFault."""
    rng = np.random.default_rng(0)
    trees = np.arange(_TRIED)
    sampler.put(trees, trees / _TRIED)
    sampler.remove(trees[:2])
    sampler.put(trees[3:4], np.ones(1))
    sampler.probability(trees[2:])
    drawn, _ = sampler.draw(2, trees[4:5], rng)
    sampler.put(drawn, np.ones(len(drawn)))
    sampler.draw(3, trees[:0], rng)


class CheckedSampler:
    """A sampler whose every result is checked to be a valid choice of trees.

    Where ``put`` or ``remove`` fails, the next draw raises: no incoming turn is refused for a sampler's fault.

    Args:
        sampler: a user's.
        name: by which the configuration has it.
    """

    def __init__(self, sampler: Sampler, name: str) -> None:
        self._sampler = sampler
        self._name = name
        self._there: set[int] = set()
        self._failed: SamplerFault | None = None

    def put(self, trees: I64, priorities: F64) -> None:
        self._there.update(trees.tolist())
        with self._raised_later():
            self._called("put", lambda: self._sampler.put(trees.copy(), priorities.copy()))

    def remove(self, trees: I64) -> None:
        self._there.difference_update(trees.tolist())
        with self._raised_later():
            self._called("remove", lambda: self._sampler.remove(trees.copy()))

    @contextlib.contextmanager
    def _raised_later(self) -> Iterator[None]:
        try:
            yield
        except SamplerFault as exc:
            self._failed = self._failed or exc

    def probability(self, trees: I64) -> F64:
        found = self._called("probability", lambda: self._sampler.probability(trees.copy()))
        probability = self._probabilities("probability", found, len(trees))
        if len(trees) == len(self._there) and abs(total := float(probability.sum()) - 1) > 1e-6:
            raise self._fault("probability", f"has probabilities of all trees that sum to {1 + total:g}, not to 1")
        return probability

    def draw(self, count: int, first: I64, rng: np.random.Generator) -> tuple[I64, F64]:
        found = self._called("draw", lambda: self._sampler.draw(count, first.copy(), rng))
        if not (isinstance(found, tuple) and len(found) == 2):
            raise self._fault("draw", f"returned {type(found).__name__}, not (trees, probabilities)")
        trees = np.asarray(found[0])
        if trees.shape != (len(first) + count,) or trees.dtype.kind not in "iu":
            asked = f"{count} trees beside the {len(first)} that have to be drawn were asked for"
            raise self._fault("draw", f"drew {trees.dtype}{list(trees.shape)}, {asked}")
        drawn = trees.astype(np.int64)
        numbers = drawn.tolist()
        if unknown := set(numbers) - self._there:
            raise self._fault("draw", f"drew tree {min(unknown)}, which cannot be drawn")
        if len(set(numbers)) < len(numbers):
            twice = next(tree for tree in numbers if numbers.count(tree) > 1)
            raise self._fault("draw", f"drew tree {twice} twice")
        if numbers[: len(first)] != first.tolist():
            raise self._fault("draw", f"drew {numbers[: len(first)]} first, which had to be {first.tolist()}")
        probability = self._probabilities("draw", found[1], len(drawn))
        self._there.difference_update(numbers)
        return drawn, probability

    def _probabilities(self, method: str, found: object, count: int) -> F64:
        try:
            probability: F64 = np.asarray(found, dtype=np.float64)
        except (TypeError, ValueError):
            raise self._fault(method, f"has probabilities that are no numbers: {found!r}") from None
        if probability.shape != (count,):
            raise self._fault(method, f"has {list(probability.shape)} probabilities for {count} trees")
        bad = ~((probability > 0) & (probability <= 1 + 1e-9))  # nan too
        if bad.any():
            raise self._fault(method, f"has probability {probability[bad][0]:g}, which is not in (0, 1]")
        if (total := float(probability.sum())) > 1 + 1e-6:
            raise self._fault(method, f"has probabilities that sum to {total:g}, over 1, of different trees")
        return probability

    def _called(self, method: str, call: Callable[[], Result]) -> Result:
        if self._failed is not None:
            raise self._failed
        try:
            return call()
        except Exception as exc:
            raise self._fault(method, f"failed: {of_error(exc)}") from exc

    def _fault(self, method: str, what: str) -> SamplerFault:
        return SamplerFault(f"buffer.sampling = {self._name!r}: {method} {what}; see {SAMPLING.protocol}")
