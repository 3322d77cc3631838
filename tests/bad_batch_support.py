"""Batches with one fault each, by name: what ``learner.intake`` must leave out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np

from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire.messages import Batch, BatchTree
from learner.batches.intake import Reason
from tests.learner_support import VOCAB, make_batch

VERSION, MAX_LAG = 20, 8
TREES = 3
Change = Callable[[BatchTree], BatchTree]


def with_tree(batch: Batch, index: int, change: Change) -> Batch:
    trees = list(batch.trees)
    trees[index] = change(trees[index])
    return msgspec.structs.replace(batch, trees=tuple(trees))


def tree_with(**fields: Any) -> Change:
    return lambda tree: msgspec.structs.replace(tree, **fields)


def turn_with(number: int, /, **fields: Any) -> Change:
    """The tree with other fields of one turn; a callable gets the turn and gives the field."""

    def change(tree: BatchTree) -> BatchTree:
        def of(turn: Turn) -> Turn:
            given = {k: v(turn) if callable(v) else v for k, v in fields.items()}
            return msgspec.structs.replace(turn, **given) if turn.turn_id == number else turn

        return msgspec.structs.replace(tree, turns=tuple(of(turn) for turn in tree.turns))

    return change


def every_turn_with(**fields: Any) -> Change:
    def change(tree: BatchTree) -> BatchTree:
        for turn in tree.turns:
            tree = turn_with(turn.turn_id, **fields)(tree)
        return tree

    return change


def item(name: str, value: Any) -> Callable[[Turn], np.ndarray]:
    """The turn's array with another first item."""

    def change(turn: Turn) -> np.ndarray:
        array: np.ndarray = getattr(turn, name).copy()
        array[0] = value
        return array

    return change


def span(version: int) -> Callable[[Turn], tuple[VersionSpan, ...]]:
    return lambda turn: (VersionSpan(version, 0, len(turn.action)),)


def logprob(value: float) -> Change:
    return turn_with(5, logprobs=item("logprobs", value))


