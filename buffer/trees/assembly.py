"""Assembles turns into trees: in any order, any number of times; turns without their parent are parked.  Pure.

A tree is known from the moment its lease is granted.  Messages about it may come in any order and any number of
times; the result depends only on their set.  The key of a turn is ``(run, tree_id, turn_id)``: the same bytes again
change nothing, other bytes are a conflict.  Turns of an older lease than the tree's newest are refused.  Entries are
held here; the records themselves go into the store.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from msgspec import UNSET

from atpo_async.core.errors import BadMessage, Conflict
from atpo_async.core.tree import ROOT, Turn
from atpo_async.core.vocabulary import Split
from atpo_async.wire import codec
from atpo_async.wire.messages import TreeClosed, TreeOpened
from atpo_async.wire.records import pack, unpack
from buffer.journal.entries import ClosingEntry, TreeStateEntry
from buffer.trees.index import ROW, Rows, Store, TreeEntry, TurnEntry, entry_of, rows_of

REMEMBERED_TREES = 2048
"""Finished trees whose turns are still recognised when an actor sends them again after a reconnect."""

TreeMessage = TreeOpened | Turn | TreeClosed
Frames = Sequence[bytes | memoryview]

_NONE = np.zeros(0, dtype=ROW)


@dataclass(slots=True)
class Growing:
    """The turns of one tree so far."""

    tree_id: str
    number: int
    task_index: int
    kind: Split
    epoch: int
    prompt: TurnEntry | None = None
    turns: dict[int, TurnEntry] = field(default_factory=dict)
    closed: TreeClosed | None = None
    parents: set[int] = field(default_factory=set)
    """Ids that turns name as their parent."""

    def closing(self) -> ClosingEntry | None:
        """The content of its closing message, for a snapshot."""
        closed = self.closed
        if closed is None:
            return None
        return ClosingEntry(
            lease_epoch=closed.lease_epoch, num_turns=closed.num_turns, failed_branches=closed.failed_branches,
            failures=closed.failures, leaf_rewards=closed.leaf_rewards or UNSET,
        )  # fmt: skip

    def attached(self) -> list[TurnEntry]:
        """Turns whose whole path is there, by id; the others are parked."""
        reached = {ROOT}
        found = []
        for turn_id in sorted(self.turns):
            turn = self.turns[turn_id]
            if turn.parent_id in reached:
                reached.add(turn_id)
                found.append(turn)
        return found


class Assembly:
    """The trees under lease, and the ids of the turns of finished ones.

    Args:
        store: where records go.
        find: a finished tree that is still held, by id; None if it is not.
        remembered_trees: finished trees whose turn ids are remembered.
    """

    def __init__(
        self,
        store: Store,
        *,
        find: Callable[[str], TreeEntry | None] = lambda tree_id: None,
        remembered_trees: int = REMEMBERED_TREES,
    ) -> None:
        self._store = store
        self._find = find
        self._growing: dict[str, Growing] = {}
        self._done: OrderedDict[str, frozenset[int]] = OrderedDict()
        self._remembered = remembered_trees
        self.nbytes = 0
        """Bytes of the records of unfinished trees."""
        self._changed: set[str] = set()

    def __contains__(self, tree_id: object) -> bool:
        return tree_id in self._growing

    def __len__(self) -> int:
        return len(self._growing)

    def growing(self, tree_id: str) -> Growing | None:
        """The turns so far of a tree under lease."""
        return self._growing.get(tree_id)

    def expect(self, tree_id: str, *, number: int, task_index: int, kind: Split, epoch: int) -> None:
        """A lease was granted: take this tree's turns under ``epoch`` from now on.

        On a reissue the turns that are attached stay; parked ones go, for their ids may come again.
        """
        self._changed.add(tree_id)
        entry = self._growing.get(tree_id)
        if entry is None:
            self._growing[tree_id] = Growing(tree_id, number, task_index, kind, epoch)
            return
        if epoch <= entry.epoch:
            raise ValueError(f"tree {tree_id} is at lease epoch {entry.epoch}, cannot go to {epoch}")
        attached = {turn.turn_id: turn for turn in entry.attached()}
        self._release(turn for i, turn in entry.turns.items() if i not in attached)
        entry.turns, entry.closed, entry.epoch = attached, None, epoch
        entry.parents = {turn.parent_id for turn in attached.values()}

    def drain_changes(self) -> set[str]:
        """Trees of which something changed beside their turns, since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def restore(self, tree_id: str, entry: TreeStateEntry, prompt: Rows, turns: Rows, *, run: str) -> None:
        """A tree under lease as an earlier process left it.

        Args:
            tree_id: its id.
            entry: of a tree that grows.
            prompt: ROW[1]; ROW[0] where it had not come.
            turns: ROW[N], what had come.
            run: id of the run.
        """
        growing = Growing(tree_id, entry.number, entry.task_index, entry.kind, entry.epoch)
        growing.prompt = entry_of(prompt[0]) if len(prompt) else None
        growing.turns = {int(row["turn_id"]): entry_of(row) for row in turns}
        if (closed := entry.closed) is not None:
            growing.closed = TreeClosed(
                run=run, tree_id=tree_id, lease_epoch=closed.lease_epoch, num_turns=closed.num_turns,
                failed_branches=closed.failed_branches, failures=closed.failures,
                leaf_rewards=closed.leaf_rewards or (),
            )  # fmt: skip
        growing.parents = {turn.parent_id for turn in growing.turns.values()}
        self._growing[tree_id] = growing
        self.nbytes += sum(turn.nbytes for turn in growing.turns.values())
        self.nbytes += 0 if growing.prompt is None else growing.prompt.nbytes

    def move(self, tree_id: str, turns: Mapping[int, TurnEntry]) -> None:
        """Note new places of records of a tree, if it grows; ``ROOT`` is its prompt."""
        growing = self._growing.get(tree_id)
        if growing is not None:
            growing.prompt = turns.get(ROOT, growing.prompt)
            growing.turns |= {turn_id: entry for turn_id, entry in turns.items() if turn_id != ROOT}

    def check(self, message: TreeMessage, frames: Frames | None = None) -> bool:
        """Whether ``message`` is new.

        Args:
            message: decoded.
            frames: as it came; None where it was made in this process: it is checked then, as received ones are when
                they are decoded.

        Raises:
            Conflict: its key is there with other bytes.
            BadMessage: no such lease here, an older one, or something no tree can hold.
        """
        if frames is None:
            codec.check(message)
        entry = self._growing.get(message.tree_id)
        if entry is None:
            return self._check_done(message, frames)
        if isinstance(message, Turn):
            return self._check_turn(entry, message, frames)
        if isinstance(message, TreeOpened):
            if entry.prompt is not None:
                if not np.array_equal(self._prompt(entry.prompt), message.prompt):
                    raise Conflict(f"tree {entry.tree_id} was opened with another prompt")
                return False
            _check_epoch(entry, message.lease_epoch)
            return True
        return _check_closed(entry, message)

    def add(self, message: TreeMessage, frames: Frames | None = None) -> bool:
        """Take in a message; False if it was known.  Raises what ``check`` raises, and changes nothing then."""
        if not self.check(message, frames):
            return False
        entry = self._growing[message.tree_id]
        if isinstance(message, TreeClosed):
            entry.closed = message
            self._changed.add(message.tree_id)
            return True
        store = self._store
        place = store.add(pack(frames if frames is not None else codec.encode(message)))
        if isinstance(message, Turn):
            added = TurnEntry.of(message, tree=entry.number, place=place)
            entry.turns[message.turn_id] = added
            entry.parents.add(message.parent_id)
        else:
            added = entry.prompt = TurnEntry.of_prompt(len(message.prompt), tree=entry.number, place=place)
        store.note(added)
        self.nbytes += place.nbytes
        return True

    def is_closed(self, tree_id: str) -> bool:
        return self._growing[tree_id].closed is not None

    def is_complete(self, tree_id: str) -> bool:
        """Whether the tree was opened and closed and every turn that the closing counted is there.

        A tree closed without a turn needs no prompt: its task could not be started.
        """
        entry = self._growing[tree_id]
        closed = entry.closed
        if closed is None or len(entry.turns) != closed.num_turns:
            return False
        return entry.prompt is not None or closed.num_turns == 0

    def tree(self, tree_id: str) -> TreeEntry:
        """As far as it has grown: what is attached; empty before it was opened."""
        entry = self._growing[tree_id]
        turns = [] if entry.prompt is None else entry.attached()
        # Without turns there is no prompt either: a closing may come before the opening, and ends a tree without any.
        prompt = rows_of([entry.prompt]) if entry.prompt is not None and turns else _NONE
        tree = TreeEntry(tree_id, entry.number, entry.task_index, prompt, rows_of(turns))
        if (closed := entry.closed) is None:
            return tree
        return replace(tree, failed_branches=closed.failed_branches).rewarded(closed.leaf_rewards)

    def num_leaves(self, tree_id: str) -> int:
        """Finished leaves so far; of a tree without parked turns, as ``tree`` has them."""
        return sum(turn.is_leaf for turn in self._growing[tree_id].turns.values())

    def num_parked(self) -> int:
        """Turns that wait for their parent or for their tree's prompt."""
        return sum(
            len(entry.turns) - (0 if entry.prompt is None else len(entry.attached()))
            for entry in self._growing.values()
        )

    def failures(self, tree_id: str) -> Mapping[str, int]:
        """Why chains of a tree failed, as it was closed -> how many; empty while it grows."""
        closed = self._growing[tree_id].closed
        return {} if closed is None else closed.failures

    def finish(self, tree_id: str) -> TreeEntry:
        """Remove and return the tree with its records; from now on its turns are only recognised."""
        tree = self.tree(tree_id)
        entry = self._growing.pop(tree_id)
        self._changed.add(tree_id)
        handed_over = {*tree.rows["turn_id"].tolist(), *tree.prompt["turn_id"].tolist()}
        rest = [turn for turn in entry.turns.values() if turn.turn_id not in handed_over]
        if entry.prompt is not None and ROOT not in handed_over:
            rest.append(entry.prompt)
        self._release(rest)
        self.nbytes -= tree.nbytes
        self._done[tree_id] = frozenset(entry.turns)
        while len(self._done) > self._remembered:
            self._done.popitem(last=False)
        return tree

    def _release(self, entries: Iterable[TurnEntry]) -> None:
        rows = rows_of(list(entries))
        self.nbytes -= int(rows["nbytes"].sum(dtype=np.int64))
        self._store.release(rows)

    def _prompt(self, entry: TurnEntry) -> np.ndarray:
        opened: TreeOpened = codec.decode(unpack(self._store.read(entry.place)), TreeOpened)
        return opened.prompt

    def _is_known(self, row: TurnEntry, turn: Turn, frames: Frames | None) -> bool:
        return bytes(self._store.read(row.place)) == pack(frames if frames is not None else codec.encode(turn))

    def _check_done(self, message: TreeMessage, frames: Frames | None) -> bool:
        known, finished = self._done.get(message.tree_id), self._find(message.tree_id)
        if known is None and finished is None:
            raise BadMessage(
                f"no lease of tree {message.tree_id} is known here (it is done, or another run's); ask for others"
            )
        if isinstance(message, Turn):
            row = None if finished is None else _row(finished.rows, message.turn_id)
            if row is None and (known is None or message.turn_id not in known):
                raise BadMessage(f"tree {message.tree_id} is finished; turn {message.turn_id} comes too late")
            if row is not None and not self._is_known(row, message, frames):
                raise Conflict(f"turn {message.turn_id} of finished tree {message.tree_id} came again with other bytes")
        return False

    def _check_turn(self, entry: Growing, turn: Turn, frames: Frames | None) -> bool:
        there = entry.turns.get(turn.turn_id)
        if there is not None:
            if not self._is_known(there, turn, frames):
                raise Conflict(f"turn {turn.turn_id} of tree {entry.tree_id} came again with other bytes")
            return False
        _check_epoch(entry, turn.lease_epoch)
        parent = entry.turns.get(turn.parent_id)
        fault: str | None = None
        if parent is not None and parent.is_leaf:
            fault = f"follows turn {parent.turn_id}, which ended its chain"
        elif turn.is_leaf and turn.turn_id in entry.parents:
            fault = "ends its chain but has children"
        elif entry.closed is not None:
            fault = _fault_of_last(entry, entry.closed, turn)
        if fault is not None:
            raise BadMessage(f"turn {turn.turn_id} of tree {entry.tree_id} {fault}")
        return True


