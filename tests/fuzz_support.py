"""Fuzzing of the buffer's sockets: a corpus of messages that no buffer should take, peers without manners who send
them, and two honest peers who must not notice.

Everything that is sent is a function of the seed.  What the corpus holds is either no message, or a message that
changes nothing: it is of another run, or about trees that nobody leased.  Without keys whoever reaches the sockets may
speak for anybody, so a valid ``RunFinished`` of this run is no fuzz, and the honest peers' names are left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeVar

import msgpack
import numpy as np
import zmq

from atpo_async.config import LinksConfig
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.links.client import Client
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from atpo_async.wire.records import TurnRecords, pack

Door = Literal["actors", "learner"]
Item = TypeVar("Item")

LINK = struct.Struct("<2sBQQQ")
MAGIC = b"a1"
SEND, REQUEST, PING, ACK, REFUSE, REPLY, PONG, REPLACED = range(1, 9)
SENDS = 10
OTHER_KINDS = (0, *range(ACK, SENDS), *range(SENDS + 1, 16), 127, 255)

U64 = 2**64 - 1
BOMBS = (
    *(
        code + length
        for code in (b"\xdd", b"\xdf", b"\xdb", b"\xc6")
        for length in (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff")
    ),
    *(code + b"\xff\xff" for code in (b"\xdc", b"\xde", b"\xda", b"\xc5")),
)
"""The beginnings of lists, maps, strings and bytes of up to 4 GB."""
EXTENSIONS = (
    b"\xd4\x05\x00",
    b"\xd6\xff\x00\x00\x00\x00",
    b"\xc7\x03\x05abc",
    b"\xc9\xff\xff\xff\xff\x05",
    b"\xd8\x01" + bytes(16),
)
NESTS = tuple(code * depth + b"\x00" for code in (b"\x91", b"\x81\xa1x") for depth in (5, 500, 20_000))
STRANGE: tuple[object, ...] = (
    None, True, False, 0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, U64, -(2**31), -(2**63), 0.0, -0.0, -1.0,
    1e39, -1e300, float("nan"), float("inf"), float("-inf"), "", "x", "x" * 201, "x" * 70_000, "\x00", "\x1b[2J",
    "é" * 150, b"", b"bytes", [], {}, [0, 0, 0], [2, 0, 8], [0, 0, 2**62], [1, 8, -1], [0] * 50, ["x"] * 3, {"x": 1.0},
    {"x": -1.0}, {"x": float("nan")}, {"": {}}, [[0, 0, 3]], [[2**40, 0, 1]], msgpack.ExtType(7, b"x"),
)  # fmt: skip
"""Put into any field: other types, and numbers and texts at and over the edges."""


# --- the corpus ------------------------------------------------------------------------------------------------


def example_turn(run: str, tree_id: str, turn_id: int = 1, *, tokens: int = 12, epoch: int = 0, **changes: Any) -> Turn:
    """A leaf whose tokens are a function of its name."""
    noise = zlib.crc32(f"{tree_id}/{turn_id}".encode())
    fields: dict[str, Any] = {
        "parent_id": 0,
        "expansion_round": 0,
        "observation": np.zeros(0, np.int32),
        "action": (np.arange(tokens, dtype=np.int32) * 7 + noise % 50_000).astype(np.int32),
        "logprobs": np.full(tokens, -0.25 - (noise % 16) / 16, np.float32),
        "spans": (VersionSpan(0, 0, tokens),),
        "end": "done",
        "reward": float(turn_id % 2),
        "success": bool(turn_id % 2),
        "generate_s": 0.0,
        "environment_s": 0.0,
    }
    return Turn(run=run, tree_id=tree_id, turn_id=turn_id, lease_epoch=epoch, **(fields | changes))


def examples(run: str) -> dict[Door, list[Any]]:
    """Valid messages for each door that change nothing there.

    What could change something if a single field came out otherwise is of another run, which no flipped bit mends.
    """
    elsewhere = "another-" + run[::-1]
    inner: dict[str, Any] = {"end": "continue", "reward": None, "success": None}
    actors: list[Any] = [
        example_turn(run, "nobody-leased-this"),
        example_turn(run, "nobody-leased-this", 5, tokens=250, observation=np.arange(9, dtype=np.int32), **inner),
        example_turn(elsewhere, "train-0", 2, spans=(VersionSpan(0, 0, 3), VersionSpan(1, 3, 12))),
        m.TreeOpened(run=run, tree_id="nobody-leased-this", lease_epoch=0, prompt=np.arange(40, dtype=np.int32)),
        m.TreeClosed(
            run=run,
            tree_id="nobody-leased-this",
            lease_epoch=3,
            num_turns=4,
            failed_branches=1,
            failures={"timeout": 1},
        ),
        m.LeaseReturned(run=elsewhere, actor="nobody", tree_ids=("a", "b")),
        m.ActorReport(run=elsewhere, actor="nobody", version=0, tree_ids=("a",), metrics={"actor/turns": 1.0}),
        m.LeaseRequest(run=elsewhere, actor="nobody", count=3, version=0),
        m.ActorHello(protocol=m.PROTOCOL, run=elsewhere, actor="nobody", environment="hopqa", search_leaves=4),
    ]
    learner: list[Any] = [
        m.SampleRequest(run=elsewhere, rank=0, num_ranks=1, step=0, version=0, num_trees=4, wait_s=0.1),
        m.Trained(run=elsewhere, batch_id=1, version=1, priorities={"train-0": 0.5, "train-1": 0.25}),
        m.Checkpointed(run=elsewhere, step=1, version=1),
        m.VersionPublished(run=elsewhere, version=3, weights_endpoint="tcp://w:1", announce_endpoint="tcp://n:1"),
        m.EvalRequest(run=elsewhere, step=1, version=1, num_tasks=4, blocking=True),
        m.EvalQuery(run=elsewhere, step=1, wait_s=0.1),
        m.RunFinished(run=elsewhere),
        # Of this run, and refused for what they say.
        m.EvalQuery(run=run, step=2**31 - 1, wait_s=0.0),
        m.SampleRequest(run=run, rank=7, num_ranks=1, step=0, version=0, num_trees=4, wait_s=0.0),
        m.Trained(run=run, batch_id=2**31 - 1, version=0, priorities={"nobody-leased-this": 1.0}),
    ]
    return {"actors": actors, "learner": learner}


@dataclass(frozen=True, slots=True)
class Shot:
    """One message to be sent: the frames behind its link frame."""

    mutation: str
    frames: tuple[bytes, ...]


class Corpus:
    """Mutated messages for one door, without end.  Equal seeds give equal messages.

    Args:
        run: the run's id, which the peers know.
        door: which socket the messages are for.
        seed: any number.
        limit_bytes: what the receiver takes at most; now and then a message is larger.
    """

    def __init__(self, run: str, door: Door, *, seed: int, limit_bytes: int) -> None:
        self._rng = random.Random(f"{seed}/{door}")
        self._limit_bytes = limit_bytes
        everything = examples(run)
        mine = [(message, _frames(message)) for message in everything[door]]
        self._valid = [frames for _, frames in mine]
        self._flippable = [frames for message, frames in mine if _may_flip(message, run)]
        self._trees = [(msgpack.unpackb(header), payload) for header, payload in self._flippable]
        self._foreign = [_frames(message) for other in everything if other != door for message in everything[other]]
        self._foreign.append(_frames(_batch(run)))
        self._altered = [self._alter() for _ in range(4000)]
        self._mutations: list[tuple[str, Callable[[], tuple[bytes, ...]]]] = [
            *[("bits of the header", self._header_bits)] * 6,
            *[("bits of the payload", self._payload_bits)] * 4,
            *[("cut off", self._cut)] * 4,
            *[("bytes put in", self._insert)] * 3,
            *[("two spliced", self._splice)] * 3,
            *[("another's payload", self._swap)] * 2,
            *[("lengths that are not there", self._bomb)] * 4,
            *[("extension types", self._extend)] * 3,
            *[("nesting", self._nest)] * 2,
            *[("one field out of range", lambda: self._pick(self._altered))] * 10,
            *[("for another receiver", lambda: self._pick(self._foreign))] * 2,
            *[("valid, to be refused", lambda: self._pick(self._valid))] * 4,
            *[("noise", self._noise)] * 2,
            *[("another number of frames", self._frame_count)] * 2,
            *[("empty frames", self._empty)] * 1,
        ]
        self._count = 0

    def next(self) -> Shot:
        self._count += 1
        if self._count % 5000 == 0:
            return Shot("larger than is taken", self._huge())
        name, mutate = self._pick(self._mutations)
        return Shot(name, mutate())

    def below(self, n: int) -> int:
        # Many times faster than randrange; that low numbers come up a trifle more often does not matter.
        return self._rng.getrandbits(32) % n

    def _pick(self, items: Sequence[Item]) -> Item:
        return items[self._rng.getrandbits(32) % len(items)]

    def _flip(self, data: bytes) -> bytes:
        if not data:
            return b"\xff"
        changed = bytearray(data)
        for _ in range(1 + self.below(4)):
            changed[self.below(len(changed))] ^= 1 << self.below(8)
        return bytes(changed)

    def _header_bits(self) -> tuple[bytes, ...]:
        header, payload = self._pick(self._flippable)
        return self._flip(header), payload

    def _payload_bits(self) -> tuple[bytes, ...]:
        header, payload = self._pick(self._flippable)
        return header, self._flip(payload)

    def _cut(self) -> tuple[bytes, ...]:
        header, payload = self._pick(self._flippable)
        if payload and self.below(2):
            return header, payload[: self.below(len(payload))]
        return header[: self.below(len(header))], payload

    def _put(self, what: bytes) -> tuple[bytes, ...]:
        header, payload = self._pick(self._flippable)
        at = self.below(len(header))
        return header[:at] + what + header[at + self.below(2) * len(what) :], payload

    def _insert(self) -> tuple[bytes, ...]:
        return self._put(self._rng.randbytes(1 + self.below(9)))

    def _bomb(self) -> tuple[bytes, ...]:
        return self._put(self._pick(BOMBS))

    def _extend(self) -> tuple[bytes, ...]:
        return self._put(self._pick(EXTENSIONS))

    def _nest(self) -> tuple[bytes, ...]:
        return self._put(NESTS[min(self.below(40), len(NESTS) - 1) if self.below(10) == 0 else self.below(2) * 3])

    def _splice(self) -> tuple[bytes, ...]:
        (one, payload), (two, _) = self._pick(self._flippable), self._pick(self._flippable)
        return one[: self.below(len(one))] + two[self.below(len(two)) :], payload

    def _swap(self) -> tuple[bytes, ...]:
        return self._pick(self._flippable)[0], self._pick(self._flippable)[1]

    def _noise(self) -> tuple[bytes, ...]:
        return self._rng.randbytes(self.below(200)), self._rng.randbytes(self.below(200))

    def _frame_count(self) -> tuple[bytes, ...]:
        count = self._pick((0, 1, 3, 4, 9, 40))
        return tuple(self._pick(self._pick(self._flippable)) for _ in range(count))

    def _empty(self) -> tuple[bytes, ...]:
        header, payload = self._pick(self._flippable)
        return self._pick(((b"", b""), (header, b""), (b"", payload)))

    def _huge(self) -> tuple[bytes, ...]:
        header, payload = self._pick(self._flippable)
        many = bytes(self._limit_bytes // 8 + 1)
        return self._pick(
            ((header + many, payload), (header, payload + many), (header, bytes(self._limit_bytes + 1)), (many, b""))
        )

    def _alter(self) -> tuple[bytes, ...]:
        tree, payload = self._pick(self._trees)
        changed = dict(tree)
        what = self.below(20)
        name = self._pick([name for name in changed if name != "run"])
        if what == 0:
            del changed[name]
        elif what == 1:
            changed["more"] = self._pick(STRANGE)
        elif what == 2:
            changed["type"] = self._pick(("", "turn", "batch", "trained", "tree_opened", "refused", 7, None))
        else:
            changed[name] = self._pick(STRANGE)
        return msgpack.packb(changed), payload


def _frames(message: Any) -> tuple[bytes, bytes]:
    header, payload = codec.encode(message)
    return bytes(header), bytes(payload)


def _may_flip(message: Any, run: str) -> bool:
    """Whether no damage to it can make it a message that changes something."""
    return message.run != run or isinstance(message, Turn | m.TreeOpened | m.TreeClosed)


def _batch(run: str) -> m.Batch:
    tree = m.BatchTree(
        tree_id="t", task_index=0, prompt=np.arange(3, dtype=np.int32), turns=TurnRecords.of([example_turn(run, "t")]),
        failed_branches=0, probability=1.0, weight=1.0, uses=1,
    )  # fmt: skip
    return m.Batch(
        batch_id=0, step=0, num_trees=1, num_leaves=1, num_action_tokens=1, num_turn_tokens=1, trees=(tree,), metrics={}
    )


# --- peers without manners -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Habits:
    """What a peer does beside sending what it should not."""

    reads: bool = True
    moves_on: bool = True
    """Whether it ever says that it has got an acknowledgement."""
    reconnects_every: int = 0
    wild: bool = False
    """Whether it begins new lives in passing.  What it sends until it notices is not looked at, so most do not."""


HABITS = (
    *[Habits()] * 4,
    Habits(wild=True),
    Habits(reads=False),
    Habits(moves_on=False),
    Habits(reconnects_every=3000),
)


@dataclass(slots=True)
class Rude:
    """A peer that knows how links are spoken, and mostly does, so that what it sends is looked at."""

    context: zmq.Context[zmq.Socket[bytes]]
    endpoint: str
    name: str
    corpus: Corpus
    habits: Habits
    counts: Counter[str]
    sent: int = 0
    answers: int = 0
    _socket: Any = None
    _nonce: int = 0
    _seq: int = 0
    _base: int = 0
    _request: int = 0
    _last: tuple[bytes, ...] = ()
    _held: tuple[bytes, ...] | None = None
    _lives: int = 0
    _lives_until: int = 0
    _halted: bool = False
    _asked: bool = False
    _waiting: list[list[bytes]] = field(default_factory=list)

    WINDOW = 900
    """Sends without an acknowledgement; a server with the default settings looks at no more than 1024."""

    def __post_init__(self) -> None:
        self._connect()

    def _connect(self) -> None:
        self.close()
        self._lives += 1
        self._socket = self.context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.setsockopt(zmq.SNDHWM, 200)
        self._socket.setsockopt(zmq.RCVHWM, 200 if not self.habits.reads else 0)
        self._socket.setsockopt(zmq.ROUTING_ID, self.name.encode() + b"\0" + self._lives.to_bytes(8, "little"))
        self._socket.connect(self.endpoint)
        self._begin()

    def _begin(self) -> None:
        """A new life: numbers begin anew."""
        self._nonce = zlib.crc32(f"{self.name}/{self._lives}/{self.sent}".encode()) + 1
        self._seq = self._base = self._request = 0
        self._halted = self._asked = False
        self._waiting.clear()
        # A server looks at no more than a window ahead of what it is told to have arrived.
        self._lives_until = self.sent + (20_000 if self.habits.reads and self.habits.moves_on else 1500)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close(0)

    def fire(self) -> bool:
        """Send one message.  False if there is no room for it now."""
        if self._waiting:
            if not self._put(self._waiting[0]):
                return False
            self._waiting.pop(0)
            return True
        every = self.habits.reconnects_every
        if every and self.sent % every == every - 1:
            self.sent += 1
            self._connect()
        if self.sent >= self._lives_until:
            self._begin()
        if self._halted or (self.habits.reads and self.habits.moves_on and self._seq - self._base > self.WINDOW):
            return False
        shot = self.corpus.next()
        mutation, frames = self._framed(shot)
        self.counts[mutation] += 1
        self._waiting += frames
        return self.fire() if frames else True

    def _framed(self, shot: Shot) -> tuple[str, list[list[bytes]]]:
        """The messages for the socket, in order, and what is wrong with them."""
        pick = self.corpus.below(100)
        body = list(shot.frames)
        if pick < 15:
            return self._together(shot)
        if pick < 70:
            return shot.mutation, [[self._sending(), *body]]
        if pick < 84:
            self._request += 1
            return shot.mutation, [[self._link(REQUEST, self._request, self._request), *body]]
        if pick in (84, 91) and not self.habits.wild:
            return shot.mutation, [[self._sending(), *body]]
        if pick == 84:
            link = self._link(SEND, self._seq, self._base)
            return "link: flipped bits", [[_flipped(link, self.corpus.below(8 * len(link))), *body]]
        if pick == 85:
            kind = OTHER_KINDS[self.corpus.below(len(OTHER_KINDS))]
            return "link: a kind that is not for servers", [[self._link(kind, self._seq, self._base), *body]]
        if pick == 86:
            a, b = self._number(), self._number()
            return "link: numbers out of order", [[self._link(1 + self.corpus.below(3), a, b), *body]]
        if pick == 87:
            size = self.corpus.below(60)
            return "link: of another size", [[(self._link(SEND, self._seq, 0) * 3)[:size], *body]]
        if pick == 88:
            return "link: none", [body or [b""]]
        if pick == 89:
            ids = bytes(self.corpus.below(100))
            return "link: a ping with noise", [[self._link(PING, self._number(), self._number()), ids]]
        if pick == 90:
            return "link: a request repeated", [[self._link(REQUEST, self._request, 0), *body]] * 3
        if pick == 91:
            return "link: another life", [[LINK.pack(MAGIC, SEND, self._number(), 0, 0), *body]]
        if pick < 95:
            one = [self._sending(), *body]
            return "link: sent twice", [one, one]
        if pick < 98:
            one, two = [self._sending(), *body], [self._sending(), *self.corpus.next().frames]
            return "link: in another order", [two, one, two]
        self._seq += 1
        gap = [[self._link(SEND, self._seq + 3, self._base), *body]]
        self._seq -= 1
        return "link: with a gap before it", gap

    def _together(self, first: Shot) -> tuple[str, list[list[bytes]]]:
        """Several sends in one frame, which may be damaged itself."""
        shots = [first, *(self.corpus.next() for _ in range(self.corpus.below(6)))]
        records = [pack(shot.frames) for shot in shots if len(shot.frames) == 2 and shot.frames[0]]
        link = self._link(SENDS, self._seq, self._base if self.habits.moves_on else 0)
        together, pick = b"".join(records), self.corpus.below(10)
        if pick == 0:
            return "sends: cut off", [[link, together[: self.corpus.below(len(together) + 1)]]]
        if pick == 1 and together:
            return "sends: flipped bits", [[link, _flipped(together, self.corpus.below(8 * len(together)))]]
        if pick == 2:
            return "sends: more than fit", [[link, bytes(16) * self.corpus.below(2000)]]
        if pick == 3:
            return "sends: in several frames", [[link, *records]]
        self._seq += len(records)
        return first.mutation, [[link, together]]

    def _sending(self) -> bytes:
        link = self._link(SEND, self._seq, self._base if self.habits.moves_on else 0)
        self._seq += 1
        return link

    def _link(self, kind: int, a: int, b: int) -> bytes:
        return LINK.pack(MAGIC, kind, self._nonce, a & U64, b & U64)

    def _number(self) -> int:
        pick = self.corpus.below(6)
        return (0, 1, self._seq, self._seq + self.corpus.below(2000), 2**63, U64)[pick]

    def _put(self, frames: list[bytes]) -> bool:
        try:
            # zmq takes no message back once its first frame is in.
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=True)
        except zmq.Again:
            return False
        self.sent += 1
        return True

    def listen(self) -> None:
        """Take what the server says; ask it where it stands."""
        if not self.habits.reads:
            return
        with contextlib.suppress(zmq.Again):
            while True:
                self._heard(self._socket.recv_multipart(zmq.NOBLOCK))
        self._ask()

    def _ask(self) -> None:
        """Where one of ours was not taken, nothing behind it is: the answer tells where to go on."""
        if not self._asked:
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart([self._link(PING, self._seq, self._base), b""], zmq.NOBLOCK)
                self._asked = True

    def _heard(self, frames: list[bytes]) -> None:
        _, kind, nonce, a, b = LINK.unpack(frames[0])
        if nonce != self._nonce:
            return
        self.answers += 1
        if kind == ACK:
            self._base = max(self._base, a)
        elif kind == PONG:
            self._asked = False
            if self._halted and a == self._seq:
                self._seq, self._halted = max(self._base, b), False
            elif b < a:
                # What is on its way behind it is lost: wait until the server has seen the last of it.
                self._halted = True
        elif kind == REPLACED:
            self._lives += 1
            self._begin()


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8 % len(data)] ^= 1 << bit % 8
    return bytes(changed)


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
KNOCKS = (
    b"",
    b"GET / HTTP/1.1\r\nHost: buffer\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    GREETING[:12],
    GREETING,
    GREETING[:32] + b"CURVE" + GREETING[37:],
    GREETING + b"\x04\x05NOPE!",
    GREETING + b"\x04" + bytes([len(READY)]) + READY + b"\x02" + b"\xff" * 8,
    GREETING + b"\x04" + bytes([len(READY)]) + READY + b"\x01\x01x",
    GREETING + b"\x04" + bytes([len(READY)]) + READY + b"\x02" + struct.pack(">Q", 1 << 20) + bytes(1000),
)
"""What others say to an open port: nothing, HTTP, TLS, and ZMTP (ZeroMQ's own protocol) that stops or goes wrong."""


def knock(endpoint: str, number: int) -> None:
    """Connect, say the ``number``-th of ``KNOCKS`` and go."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(KNOCKS[number % len(KNOCKS)])


# --- peers with manners ----------------------------------------------------------------------------------------

STALL_S = 30.0
"""No single step of honest work may take longer."""


@dataclass
class HonestReport:
    """What the honest peers did and saw."""

    trees: int = 0
    turns: int = 0
    batches: int = 0
    trees_trained: int = 0
    bad_messages: int = 0
    """That the buffer had counted when it made the last batch."""
    slowest_s: float = 0.0
    slowest: str = ""
    faults: list[str] = field(default_factory=list)


class Honest:
    """An actor and a learner that work as they should, and note whatever goes otherwise than it should.

    Args:
        run: the run's id.
        doors: endpoints of the buffer.
        hello: the actor's.
        trees_per_batch: what the learner asks for.
        settings: of the links.
        pause_s: between two trees; leaves the machine to the others.
    """

    def __init__(
        self,
        run: str,
        doors: dict[Door, str],
        *,
        hello: m.ActorHello,
        trees_per_batch: int,
        settings: LinksConfig,
        pause_s: float = 0.02,
    ) -> None:
        self.report = HonestReport()
        self._run, self._doors, self._hello = run, doors, hello
        self._trees_per_batch, self._settings, self._pause_s = trees_per_batch, settings, pause_s
        self._stopping = asyncio.Event()
        self._version = 0
        self._grown: dict[str, int] = {}
        self._progressed_at = time.monotonic()

    def stop(self) -> None:
        self._stopping.set()

    async def work(self) -> HonestReport:
        """Waits for: ``stop``.  Faults are in the report."""
        try:
            async with self._client("learner", "honest-learner", m.BufferToLearner) as learner:
                await self._timed("publish", self._send(learner, self._published()))
                async with (
                    self._client("actors", self._hello.actor, m.BufferToActor) as actor,
                    asyncio.TaskGroup() as group,
                ):
                    group.create_task(self._grow(actor))
                    group.create_task(self._train(learner))
        except* Exception as group_of:
            for exc in group_of.exceptions:
                self.report.faults.append("".join(traceback.format_exception_only(exc)).strip())
        return self.report

    def _client(self, door: Door, name: str, receives: Any) -> Client:
        def refused(message: Any, reason: str) -> None:
            self.report.faults.append(f"{type(message).__name__} of {name} was refused: {reason}")

        return Client(
            self._doors[door],
            peer="buffer",
            identity=name,
            receives=receives,
            settings=self._settings,
            on_refused=refused,
        )

    def _published(self) -> m.VersionPublished:
        return m.VersionPublished(
            run=self._run, version=self._version, weights_endpoint="tcp://w:1", announce_endpoint="tcp://n:1"
        )

    async def _send(self, client: Client, *messages: Any) -> None:
        for message in messages:
            await client.send(message)
        await client.drain(timeout_s=STALL_S)

    async def _timed(self, what: str, doing: Any) -> Any:
        begun = time.monotonic()
        async with asyncio.timeout(STALL_S):
            result = await doing
        took_s = time.monotonic() - begun
        if took_s > self.report.slowest_s:
            self.report.slowest_s, self.report.slowest = took_s, what
        if isinstance(result, m.Refused):
            raise AssertionError(f"{what} was refused: {result.reason}")
        return result

    async def _grow(self, client: Client) -> None:
        """Lease, open, turns, close.  Waits for: leases.  Ended by: ``stop``."""
        await self._timed("hello", client.request(self._hello, timeout_s=STALL_S))
        actor, reported_at = self._hello.actor, 0.0
        while not self._stopping.is_set():
            asked = m.LeaseRequest(run=self._run, actor=actor, count=2, version=self._version)
            leases = await self._timed("lease", client.request(asked, timeout_s=STALL_S))
            for lease in leases.leases:
                await self._timed("a tree's acknowledgement", self._send(client, *self._tree(lease)))
                self._grown[lease.tree_id] = lease.task_index
                self.report.trees += 1
                await asyncio.sleep(self._pause_s)
            if time.monotonic() - reported_at > 1.0:
                reported_at = time.monotonic()
                report = m.ActorReport(run=self._run, actor=actor, version=self._version, tree_ids=(), metrics={})
                await self._timed("report", self._send(client, report))

    def _tree(self, lease: m.Lease) -> list[Any]:
        turns = [self._turn(lease.tree_id, i, lease.epoch) for i in range(1 + len(lease.committed), 5)]
        self.report.turns += len(turns)
        opened = m.TreeOpened(
            run=self._run, tree_id=lease.tree_id, lease_epoch=lease.epoch, prompt=np.arange(8, dtype=np.int32)
        )
        closed = m.TreeClosed(
            run=self._run, tree_id=lease.tree_id, lease_epoch=lease.epoch, num_turns=4, failed_branches=0, failures={}
        )
        return [opened, *turns, closed]

    def _turn(self, tree_id: str, turn_id: int, epoch: int) -> Turn:
        return example_turn(self._run, tree_id, turn_id, epoch=epoch, spans=(VersionSpan(self._version, 0, 12),))

    async def _train(self, client: Client) -> None:
        """Sample, confirm, publish.  Waits for: batches.  Ended by: ``stop``."""
        step, waited_since = 0, time.monotonic()
        while not self._stopping.is_set():
            asked = m.SampleRequest(
                run=self._run,
                rank=0,
                num_ranks=1,
                step=step,
                version=self._version,
                num_trees=self._trees_per_batch,
                wait_s=1.0,
            )
            reply = await self._timed("batch", client.request(asked, timeout_s=STALL_S))
            if isinstance(reply, m.NotYet):
                if time.monotonic() - waited_since > STALL_S:
                    raise AssertionError(f"no batch for {STALL_S:.0f} s: the buffer waits for {reply.waiting_for}")
                continue
            assert isinstance(reply, m.Batch), reply
            for tree in reply.trees:
                self._look_at(tree)
            step, waited_since = step + 1, time.monotonic()
            self._version += 1
            priorities = {tree.tree_id: 0.5 for tree in reply.trees}
            trained = m.Trained(run=self._run, batch_id=reply.batch_id, version=self._version, priorities=priorities)
            checkpointed = m.Checkpointed(run=self._run, step=step, version=self._version)
            await self._timed("trained", self._send(client, trained, checkpointed, self._published()))
            self.report.batches += 1
            self.report.bad_messages += int(reply.metrics.get("buffer/bad_messages", 0))
            self.report.trees_trained += len(reply.trees)

    def _look_at(self, tree: m.BatchTree) -> None:
        if tree.tree_id not in self._grown and len(tree.turns) != 4:
            raise AssertionError(f"a batch has tree {tree.tree_id}, which was not grown")
        for turn in tree.turns:
            grown = example_turn(self._run, tree.tree_id, turn.turn_id)
            same = np.array_equal(turn.action, grown.action) and np.array_equal(turn.logprobs, grown.logprobs)
            if not same or turn.reward != grown.reward:
                raise AssertionError(f"turn {turn.turn_id} of tree {tree.tree_id} came back otherwise than it was sent")


def honest_process(
    run: str, doors: dict[Door, str], hello: m.ActorHello, trees_per_batch: int, heartbeat_s: float, pipe: Connection
) -> None:
    """Honest peers in a process of their own: ends on any word from the pipe, and answers with the report."""

    async def main() -> HonestReport:
        settings = LinksConfig(heartbeat_s=heartbeat_s, give_up_s=2 * STALL_S)
        honest = Honest(run, doors, hello=hello, trees_per_batch=trees_per_batch, settings=settings)
        asyncio.get_running_loop().add_reader(pipe.fileno(), honest.stop)
        working = asyncio.create_task(honest.work())
        return await working

    pipe.send(asyncio.run(main()))
