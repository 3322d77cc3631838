"""What a mode of credit declares about itself: decorators that set marks on the function, and how they are read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

M = TypeVar("M", bound=Callable[..., Any])


def reads_ratio(mode: M) -> M:
    """Decorator: this value mode weighs turns by their ratios, so that the learner measures them before each batch."""
    mode.reads_ratio = True  # type: ignore[attr-defined]
    return mode


def reads_reference(mode: M) -> M:
    """Decorator: this mode reads ``arrays.reference``, how much likelier the policy makes each turn than the reference
    (the weights of ``model.path``) does, so that the learner measures it before each batch."""
    mode.reads_reference = True  # type: ignore[attr-defined]
    return mode


def needs_no_comparison(mode: M) -> M:
    """Decorator: under this advantage mode a tree whose chains all earned the same, and one of a single chain, has a
    signal too."""
    mode.needs_no_comparison = True  # type: ignore[attr-defined]
    return mode


def reads_tasks_rewards(option: str) -> Callable[[M], M]:
    """Decorator: the option ``option`` of this mode names a file of rewards by task (``config.credit_rule``); the mode
    is called with what is in it, a mapping of task index to rewards, in place of the name."""

    def mark(mode: M) -> M:
        mode.reads_tasks_rewards = option  # type: ignore[attr-defined]
        return mode

    return mark


Sums = Mapping[str, tuple[float, float]]
"""Name -> (sum, over how many): what a mode says of one tree, for metrics."""


def added(parts: Sequence[Sums], names: Sequence[str]) -> Sums:
    """What was said of several trees, or of the parts of one."""
    found = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: (sum(s for s, _ in each), sum(n for _, n in each)) for name, each in found.items()}


def logs(names: tuple[str, ...], measure: Callable[..., Sums]) -> Callable[[M], M]:
    """Decorator: ``measure``, called as the advantage mode is (its options too), says of each tree the numbers
    ``names``, whose means over the batch are logged as ``credit/NAME``."""

    def mark(mode: M) -> M:
        mode.logs = (names, measure)  # type: ignore[attr-defined]
        return mode

    return mark


def mark_of(mode: Callable[..., Any], mark: str, default: Any = None) -> Any:
    """A mark of a mode, whether options are bound to it or not."""
    return getattr(mode.func if isinstance(mode, functools.partial) else mode, mark, default)
