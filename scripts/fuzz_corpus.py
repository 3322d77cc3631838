"""The corpus of the socket fuzzer: mutated messages that no buffer should take.

Everything is a function of the seed.  What the corpus holds is either no message, or a message that changes nothing: it
is of another run, or about trees that nobody leased.  Without keys whoever reaches the sockets may speak for anybody,
so a valid ``RunFinished`` of this run is no fuzz, and the honest peers' names are left alone.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgpack
import numpy as np

from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from atpo_async.wire.records import TurnRecords

Door = Literal["actors", "learner"]
Item = TypeVar("Item")

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
