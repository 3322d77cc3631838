"""Which trees of a batch can be trained on; the others are left out, each with its reason.  Pure.

One bad tree must cost one tree: past this point a log-prob that is not a number makes the whole batch's loss one, a
token id outside the vocabulary reads beyond the embeddings (on a GPU that ends the process), and a broken chain of
parents has no row.

Where such trees come from.  ``atpo_async.wire.codec`` has held each message, from the socket and from a file alike
(``learner.batches.skipped.load_batch``), against what one turn promises: array types, lengths, spans that cover the
action, finite log-probs and rewards, ids from 0.  ``trees.assembly`` has held turns against each other.  Neither knows

- the model: a token id may be below 2**31 and beyond the vocabulary (an actor with another tokenizer, or an
  environment with a tokenizer of its own);
- the learner's version: turns may come from its future (a batch kept by a later run, weights copied between runs);
- how old a tree is by now: a batch may wait on its way;
- what is in a batch as a whole: trees without a finished leaf, turns whose parent is missing, no prompt.

A batch made in the same process (a test, a script that trains on recorded trees) has passed neither, so everything is
asked here again; it is cheap.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import ROOT, Turn, is_fresh, lag_versions
from atpo_async.wire.codec import LOGPROB_SLACK
from atpo_async.wire.messages import Batch, BatchTree

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
"""In the order in which they are asked: a tree with several faults is counted under the first."""

_LARGEST = float(np.finfo(np.float32).max)
"""The loss is taken in float32 at the least: beyond this a reward or weight is infinite there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sifted:
    """What is left of a batch, and what is not."""

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
class _Fault:
    reason: Reason
    fact: str
    """What is wrong, where, and with which value."""
    hint: str
    """What it means or where to look."""


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
    found: list[_Fault | None] = []
    for tree in batch.trees:
        decoded = _decoded(tree)
        if isinstance(decoded, _Fault):
            trees.append(tree)
            found.append(decoded)
        else:
            trees.append(decoded)
            found.append(_fault(decoded, version=version, vocab_size=vocab_size, max_lag=max_lag))
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


def _decoded(tree: BatchTree) -> BatchTree | _Fault:
    """The tree with its turns as such; they came as records that nobody has looked at since the buffer took them."""
    if isinstance(tree.turns, tuple):
        return tree
    try:
        turns = tuple(tree.turns)
    except BadMessage as exc:
        return _Fault("bad_record", str(exc), "the buffer's journal or its disk has damaged it: look there")
    return msgspec.structs.replace(tree, turns=turns)


def _fault(tree: BatchTree, *, version: int, vocab_size: int, max_lag: int) -> _Fault | None:
    # In the order of REASONS.  Each may rely on those before it.
    return (
        _structure(tree.turns)
        or _leaves(tree.turns)
        or _tokens(tree, vocab_size)
        or _logprobs(tree.turns)
        or _spans(tree.turns, version)
        or _rewards(tree)
        or _weight(tree)
        or _staleness(tree.turns, version, max_lag)
    )


def _counts(batch: Batch, fit: Sequence[BatchTree]) -> _Fault | None:
    """A fault of every tree: the mean they would be part of is over fewer trees or leaves than there are."""
    num_leaves = sum(turn.end != "continue" for tree in fit for turn in tree.turns)
    least = {
        "num_trees": len(fit),
        "num_leaves": num_leaves,
        "num_action_tokens": num_leaves,  # each row has one at the least
        "num_turn_tokens": len(fit),
    }
    for name, count in least.items():
        if getattr(batch, name) < count:
            return _Fault(
                "bad_counts",
                f"its batch has {name} = {getattr(batch, name)}, and this share alone has {count} or more",
                "the loss is divided by it: look at whatever made this batch",
            )
    return None


def _structure(turns: Sequence[Turn]) -> _Fault | None:
    ids = [turn.turn_id for turn in turns]
    parents = [turn.parent_id for turn in turns]
    known = {ROOT, *ids}
    ended = {turn.turn_id for turn in turns if turn.end != "continue"}
    if (
        len(known) == len(ids) + 1
        and all(map(operator.lt, parents, ids))
        and known.issuperset(parents)
        and ended.isdisjoint(parents)
    ):
        return None
    seen = {ROOT}
    for turn_id, parent_id in zip(ids, parents, strict=True):
        if turn_id in seen:
            fact = "turn 0 is among its turns: 0 is the prompt" if turn_id == ROOT else f"turn {turn_id} is there twice"
        elif not ROOT <= parent_id < turn_id:
            fact = f"turn {turn_id} has parent {parent_id}: a parent's id is at least 0 and below its child's"
        elif parent_id not in known:
            fact = f"turn {turn_id} follows turn {parent_id}, which is not in the tree"
        elif parent_id in ended:
            fact = f"turn {turn_id} follows turn {parent_id}, which ended its chain"
        else:
            seen.add(turn_id)
            continue
        break
    return _Fault("bad_structure", fact, "it was put together wrongly: look at whatever made this batch")


def _leaves(turns: Sequence[Turn]) -> _Fault | None:
    if any(turn.end != "continue" for turn in turns):
        return None
    return _Fault(
        "no_leaf",
        f"none of its {len(turns)} turns ends a chain",
        "without a reward there is nothing to learn from: look for why its branches failed (actor/failed/*)",
    )


