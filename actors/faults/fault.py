"""Why a chain was lost, and which error of several a user should read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atpo_async.core.errors import AtpoError

Place = Literal["chain", "branch"]
"""Whether a chain began at the prompt, or forks off another: a replay that always fails leaves the first ones alone."""

EXPANSION_FAILED = "expansion_failed"
"""Why branches are lost that the expansion strategy did not choose."""

ENGINE_FAILED = frozenset({"generate_timeout", "generate_failed", "score_timeout", "score_failed"})


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a chain was lost."""

    reason: str
    """What it is counted under: ``actor/failed/<reason>``."""
    kind: str
    """What faults with one cause have in common."""
    detail: str
    """One line: what, where, and the way out."""
    source: str = ""
    """The setting at fault; empty where it is the environment, or the engine."""

    @property
    def share(self) -> float:
        """Of a tree's chains in one place, how many must be lost to it for the tree to count as hit.

        A value of the wrong type is a slip in code that is always the same; a tool that raises may do so at random.
        """
        return 0.25 if self.kind.startswith("value of ") else 0.8


def first_of(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a user should read: the first error of ours, else the first at all."""
    flat: list[BaseException] = []

    def walk(group: BaseExceptionGroup[BaseException]) -> None:
        for exc in group.exceptions:
            if isinstance(exc, BaseExceptionGroup):
                walk(exc)
            else:
                flat.append(exc)

    walk(failures)
    return next((exc for exc in flat if isinstance(exc, AtpoError)), flat[0])
