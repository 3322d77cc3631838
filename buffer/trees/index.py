"""The buffer's in-memory entries of turns and trees: numbers and places; the tokens lie in the journal.  Pure.

Shapes: N turns of a tree, by ascending id, so that parents come before their children.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from atpo_async.core.credit import ROLES, TreeArrays
from atpo_async.core.credit.roles import SYNTHESIZER
from atpo_async.core.tree import ROOT, LeafReward, Turn
from atpo_async.wire import codec
from atpo_async.wire.messages import TreeOpened
from atpo_async.wire.records import TurnRecords, pack

_LEAF, _REWARD, _JUDGED, _SUCCESS, _PARTS = 1, 2, 4, 8, 16
_ROLE_SHIFT = 5
"""Above these bits: index of the turn's role in ``core.credit.ROLES``."""


class Place(NamedTuple):
    """Where a record lies in the journal."""

    chunk: int
    offset: int
    nbytes: int


class TurnEntry(NamedTuple):
    """One turn, or a tree's prompt (``turn_id`` ``ROOT``).  The fields are those of ``ROW``, in its order."""

    tree: int
    """Number of its tree, given once in a run."""
    turn_id: int
    parent_id: int
    flags: int
    num_action_tokens: int
    num_tokens: int
    """Observation and action; of the prompt its length."""
    reward: float
    entropy: float
    """Nats: mean negative log-prob of the action's tokens."""
    oldest_version: int
    newest_version: int
    chunk: int
    offset: int
    nbytes: int
    """Of the record."""
    turn_reward: float = 0.0

    @property
    def is_leaf(self) -> bool:
        return bool(self.flags & _LEAF)

    @property
    def place(self) -> Place:
        return Place(self.chunk, self.offset, self.nbytes)

    @classmethod
    def of(cls, turn: Turn, *, tree: int, place: Place) -> TurnEntry:
        length = len(turn.action)
        flags = 0
        if turn.is_leaf:
            flags = _LEAF
            if turn.reward is not None:
                flags |= _REWARD
            if turn.success is not None:
                flags |= _JUDGED | (_SUCCESS if turn.success else 0)
            if turn.rewards:
                flags |= _PARTS
        if turn.role:
            flags |= ROLES.index(turn.role) << _ROLE_SHIFT
        spans = turn.spans
        if len(spans) == 1:
            oldest = newest = spans[0].version
        else:
            oldest, newest = turn.oldest_version, turn.newest_version
        return cls(
            tree,
            turn.turn_id,
            turn.parent_id,
            flags,
            length,
            length + len(turn.observation),
            turn.reward or 0.0,
            -float(np.add.reduce(turn.logprobs, dtype=np.float64)) / length,
            oldest,
            newest,
            *place,
            turn.turn_reward,
        )

    @classmethod
    def of_prompt(cls, num_tokens: int, *, tree: int, place: Place) -> TurnEntry:
        return cls(tree, ROOT, ROOT, 0, 0, num_tokens, 0.0, 0.0, 0, 0, *place)


_ROW = struct.Struct("<QiiIiiddqqQIId")
ROW = np.dtype(
    [
        ("tree", "<u8"),
        ("turn_id", "<i4"),
        ("parent_id", "<i4"),
        ("flags", "<u4"),
        ("num_action_tokens", "<i4"),
        ("num_tokens", "<i4"),
        ("reward", "<f8"),
        ("entropy", "<f8"),
        ("oldest_version", "<i8"),
        ("newest_version", "<i8"),
        ("chunk", "<u8"),
        ("offset", "<u4"),
        ("nbytes", "<u4"),
        ("turn_reward", "<f8"),
    ]
)
"""An entry as bytes, and as a row of an array."""
assert _ROW.size == ROW.itemsize

Rows = NDArray[np.void]


def pack_entry(entry: TurnEntry) -> bytes:
    return _ROW.pack(*entry)


def rows_of(entries: Sequence[TurnEntry]) -> Rows:
    """ROW[N]."""
    return np.frombuffer(b"".join(map(pack_entry, entries)), dtype=ROW)


def entry_of(row: np.void) -> TurnEntry:
    return TurnEntry(*row.tolist())


