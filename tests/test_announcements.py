"""Announcements: who listens hears them, silence is none."""

from __future__ import annotations

import asyncio

from atpo_async.links.announcements import Announcer, Listener
from atpo_async.wire import messages as m
from tests.links_support import ANY_PORT, FAST
from tests.waiting_support import LIMIT_S


def announced(version: int) -> m.WeightsAnnounced:
    return m.WeightsAnnounced(run="r", version=version, total_bytes=1, digest="", host_id="h", shm_path=None)


async def _hear_one(announcer: Announcer, listener: Listener) -> m.WeightsAnnounced:
    """Announce until the subscription has arrived."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            await announcer.publish(announced(1))
            if (heard := await listener.next(timeout_s=0.02)) is not None:
                assert isinstance(heard, m.WeightsAnnounced)
                return heard


async def test_announcements_reach_a_listener_and_silence_is_none() -> None:
    async with (
        Announcer(ANY_PORT, settings=FAST) as announcer,
        Listener(announcer.endpoint, receives=m.WeightsAnnounced, settings=FAST) as listener,
    ):
        assert (await _hear_one(announcer, listener)).version == 1
        while await listener.next(timeout_s=0.02) is not None:
            pass
        await announcer.publish(announced(2))
        await announcer.publish(announced(3))
        heard = [await listener.next(timeout_s=LIMIT_S) for _ in range(2)]
        assert [h.version for h in heard] == [2, 3]
        await announcer.publish(m.RunFinished(run="r"))
        await announcer.publish(announced(4))
        assert (await listener.next(timeout_s=LIMIT_S)).version == 4
        assert listener.bad_messages == 1
