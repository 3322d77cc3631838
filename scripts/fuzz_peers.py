"""Peers without manners, which send the corpus to a buffer's sockets over the links' own protocol or beside it."""

from __future__ import annotations

import contextlib
import socket
import struct
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import zmq

from atpo_async.wire.records import pack
from scripts.fuzz_corpus import U64, Corpus, Shot

LINK = struct.Struct("<2sBQQQ")
MAGIC = b"a1"
SEND, REQUEST, PING, ACK, REFUSE, REPLY, PONG, REPLACED = range(1, 9)
SENDS = 10
OTHER_KINDS = (0, *range(ACK, SENDS), *range(SENDS + 1, 16), 127, 255)


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
        """Send one message.  False if the socket cannot take it now."""
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