class Store(Protocol):
    """Holds records."""

    def add(self, record: bytes) -> Place:
        """Add a record; it is durable only after the store's commit."""

    def note(self, entry: TurnEntry) -> None:
        """The entry of a record just added: recovered with it."""

    def read(self, place: Place) -> bytes | memoryview:
        """A record that is held."""

    def release(self, rows: Rows, *, gone: bool = False) -> None:
        """These records are needed no more.

        Args:
            rows: ROW[R].
            gone: whether their trees are gone too: their entries may stay until the chunk goes.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of the records held."""


class MemoryStore:
    """Records in memory, for state that is to survive nothing."""

    def __init__(self) -> None:
        self._records: dict[int, bytes] = {}
        self._next = 1
        self.nbytes = 0

    def add(self, record: bytes) -> Place:
        place = Place(self._next, 0, len(record))
        self._records[self._next] = record
        self._next += 1
        self.nbytes += len(record)
        return place

    def note(self, entry: TurnEntry) -> None:
        pass

    def read(self, place: Place) -> bytes | memoryview:
        return self._records[place.chunk]

    def release(self, rows: Rows, *, gone: bool = False) -> None:
        for chunk in rows["chunk"].tolist():
            self.nbytes -= len(self._records.pop(chunk))


class StoredTurns(Sequence[Turn]):
    """Turns of a tree, read from the store when they are accessed.

    Args:
        rows: ROW[N].
        store: what holds them.
    """

    def __init__(self, rows: Rows, store: Store) -> None:
        self.rows = rows
        self._store = store
        self._read: TurnRecords | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Turn: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Turn]: ...

    def __getitem__(self, index: int | slice) -> Turn | Sequence[Turn]:
        return self.records()[index]

    def __iter__(self) -> Iterator[Turn]:
        return iter(self.records())

    @property
    def places(self) -> list[Place]:
        return places_of(self.rows)

    def records(self) -> TurnRecords:
        """Read now, in the caller's thread."""
        if self._read is None:
            self._read = TurnRecords.raw([self._store.read(place) for place in self.places], len(self.rows))
        return self._read


def places_of(rows: Rows) -> list[Place]:
    return list(map(Place, rows["chunk"].tolist(), rows["offset"].tolist(), rows["nbytes"].tolist()))


