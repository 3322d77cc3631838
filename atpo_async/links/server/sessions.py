"""A server's clients: one session for each life of a client, and which one is evicted when there are too many."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from atpo_async.config import LinksConfig
from atpo_async.links.frames import FULL, ID_SEPARATOR, REPLACED, worth_a_line
from atpo_async.links.parcels import Parcel
from atpo_async.links.server.handling import BadMessages, Frames
from atpo_async.wire import codec

log = logging.getLogger("atpo.links")


@dataclass(slots=True, eq=False)
class Work:
    """A handler at work, or waiting for its turn: for the log."""

    what: str
    since: float
    reported_s: float = 0.0
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class ReceivedSends:
    """Positions in the sends of one client: base <= settled <= handled <= expected."""

    base: int = 0
    """The client knows that those below are handled."""
    settled: int = 0
    handled: int = 0
    expected: int | None = None
    """The next one; None until the client has announced its position."""
    queue: deque[tuple[Any, Frames]] = field(default_factory=deque)
    """Sends that wait for the handler, each with its frames; BadMessage in place of one that could not be read."""
    queued_bytes: int = 0
    before: tuple[ReceivedSends, ...] = ()
    """Of earlier lives of the client, oldest first: those with a queue that was not handled yet at the last look."""
    begun: Any = None
    """What the handler's first attempt on the queue's first message came to: an awaitable, or its exception."""
    passed_on: deque[tuple[int, Parcel]] = field(default_factory=deque)
    """Number -> what has not arrived where the handler passed it on to, in order."""
    refusals: dict[int, str] = field(default_factory=dict)
    """Number -> reason, until the client knows of it."""
    worker: asyncio.Task[None] | None = None
    """Handles the queue while there is one."""
    work: Work | None = None
    due: bool = False
    """An acknowledgement is about to be sent."""

    def earlier(self) -> tuple[int, int]:
        """Sends of earlier lives that wait for the handler, and their bytes."""
        self.before = tuple(sends for sends in self.before if sends.queue)
        return sum(len(sends.queue) for sends in self.before), sum(sends.queued_bytes for sends in self.before)


@dataclass(slots=True, eq=False)
class OpenRequests:
    """Requests of one client that are being worked on, or wait for it."""

    work: dict[int, Work] = field(default_factory=dict)
    """Of all of them."""
    waiting: deque[tuple[int, Any, Frames]] = field(default_factory=deque)
    """Those whose turn comes when earlier replies have left."""
    waiting_bytes: int = 0


@dataclass(slots=True, eq=False)
class RecentReplies:
    """Replies to one client, until it confirms that it has them."""

    frames: OrderedDict[int, list[codec.Buffer]] = field(default_factory=OrderedDict)
    nbytes: int = 0
    unsent: deque[int] = field(default_factory=deque)
    """Requests whose replies wait until the outbox has space."""
    largest: int = 0
    """Bytes; halves with every smaller one."""


@dataclass(slots=True, eq=False)
class Session:
    """One life of one client."""

    routing_id: bytes
    owner: str
    """The name of its key; empty without keys."""
    name: str
    """What handlers and logs call it."""
    nonce: int
    heard_at: float
    useful: bool = False
    """It has sent something that the handler took."""
    sends: ReceivedSends = field(default_factory=ReceivedSends)
    requests: OpenRequests = field(default_factory=OpenRequests)
    replies: RecentReplies = field(default_factory=RecentReplies)

    @property
    def idle(self) -> bool:
        """Nothing of it is being worked on or left to acknowledge."""
        sends = self.sends
        return sends.worker is None and sends.settled == sends.handled and not self.requests.work

    @property
    def all_work(self) -> Iterator[Work]:
        if self.sends.work is not None:
            yield self.sends.work
        yield from self.requests.work.values()


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """A client as its server sees it."""

    identity: str
    """Its name; with keys the name of its key before it, ``gpu-7/actor-0``."""
    silent_s: float
    """Since its last sign of life."""
    queued: int
    """Sends taken and not handled yet."""
    unsettled: int
    """Sends handled and not settled yet; see ``Server``'s ``settled``."""
    requests: int
    """Requests being worked on."""

    @classmethod
    def of(cls, session: Session, now: float) -> PeerInfo:
        return cls(
            identity=session.name,
            silent_s=now - session.heard_at,
            queued=len(session.sends.queue),
            unsettled=session.sends.handled - session.sends.settled,
            requests=len(session.requests.work),
        )


MAX_PEERS = 4096
MAX_PEERS_OF_A_KEY = 1024
"""Limits the clients of one key, so that one host cannot fill the table."""
GONE_BEATS = 5
"""Heartbeats without a sign of life after which a client may be evicted for another, where the table is full."""


class Admission(NamedTuple):
    """Whether a newcomer is taken into the table of clients."""

    evicted: Session | None
    """The session that is evicted for it."""
    refusal: str
    """Why it is not taken; empty where it is."""


def admission(
    sessions: Iterable[Session], owner: str, *, now: float, heartbeat_s: float, most: int | None = None
) -> Admission:
    """Whether one more client is admitted, and which one is evicted for it.  Pure.

    Those that never sent anything of use go first, the oldest of them; then those that have been silent for longer than
    any client of ours is, the longest silent first.

    Args:
        sessions: oldest first.
        owner: the newcomer's key; empty without keys.
        now: of the clock of ``heard_at``.
        heartbeat_s: of the link's settings.
        most: clients for which this process may open files, where that is less than ``MAX_PEERS``.
    """
    everybody = list(sessions)
    own = [session for session in everybody if session.owner == owner] if owner else []
    if len(own) >= MAX_PEERS_OF_A_KEY:
        candidates, full = own, f"{MAX_PEERS_OF_A_KEY} of the key {owner!r}"
    elif len(everybody) >= MAX_PEERS:
        candidates, full = everybody, str(MAX_PEERS)
    elif most is not None and len(everybody) >= most:
        candidates, full = everybody, f"{most}, for which the server may open files (ulimit -n)"
    else:
        return Admission(None, "")
    useless = next((session for session in candidates if session.idle and not session.useful), None)
    if useless is not None:
        return Admission(useless, "")
    gone = [s for s in candidates if s.idle and now - s.heard_at > GONE_BEATS * heartbeat_s]
    if gone:
        return Admission(min(gone, key=lambda session: session.heard_at), "")
    return Admission(None, f"the table of peers is full: {full}, all of them alive")


