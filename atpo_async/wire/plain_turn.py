"""Fast path of decoding for turns, which are nearly all messages: accepts those that need no closer check.

Everything else is decoded as any message is (``wire.codec``), which finds what is wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from atpo_async.core.bounds import LOGPROB_SLACK, MAX_ID
from atpo_async.core.dtypes import FLOAT32, INT32
from atpo_async.core.tree import Turn
from atpo_async.wire.arrays import FLOAT32_CODE, INT32_CODE, NO_ITEMS, Buffer

# The first byte of a float32, the sign and seven bits of the exponent.  With these it is negative and finite, or from
# 0 to under half of the slack; 0xff may be infinite, 0x3a above the slack: those are looked at more closely.
_PLAIN_LOGPROB = bytes([*range(0x3A), *range(0x80, 0xFF)])
assert LOGPROB_SLACK == 2.0**-10


def plain_turn(value: Any, payload: Buffer) -> Turn | None:
    """The turn, if it is one that needs no closer look: laid out as ``encode`` does it, and plainly within all bounds.

    None does not mean that it is bad.  This is what runs for every turn of a run, so it is written for speed: arrays
    are held against their bounds by their highest bytes alone.
    """
    observation_code, observation_at, observation_len = value.observation
    action_code, action_at, length = value.action
    logprobs_code, logprobs_at, logprobs_len = value.logprobs
    action_end = action_at + 4 * length
    logprobs_end = logprobs_at + 4 * length
    if not (
        observation_code == action_code == INT32_CODE
        and logprobs_code == FLOAT32_CODE
        and observation_at == 0
        and 0 <= observation_len <= MAX_ID
        and 0 < length == logprobs_len <= MAX_ID
        and action_at == (4 * observation_len + 7) & -8
        and logprobs_at == (action_end + 7) & -8
        and logprobs_end == len(payload)
    ):
        return None
    turn_id, end, reward = value.turn_id, value.end, value.reward
    run, tree_id = value.run, value.tree_id
    if not (
        value.parent_id < turn_id
        and run.isascii()
        and tree_id.isascii()
        and run.isprintable()
        and tree_id.isprintable()
    ):
        return None
    if value.rewards:
        return None
    if end == "continue" or end == "pruned":
        if reward is not None or value.success is not None:
            return None
    elif reward is None:
        return None
    covered = 0
    for span in value.spans:
        if span.start != covered or not covered < span.end <= length:
            return None
        covered = span.end
    if covered != length:
        return None
    raw = payload if type(payload) is bytes else bytes(payload)
    # The sign of every token id at once; the zeros between the two arrays do not matter.
    if not raw[3:action_end:4].isascii() or raw[logprobs_at + 3 :: 4].translate(None, _PLAIN_LOGPROB):
        return None
    return Turn(
        run=run,
        tree_id=tree_id,
        turn_id=turn_id,
        parent_id=value.parent_id,
        lease_epoch=value.lease_epoch,
        expansion_round=value.expansion_round,
        observation=np.frombuffer(payload, INT32, observation_len) if observation_len else NO_ITEMS[INT32_CODE],
        action=np.frombuffer(payload, INT32, length, action_at),
        logprobs=np.frombuffer(payload, FLOAT32, length, logprobs_at),
        spans=value.spans,
        end=end,
        reward=reward,
        success=value.success,
        generate_s=value.generate_s,
        environment_s=value.environment_s,
        turn_reward=value.turn_reward,
        fingerprint=value.fingerprint,
        state_value=value.state_value,
        role=value.role,
    )
