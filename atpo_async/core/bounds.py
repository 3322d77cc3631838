"""Types of a message's fields with their bounds: what each kind of number, text and array may be at most.

The wire's parser enforces the bounds that msgspec knows; ``atpo_async.wire.checks`` checks what a type cannot express
(``Content``) and which fields must agree.  Numbers must fit the types that the program stores them in: ids and counts
int32, other numbers float32.
"""

from __future__ import annotations

import enum
from typing import Annotated

import numpy as np
from msgspec import Meta

MAX_ID = 2**31 - 1
"""Of ids, versions, counts and token ids."""
MAX_SIZE = 2**63 - 1
"""Of byte counts, and of sums over a whole batch or run."""
MAX_NUMBER = float(np.finfo(np.float32).max)
MAX_SECONDS = 1e9
"""Some thirty years: more is no duration but a point in time, or noise."""
MAX_NAME_BYTES = 200
MAX_TEXT_BYTES = 1 << 16
MAX_DIMENSIONS = 32
"""Of a tensor; the product of many large factors would take its time."""
LOGPROB_SLACK = 2.0**-10
"""Log-probs may exceed 0 by this much: a softmax in reduced precision can round a sure token's to just above 0."""


MAX_REWARD_PARTS = 16
"""Of one leaf: named parts of its reward."""
MAX_REWARD_NAME = 64
"""Characters in the name of such a part; twice as many bytes, for it becomes a part of a metric's name."""
REWARD_NAME = f"1 to {MAX_REWARD_NAME} printable characters, at most {2 * MAX_REWARD_NAME} bytes in UTF-8"


MAX_FINGERPRINT = 256
"""Ids in the fingerprint of one turn."""


class Content(enum.Enum):
    """What a field holds, where its type cannot express every check."""

    NAME = "printable, at most MAX_NAME_BYTES bytes"
    TEXT = "at most MAX_TEXT_BYTES bytes"
    TOKENS = "int32, token ids"
    LOGPROBS = "float32, finite, at most LOGPROB_SLACK"
    BYTES = "uint8"


Id = Annotated[int, Meta(ge=0, le=MAX_ID)]
Count = Id
TurnId = Annotated[int, Meta(ge=1, le=MAX_ID)]
Version = Annotated[int, Meta(ge=0, le=MAX_ID)]
VersionOrNone = Annotated[int, Meta(ge=-1, le=MAX_ID)]
"""-1 where there is none yet."""
Size = Annotated[int, Meta(ge=0, le=MAX_SIZE)]
Fingerprint = Annotated[tuple[Size, ...], Meta(max_length=MAX_FINGERPRINT)]
Number = Annotated[float, Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)]
NotNegative = Annotated[float, Meta(ge=0.0, le=MAX_NUMBER)]
Seconds = Annotated[float, Meta(ge=0.0, le=MAX_SECONDS)]
"""A duration."""
Name = Annotated[str, Meta(max_length=MAX_NAME_BYTES), Content.NAME]
"""Of a run, an actor, a tree; may be empty."""
Text = Annotated[str, Meta(max_length=MAX_TEXT_BYTES), Content.TEXT]
Shape = Annotated[tuple[Size, ...], Meta(max_length=MAX_DIMENSIONS)]
Tokens = Annotated[np.ndarray, Content.TOKENS]
Logprobs = Annotated[np.ndarray, Content.LOGPROBS]
RawBytes = Annotated[np.ndarray, Content.BYTES]


def is_reward_name(text: str) -> bool:
    """Whether ``text`` may name a part of a reward (``REWARD_NAME``)."""
    return 0 < len(text) <= MAX_REWARD_NAME and text.isprintable() and len(text.encode()) <= 2 * MAX_REWARD_NAME