def _fault_of_last(entry: Growing, closed: TreeClosed, turn: Turn) -> str | None:
    """A turn that came after its tree was closed."""
    if len(entry.turns) >= closed.num_turns:
        return f"is one more than the {closed.num_turns} it was closed with"
    if len(entry.turns) + 1 < closed.num_turns:
        return None
    leaves = {each.turn_id for each in entry.turns.values() if each.is_leaf}
    return _unknown_leaf(closed, leaves | ({turn.turn_id} if turn.is_leaf else set()))


def _unknown_leaf(closed: TreeClosed, leaves: set[int]) -> str | None:
    """Once all turns are there: a reward of a leaf that is none."""
    odd = next((each.turn_id for each in closed.leaf_rewards if each.turn_id not in leaves), None)
    return None if odd is None else f"was closed with a reward of turn {odd}, which is no leaf of it"


def _row(rows: Rows, turn_id: int) -> TurnEntry | None:
    at = np.flatnonzero(rows["turn_id"] == turn_id)
    return entry_of(rows[at[0]]) if len(at) else None


def _check_epoch(entry: Growing, epoch: int) -> None:
    if epoch != entry.epoch:
        raise BadMessage(
            f"tree {entry.tree_id} is leased under epoch {entry.epoch}, this comes from epoch {epoch}: abandon the tree"
        )


def _check_closed(entry: Growing, closed: TreeClosed) -> bool:
    if entry.closed is not None and entry.closed.lease_epoch == closed.lease_epoch:
        if _content(entry.closed) != _content(closed):
            raise Conflict(
                f"tree {entry.tree_id} was closed with {entry.closed.num_turns} turns, now {closed.num_turns}"
            )
        return False
    _check_epoch(entry, closed.lease_epoch)
    if closed.num_turns < len(entry.turns):
        raise BadMessage(f"tree {entry.tree_id} is closed with {closed.num_turns} turns, {len(entry.turns)} came")
    if closed.num_turns == len(entry.turns):
        fault = _unknown_leaf(closed, {turn.turn_id for turn in entry.turns.values() if turn.is_leaf})
        if fault is not None:
            raise BadMessage(f"tree {entry.tree_id} {fault}")
    return True


def _content(closed: TreeClosed) -> tuple[object, ...]:
    return closed.num_turns, closed.failed_branches, closed.failures, closed.leaf_rewards
