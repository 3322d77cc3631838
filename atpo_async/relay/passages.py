"""Passes on what the peers of a relay and the buffer say to each other, each peer over a link of its own upstream.

A peer's sends keep their order and are acknowledged to it only once the buffer has acknowledged them.  Both windows are
bounded; a full one upstream holds up that peer alone.  A request without an answer from upstream gets none here: the
peer asks again while it waits.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from atpo_async.config import LinksConfig
from atpo_async.core.errors import BadMessage, PeerLost, SetupError
from atpo_async.links.client import RoutedClient
from atpo_async.links.keys import why_not_said
from atpo_async.links.parcels import NoAnswer, Parcel
from atpo_async.links.way import Way
from atpo_async.wire import codec
from atpo_async.wire.messages import ActorHello, BufferToActor, LeaseRequest, Leases, Refused, RelayHello, Welcome

log = logging.getLogger("atpo.relay")

ANSWER_S = 4.0
"""For upstream to answer a hello: less than a peer waits for it, so that none is passed on late for one that has asked
again."""
LEASES_S = 30.0
"""The same for a request for leases, which the buffer holds while there are none."""
MUTE_BEATS = 2
"""Heartbeats of silence of a peer after which this relay shows no sign of life for it either."""
GONE_BEATS = 30

Request = ActorHello | RelayHello | LeaseRequest


class Own(NamedTuple):
    """Where this relay's peers find the weights."""

    weights: str
    announce: str


class Passage:
    """The link upstream of one peer.

    Args:
        peer: its name, as this relay knows it.
        link: its own.
        own: what its answers say of the weights.
    """

    def __init__(self, peer: str, link: RoutedClient, own: Callable[[], Own]) -> None:
        self.peer, self.link = peer, link
        self.silent_s = 0.0
        self.known_as = ""
        """What the buffer calls it."""
        self.hello: ActorHello | RelayHello | None = None
        self.finished = False
        """It was told that the run is over."""
        self._ticket = ""
        self._own = own
        link.is_muted = lambda: not self.is_alive

    @property
    def is_alive(self) -> bool:
        """Whether its peer has shown a sign of life of late."""
        return self.silent_s <= MUTE_BEATS * self.link.settings.heartbeat_s

    async def send(self, frames: Sequence[codec.Buffer]) -> Parcel:
        """Waits for: a place in the window upstream.  Unblocked by: the buffer's acknowledgements."""
        parcel = Parcel()
        await self.link.pass_on(parcel, frames)
        return parcel

    async def ask(self, request: Request) -> Welcome | Leases | Refused:
        """Waits for: upstream's answer.  Raises NoAnswer if there is none in time."""
        try:
            answer = await self.link.request(
                request, timeout_s=LEASES_S if isinstance(request, LeaseRequest) else ANSWER_S
            )
        except PeerLost as exc:
            if self.link.failure is not None:
                raise
            raise NoAnswer from exc
        if isinstance(answer, Welcome):
            assert not isinstance(request, LeaseRequest)
            if not self.known_as:
                log.info("%s joins: the buffer calls it %s", self.peer, answer.name or "by its name")
            self.hello = request
            self._welcomed(answer)
            self.link.introduce_by(self._greeting, self._welcomed)
            return self._rewritten(answer)
        if isinstance(answer, Leases):
            return self._rewritten(answer)
        return answer if isinstance(answer, Refused) else Refused(reason=f"{type(answer).__name__} is no answer")

    def _greeting(self) -> ActorHello | RelayHello:
        assert self.hello is not None
        if isinstance(self.hello, RelayHello):
            return self.hello
        return msgspec.structs.replace(self.hello, continues=self.known_as, ticket=self._ticket)

    def _welcomed(self, welcome: Welcome) -> None:
        self.link.way.learn(welcome.way)
        if self.known_as and welcome.name != self.known_as:
            log.info("%s goes on: the buffer calls it %s now", self.peer, welcome.name)
        self.known_as, self._ticket = welcome.name, welcome.ticket

    def _rewritten(self, answer: Welcome | Leases) -> Welcome | Leases:
        """With this relay's own addresses in place of the learner's, and the way beyond it."""
        own = self._own()
        self.finished = self.finished or answer.finished
        changes: dict[str, Any] = {}
        if answer.weights_endpoint:
            changes = {"weights_endpoint": own.weights, "announce_endpoint": own.announce}
        if isinstance(answer, Welcome):
            changes["way"] = self.link.way.rest
        elif answer.shards:
            changes["shards"] = ()  # an actor may not reach what this relay does
        return msgspec.structs.replace(answer, **changes)


