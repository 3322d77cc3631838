"""The probe: sequences that the policy samples, whose log-probs an engine must reproduce.

They are sampled rather than drawn at random, because engine and learner must agree on tokens that are trained on: on a
token that the policy would hardly ever sample, both differ widely without any fault.
"""

from __future__ import annotations

import numpy as np
import torch

from atpo_async.config import Config
from learner.training.trainer import Trainer

NUM_SEQUENCES = 32
"""Of the probe: enough that one which repeats itself does not decide, few enough to be scored together."""

REDRAWN_EVERY = 8
"""The first publication draws the probe, then those with this many times the number of the last one that did: 8, 64, …
The policy drifts away from the sequences that an earlier one sampled, ever more slowly."""


def probe_shape(config: Config) -> tuple[int, int]:
    """Sequences S and tokens T of each, the first one not counted in ``weights.probe_tokens``: T is one more.

    T leaves space in the context for one token more, without which engines score no prompt.
    """
    sequences = min(NUM_SEQUENCES, config.weights.probe_tokens)
    length = 1 + -(-config.weights.probe_tokens // sequences)
    return sequences, max(2, min(length, config.model.max_context_tokens - 1))


def is_drawn_at(publication: int) -> bool:
    """Whether the ``publication``-th publication of a learner's life, from 1, draws the probe anew."""
    while publication % REDRAWN_EVERY == 0:
        publication //= REDRAWN_EVERY
    return publication == 1


def draw_probe(trainer: Trainer, shape: tuple[int, int], *, seed: tuple[int, ...]) -> np.ndarray:
    """int32[S, T] that the policy samples at temperature 1, each after its first token.  Collective when sharded.

    The first is the model's own (``bos_token_id``), or one drawn from its vocabulary where it has none.  The same
    weights and seed give the same tokens; those of rank 0 count.
    """
    sequences, length = shape
    source = np.random.default_rng(seed)
    vocab_size = int(trainer.policy.hf.config.vocab_size)
    begin = getattr(trainer.policy.hf.config, "bos_token_id", None)
    if isinstance(begin, int) and 0 <= begin < vocab_size:
        first = np.full(sequences, begin)
    else:
        first = source.integers(0, vocab_size, sequences)
    # On the CPU, whatever the device: the same numbers everywhere.
    noise = torch.Generator().manual_seed(int(source.integers(2**62)))
    tokens = torch.zeros((sequences, length), dtype=torch.int64)
    tokens[:, 0] = torch.from_numpy(first)
    for place in range(length - 1):
        waiting_times = torch.empty((sequences, vocab_size)).exponential_(generator=noise)
        tokens[:, place + 1] = trainer.whole.next_tokens(tokens[:, : place + 1], waiting_times)
    return tokens.numpy().astype(np.int32)