@dataclass(frozen=True, slots=True, eq=False)
class TreeEntry:
    """A prompt and its turns, as numbers.  Immutable."""

    tree_id: str
    number: int
    task_index: int
    prompt: Rows
    """ROW[1]; ROW[0] where there is none."""
    rows: Rows
    """ROW[N]."""
    failed_branches: int = 0
    leaf_rewards: tuple[LeafReward, ...] = ()
    """As it was closed; ``rows`` have them, its records do not."""

    def __len__(self) -> int:
        return len(self.rows)

    def rewarded(self, leaf_rewards: tuple[LeafReward, ...]) -> TreeEntry:
        """The same with these rewards of leaves in place of those that came with their turns."""
        if not leaf_rewards:
            return self
        rows, given = self.rows.copy(), {each.turn_id: each.reward for each in leaf_rewards}
        for i, turn_id in enumerate(rows["turn_id"].tolist()):
            if turn_id in given:
                rows[i]["reward"] = given[turn_id]
        return replace(self, rows=rows, leaf_rewards=leaf_rewards)

    @property
    def roles(self) -> NDArray[np.int64]:
        """int64[N]: each turn's index in ``core.credit.ROLES``; 0 outside groups."""
        roles: NDArray[np.int64] = (self.rows["flags"] >> _ROLE_SHIFT).astype(np.int64)
        return roles

    @property
    def is_leaf(self) -> NDArray[np.bool_]:
        """bool[N]."""
        leaf: NDArray[np.bool_] = (self.rows["flags"] & _LEAF) > 0
        return leaf

    @property
    def num_leaves(self) -> int:
        return int(np.count_nonzero(self.rows["flags"] & _LEAF))

    @property
    def nbytes(self) -> int:
        """Of its records."""
        return int(self.rows["nbytes"].sum(dtype=np.int64) + self.prompt["nbytes"].sum(dtype=np.int64))

    @property
    def num_tokens(self) -> int:
        """In one pass: the prompt, and each turn once."""
        return int(self.rows["num_tokens"].sum(dtype=np.int64) + self.prompt["num_tokens"].sum(dtype=np.int64))

    @property
    def oldest_versions(self) -> NDArray[np.int64]:
        """int64[N]: of each turn."""
        versions: NDArray[np.int64] = self.rows["oldest_version"].astype(np.int64)
        return versions

    @property
    def versions(self) -> set[int]:
        """The oldest and the newest of every turn."""
        return {*self.rows["oldest_version"].tolist(), *self.rows["newest_version"].tolist()}

    @property
    def judged(self) -> NDArray[np.bool_]:
        """bool[N]: leaves for which the environment reported success or failure."""
        judged: NDArray[np.bool_] = (self.rows["flags"] & _JUDGED) > 0
        return judged & self.is_leaf

    @property
    def success(self) -> NDArray[np.float64]:
        """float64[N]: 1 on successful leaves, 0 on the others and on those that are not ``judged``."""
        success: NDArray[np.float64] = (((self.rows["flags"] & _SUCCESS) > 0) & self.judged).astype(np.float64)
        return success

    @property
    def has_parts(self) -> NDArray[np.bool_]:
        """bool[N]: leaves whose reward has named parts."""
        parts: NDArray[np.bool_] = (self.rows["flags"] & _PARTS) > 0
        return parts

    def place(self, at: int) -> Place:
        """Of the record of the turn in row ``at``."""
        return entry_of(self.rows[at]).place

    @property
    def mean_success(self) -> float | None:
        """Share of successful leaves among those ``judged``, of a group its synthesizers'; None where none is."""
        own = self.outcome()
        num_judged = int(np.count_nonzero(own.judged))
        return float(own.success.sum()) / num_judged if num_judged else None

    def outcome(self) -> TreeEntry:
        """Of a group its synthesizers' turns, which decide what it came to; any other tree as it is."""
        roles = self.roles
        return replace(self, rows=self.rows[roles == SYNTHESIZER]) if roles.any() else self

    def pruned(self) -> TreeEntry:
        """Without turns that lead to no finished leaf (failed branches, chains still growing)."""
        return self.down_to(self.rows["turn_id"][self.is_leaf].tolist())

    def down_to(self, turn_ids: Iterable[int]) -> TreeEntry:
        """Only the turns on the way to these, themselves included."""
        parents = dict(zip(self.rows["turn_id"].tolist(), self.rows["parent_id"].tolist(), strict=True))
        keep: set[int] = {ROOT}
        for turn_id in turn_ids:
            while turn_id not in keep:
                keep.add(turn_id)
                turn_id = parents[turn_id]
        if len(keep) - 1 == len(self.rows):
            return self
        kept = np.fromiter((i in keep for i in parents), dtype=bool, count=len(parents))
        return replace(self, rows=self.rows[kept])

    def moved(self, entries: Mapping[int, TurnEntry]) -> TreeEntry:
        """The same with these turns' records in other places."""
        return replace(self, prompt=_moved(self.prompt, entries), rows=_moved(self.rows, entries))

    def arrays(self) -> TreeArrays:
        """The arrays that credit needs.  Raises ValueError where the tree is not pruned."""
        position = {turn_id: i for i, turn_id in enumerate(self.rows["turn_id"].tolist())}
        position[ROOT] = -1
        return TreeArrays(
            parent=np.array([position[p] for p in self.rows["parent_id"].tolist()], dtype=np.int64),
            is_leaf=self.is_leaf,
            reward=self.rows["reward"].astype(np.float64),
            turn_reward=self.rows["turn_reward"].astype(np.float64),
            entropy=self.rows["entropy"].astype(np.float64),
            num_action_tokens=self.rows["num_action_tokens"].astype(np.int64),
            role=self.roles,
            task_index=self.task_index,
        )


def _moved(rows: Rows, entries: Mapping[int, TurnEntry]) -> Rows:
    rows = rows.copy()
    for i, turn_id in enumerate(rows["turn_id"].tolist()):
        if turn_id in entries:
            rows[i]["chunk"], rows[i]["offset"] = entries[turn_id].chunk, entries[turn_id].offset
    return rows


def entry_from_turns(
    tree_id: str, task_index: int, prompt: NDArray[np.int32], turns: Sequence[Turn], store: Store, *, number: int = 0
) -> TreeEntry:
    """The entry of a whole tree, its records put into ``store``."""
    opened = TreeOpened(run="", tree_id=tree_id, lease_epoch=0, prompt=prompt)
    root = TurnEntry.of_prompt(len(prompt), tree=number, place=store.add(pack(codec.encode(opened))))
    entries = [TurnEntry.of(turn, tree=number, place=store.add(pack(codec.encode(turn)))) for turn in turns]
    return TreeEntry(tree_id, number, task_index, rows_of([root]), rows_of(entries))