def _tokens(tree: BatchTree, vocab_size: int) -> _Fault | None:
    turns = tree.turns
    actions = [turn.action for turn in turns]
    arrays = [tree.prompt, *actions, *(turn.observation for turn in turns)]
    if tree.prompt.size and all(action.size for action in actions) and _are_tokens(arrays, vocab_size):
        return None
    if not tree.prompt.size:
        return _Fault("empty_prompt", "its prompt has no tokens", "nothing would predict the first token of an action")
    for turn in turns:
        if not turn.action.size:
            return _Fault(
                "empty_action",
                f"turn {turn.turn_id} has no action tokens",
                "a turn has at least its stop token: look at the engine that generated it",
            )
    named = [("the prompt", tree.prompt)]
    for turn in turns:
        named += [
            (f"the observation of turn {turn.turn_id}", turn.observation),
            (f"the action of turn {turn.turn_id}", turn.action),
        ]
    where, array = next((where, array) for where, array in named if not _are_tokens([array], vocab_size))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        fact = f"{where} is {array.dtype}{list(array.shape)}, not a line of token ids"
    else:
        at = int(np.flatnonzero((array < 0) | (array >= vocab_size))[0])
        fact = f"token {at} of {where} is {array[at]}, the vocabulary has ids 0 to {vocab_size - 1}"
    return _Fault(
        "bad_token", fact, "actors, environment and learner must use one tokenizer: compare model.path and theirs"
    )


def _are_tokens(arrays: Sequence[np.ndarray], vocab_size: int) -> bool:
    tokens = _joined(arrays, kinds="iu")
    return tokens is not None and (not tokens.size or bool(tokens.min() >= 0 and tokens.max() < vocab_size))


def _joined(arrays: Sequence[np.ndarray], *, kinds: str) -> np.ndarray | None:
    """All of them, end to end; None unless each has one dimension and a type of one of ``kinds``."""
    if any(array.ndim != 1 or array.dtype.kind not in kinds for array in arrays):
        return None
    joined: np.ndarray = np.concatenate(arrays)
    return joined


def _logprobs(turns: Sequence[Turn]) -> _Fault | None:
    if [turn.logprobs.size for turn in turns] == [len(turn.action) for turn in turns] and _are_logprobs(
        [turn.logprobs for turn in turns]
    ):
        return None
    for turn in turns:
        found, length = turn.logprobs, len(turn.action)
        if found.ndim != 1 or found.dtype.kind != "f":
            fact = f"the log-probs of turn {turn.turn_id} are {found.dtype}{list(found.shape)}, not a line of floats"
        elif len(found) != length:
            fact = f"turn {turn.turn_id} has {len(found)} log-probs for {length} action tokens"
        elif not _are_logprobs([found]):
            at = int(np.flatnonzero(~(np.isfinite(found) & (found <= LOGPROB_SLACK)))[0])
            fact = f"log-prob {at} of turn {turn.turn_id} is {found[at]}, expected finite and at most 0"
        else:
            continue
        break
    return _Fault(
        "bad_logprobs", fact, "without mu's there is no importance weight: look at the engine that generated it"
    )


def _are_logprobs(arrays: Sequence[np.ndarray]) -> bool:
    values = _joined(arrays, kinds="f")
    # Whatever is compared with a NaN is false.
    return values is not None and bool(values.min() > -np.inf and values.max() <= LOGPROB_SLACK)


def _spans(turns: Sequence[Turn], version: int) -> _Fault | None:
    future: _Fault | None = None
    for turn in turns:
        end, length = 0, len(turn.action)
        for span in turn.spans:
            if span.start != end or not end < span.end <= length or span.version < 0:
                return _Fault(
                    "bad_spans",
                    f"turn {turn.turn_id} has a span {span.start}:{span.end} of version {span.version} after {end} of "
                    f"its {length} action tokens",
                    "each token needs the one version that sampled it: look at the engine that generated it",
                )
            end = span.end
            if span.version > version and future is None:
                future = _Fault(
                    "future_version",
                    f"turn {turn.turn_id} has tokens of version {span.version}, the learner is at {version}",
                    "no weights of this run made them: is the batch, or are an actor's weights, another run's?",
                )
        if end != length:
            return _Fault(
                "bad_spans",
                f"the spans of turn {turn.turn_id} cover {end} of {length} action tokens",
                "each token needs the one version that sampled it: look at the engine that generated it",
            )
    return future


def _rewards(tree: BatchTree) -> _Fault | None:
    for turn in tree.turns:
        reward: Any = turn.reward
        if turn.end == "continue":
            if reward is None:
                continue
            fact = f"turn {turn.turn_id} goes on and has reward {reward}, only leaves have one"
        elif reward is None:
            fact = f"leaf {turn.turn_id} has no reward"
        elif not abs(reward) <= _LARGEST:
            fact = f"leaf {turn.turn_id} has reward {reward}, expected a finite number (float32)"
        else:
            continue
        return _Fault("bad_reward", fact, f"look at what the environment returns for task {tree.task_index}")
    return None


def _weight(tree: BatchTree) -> _Fault | None:
    if 0 <= tree.weight <= _LARGEST:
        return None
    return _Fault(
        "bad_weight",
        f"its priority weight is {tree.weight}, expected a finite number of at least 0",
        f"it was drawn with probability {tree.probability}: look at the buffer's priorities",
    )


def _staleness(turns: Sequence[Turn], version: int, max_lag: int) -> _Fault | None:
    leaves = [turn for turn in turns if turn.end != "continue"]
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
    return _Fault(
        "all_stale",
        f"the freshest of its {len(on_a_path)} turns is {lag} versions old, over staleness.max_lag = {max_lag}",
        "it waited too long for its turn: see lag/* and the knobs of staleness",
    )
