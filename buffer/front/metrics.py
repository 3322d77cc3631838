"""The metrics of a batch of several shards, from those of its parts.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from buffer.front.messages import Part

MEAN_OF_READY = "buffer/priority_mean"
READY = "buffer/trees"
_MEANS, _LARGEST = ("buffer/commit_s/mean",), ("/max",)
"""Of shards each of which counts the same; and the endings of those of which the largest counts."""


def merged(parts: Sequence[Part]) -> dict[str, float]:
    """Sums, and means over all values that the parts' means are taken over."""
    names = {name: None for part in parts for name in part.metrics}
    return {name: _merged(name, [part for part in parts if name in part.metrics]) for name in names}


def _merged(name: str, parts: Sequence[Part]) -> float:
    if any(name in part.means for part in parts):
        return _mean(name, parts, [part.means for part in parts], name)
    if name == MEAN_OF_READY:
        return _mean(name, parts, [part.metrics for part in parts], READY)
    found = [part.metrics[name] for part in parts]
    if name.endswith(_LARGEST):
        return max(found)
    return sum(found) / len(found) if name in _MEANS else sum(found)


def _mean(name: str, parts: Sequence[Part], weights: Sequence[Mapping[str, float]], weight: str) -> float:
    total = sum(each.get(weight, 0.0) for each in weights)
    if not total:
        return 0.0
    return sum(part.metrics[name] * each.get(weight, 0.0) for part, each in zip(parts, weights, strict=True)) / total
