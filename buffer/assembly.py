"""Turns -> trees: idempotent, in any order, orphans parked.  Pure.

A tree is known from the moment its lease is granted.  Messages about it may come in any order and any number of
times; what comes out depends only on which came.  The key of a turn is ``(run, tree_id, turn_id)``: the same bytes
again change nothing, other bytes are a conflict.  A newer lease fences the older one's turns off.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from atpo_async.errors import BadMessage, Conflict
from atpo_async.messages import TaskKind, TreeClosed, TreeOpened
from atpo_async.tree import ROOT, Turn, TurnTree
from buffer.replay import turn_nbytes

REMEMBERED_TREES = 2048
"""Finished trees whose turns are still recognised when an actor sends them again after a reconnect."""

TreeMessage = TreeOpened | Turn | TreeClosed


@dataclass(slots=True)
class _Growing:
    """What has come of one tree."""

    tree_id: str
    task_index: int
    kind: TaskKind
    epoch: int
    prompt: np.ndarray | None = None
    turns: dict[int, Turn] = field(default_factory=dict)
    closed: TreeClosed | None = None

    def attached(self) -> list[Turn]:
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
    """The trees under lease, and a memory of those that are done."""

    def __init__(self, *, remembered_trees: int = REMEMBERED_TREES) -> None:
        self._growing: dict[str, _Growing] = {}
        self._done: OrderedDict[str, dict[int, bytes]] = OrderedDict()
        self._remembered = remembered_trees
        self.nbytes = 0
        """Bytes of the turns of unfinished trees."""

    def __contains__(self, tree_id: object) -> bool:
        return tree_id in self._growing

    def __len__(self) -> int:
        return len(self._growing)

    def expect(self, tree_id: str, *, task_index: int, kind: TaskKind, epoch: int) -> None:
        """A lease was granted: take this tree's turns under ``epoch`` from now on.

        On a reissue the turns that are attached stay; parked ones go, for their ids may come again.
        """
        entry = self._growing.get(tree_id)
        if entry is None:
            self._growing[tree_id] = _Growing(tree_id, task_index, kind, epoch)
            return
        if epoch <= entry.epoch:
            raise ValueError(f"tree {tree_id} is at lease epoch {entry.epoch}, cannot go to {epoch}")
        kept = {turn.turn_id: turn for turn in entry.attached()}
        self.nbytes -= sum(turn_nbytes(t) for i, t in entry.turns.items() if i not in kept)
        entry.turns, entry.closed, entry.epoch = kept, None, epoch

    def check(self, message: TreeMessage) -> bool:
        """Whether ``message`` says anything new.

        Raises:
            Conflict: its key is there with other bytes.
            BadMessage: no such lease here, an older one, or something no tree can hold.
        """
        entry = self._growing.get(message.tree_id)
        if entry is None:
            return self._check_done(message)
        if isinstance(message, Turn):
            return _check_turn(entry, message)
        if isinstance(message, TreeOpened):
            if entry.prompt is not None:
                if not np.array_equal(entry.prompt, message.prompt):
                    raise Conflict(f"tree {entry.tree_id} was opened with another prompt")
                return False
            _check_epoch(entry, message.lease_epoch)
            return True
        return _check_closed(entry, message)

    def add(self, message: TreeMessage) -> bool:
        """Take in a message; False if it was known.  Raises what ``check`` raises, and changes nothing then."""
        if not self.check(message):
            return False
        entry = self._growing[message.tree_id]
        if isinstance(message, Turn):
            entry.turns[message.turn_id] = message
            self.nbytes += turn_nbytes(message)
        elif isinstance(message, TreeOpened):
            entry.prompt = message.prompt
        else:
            entry.closed = message
        return True

    def is_complete(self, tree_id: str) -> bool:
        """Whether the tree was opened and closed and every turn that the closing counted is there.

        A tree closed without a turn needs no prompt: its task could not be started.
        """
        entry = self._growing[tree_id]
        closed = entry.closed
        if closed is None or len(entry.turns) != closed.num_turns:
            return False
        return entry.prompt is not None or closed.num_turns == 0

    def tree(self, tree_id: str) -> TurnTree:
        """As far as it has grown: what is attached; empty before it was opened."""
        entry = self._growing[tree_id]
        turns = () if entry.prompt is None else tuple(entry.attached())
        # Without turns there is no prompt either: a closing may come before the opening, and ends a tree without any.
        prompt = entry.prompt if entry.prompt is not None and turns else np.zeros(0, dtype=np.int32)
        failed = 0 if entry.closed is None else entry.closed.failed_branches
        return TurnTree(tree_id, entry.task_index, prompt, turns, failed)

    def num_parked(self) -> int:
        """Turns that wait for their parent or for their tree's prompt."""
        return sum(
            len(entry.turns) - (0 if entry.prompt is None else len(entry.attached()))
            for entry in self._growing.values()
        )

    def finish(self, tree_id: str) -> TurnTree:
        """Hand the tree over; from now on its turns are only recognised."""
        tree = self.tree(tree_id)
        entry = self._growing.pop(tree_id)
        self.nbytes -= sum(turn_nbytes(turn) for turn in entry.turns.values())
        self._done[tree_id] = {turn.turn_id: fingerprint(turn) for turn in entry.turns.values()}
        while len(self._done) > self._remembered:
            self._done.popitem(last=False)
        return tree

    def _check_done(self, message: TreeMessage) -> bool:
        known = self._done.get(message.tree_id)
        if known is None:
            raise BadMessage(
                f"no lease of tree {message.tree_id} is known here (the buffer may have restarted); ask for others"
            )
        if isinstance(message, Turn):
            if message.turn_id not in known:
                raise BadMessage(f"tree {message.tree_id} is finished; turn {message.turn_id} comes too late")
            if known[message.turn_id] != fingerprint(message):
                raise Conflict(f"turn {message.turn_id} of finished tree {message.tree_id} came again with other bytes")
        return False