class Passages:
    """The passages of all peers of a relay.

    Args:
        name: of the relay.
        settings: of links.
        beside: the relay's own link upstream, whose threads they share.
        own: where this relay's weights are.
        introduced: what becomes of the hello of another relay on its way upstream.
        is_relay: whether the key of a peer is a relay's, as of ``Server.is_relay``.
    """

    def __init__(
        self,
        name: str,
        *,
        settings: LinksConfig,
        beside: RoutedClient,
        own: Callable[[], Own],
        introduced: Callable[[RelayHello], RelayHello | Refused],
        is_relay: Callable[[str], bool],
    ) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails with the loss of upstream for good."""
        self._name, self._settings = name, settings
        self._beside, self._own, self._introduced = beside, own, introduced
        self._is_relay = is_relay
        # It is the relay's own link that finds upstream lost, and ends the relay: those of peers that are silent hear
        # nothing either, and their silence says nothing of upstream.
        self._patient = settings.model_copy(update={"give_up_s": math.inf})
        self._by_peer: dict[str, Passage] = {}

    def __len__(self) -> int:
        return len(self._by_peer)

    def __iter__(self) -> Any:
        return iter(list(self._by_peer.values()))

    async def handle(self, peer: str, message: Any, frames: Sequence[codec.Buffer]) -> Any:
        """One message of a peer, as of ``Server``'s handler."""
        if self._settings.keys_dir is not None and (
            refusal := why_not_said(peer, is_relay=self._is_relay(peer), hello=isinstance(message, RelayHello))
        ):
            log.warning("refuses %s: %s", peer, refusal)
            return _refused(message, refusal)
        if isinstance(message, RelayHello):
            passed_on = self._introduced(message)
            if isinstance(passed_on, Refused):
                log.warning("refuses %s: %s", peer, passed_on.reason)
                return passed_on
            message = passed_on
        try:
            passage = await self._of(peer)
        except SetupError as exc:
            raise BadMessage(str(exc)) from None
        try:
            if isinstance(message, Request):
                return await passage.ask(message)
            return await passage.send(frames)
        except PeerLost as exc:
            if self._by_peer.get(peer) is not passage or not passage.is_alive:
                # The peer has gone, or has come another way and taken its name there: that concerns no other.
                if isinstance(message, Request):
                    raise NoAnswer from exc
                return await asyncio.Event().wait()
            # Not refused: a send that is refused is given up.  This relay ends, and its peers go past it.
            if not self.failed.done():
                self.failed.set_exception(exc)
            return await asyncio.Event().wait()

    async def _of(self, peer: str) -> Passage:
        """Raises SetupError if its name is too long."""
        found = self._by_peer.get(peer)
        former = None
        if found is not None and found.link.failure is not None and not found.link.stats.unacked:
            found, former = None, found  # its name was taken elsewhere, and the peer is back
        if found is None:
            # With keys the buffer puts the name of this relay's key before it.
            identity = peer if self._settings.keys_dir is not None else f"{self._name}/{peer}"
            current = self._beside.way.current
            link = RoutedClient(
                Way(current.endpoint, current.server_key), peer="buffer", identity=identity, receives=BufferToActor,
                settings=self._patient, beside=self._beside,
            )  # fmt: skip
            await link.__aenter__()  # does not suspend
            found = self._by_peer[peer] = Passage(peer, link, self._own)
            link.way.learn(self._beside.way.rest[1:])
        if former is not None:
            await former.link.close()
        return found

    async def look_after(self, silences: dict[str, float]) -> None:
        """Once a heartbeat: show no sign of life for peers that show none, and drop those that have gone."""
        for peer, passage in list(self._by_peer.items()):
            passage.silent_s = silences.get(peer, float("inf"))
            gone = passage.silent_s > GONE_BEATS * self._settings.heartbeat_s
            if gone and not passage.link.stats.unacked:
                log.info("%s has gone", peer)
                del self._by_peer[peer]
                await passage.link.close()

    async def close(self) -> None:
        for passage in self:
            await passage.link.close()
        self._by_peer.clear()
        if not self.failed.done():
            self.failed.cancel()


def _refused(message: Any, reason: str) -> Refused:
    """The answer to a request; a send is refused by raising BadMessage."""
    if isinstance(message, Request):
        return Refused(reason=reason)
    raise BadMessage(reason)
