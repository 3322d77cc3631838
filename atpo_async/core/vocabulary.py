"""The closed vocabularies: every word that configuration, messages and roles choose from a fixed list, defined once.

What users may extend (credit modes, expansion strategies, surrogates, …) is no closed list: ``config/doors.py``.
"""

from __future__ import annotations

from typing import Literal

# --- tasks and trees -------------------------------------------------------------------------------------------

Split = Literal["train", "eval"]
"""Of the tasks: ``eval`` holds the held-out ones; the two never share a task.  A lease's ``kind`` is a split."""

EpisodeEnd = Literal["continue", "done", "turn_limit"]
"""What an environment reports after an action: the episode goes on, or why it ended."""

EndReason = Literal["continue", "done", "turn_limit", "length_limit", "pruned"]
"""Why the chain went on or ended after a turn.  All but ``continue`` and ``pruned`` make the turn a leaf: a chain that
was closed because it found what a sibling had (``search.prune_duplicates``) earns nothing, and leaves the tree."""

Role = Literal["", "proposer", "synthesizer"]
"""Of a turn in a group of trees (``[team]``): which of the group's trees it belongs to; empty outside groups."""

# --- credit and loss -------------------------------------------------------------------------------------------

LeafWeights = Literal["uniform", "branch-prob"]
"""Weights under which a tree's leaf rewards are normalised (ALGORITHM, section 2)."""

Aggregation = Literal[
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "token-mean",
    "unique-token-mean",
    "branch-prob",
    "branch-prob-token-sum",
]
"""How the loss averages over leaves and tokens (ALGORITHM, section 5)."""

RatioLevel = Literal["token", "turn", "sequence"]
"""What one importance ratio of the surrogate spans."""

Level = Literal["token", "turn", "prefix", "sequence"]
"""What one weight of the correction spans; ``prefix``: the path down to the turn, the turn included."""

WeightsOver = Literal["max", "mean", "none"]
"""What the importance weights of prioritized sampling are divided by (ALGORITHM, section 4)."""

# --- tensors ---------------------------------------------------------------------------------------------------

Precision = Literal["float32", "bfloat16", "float16"]
"""Of an engine, of published weights and of an exported policy."""
