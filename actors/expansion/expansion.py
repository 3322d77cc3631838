"""The expansion strategy of a run, loaded by its name, and what it chooses, checked."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actors.expansion.facts import Facts
from actors.expansion.growing_tree import GrowingTree, Tree
from actors.expansion.rise import chains_after
from actors.expansion.token_budget import affordable
from atpo_async.config import SearchConfig
from atpo_async.config.doors import strategy_door
from atpo_async.core.texts import of_error, shortened
from atpo_async.core.tree import ROOT, Turn

Strategy = Callable[..., Sequence[int]]
"""``(tree, count, rng, settings) -> ids of up to count turns``: each gets one new sibling, one named twice gets two.

A pure function of its arguments: a tree that another actor takes over must come out the same.  ``ROOT`` stands for a
fresh chain from the prompt.  One with a keyword ``facts`` is handed ``Facts``.
"""

Rule = Callable[..., Sequence[int]]
"""``(tree, turn_id, count, rng, settings) -> ids``: the turns after which up to ``count`` further chains begin, now
that the turn ``turn_id`` has ended; ``ROOT`` is the prompt.

A function of the turns up to this one (``GrowingTree``) alone; ``rng`` is the turn's own, the same at every call.
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
    """A strategy, or with ``search.expand = "online"`` a rule, and the settings it is called with."""

    strategy: Strategy | Rule
    settings: SearchConfig
    policy_tokens: int | None = None
    """As of ``Facts``."""

    @classmethod
    def of(cls, settings: SearchConfig, *, policy_tokens: int | None = None) -> Expansion:
        """Raises ConfigError or SetupError where the strategy that the settings name cannot be loaded."""
        door = strategy_door(settings.expand)
        return cls(door.load(settings.strategy, settings.strategy_options), settings, policy_tokens)

    @property
    def setting(self) -> str:
        """What chose the strategy, for messages."""
        return f"search.strategy = {self.settings.strategy!r}"

    @property
    def is_online(self) -> bool:
        return self.settings.expand == "online"

    @property
    def goes_on_from_states(self) -> bool:
        """Its ids are turns after which chains go on, all of which stop every few turns."""
        return self.settings.strategy == "resample"

    def facts(self, seed: int, tree: GrowingTree | None = None) -> Facts:
        """Of the tree whose lease has this seed; to be kept as long as the tree grows."""
        return Facts(seed=seed, policy_tokens=self.policy_tokens, tree=tree)

    def choose(
        self, tree: Tree, *, count: int, rng: np.random.Generator, facts: Facts | None = None, round_number: int = 1
    ) -> tuple[int, ...]:
        """The turns that each get one new sibling, at most ``count`` and within ``search.tree_tokens``.

        Raises ExpansionFailed.
        """
        known = replace(facts or self.facts(0), round=round_number)
        with _told(tree):
            chosen = self._called(known, tree, count, rng, self.settings)
            found = _checked(chosen, tree, count)
        limit = self.settings.tree_tokens
        return affordable(tree, found, limit=limit) if limit and not self.goes_on_from_states else found

    def decide(self, tree: GrowingTree, turn_id: int, *, count: int, facts: Facts) -> tuple[int, ...]:
        """The turns after which a further chain begins now that ``turn_id`` has ended.  Raises ExpansionFailed."""
        with _told(tree):
            rng = facts.rng(tree, turn_id)
            found = _checked(self._called(facts, tree, turn_id, count, rng, self.settings), tree, count)
        ended = [parent for parent in found if parent != ROOT and tree[parent].end != "continue"]
        if ended:
            raise ExpansionFailed(
                f"it began a chain after turn {ended[0]} of {_named(tree)}, which ended its own; expected turns that "
                "went on",
                kind="a chain that ended from the strategy",
            )
        return found

    def chains_after(self, probe: Sequence[Turn], facts: Facts) -> int:
        """By a first chain, how many chains the tree has (``search.probe_budget``).  Raises ExpansionFailed."""
        try:
            return chains_after(probe, self.settings, facts)
        except ValueError as exc:
            raise ExpansionFailed(str(exc), kind="no vocabulary") from exc

    def _called(self, facts: Facts, *args: Any) -> Any:
        return self.strategy(*args, facts=facts) if takes_facts(self.strategy) else self.strategy(*args)


@functools.lru_cache(maxsize=64)
def takes_facts(function: Callable[..., Any]) -> bool:
    try:
        return "facts" in inspect.signature(function).parameters
    except (ValueError, TypeError):
        return False


class _told:
    """Makes ExpansionFailed of whatever the strategy raises."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, Exception | SystemExit) and not isinstance(exc, ExpansionFailed):
            raise ExpansionFailed(
                f"it failed on {_named(self._tree)}: {of_error(exc)}", kind=f"{type(exc).__name__} in the strategy"
            ) from exc


def _checked(chosen: Any, tree: Tree, count: int) -> tuple[int, ...]:
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
            f"it chose {len(turn_ids)} turns of {_named(tree)}; expected at most {count}, as it was asked for",
            kind="too many turns from the strategy",
        )
    return turn_ids


def _named(tree: Tree) -> str:
    return f"tree {tree.tree_id} of {len(tree)} turns"
