"""Every link cut, two seconds late, and made one-way: windows, acknowledgements and polls make up for all of it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from actors.weights.fetcher import WeightsFetcher
from atpo_async.config import LinksConfig, WeightsConfig
from atpo_async.core.errors import PeerLost
from atpo_async.links.announcements import Announcer, Listener
from atpo_async.links.client import Client
from atpo_async.links.server import Server
from atpo_async.wire.messages import ActorToLearner, LearnerToActor
from tests.fault_support import WAIT_S, Flow, Proxy, Recovery, Spawner, until_async
from tests.scene_support import Scene
from tests.test_actor_weights import PAYLOAD, FakeLearner

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")

LINKS = {"actors": "actor to buffer", "learner": "learner to buffer"}
DELAY_S = 2.0


def proxy_of(scene: Scene, link: str) -> Proxy:
    return scene.actors_proxy if link == "actors" else scene.learner_proxy


def way(proxy: Proxy, direction: str) -> Flow:
    return proxy.up if direction == "up" else proxy.down


def has_accepted(proxy: Proxy, goal: int) -> bool:
    return proxy.accepted >= goal


@pytest.mark.parametrize("link", LINKS)
async def test_a_cut_link_to_the_buffer_comes_back_and_nothing_is_lost(
    link: str, spawner: Spawner, tmp_path: Path
) -> None:
    fault = Recovery(f"the link {LINKS[link]} is cut", "both ends try again; what was not acknowledged is sent again")
    async with Scene(tmp_path / "run", spawner, proxied=True) as scene:
        scene.roles.start()
        await scene.stepped(2)
        proxy = proxy_of(scene, link)
        for _ in range(3):
            goal = proxy.accepted + 2
            proxy.cut()
            await until_async(functools.partial(has_accepted, proxy, goal), "the link to be tried again")
            proxy.restore()
            fault.over()
            await scene.recovered(fault)
        await scene.ended_well()


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("link", LINKS)
async def test_a_link_to_the_buffer_that_became_one_way_is_given_up_and_made_anew(
    link: str, direction: str, spawner: Spawner, tmp_path: Path
) -> None:
    silent = "from" if direction == "down" else "to"
    fault = Recovery(
        f"the link {LINKS[link]} is one-way: nothing comes {silent} the buffer",
        "the silent connection is given up after its heartbeats; a new one goes on where the acknowledgements ended",
    )
    async with Scene(tmp_path / "run", spawner, proxied=True) as scene:
        scene.roles.start()
        await scene.stepped(2)
        proxy = proxy_of(scene, link)
        tried = proxy.accepted
        way(proxy, direction).hold()
        await scene.until(lambda: proxy.accepted > tried, "the silent connection to be given up")
        way(proxy, direction).release()
        fault.over()
        await scene.recovered(fault)
        await scene.ended_well()


@pytest.mark.slow
async def test_links_to_the_buffer_that_are_two_seconds_late_are_slow_and_nothing_worse(
    spawner: Spawner, tmp_path: Path
) -> None:
    fault = Recovery(
        "both links to the buffer are late by 2 s each way", "slow, and nothing worse: no connection is given up for it"
    )
    # Heartbeats as by default: a round trip of four seconds is within three of them.
    sections = {"links": {"heartbeat_s": 2.0}}
    async with Scene(tmp_path / "run", spawner, proxied=True, sections=sections) as scene:
        scene.roles.start()
        await scene.stepped(2)
        proxies = (scene.actors_proxy, scene.learner_proxy)
        accepted = [proxy.accepted for proxy in proxies]
        for proxy in proxies:
            proxy.up.delay_s = proxy.down.delay_s = DELAY_S
        fault.over()
        await scene.recovered(fault)
        assert [proxy.accepted for proxy in proxies] == accepted
        for proxy in proxies:
            proxy.up.delay_s = proxy.down.delay_s = 0.0
        await scene.ended_well()


# --- weights ---------------------------------------------------------------------------------------------------


@dataclass
class Weights:
    """A learner's weights and announcements, and an actor's end of both, with proxies between."""

    learner: FakeLearner
    announcer: Announcer
    fetcher: WeightsFetcher
    pulling: Proxy
    hearing: Proxy

    async def publish(self, version: int) -> None:
        self.learner.version = version
        await self.announcer.publish(self.learner.announcement)

    async def taken(self, version: int) -> None:
        """The actor's loop, as far as weights go, until it has ``version``."""
        async with asyncio.timeout(WAIT_S):
            while self.fetcher.version < version:
                announced = await self.fetcher.next()
                if announced is None:
                    continue
                with contextlib.suppress(PeerLost):
                    weights = await self.fetcher.fetch(announced)
                    if weights is not None:
                        assert weights.path.read_bytes() == PAYLOAD.tobytes()