class SessionTable:
    """The clients that a server knows.

    Args:
        title: the server's name, for the log.
        settings: of the link.
        answer: sends a client a link frame of a kind, with two numbers and further frames.
        on_gone: called with a session that has ended.
        bad: counts messages that make no sense.
    """

    def __init__(
        self,
        title: str,
        settings: LinksConfig,
        *,
        answer: Callable[..., bool],
        on_gone: Callable[[Session], None],
        bad: BadMessages,
    ) -> None:
        self.most: int | None = None
        """Clients for which this process may open files; None where that is not known."""
        self.refused = 0
        """Clients that were not admitted because the table was full, and those that were evicted."""
        self._title = title
        self._settings = settings
        self._answer = answer
        self._on_gone = on_gone
        self._bad = bad
        self._by_routing_id: dict[bytes, Session] = {}
        self._by_name: dict[str, Session] = {}
        self._replaced: OrderedDict[tuple[str, int], None] = OrderedDict()

    def __iter__(self) -> Iterator[Session]:
        """Those of this moment, oldest first; the table may change meanwhile."""
        return iter(list(self._by_routing_id.values()))

    def named(self, name: str) -> Session | None:
        return self._by_name.get(name)

    def was_replaced(self, owner: str, nonce: int) -> bool:
        """Whether this life of a client has a successor."""
        return (owner, nonce) in self._replaced

    def of(self, routing_id: bytes, owner: str, nonce: int) -> Session | None:
        """The session of a client's life, a new one where this life began just now; None if it may have none."""
        session = self._by_routing_id.get(routing_id)
        if session is None or session.nonce != nonce or session.owner != owner:
            return self._begin(Session(routing_id, owner, client_name(owner, routing_id), nonce, time.monotonic()))
        return session

    def _begin(self, session: Session) -> Session | None:
        """Take a new life of a client into the table, in place of its last one."""
        if self.was_replaced(session.owner, session.nonce):
            # Its successor is there already: two live clients of one name would replace each other for ever.
            self._answer(session, REPLACED)
            return None
        other = self._by_routing_id.get(session.routing_id)
        if other is not None and other.name != session.name:
            # libzmq has cut the other one's connection; it will come back, and its session waits for it.
            self._bad.note(session.name, f"claims the routing id of {other.name}")
            return None
        old = self._by_name.get(session.name)
        if old is None:
            if not self._admit(session):
                return None
        else:
            self._replace(old, session)
        self._by_routing_id[session.routing_id] = self._by_name[session.name] = session
        return session

    def _replace(self, old: Session, new: Session) -> None:
        # What it sent and we took is still handled; its replies are dropped.
        self.forget(old)
        new.sends.before = tuple(sends for sends in (*old.sends.before, old.sends) if sends.queue)
        old.sends.before = ()  # or each life would keep all those before it
        self._replaced[old.owner, old.nonce] = None
        if len(self._replaced) > MAX_PEERS:
            self._replaced.popitem(last=False)
        if old.routing_id != new.routing_id:
            self._answer(old, REPLACED)

    def _admit(self, newcomer: Session) -> bool:
        """Whether one more client is admitted, perhaps by evicting another; a refused one is sent the reason."""
        evicted, refusal = admission(
            self._by_routing_id.values(),
            newcomer.owner,
            now=newcomer.heard_at,
            heartbeat_s=self._settings.heartbeat_s,
            most=self.most,
        )
        if evicted is None and not refusal:
            return True
        self.refused += 1
        if worth_a_line(self.refused):
            what = (
                f"refuses {newcomer.name}: {refusal}"
                if evicted is None
                else f"drops {evicted.name} for {newcomer.name}"
            )
            log.warning("%s %s (%d refused or dropped by now)", self._title, what, self.refused)
        gone = newcomer if evicted is None else evicted
        self._answer(gone, FULL, 0, 0, (refusal or "the table of peers is full, and nothing of use came").encode())
        if evicted is not None:
            self.forget(evicted)
        return evicted is not None

    def forget(self, session: Session) -> None:
        """End a session: requests are cancelled, replies dropped.  What it sent and we took is still handled."""
        for work in session.requests.work.values():
            if work.task is not None:
                work.task.cancel()
        # One that had not begun never gets to where it would take itself out: with its task it would keep the session.
        session.requests.work.clear()
        session.requests.waiting.clear()
        self._on_gone(session)
        if self._by_routing_id.get(session.routing_id) is session:
            del self._by_routing_id[session.routing_id]
        if self._by_name.get(session.name) is session:
            del self._by_name[session.name]


def client_name(owner: str, routing_id: bytes) -> str:
    """The name of a client: its own, after the name of its key if there are keys."""
    said = routing_id.partition(ID_SEPARATOR)[0]
    try:
        name = said.decode()
    except UnicodeDecodeError:
        name = ""
    if not name or not name.isprintable():
        name = routing_id.hex()
    return f"{owner}/{name}" if owner else name
