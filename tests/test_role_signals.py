"""A first call lets a role end by itself, a second cancels it; its supervisor's end is one call that is told twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from signal import SIGINT, SIGTERM

import pytest

from atpo_async.ops.lifeline import Signals

Calls = list[Callable[[Signals], None]]


def interrupted(signals: Signals) -> None:
    signals.received(SIGINT)


def asked(signals: Signals) -> None:
    signals.received(SIGTERM)


def orphaned(signals: Signals) -> None:
    signals.supervisor_gone()


@pytest.mark.parametrize(
    ("calls", "cancelled"),
    [
        ([asked], 0),
        ([asked, asked], 1),
        ([interrupted, asked], 1),
        ([orphaned], 0),
        # The death signal and the thread that looks after the supervisor: whichever comes first.
        ([orphaned, asked], 0),
        ([asked, orphaned], 0),
        ([orphaned, asked, asked], 1),
        ([orphaned, interrupted], 1),
    ],
)
def test_a_second_call_cancels_unless_both_tell_the_supervisors_end(calls: Calls, cancelled: int) -> None:
    stopping, cuts = asyncio.Event(), list[int]()
    signals = Signals(stopping, cancel=lambda: cuts.append(1), log=logging.getLogger("test"))
    assert signals.first is None
    for call in calls:
        call(signals)
    assert stopping.is_set()
    assert len(cuts) == cancelled
    assert signals.first == (SIGINT if calls[0] is interrupted else SIGTERM)