@pytest.fixture(params=[0.1])
async def weights(request: pytest.FixtureRequest) -> AsyncIterator[Weights]:
    learner = FakeLearner(1)
    links = LinksConfig(heartbeat_s=request.param, deadline_s=10.0, give_up_s=60.0)
    settings = WeightsConfig(chunk_bytes=4096, poll_s=0.5, fetch_timeout_s=30.0)

    async def answer(peer: str, message: Any) -> Any:
        return await learner.request(message, timeout_s=WAIT_S)

    any_port = "tcp://127.0.0.1:0"
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        server = await enter(Server(any_port, name="w", receives=ActorToLearner, handler=answer, settings=links))
        announcer = await enter(Announcer(any_port, settings=links))
        pulling, hearing = await enter(Proxy(server.endpoint)), await enter(Proxy(announcer.endpoint))
        client = await enter(
            Client(pulling.endpoint, peer="learner", identity="a", receives=LearnerToActor, settings=links)
        )
        listener = await enter(Listener(hearing.endpoint, receives=LearnerToActor, settings=links))
        fetcher = WeightsFetcher(run="r", client=client, listener=listener, settings=settings)
        try:
            yield Weights(learner, announcer, fetcher, pulling, hearing)
        finally:
            fetcher.close()


@pytest.mark.parametrize("link", ["pulling", "hearing"])
async def test_weights_are_taken_whole_after_their_link_was_cut(link: str, weights: Weights) -> None:
    what = "weights" if link == "pulling" else "announcements"
    fault = Recovery(
        f"the link for {what} is cut", "the next version is fetched whole, by the poll where no announcement was heard"
    )
    await weights.taken(1)
    proxy: Proxy = getattr(weights, link)
    tried = proxy.accepted
    proxy.cut()
    await weights.publish(2)
    await until_async(lambda: proxy.accepted > tried, "the link to be tried again")
    proxy.restore()
    fault.over()
    await weights.taken(2)
    fault.recovered()


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_weights_are_taken_after_their_links_were_one_way(direction: str, weights: Weights) -> None:
    fault = Recovery(
        f"both links for weights are one-way ({'nothing comes' if direction == 'down' else 'nothing goes out'})",
        "given up after their heartbeats and made anew; the next version is fetched whole",
    )
    await weights.taken(1)
    proxies = (weights.pulling, weights.hearing)
    tried = [proxy.accepted for proxy in proxies]
    for proxy in proxies:
        way(proxy, direction).hold()
    await weights.publish(2)
    # Announcements need no way back: their link stays as it is when only that is silent.
    found_out = 1 if direction == "up" else 2
    await until_async(
        lambda: all(p.accepted > before for p, before in zip(proxies[:found_out], tried, strict=False)),
        "the silent links to be given up",
    )
    for proxy in proxies:
        way(proxy, direction).release()
    fault.over()
    await weights.taken(2)
    fault.recovered()


@pytest.mark.slow
@pytest.mark.parametrize("weights", [2.0], indirect=True)
async def test_weights_two_seconds_late_are_taken_whole(weights: Weights) -> None:
    fault = Recovery("both links for weights are late by 2 s each way", "the version is taken whole, later")
    await weights.taken(1)
    for proxy in (weights.pulling, weights.hearing):
        proxy.up.delay_s = proxy.down.delay_s = DELAY_S
    fault.over()
    await weights.publish(2)
    await weights.taken(2)
    fault.recovered()
