"""Which differences lead from one version to another, and why none does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from atpo_async.core.errors import AtpoError
from atpo_async.transports.deltas.codec import CODEC
from atpo_async.wire.messages import Difference


class NoChain(AtpoError):
    """A version is taken whole.

    Args:
        reason: in one word, counted under it.
        fact: for the log.
    """

    def __init__(self, reason: str, fact: str) -> None:
        super().__init__(fact)
        self.reason = reason


def steps_back(version: int, differences: Iterable[Difference]) -> tuple[Difference, ...]:
    """All differences that lead to ``version``, one from another's version to the next, in that order."""
    by_version = {each.version: each for each in differences}
    found: list[Difference] = []
    at = version
    # A difference that leads to an older version is none: the walk ends.
    while (each := by_version.get(at)) is not None and each.base < at:
        found.append(each)
        at = each.base
    return tuple(reversed(found))


def chain_from(
    base: int, digest: str, version: int, differences: Sequence[Difference], *, max_steps: int, total_bytes: int
) -> tuple[Difference, ...]:
    """The differences that lead from version ``base`` to ``version``, in order.

    Args:
        base: the version that is there.
        digest: of it as a whole.
        version: that is wanted.
        differences: that are offered.
        max_steps: as ``weights.max_chain``.
        total_bytes: of the wanted version: more than that is not worth fetching.

    Raises:
        NoChain: there is no such chain.
    """
    steps = steps_back(version, differences)
    begin = next((index for index, step in enumerate(steps) if step.base == base), None)
    if begin is None:
        raise NoChain("not_offered", f"no differences lead from version {base} to {version}")
    steps = steps[begin:]
    if steps[0].base_digest != digest:
        raise NoChain(
            "wrong_base", f"version {base} is {digest} here, the difference is to one of {steps[0].base_digest}"
        )
    if len(steps) > max_steps:
        raise NoChain("too_long", f"version {version} is {len(steps)} differences from {base}, over weights.max_chain")
    unknown = next((step.codec for step in steps if step.codec != CODEC), None)
    if unknown is not None:
        raise NoChain("unknown_codec", f"a difference to version {version} is in {unknown!r}, known is {CODEC!r}")
    if sum(step.nbytes for step in steps) >= total_bytes:
        raise NoChain("too_large", f"the differences to version {version} have more than its {total_bytes} bytes")
    return steps
