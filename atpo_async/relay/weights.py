"""Serves weights to the actors that joined through a relay: it follows the learner's announcements, and repeats them
once it has the version itself.

Who waits for whom: an actor's request waits for nothing, what is not here yet is not announced here; following waits
for an announcement from upstream, then for the version's bytes.  A version that does not fit on this host is announced
all the same, and each request for it is passed on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from atpo_async.config import LinksConfig, WeightsConfig
from atpo_async.core.errors import AtpoError, PeerLost
from atpo_async.links import ports
from atpo_async.links.announcements import Announcer, Listener
from atpo_async.links.client import Client
from atpo_async.links.parcels import NoAnswer
from atpo_async.links.server import Server
from atpo_async.relay.versions import DoesNotFit, RelayedVersions, none_yet
from atpo_async.status import waits
from atpo_async.wire import messages as m

log = logging.getLogger("atpo.relay")


class RelayedWeights:
    """The weights' sockets of a relay, towards the actors and towards upstream.

    Args:
        name: of the relay.
        links, weights: settings.
        folder: for the versions, as of ``RelayedVersions``.
        is_wanted: whether there are actors to fetch versions for.
    """

    def __init__(
        self,
        name: str,
        *,
        links: LinksConfig,
        weights: WeightsConfig,
        folder: Path | None,
        is_wanted: Callable[[], bool],
    ) -> None:
        self.versions: RelayedVersions | None = None
        """None until the run is known."""
        self.passed_on = 0
        """Requests that were passed on, because a version does not fit here."""
        self.rejected = 0
        self._name, self._links, self._settings, self._folder = name, links, weights, folder
        self._is_wanted = is_wanted
        self._run = ""
        self.server = Server(
            ports.to_bind(links, "weights"), name="relay", receives=m.ActorToLearner, handler=self._handle,
            settings=links, setting="links.weights_port",
        )  # fmt: skip
        self.announcer = Announcer(ports.to_bind(links, "announce"), settings=links, setting="links.announce_port")
        self._client = Client("", peer="learner", identity=name, receives=m.LearnerToActor, settings=links)
        self._listener = Listener("", receives=m.LearnerToActor, settings=links)
        self._stack = contextlib.AsyncExitStack()
        self._said = ""

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            for end in (self.server, self.announcer, self._client, self._listener):
                await stack.enter_async_context(end)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
        if self.versions is not None:
            self.versions.close()

    def look_at(self, run: str, weights_endpoint: str, announce_endpoint: str, server_key: str) -> None:
        """Where weights come from, now; the same again changes nothing."""
        if self.versions is None:
            self._run = run
            self.versions = RelayedVersions(run, self._settings, ask=self._ask, folder=self._folder)
        for end, endpoint in ((self._client, weights_endpoint), (self._listener, announce_endpoint)):
            if endpoint and endpoint != end.endpoint:
                log.info("weights come from %s now", endpoint)
                end.move(endpoint, server_key)

    async def follow(self) -> None:
        """Take every newer version.  Never returns.

        Waits for: an announcement, or the poll.  Unblocked by: the learner publishing.
        """
        while True:
            heard = await self._listener.next(timeout_s=self._settings.poll_s)
            while heard is not None and (later := await self._listener.next(timeout_s=0.0)) is not None:
                heard = later
            if self.versions is None or not self._is_wanted():
                continue
            if not isinstance(heard, m.WeightsAnnounced) or heard.run != self._run:
                heard = await self._newest()
            if heard is not None and not self.versions.holds(heard):
                await self._take(self.versions, heard)

    async def _newest(self) -> m.WeightsAnnounced | None:
        with contextlib.suppress(PeerLost):
            answer = await self._client.request(
                m.AnnouncementRequest(run=self._run), timeout_s=self._settings.poll_s * 2
            )
            if isinstance(answer, m.WeightsAnnounced) and answer.run == self._run:
                return answer
        return None

    async def _take(self, versions: RelayedVersions, announced: m.WeightsAnnounced) -> None:
        try:
            with waits.waiting(f"relay {self._name}", f"the bytes of version {announced.version}", on="learner"):
                mine = await versions.take(announced)
        except DoesNotFit as exc:
            self._say(str(exc))
            mine = msgspec.structs.replace(announced, shm_path=None)
        except AtpoError as exc:
            self.rejected += 1
            self._say(f"version {announced.version} was not taken, it is fetched again: {exc}")
            return
        if mine is not None:
            await self.announcer.publish(mine)

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            log.error("%s", text)

    async def _handle(self, peer: str, request: m.ActorToLearner) -> m.LearnerToActor:
        if self.versions is None:
            return none_yet(request)
        if not self.versions.does_not_fit:
            return self.versions.answer(request)
        self.passed_on += 1
        try:
            answer = await self._ask(request)
        except PeerLost:
            raise NoAnswer from None
        if isinstance(answer, m.WeightsAnnounced):
            return msgspec.structs.replace(answer, shm_path=None)
        return answer

    async def _ask(self, request: m.ActorToLearner) -> m.LearnerToActor:
        answer: m.LearnerToActor = await self._client.request(request, timeout_s=self._settings.fetch_timeout_s)
        return answer
