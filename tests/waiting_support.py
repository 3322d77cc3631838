"""Waiting for what a test brings about: each wait ends the test that would hang, none measures time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

LIMIT_S = 15.0
"""Far more than any test needs: it ends a test that would hang, it does not time one."""


async def until(condition: Callable[[], bool]) -> None:
    """Returns once a condition holds that is brought about on this loop."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110  (conditions on state that has no event)
            await asyncio.sleep(0.002)


async def within(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, LIMIT_S)