def _check_epoch(entry: _Growing, epoch: int) -> None:
    if epoch != entry.epoch:
        raise BadMessage(
            f"tree {entry.tree_id} is leased under epoch {entry.epoch}, this comes from epoch {epoch}: abandon the tree"
        )


def _check_turn(entry: _Growing, turn: Turn) -> bool:
    name = f"turn {turn.turn_id} of tree {entry.tree_id}"
    there = entry.turns.get(turn.turn_id)
    if there is not None:
        if not same_turn(there, turn):
            raise Conflict(f"{name} came again with other bytes")
        return False
    _check_epoch(entry, turn.lease_epoch)
    if not 0 <= turn.parent_id < turn.turn_id:
        raise BadMessage(f"{name} has parent {turn.parent_id}: a parent's id is below its children's")
    if turn.is_leaf == (turn.reward is None):
        raise BadMessage(f"{name} ends with {turn.end!r} and has reward {turn.reward}: leaves have one, others none")
    if turn.reward is not None and not np.isfinite(turn.reward):
        raise BadMessage(f"{name} has reward {turn.reward}")
    parent = entry.turns.get(turn.parent_id)
    if parent is not None and parent.is_leaf:
        raise BadMessage(f"{name} follows turn {parent.turn_id}, which ended its chain")
    if turn.is_leaf and any(other.parent_id == turn.turn_id for other in entry.turns.values()):
        raise BadMessage(f"{name} ends its chain but has children")
    if entry.closed is not None and len(entry.turns) >= entry.closed.num_turns:
        raise BadMessage(f"{name} is one more than the {entry.closed.num_turns} it was closed with")
    return True


def _check_closed(entry: _Growing, closed: TreeClosed) -> bool:
    if entry.closed is not None and entry.closed.lease_epoch == closed.lease_epoch:
        same = (entry.closed.num_turns, entry.closed.failed_branches, entry.closed.failures) == (
            closed.num_turns,
            closed.failed_branches,
            closed.failures,
        )
        if not same:
            raise Conflict(
                f"tree {entry.tree_id} was closed with {entry.closed.num_turns} turns, now {closed.num_turns}"
            )
        return False
    _check_epoch(entry, closed.lease_epoch)
    if closed.num_turns < len(entry.turns):
        raise BadMessage(f"tree {entry.tree_id} is closed with {closed.num_turns} turns, {len(entry.turns)} came")
    return True


def same_turn(one: Turn, other: Turn) -> bool:
    """Whether two turns are the same in every field and every array element."""
    return _plain(one) == _plain(other) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(_arrays(one), _arrays(other), strict=True)
    )


def fingerprint(turn: Turn) -> bytes:
    """16 bytes that differ for turns that differ."""
    digest = hashlib.blake2b(repr(_plain(turn)).encode(), digest_size=16)
    for array in _arrays(turn):
        digest.update(f"{array.dtype.str}{len(array)}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def _arrays(turn: Turn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return turn.observation, turn.action, turn.logprobs


def _plain(turn: Turn) -> tuple[object, ...]:
    return (
        turn.run, turn.tree_id, turn.turn_id, turn.parent_id, turn.lease_epoch, turn.expansion_round, turn.spans,
        turn.end, turn.reward, turn.success, turn.generate_s, turn.environment_s,
    )  # fmt: skip
