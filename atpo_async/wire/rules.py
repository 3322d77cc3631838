"""The rules of a message's values that types cannot express: of names, arrays, turns and manifests of weights.

Each function returns the fact that breaks its rule, or None.  The caller decides what follows: ``wire.checks`` refuses
the message, ``learner.batches.intake`` leaves the tree out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from atpo_async.core.bounds import LOGPROB_SLACK, MAX_NAME_BYTES, MAX_REWARD_PARTS, REWARD_NAME, is_reward_name
from atpo_async.core.dtypes import PRECISION_BYTES
from atpo_async.core.tree import Turn
from atpo_async.wire import messages as m

Part = Literal["order", "action", "tokens", "logprobs", "spans", "outcome"]
"""Of a turn, what a fault is about."""


class TurnFault(NamedTuple):
    part: Part
    fact: str


def is_name(text: str) -> bool:
    """Whether ``text`` may name a run, an actor, a tree: printable, at most ``MAX_NAME_BYTES`` bytes; may be empty."""
    return text.isprintable() and (
        len(text) <= MAX_NAME_BYTES if text.isascii() else len(text.encode()) <= MAX_NAME_BYTES
    )


# --- arrays ----------------------------------------------------------------------------------------------------


def token_fault(name: str, tokens: np.ndarray) -> str | None:
    """Token ids are whole numbers in a line, none below 0."""
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        return f"{name} is {tokens.dtype}{list(tokens.shape)}, expected a line of token ids"
    if len(tokens) and tokens.min() < 0:
        return f"{name} has the negative token id {tokens.min()}"
    return None


def logprob_fault(name: str, logprobs: np.ndarray) -> str | None:
    """Log-probs are floats in a line, each finite and at most 0 but for rounding."""
    if logprobs.ndim != 1 or logprobs.dtype.kind != "f":
        return f"{name} is {logprobs.dtype}{list(logprobs.shape)}, expected a line of floats"
    good = np.isfinite(logprobs) & (logprobs <= LOGPROB_SLACK)
    if not good.all():
        at = int(np.flatnonzero(~good)[0])
        return f"{name}[{at}] is {logprobs[at]}, expected finite and at most {LOGPROB_SLACK}"
    return None


# --- turns -----------------------------------------------------------------------------------------------------


def turn_faults(turn: Turn) -> Iterator[TurnFault]:
    """Every inconsistency within a turn, independently of its tree."""
    if not turn.parent_id < turn.turn_id:
        yield TurnFault("order", f"parent_id is {turn.parent_id}, a parent's id is below its child's")
    if not len(turn.action):
        yield TurnFault("action", "action is empty, expected at least one token")
    for name, tokens in (("observation", turn.observation), ("action", turn.action)):
        if fact := token_fault(name, tokens):
            yield TurnFault("tokens", fact)
    if len(turn.logprobs) != len(turn.action) and turn.logprobs.ndim == 1:
        yield TurnFault("logprobs", f"{len(turn.logprobs)} logprobs for {len(turn.action)} action tokens")
    elif fact := logprob_fault("logprobs", turn.logprobs):
        yield TurnFault("logprobs", fact)
    if fact := _span_fault(turn):
        yield TurnFault("spans", fact)
    if (turn.reward is None) is turn.is_leaf:
        fact = f"reward is {turn.reward} with end {turn.end!r}, a reward is set on leaves and only there"
        yield TurnFault("outcome", fact)
    if turn.success is not None and not turn.is_leaf:
        yield TurnFault("outcome", "success is set on a turn that is no leaf")
    if turn.rewards and (fact := _parts_fault(turn)):
        yield TurnFault("outcome", fact)


def _parts_fault(turn: Turn) -> str | None:
    """Named parts of a reward are on leaves, few, and have short names."""
    if not turn.is_leaf:
        return "rewards are set on a turn that is no leaf"
    if len(turn.rewards) > MAX_REWARD_PARTS:
        return f"rewards has {len(turn.rewards)} names, expected {MAX_REWARD_PARTS} at most"
    bad = next((name for name in turn.rewards if not is_reward_name(name)), None)
    return None if bad is None else f"rewards has the name {bad!r:.80}, expected {REWARD_NAME}"


def _span_fault(turn: Turn) -> str | None:
    """Spans follow one another without gaps and cover the action."""
    end, length = 0, len(turn.action)
    for span in turn.spans:
        if span.start != end or not end < span.end <= length:
            where = f"span (version {span.version}, {span.start}:{span.end})"
            return f"{where} does not follow {end} of {length} action tokens"
        end = span.end
    return None if end == length else f"spans cover {end} of {length} action tokens"


# --- weights ---------------------------------------------------------------------------------------------------


def manifest_fault(manifest: m.WeightsManifest) -> str | None:
    """The probe is made of sequences of one length; tensors have the bytes of their shapes, and overlap only where they
    are tied: at the very same place."""
    tokens, sequences = len(manifest.probe_token_ids), manifest.probe_sequences
    if sequences == 0 or tokens % sequences:
        return f"{tokens} probe_token_ids are no {sequences} sequences of one length"
    if len(manifest.probe_logprobs) != max(0, tokens - sequences):
        return f"{len(manifest.probe_logprobs)} probe_logprobs, expected {max(0, tokens - sequences)}"
    begin = end = 0
    for spec in sorted(manifest.tensors, key=lambda s: (s.offset, s.nbytes)):
        name = f"tensor {spec.name!r:.80}"
        if math.prod(spec.shape) * PRECISION_BYTES[spec.dtype] != spec.nbytes:
            return f"{name} of {spec.dtype}{list(spec.shape)} has {spec.nbytes} bytes"
        is_tied = (spec.offset, spec.offset + spec.nbytes) == (begin, end)
        if (spec.offset < end and not is_tied) or spec.offset + spec.nbytes > manifest.total_bytes:
            return f"{name} overlaps another or ends past {manifest.total_bytes} bytes"
        begin, end = spec.offset, spec.offset + spec.nbytes
    return None
