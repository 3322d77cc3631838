"""The expansion strategy of a run, loaded by its name, and what it chooses, checked."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atpo_async.config import SearchConfig
from atpo_async.config.doors import STRATEGY
from atpo_async.core.texts import of_error, shortened
from atpo_async.core.tree import ROOT, TurnTree

Strategy = Callable[[TurnTree, int, np.random.Generator, SearchConfig], Sequence[int]]
"""``(tree, count, rng, settings) -> ids of up to count turns``: each gets one new sibling, one named twice gets two.

A pure function of its arguments: a tree that another actor takes over must come out the same.  ``ROOT`` stands for a
fresh chain from the prompt.
"""


class ExpansionFailed(Exception):
    """A strategy raised, or returned what cannot be branched at.

    Attributes:
        kind: what such faults with one cause have in common.
    """

    def __init__(self, detail: str, *, kind: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Expansion:
    """A strategy and the settings it is called with."""

    strategy: Strategy
    settings: SearchConfig

    @classmethod
    def of(cls, settings: SearchConfig) -> Expansion:
        """Raises ConfigError or SetupError where the strategy that the settings name cannot be loaded."""
        return cls(STRATEGY.load(settings.strategy, settings.strategy_options), settings)

    @property
    def setting(self) -> str:
        """What chose the strategy, for messages."""
        return f"search.strategy = {self.settings.strategy!r}"

    def choose(self, tree: TurnTree, *, count: int, rng: np.random.Generator) -> tuple[int, ...]:
        """The turns that each get one new sibling, at most ``count``.  Raises ExpansionFailed."""
        try:
            chosen = self.strategy(tree, count, rng, self.settings)
        except (Exception, SystemExit) as exc:
            raise ExpansionFailed(
                f"it failed on {_named(tree)}: {of_error(exc)}", kind=f"{type(exc).__name__} in the strategy"
            ) from exc
        return _checked(chosen, tree, count)


def _checked(chosen: Any, tree: TurnTree, count: int) -> tuple[int, ...]:
    if inspect.iscoroutine(chosen):
        chosen.close()  # Python would warn that it was never awaited
    try:
        turn_ids = tuple(operator.index(turn_id) for turn_id in chosen)
    except TypeError:
        raise ExpansionFailed(
            f"it returned {shortened(repr(chosen), 80)} for {_named(tree)}; expected a sequence of turn ids",
            kind="no turn ids from the strategy",
        ) from None
    unknown = [turn_id for turn_id in turn_ids if turn_id != ROOT and turn_id not in tree]
    if unknown:
        raise ExpansionFailed(
            f"it chose turn {unknown[0]}, which is not in {_named(tree)}; expected ids of its turns, or {ROOT} for the "
            "prompt",
            kind="unknown turn from the strategy",
        )
    if len(turn_ids) > count:
        raise ExpansionFailed(
            f"it chose {len(turn_ids)} turns of {_named(tree)}; expected at most search.branches = {count}",
            kind="too many turns from the strategy",
        )
    return turn_ids


def _named(tree: TurnTree) -> str:
    return f"tree {tree.tree_id} of {len(tree)} turns"
