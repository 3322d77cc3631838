"""Judges whether an engine computes what the learner does: its error on the probe, and how much of it is rounding.

The measure is the root mean square, over tokens that the policy sampled, of the differences between the engine's and
the learner's log-probs, each divided by ``1 - p`` of its token.  With honest weights the differences are rounding: of
the engine's precision, of its kernels, of as many layers as the model has.  That is noise on the logits, and noise of
one nat on each logit moves the log-prob of a token by ``1 - p``, about: so the measure is the size of that noise,
whatever the policy is sure of, and its logarithm is close to normal over versions (``benchmarks/probe.py`` fits it).

Its size cannot be predicted, but it is hardly ever larger at one version than at another.  So the first version that
an engine loads must be within a loose bound of the device and the precision, and within a share of the spread of the
log-probs, which weights of another model would exceed; from then on ``MULTIPLE`` times the median of the readings so
far is too much.

What is smaller passes: one tensor left out of a step of 1e-6 changes no log-prob by as much as bfloat16 rounds.
Engines also compare the tensors that they hold with the published ones, where they can; see their modules.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import NamedTuple

import numpy as np

from atpo_async.core.errors import ProbeMismatch, WeightsRejected
from atpo_async.wire.messages import WeightsManifest

MULTIPLE = 4.0
"""Of the median of the readings.  A fault that by itself makes a reading of 3.9 medians shows."""

SPREAD_SHARE = 0.3
"""Of the standard deviation of the learner's log-probs, in the measure's unit.  Other weights are off by more than the
whole of it, honest bfloat16 in 24 wide-spread random layers by 0.04 of it."""

LEAST_SCALE = 0.03
"""Of a token that the policy is all but sure of: below it float32 itself is the noise."""

NUM_READINGS = 15


class Bound(NamedTuple):
    """Nats of noise on the logits."""

    always_good: float
    never_good: float


BOUNDS = {
    ("cpu", "float32"): Bound(1e-4, 1e-3),
    # Triton's attention multiplies in TF32 on Hopper: 10 bits of mantissa.  0.009 nats were seen on a single token.
    ("cuda", "float32"): Bound(1e-3, 0.05),
    ("cpu", "float16"): Bound(1e-3, 0.1),
    ("cuda", "float16"): Bound(1e-3, 0.1),
    ("cpu", "bfloat16"): Bound(5e-3, 0.5),
    ("cuda", "bfloat16"): Bound(5e-3, 0.5),
}
"""By device and precision of the engine."""


class Probe:
    """The readings of one engine.

    Args:
        device: ``cpu`` or ``cuda``, with or without a number.
        dtype: precision that the engine computes in.
    """

    def __init__(self, *, device: str, dtype: str) -> None:
        self._device = device.partition(":")[0]
        self._dtype = dtype
        self._readings: deque[float] = deque(maxlen=NUM_READINGS)

    def tolerance(self, manifest: WeightsManifest) -> float:
        """Nats; the configuration's own, or computed as the module describes."""
        if manifest.probe_tolerance is not None:
            return manifest.probe_tolerance
        bound = BOUNDS[self._device, self._dtype]
        unit = float(np.sqrt(np.mean(np.square(scale_of(manifest.probe_logprobs)))))
        spread = float(np.std(manifest.probe_logprobs.astype(np.float64))) / unit
        most = min(bound.never_good, SPREAD_SHARE * spread)
        if self._readings:
            most = min(most, MULTIPLE * statistics.median(self._readings))
        return max(bound.always_good, most)

    def judge(self, manifest: WeightsManifest, logprobs: np.ndarray) -> float:
        """The engine's error, nats of noise on the logits.  Raises ProbeMismatch where it is too large.

        Args:
            manifest: of the weights it has taken up.
            logprobs: float[S * (T - 1)], the engine's.
        """
        error = noise(logprobs, manifest.probe_logprobs)
        tolerance = self.tolerance(manifest)
        # Written so that a NaN fails too.
        if not error <= tolerance:
            seen = f"{statistics.median(self._readings):.3g} before" if self._readings else "its first version"
            raise ProbeMismatch(
                f"weights version {manifest.version}: the engine ({self._dtype} on {self._device}) is {error:.3g} nats "
                f"off the learner's probe, tolerance {tolerance:.3g}, {seen}: it did not take up all weights, or "
                "computes otherwise than the learner; if it is known to be right, set --weights.probe_tolerance"
            )
        self._readings.append(error)
        return error


def noise(found: np.ndarray, expected: np.ndarray) -> float:
    """Nats: root mean square of the differences between log-probs, each by the scale of its token."""
    differences = found.astype(np.float64) - expected.astype(np.float64)
    return float(np.sqrt(np.mean(np.square(differences / scale_of(expected)))))


def scale_of(logprobs: np.ndarray) -> np.ndarray:
    """float64: how far about one nat of noise on every logit moves a token of this log-prob."""
    scale: np.ndarray = np.hypot(1.0 - np.exp(np.minimum(logprobs.astype(np.float64), 0.0)), LEAST_SCALE)
    return scale


def sequences_of(manifest: WeightsManifest) -> np.ndarray:
    """int32[S, T]: what has to be scored."""
    return manifest.probe_token_ids.reshape(manifest.probe_sequences, -1)


def check_probe_fits(manifest: WeightsManifest, *, max_model_len: int) -> None:
    """Raises WeightsRejected if the probe cannot be scored by this engine."""
    tokens, sequences = len(manifest.probe_token_ids), manifest.probe_sequences
    length = tokens // max(1, sequences)
    fits = 2 <= length < max_model_len and length * sequences == tokens
    if not fits or len(manifest.probe_logprobs) != tokens - sequences:
        raise WeightsRejected(
            f"weights version {manifest.version}: a probe of {sequences} sequences of {length} tokens with "
            f"{len(manifest.probe_logprobs)} log-probs; it needs 2 to {max_model_len - 1} tokens a sequence, and a "
            "log-prob for each but the first"
        )
