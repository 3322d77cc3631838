"""Decides which trees of a batch can be trained on; the others are left out, each with its reason.  Pure.

One bad tree must cost one tree: past this point a log-prob that is not a number makes the whole batch's loss one, a
token id outside the vocabulary reads beyond the embeddings (on a GPU that ends the process), and a broken chain of
parents has no row.

Where such trees come from.  ``atpo_async.wire.codec`` has checked each turn that it decoded, from the socket and from a
file alike (``learner.batches.skipped.load_batch``), against the rules of a turn (``atpo_async.wire.checks``).  Turns of
a batch that was made in this process (a test, a script that trains on recorded trees) are checked in the same way here.
``trees.assembly`` has checked turns against each other.  Neither knows

- the model: a token id may be below 2**31 and beyond the vocabulary (an actor with another tokenizer, or an
  environment with a tokenizer of its own);
- the learner's version: turns may come from its future (a batch saved by a later run, weights copied between runs);
- how old a tree is by now: a batch may wait on its way;
- what is in a batch as a whole: trees without a finished leaf, turns whose parent is missing, no prompt.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import msgspec
import numpy as np

from atpo_async.core.bounds import MAX_NUMBER
from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import ROOT, Turn, is_fresh, lag_versions
from atpo_async.wire.checks import faults_of
from atpo_async.wire.messages import Batch, BatchTree
from atpo_async.wire.rules import token_fault

Reason = Literal[
    "bad_record",
    "bad_structure",
    "no_leaf",
    "empty_prompt",
    "empty_action",
    "bad_token",
    "bad_logprobs",
    "bad_spans",
    "future_version",
    "bad_reward",
    "bad_weight",
    "all_stale",
    "bad_counts",
]
REASONS: tuple[Reason, ...] = get_args(Reason)
"""In the order in which they are checked: a tree with several faults is counted under the first."""

_OF_A_TURN: dict[str, tuple[Reason, str]] = {
    "order": ("bad_structure", "it was put together wrongly: look at whatever made this batch"),
    "action": ("empty_action", "a turn has at least its stop token: look at the engine that generated it"),
    "tokens": (
        "bad_token",
        "actors, environment and learner must use one tokenizer: compare model.path and theirs",
    ),
    "logprobs": ("bad_logprobs", "without mu's there is no importance weight: look at the engine that generated it"),
    "spans": ("bad_spans", "each token needs the one version that sampled it: look at the engine that generated it"),
    "outcome": ("bad_reward", "look at what the environment returns for its task"),
}
"""Kind of a turn's fault (``wire.checks.faults_of``) -> the reason that its tree is counted under, where to look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sifted:
    """The trees of a batch that are fit, and those that are left out."""

    batch: Batch
    """The trees that are fit, in the same order, their turns decoded; all else as it was."""
    dropped: dict[Reason, tuple[str, ...]]
    """Ids of the trees left out; reasons that no tree gave are not in it."""
    messages: tuple[str, ...]
    """A line for each tree left out."""

    def metrics(self) -> dict[str, float]:
        """``dropped/<reason>``: trees left out, 0 too.  To be added over ranks."""
        return {f"dropped/{reason}": float(len(self.dropped.get(reason, ()))) for reason in REASONS}


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a tree is left out."""

    reason: Reason
    fact: str
    """What is wrong, where, and with which value."""
    hint: str
    """What the fault means, or where to look."""


def sift(batch: Batch, *, version: int, vocab_size: int, max_lag: int) -> Sifted:
    """Leave out the trees that must not, or cannot, be trained on.

    The batch's ``num_*`` stay what they are.  They are the normalisers of the global mean, counted by the buffer over
    all ranks' shares, and each rank sifts only its own: a rank that corrected them would divide by another number
    than the others.  So a tree left out counts as one whose every turn is masked, and the rest weighs what it
    would have weighed.  (With ``learner.minibatches`` above 1 the trainer counts the trees of each part anew, summed
    over the ranks: there the rest weighs more.)  A share with more trees or leaves than its batch claims to have in
    all is left out as a whole.

    Args:
        batch: this rank's share.
        version: being trained; nothing may be newer.
        vocab_size: rows of the model's embeddings.
        max_lag: a tree with no turn within it, on the way to a finished leaf, has nothing to train on.
    """
    trees: list[BatchTree] = []
    found: list[Fault | None] = []
    for tree in batch.trees:
        decoded, fault = examined(tree, version=version, vocab_size=vocab_size, max_lag=max_lag)
        trees.append(decoded)
        found.append(fault)
    miscounted = _counts(batch, [tree for tree, fault in zip(trees, found, strict=True) if fault is None])
    kept: list[BatchTree] = []
    dropped: dict[Reason, tuple[str, ...]] = {}
    messages: list[str] = []
    for tree, own in zip(trees, found, strict=True):
        fault = own or miscounted
        if fault is None:
            kept.append(tree)
            continue
        dropped[fault.reason] = (*dropped.get(fault.reason, ()), tree.tree_id)
        messages.append(f"tree {tree.tree_id} is left out ({fault.reason}): {fault.fact}; {fault.hint}")
    all_as_they_were = len(kept) == len(batch.trees) and all(map(operator.is_, kept, batch.trees))
    return Sifted(
        batch=batch if all_as_they_were else msgspec.structs.replace(batch, trees=tuple(kept)),
        dropped=dropped,
        messages=tuple(messages),
    )


def examined(tree: BatchTree, *, version: int, vocab_size: int, max_lag: int) -> tuple[BatchTree, Fault | None]:
    """A tree with its turns decoded, as far as that can be, and its first fault; arguments are those of ``sift``."""
    decoded = _decoded(tree)
    if isinstance(decoded, Fault):
        return tree, decoded
    # Turns that were decoded just now have been checked one by one.
    of_turns = _turn_faults(tree) if decoded is tree else []
    return decoded, _first(decoded, of_turns, version=version, vocab_size=vocab_size, max_lag=max_lag)


def _decoded(tree: BatchTree) -> BatchTree | Fault:
    """The tree with its turns decoded; they came as records that were not decoded since the buffer received them."""
    if isinstance(tree.turns, tuple):
        return tree
    try:
        turns = tuple(tree.turns)
    except BadMessage as exc:
        return Fault("bad_record", str(exc), "the buffer's journal or its disk has damaged it: look there")
    return msgspec.structs.replace(tree, turns=turns)


def _turn_faults(tree: BatchTree) -> list[Fault]:
    """Faults of single turns against the rules of a turn."""
    found = []
    for turn in tree.turns:
        for part, fact in faults_of(turn):
            reason, hint = _OF_A_TURN[part]
            found.append(Fault(reason, f"turn {turn.turn_id}: {fact}", hint))
    return found


def _first(tree: BatchTree, of_turns: list[Fault], *, version: int, vocab_size: int, max_lag: int) -> Fault | None:
    """The fault that comes first in REASONS."""
    own = min(of_turns, key=lambda fault: REASONS.index(fault.reason), default=None)
    # Each check may rely on those before it, and on the rules of a turn.
    questions: tuple[tuple[Reason, Callable[[], Fault | None]], ...] = (
        ("bad_structure", lambda: _structure(tree.turns)),
        ("no_leaf", lambda: _leaves(tree.turns)),
        ("empty_prompt", lambda: _prompt(tree)),
        ("bad_token", lambda: _tokens(tree, vocab_size)),
        ("future_version", lambda: _versions(tree.turns, version)),
        ("bad_weight", lambda: _weight(tree)),
        ("all_stale", lambda: _staleness(tree.turns, version, max_lag)),
    )
    for reason, ask in questions:
        if own is not None and REASONS.index(own.reason) <= REASONS.index(reason):
            return own
        if (fault := ask()) is not None:
            return fault
    return own


def _counts(batch: Batch, fit: Sequence[BatchTree]) -> Fault | None:
    """A fault of every tree: the mean they would be part of is over fewer trees or leaves than there are."""
    num_leaves = sum(turn.is_leaf for tree in fit for turn in tree.turns)
    least = {
        "num_trees": len(fit),
        "num_leaves": num_leaves,
        "num_action_tokens": num_leaves,  # each row has one at the least
        "num_turn_tokens": len(fit),
    }
    for name, count in least.items():
        if getattr(batch, name) < count:
            return Fault(
                "bad_counts",
                f"its batch has {name} = {getattr(batch, name)}, and this share alone has {count} or more",
                "the loss is divided by it: look at whatever made this batch",
            )
    return None


def _structure(turns: Sequence[Turn]) -> Fault | None:
    seen = {ROOT}
    known = {ROOT, *(turn.turn_id for turn in turns)}
    ended = {turn.turn_id for turn in turns if turn.is_leaf}
    for turn in turns:
        if turn.turn_id in seen:
            fact = f"turn {turn.turn_id} is there twice"
        elif turn.parent_id not in known:
            fact = f"turn {turn.turn_id} follows turn {turn.parent_id}, which is not in the tree"
        elif turn.parent_id in ended:
            fact = f"turn {turn.turn_id} follows turn {turn.parent_id}, which ended its chain"
        else:
            seen.add(turn.turn_id)
            continue
        return Fault("bad_structure", fact, _OF_A_TURN["order"][1])
    return None


def _leaves(turns: Sequence[Turn]) -> Fault | None:
    if any(turn.is_leaf for turn in turns):
        return None
    return Fault(
        "no_leaf",
        f"none of its {len(turns)} turns ends a chain",
        "without a reward there is nothing to learn from: look for why its branches failed (actor/failed/*)",
    )


def _prompt(tree: BatchTree) -> Fault | None:
    if tree.prompt.size or all(turn.observation.size for turn in tree.turns if turn.parent_id == ROOT):
        return None
    return Fault("empty_prompt", "its prompt has no tokens", "nothing would predict the first token of an action")


def _tokens(tree: BatchTree, vocab_size: int) -> Fault | None:
    hint = _OF_A_TURN["tokens"][1]
    if fact := token_fault("its prompt", tree.prompt):
        return Fault("bad_token", fact, hint)
    arrays = [tree.prompt, *(tokens for turn in tree.turns for tokens in (turn.observation, turn.action))]
    if np.concatenate(arrays).max() < vocab_size:
        return None
    names = ["the prompt"]
    for turn in tree.turns:
        names += [f"the observation of turn {turn.turn_id}", f"the action of turn {turn.turn_id}"]
    where, tokens = next((n, a) for n, a in zip(names, arrays, strict=True) if a.size and a.max() >= vocab_size)
    at = int(np.flatnonzero(tokens >= vocab_size)[0])
    fact = f"token {at} of {where} is {tokens[at]}, the vocabulary has ids 0 to {vocab_size - 1}"
    return Fault("bad_token", fact, hint)


def _versions(turns: Sequence[Turn], version: int) -> Fault | None:
    for turn in turns:
        if turn.newest_version > version:
            return Fault(
                "future_version",
                f"turn {turn.turn_id} has tokens of version {turn.newest_version}, the learner is at {version}",
                "no weights of this run made them: is the batch, or are an actor's weights, another run's?",
            )
    return None


def _weight(tree: BatchTree) -> Fault | None:
    if 0 <= tree.weight <= MAX_NUMBER:
        return None
    return Fault(
        "bad_weight",
        f"its priority weight is {tree.weight}, expected a finite number of at least 0",
        f"it was drawn with probability {tree.probability}: look at the buffer's priorities",
    )


def _staleness(turns: Sequence[Turn], version: int, max_lag: int) -> Fault | None:
    leaves = [turn for turn in turns if turn.is_leaf]
    if any(is_fresh(leaf, current=version, max_lag=max_lag) for leaf in leaves):
        return None
    by_id = {turn.turn_id: turn for turn in turns}
    on_a_path: dict[int, Turn] = {}
    for leaf in leaves:
        turn_id = leaf.turn_id
        while turn_id != ROOT and turn_id not in on_a_path:
            on_a_path[turn_id] = by_id[turn_id]
            turn_id = by_id[turn_id].parent_id
    lag = min(lag_versions(turn, current=version) for turn in on_a_path.values())
    if lag <= max_lag:
        return None
    return Fault(
        "all_stale",
        f"the freshest of its {len(on_a_path)} turns is {lag} versions old, over staleness.max_lag = {max_lag}",
        "it waited too long for its turn: see lag/* and the settings of staleness",
    )
