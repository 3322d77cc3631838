"""Functions of a user under their time limits."""

from __future__ import annotations

from typing import Any

import pytest

from atpo_async.environments.tools import running


class Clock:
    """Reads what it is set to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(running, "time", made)
    return made


async def called(clock: Clock, takes_s: float) -> Any:
    async def holds_the_loop() -> str:
        clock.now += takes_s
        return "done"

    return await running.run(holds_the_loop, {}, is_async=True, limit_s=5.0, what="tool 'x'")


async def test_an_async_function_that_holds_the_loop_past_its_limit_counts_as_late_and_says_what_to_do(
    clock: Clock,
) -> None:
    with pytest.raises(running.HeldTheLoop) as caught:
        await called(clock, takes_s=5.0 + running.LATE_S + 0.1)
    assert "make it a plain function" in caught.value.advice


async def test_a_machine_that_is_a_little_late_costs_no_call(clock: Clock) -> None:
    assert await called(clock, takes_s=5.0 + running.LATE_S / 2) == "done"
