"""Checks what a user's own part of the loss returns; the errors name the field, the value and where it went wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from atpo_async.core.doors import Door
from atpo_async.core.errors import AtpoError, ConfigError
from atpo_async.core.texts import of_error, of_type

T = TypeVar("T")


class Returned:
    """Checks the results of a function that a door loaded; the errors name its field."""

    def __init__(self, door: Door[Any], name: str) -> None:
        self._door = door
        self._name = name

    def fault(self, what: str) -> ConfigError:
        return ConfigError(f"{self._door.field} = {self._name!r} {what}; see {self._door.protocol}")

    def checked(self, kind: type[T], call: Callable[[], object]) -> T:
        """The result of ``call``, checked to be of ``kind``."""
        try:
            found = call()
        except AtpoError:
            raise
        except Exception as exc:
            raise self.fault(f"failed: {of_error(exc)}{_where(exc)}") from exc
        if not isinstance(found, kind):
            raise self.fault(f"returned {of_type(found)}: it must return {kind.__name__}")
        return found

    def check_metrics(
        self, metrics: Mapping[str, object], declared: tuple[str, ...], traits: str, shape: torch.Size
    ) -> None:
        """Metrics by name, of ``shape`` each: those that ``traits`` declare, whatever the pass."""
        if tuple(sorted(metrics)) != declared:
            raise self.fault(
                f"returned the metrics {sorted(metrics)} and declares {list(declared)} ({traits}.metrics): every pass "
                "must return those it declares"
            )
        for name, values in metrics.items():
            self.check_number(f"metrics[{name!r}]", values, shape)

    def check_number(self, what: str, values: object, shape: torch.Size) -> None:
        if not (isinstance(values, Tensor) and values.is_floating_point() and values.shape == shape):
            raise self.fault(f"returned for {what} {_described(values)}: it must be float{list(shape)}")

    def check_truth(self, what: str, values: object, shape: torch.Size) -> None:
        if not (isinstance(values, Tensor) and values.dtype == torch.bool and values.shape == shape):
            raise self.fault(f"returned for {what} {_described(values)}: it must be bool{list(shape)}")

    def check_finite(self, what: str, values: Tensor, inputs: Mapping[str, Tensor]) -> None:
        """Where every input is finite, so must be the output."""
        fine = functools.reduce(torch.logical_and, (given.isfinite() for given in inputs.values()))
        bad = fine & ~values.isfinite()
        if bool(bad.any()):
            at = int(bad.reshape(-1).nonzero()[0])
            given = ", ".join(f"{name} {_at(tensor, at)}" for name, tensor in inputs.items())
            raise self.fault(
                f"returned for {what} {_at(values, at)} at place {at} of {values.numel()} ({given}): it must be finite "
                "where what it is computed from is"
            )


def _at(values: Tensor, place: int) -> str:
    return f"{float(values.detach().reshape(-1)[place]):g}"


def _described(values: object) -> str:
    if not isinstance(values, Tensor):
        return of_type(values)
    return f"{str(values.dtype).removeprefix('torch.')}{list(values.shape)}"


def _where(error: BaseException) -> str:
    """The line that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
