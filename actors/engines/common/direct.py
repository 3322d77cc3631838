"""Copies a version's tensors straight into a model's parameters, where those hold them as they are in a file.

A parameter does so if it has the tensor's shape, or if it is a stack of several tensors along its rows; padding may lie
behind the last row.  Knows no engine: whether anything else is derived from a parameter is the engine's to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atpo_async.models.causal_lm import in_one_thread

PART_ELEMENTS = 1 << 24
"""Elements that are compared at a time: a GPU that generates has little memory left."""


class Placement(NamedTuple):
    """A parameter, and the tensors that are its rows, one after another."""

    name: str
    parameter: Tensor
    sources: tuple[str, ...]

    def rows(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(a part of the parameter, what belongs there), of ``PART_ELEMENTS`` at most."""
        begin = 0
        for source in self.sources:
            tensor = tensors[source]
            size = max(1, PART_ELEMENTS // max(1, tensor[:1].numel()))
            for given in (tensor[at : at + size] for at in range(0, len(tensor), size)):
                yield self.parameter[begin : begin + len(given)], given
                begin += len(given)


def placements(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[Placement]:
    """Of the parameters that stand under their own names, or as stacks (``packed_modules_mapping``)."""
    stacks: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    found = []
    for name, parameter in model.named_parameters():
        sources = [name]
        for stack, parts in stacks.items():
            if f".{stack}." in name:
                sources = [name.replace(f".{stack}.", f".{part}.") for part in parts]
        if any(source not in tensors for source in sources):
            continue
        given = [tensors[source] for source in sources]
        if parameter.dim() == 0 or any(t.shape[1:] != parameter.shape[1:] or t.dim() == 0 for t in given):
            continue
        if parameter.shape[0] >= sum(len(t) for t in given):
            found.append(Placement(name, parameter.data, tuple(sources)))
    return found


def uncovered(model: nn.Module, tensors: Mapping[str, Tensor], places: Iterable[Placement]) -> list[str]:
    """Parameters that get nothing, and tensors that go nowhere, tied ones aside: they are one with another tensor."""
    named, used = set[str](), set[str]()
    for place in places:
        named.add(place.name)
        used |= set(place.sources)
    at = {tensors[name].data_ptr() for name in used}
    left = [name for name, _ in model.named_parameters() if name not in named]
    return left + [name for name, tensor in tensors.items() if name not in used and tensor.data_ptr() not in at]


@torch.no_grad()
def copy_all(places: Iterable[Placement], tensors: Mapping[str, Tensor]) -> None:
    """On a GPU only started: what runs there next finds them.  ``tensors`` must stay until the device is done."""
    with in_one_thread():
        for place in places:
            begin = 0
            for source in place.sources:
                tensor = tensors[source]
                place.parameter[begin : begin + len(tensor)].copy_(tensor, non_blocking=True)
                begin += len(tensor)


def compare(places: Iterable[Placement], tensors: Mapping[str, Tensor]) -> tuple[set[str], set[str]]:
    """The parameters that are bit for bit what ``tensors`` say, and those that are not."""
    same: set[str] = set()
    other: set[str] = set()
    for place in places:
        is_same = all(_is(there, given) for there, given in place.rows(tensors))
        (same if is_same else other).add(place.name)
    return same, other


class SpotCheck:
    """Compares a part of the parameters after every load, another one each time, in turn.

    Args:
        elements: that are compared each time, about.
    """

    def __init__(self, elements: int) -> None:
        self._elements = elements
        self._next = 0

    def first_wrong(self, places: Sequence[Placement], tensors: Mapping[str, Tensor]) -> str | None:
        """The name of a parameter that is not what ``tensors`` say, among those whose turn it is."""
        parts = [(place, index) for place in places for index, _ in enumerate(place.rows(tensors))]
        left, wrong = self._elements, None
        for _ in range(len(parts)):
            place, index = parts[self._next % len(parts)]
            self._next = (self._next + 1) % len(parts)
            there, given = next(pair for i, pair in enumerate(place.rows(tensors)) if i == index)
            if wrong is None and not _is(there, given):
                wrong = place.name
            left -= given.numel()
            if left <= 0:
                break
        return wrong


def _is(there: Tensor, given: Tensor) -> bool:
    return torch.equal(_bits(there), _bits(given.to(there.device, there.dtype)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.element_size()])