def int32(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def without_leaves(tree: BatchTree) -> BatchTree:
    """As a tree whose branches all failed: its turns lead nowhere."""
    return msgspec.structs.replace(tree, turns=tuple(turn for turn in tree.turns if not turn.is_leaf))


def without_turn(turn_id: int) -> Change:
    return lambda tree: msgspec.structs.replace(tree, turns=tuple(t for t in tree.turns if t.turn_id != turn_id))


def repeating(tree: BatchTree) -> BatchTree:
    return msgspec.structs.replace(tree, turns=(*tree.turns, tree.turns[-1]))


def moving_a_log_prob(tree: BatchTree) -> BatchTree:
    """From turn 1 to turn 2: as many as before in all."""
    tree = turn_with(2, logprobs=longer)(tree)
    return turn_with(1, logprobs=lambda turn: turn.logprobs[:-1])(tree)


def longer(turn: Turn) -> np.ndarray:
    return np.append(turn.logprobs, turn.logprobs[:1])


def three_tokens(*spans: tuple[int, int, int]) -> dict[str, Any]:
    """An action of three tokens with these spans (version, start, end)."""
    return {
        "action": int32(1, 2, 3),
        "logprobs": -np.ones(3, dtype=np.float32),
        "spans": tuple(VersionSpan(*each) for each in spans),
    }


NO_ACTION = {"action": int32(), "logprobs": np.zeros(0, dtype=np.float32), "spans": ()}


class Bad(NamedTuple):
    change: Change
    """To a good tree."""
    reason: Reason
    says: str
    """What the message about it must contain."""


BAD = {
    "no turns": Bad(tree_with(turns=()), "no_leaf", "none of its 0 turns"),
    "no leaves": Bad(without_leaves, "no_leaf", "none of its 2 turns ends a chain"),
    "a leaf without a reward": Bad(turn_with(4, reward=None), "bad_reward", "turn 4: reward is None with end 'done'"),
    "a reward of nan": Bad(turn_with(4, reward=math.nan), "bad_reward", "turn 4: reward is nan"),
    "a reward of inf": Bad(turn_with(3, reward=math.inf), "bad_reward", "turn 3: reward is inf"),
    "a reward of -inf": Bad(turn_with(3, reward=-math.inf), "bad_reward", "turn 3: reward is -inf"),
    "a reward beyond float32": Bad(turn_with(3, reward=1e300), "bad_reward", "turn 3: reward is 1e+300"),
    "a reward on an inner turn": Bad(
        turn_with(2, reward=1.0), "bad_reward", "turn 2: reward is 1.0 with end 'continue'"
    ),
    "a log-prob of nan": Bad(logprob(math.nan), "bad_logprobs", "turn 5: logprobs[0] is nan"),
    "a log-prob of -inf": Bad(logprob(-math.inf), "bad_logprobs", "turn 5: logprobs[0] is -inf"),
    "a log-prob of inf": Bad(logprob(math.inf), "bad_logprobs", "turn 5: logprobs[0] is inf"),
    "a positive log-prob": Bad(logprob(0.25), "bad_logprobs", "turn 5: logprobs[0] is 0.25"),
    "a log-prob too few": Bad(turn_with(2, logprobs=lambda t: t.logprobs[:-1]), "bad_logprobs", "turn 2: "),
    "a log-prob too many": Bad(turn_with(2, logprobs=longer), "bad_logprobs", "turn 2: "),
    "a log-prob at the turn before": Bad(moving_a_log_prob, "bad_logprobs", "turn 1: "),
    "log-probs that are whole numbers": Bad(
        turn_with(2, logprobs=lambda t: -np.ones(len(t.action), dtype=np.int32)),
        "bad_logprobs",
        "turn 2: logprobs is int32[",
    ),
    "log-probs in two dimensions": Bad(
        turn_with(2, logprobs=lambda t: t.logprobs[None]), "bad_logprobs", "turn 2: logprobs is float32[1, "
    ),
    "a version from the future": Bad(
        turn_with(2, spans=span(VERSION + 1)),
        "future_version",
        f"turn 2 has tokens of version {VERSION + 1}, the learner is at {VERSION}",
    ),
    "a negative version": Bad(turn_with(2, spans=span(-1)), "bad_spans", "turn 2: spans[0]: version is -1"),
    "no spans": Bad(turn_with(2, spans=()), "bad_spans", "turn 2: spans cover 0 of"),
    "spans that end early": Bad(
        turn_with(2, **three_tokens((1, 0, 2))), "bad_spans", "turn 2: spans cover 2 of 3 action tokens"
    ),
    "spans that end late": Bad(
        turn_with(2, **three_tokens((1, 0, 4))), "bad_spans", "turn 2: span (version 1, 0:4) does not follow"
    ),
    "spans with a gap": Bad(
        turn_with(2, **three_tokens((1, 0, 1), (2, 2, 3))),
        "bad_spans",
        "turn 2: span (version 2, 2:3) does not follow 1 of 3 action tokens",
    ),
    "spans that overlap": Bad(
        turn_with(2, **three_tokens((1, 0, 2), (2, 1, 3))),
        "bad_spans",
        "turn 2: span (version 2, 1:3) does not follow 2",
    ),
    "an empty span": Bad(
        turn_with(2, **three_tokens((1, 0, 0), (1, 0, 3))),
        "bad_spans",
        "turn 2: span (version 1, 0:0) does not follow 0",
    ),
    "a turn with no action tokens": Bad(turn_with(2, **NO_ACTION), "empty_action", "turn 2: action is empty"),
    "an action token beyond the vocabulary": Bad(
        turn_with(4, action=item("action", VOCAB)),
        "bad_token",
        f"token 0 of the action of turn 4 is {VOCAB}, the vocabulary has ids 0 to {VOCAB - 1}",
    ),
    "a negative action token": Bad(
        turn_with(4, action=item("action", -1)), "bad_token", "turn 4: action has the negative token id -1"
    ),
    "an observation token beyond the vocabulary": Bad(
        turn_with(2, observation=int32(0, 2**31 - 1)),
        "bad_token",
        "token 1 of the observation of turn 2 is 2147483647",
    ),
    "a negative observation token": Bad(
        turn_with(2, observation=int32(-3)), "bad_token", "turn 2: observation has the negative token id -3"
    ),
    "a prompt token beyond the vocabulary": Bad(
        tree_with(prompt=int32(1, VOCAB)), "bad_token", f"token 1 of the prompt is {VOCAB}"
    ),
    "a negative prompt token": Bad(
        tree_with(prompt=int32(1, -7)), "bad_token", "its prompt has the negative token id -7"
    ),
    "tokens that are no whole numbers": Bad(
        turn_with(4, action=lambda t: t.action.astype(np.float64)), "bad_token", "turn 4: action is float64["
    ),
    "tokens in two dimensions": Bad(
        tree_with(prompt=np.zeros((2, 2), dtype=np.int32)), "bad_token", "its prompt is int32[2, 2]"
    ),
    "an empty prompt": Bad(tree_with(prompt=int32()), "empty_prompt", "its prompt has no tokens"),
    "an unknown parent": Bad(without_turn(2), "bad_structure", "turn 4 follows turn 2, which is not in the tree"),
    "a parent that comes later": Bad(turn_with(1, parent_id=2), "bad_structure", "turn 1: parent_id is 2"),
    "a turn that is its own parent": Bad(turn_with(2, parent_id=2), "bad_structure", "turn 2: parent_id is 2"),
    "a negative parent": Bad(turn_with(2, parent_id=-1), "bad_structure", "turn 2: parent_id is -1"),
    "a turn numbered 0": Bad(turn_with(1, turn_id=0), "bad_structure", "turn 0: turn_id is 0"),
    "a turn twice": Bad(repeating, "bad_structure", "is there twice"),
    "a turn after the end": Bad(
        turn_with(5, parent_id=4), "bad_structure", "turn 5 follows turn 4, which ended its chain"
    ),
    "a weight of nan": Bad(tree_with(weight=math.nan), "bad_weight", "weight is nan"),
    "a weight of inf": Bad(tree_with(weight=math.inf), "bad_weight", "weight is inf"),
    "a negative weight": Bad(tree_with(weight=-0.5), "bad_weight", "weight is -0.5"),
    "nothing but stale turns": Bad(
        every_turn_with(spans=span(VERSION - MAX_LAG - 1)),
        "all_stale",
        f"turns is {MAX_LAG + 1} versions old, over staleness.max_lag = {MAX_LAG}",
    ),
}


def good_batch() -> Batch:
    return make_batch(num_trees=TREES, version=VERSION)
