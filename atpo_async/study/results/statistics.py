"""Student's t, Welch's test, Holm's correction and the power of a comparison of two means.  Pure.

Written out, for a few dozen lines do not call for a library of a hundred megabytes; the tests hold them against printed
tables and against simulation.

Sources: Welch (1947) for the test and its degrees of freedom; Holm (1979) for the correction; the incomplete beta
function by its continued fraction (Abramowitz and Stegun 26.5.8), by Lentz's method.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ALPHA, POWER = 0.05, 0.8
"""Two-sided level of a test, and the power that is planned for."""
LEVEL = 1.0 - ALPHA
"""Of every interval, unless another one is stated."""

_TINY = 1e-300


def mean(values: Sequence[float]) -> float:
    """Of one value at least."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample, with N − 1; 0 of one value."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and where it lies at some level."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], *, level: float = LEVEL, least_deviation: float = 0.0) -> Interval | None:
    """Student's t interval of a mean; None of fewer than two values.

    Args:
        least_deviation: a smaller spread counts as this.
    """
    if len(values) < 2:
        return None
    middle = mean(values)
    spread = max(deviation(values), least_deviation)
    half = t_quantile(0.5 + level / 2, len(values) - 1) * spread / math.sqrt(len(values))
    return Interval(middle, middle - half, middle + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of two means, by Welch's test."""

    value: float
    error: float
    """Its standard error."""
    freedom: float
    """Degrees of freedom, by Welch and Satterthwaite."""
    p: float
    """Two-sided, of this comparison alone."""

    def within(self, level: float = LEVEL) -> tuple[float, float]:
        """Its interval."""
        half = t_quantile(0.5 + level / 2, self.freedom) * self.error
        return self.value - half, self.value + half


def welch(first: Sequence[float], second: Sequence[float], *, least_deviation: float = 0.0) -> Difference:
    """The mean of ``first`` minus that of ``second``; variances may differ.

    Args:
        first, second: two values each at least.
        least_deviation: a smaller spread counts as this: what the measure itself does not tell apart.  Above 0 unless
            one of the two is known to vary.

    Raises ValueError for too few values, and where neither varies and ``least_deviation`` is 0.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("a comparison takes two values on each side at least")
    parts = [max(deviation(values), least_deviation) ** 2 / len(values) for values in (first, second)]
    error = math.sqrt(sum(parts))
    if not error:
        raise ValueError("neither side varies: there is nothing to measure a difference by")
    sizes = (len(first) - 1, len(second) - 1)
    freedom = sum(parts) ** 2 / sum(part**2 / size for part, size in zip(parts, sizes, strict=True))
    value = mean(first) - mean(second)
    p = 2.0 * t_cdf(-abs(value) / error, freedom)
    return Difference(value=value, error=error, freedom=freedom, p=p)


def holm(ps: Sequence[float], *, among: int = 0) -> list[float]:
    """The p-values, corrected for their number by Holm's method; in the order given.

    Args:
        among: of how many comparisons these are, where there are more; the others count as if they showed nothing.
    """
    count = max(among, len(ps))
    order = sorted(range(len(ps)), key=ps.__getitem__)
    found, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (count - rank) * ps[i]))
        found[i] = largest
    return found


# --- Student's t --------------------------------------------------------------------------------------------------


def t_cdf(t: float, freedom: float) -> float:
    """P(T ≤ t) of Student's t."""
    if t * t < freedom:  # by the middle: near 0 the tail is 1/2 less a number that rounding would take
        return 0.5 + math.copysign(0.5 * _incomplete_beta(0.5, freedom / 2, t * t / (freedom + t * t)), t)
    tail = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))
    return 1.0 - tail if t > 0 else tail


def t_quantile(p: float, freedom: float) -> float:
    """The t with P(T ≤ t) = ``p``, 0 < p < 1."""
    if p < 0.5:
        return -t_quantile(1.0 - p, freedom)
    return _root(lambda t: t_cdf(t, freedom) - p, 0.0, 1.0)


def _root(rises: Callable[[float], float], low: float, high: float, *, halvings: int = 80) -> float:
    """Where a rising function passes 0, from ``low`` on; ``high`` is moved up until it is above."""
    while rises(high) < 0 and high < 1e12:
        low, high = high, 2 * high
    for _ in range(halvings):
        middle = (low + high) / 2
        if rises(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), regularised."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )  # symmetric in (a, x) and (b, 1 − x)
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, 1.0 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function; it converges quickly for x < (a + 1)/(a + b + 2)."""
    c, d = 1.0, 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0))
    found = d
    for m in range(1, 400):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / _away_from_zero(1.0 + term * d)
            c = _away_from_zero(1.0 + term / c)
            found *= c * d
        if abs(c * d - 1.0) < 1e-14:
            break
    return found


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


# --- power --------------------------------------------------------------------------------------------------------


def power(difference: float, spread: float, seeds: int, *, alpha: float = ALPHA) -> float:
    """Of Welch's two-sided test of two means at level ``alpha``, each of ``seeds`` values.

    Exact for normal values of equal variances: with as many values on both sides the statistic is Student's, whose
    noncentral distribution is integrated over the estimate of the variance; how the two sides share that estimate is
    independent of it, and decides Welch's degrees of freedom.

    Args:
        difference: of the true means.
        spread: standard deviation over seeds, the same on both sides, above 0.
        seeds: two at least.
    """
    shift = difference / spread * math.sqrt(seeds / 2)
    found = 0.0
    for weight, critical in _criticals(seeds, alpha):
        # With u the estimate of the standard deviation over the true one: P(N(shift, 1) > critical · u), over all u.
        found += weight * _over_chi(2 * seeds - 2, functools.partial(_beyond, shift, critical))
    return min(1.0, found)


def _beyond(shift: float, critical: float, u: float) -> float:
    """P(|N(shift, 1)| > critical · u)."""
    return _normal_cdf(shift - critical * u) + _normal_cdf(-shift - critical * u)


_SHARES = 16


@functools.lru_cache(maxsize=256)
def _criticals(seeds: int, alpha: float) -> tuple[tuple[float, float], ...]:
    """(weight, critical t) of Welch's test over the ways in which two samples share their variances' sum.

    The first one's share b is Beta(k/2, k/2), k = seeds − 1: with b = sin² θ its density is sin(2θ)^(k − 1), up to a
    factor and the same about π/4.  By Simpson's rule.
    """
    k = seeds - 1
    found = []
    for i in range(_SHARES + 1):
        theta = math.pi / 4 * i / _SHARES
        density = math.sin(2 * theta) ** (k - 1) if k > 1 else 1.0
        share = math.sin(theta) ** 2
        weight = density * (1 if i in (0, _SHARES) else 4 if i % 2 else 2)
        if weight:
            found.append((weight, t_quantile(1.0 - alpha / 2, k / (share**2 + (1.0 - share) ** 2))))
    total = math.fsum(weight for weight, _ in found)
    return tuple((weight / total, critical) for weight, critical in found)


@functools.lru_cache(maxsize=256)
def _detectable(seeds: int, alpha: float, wanted: float) -> float:
    return _root(lambda d: power(d, 1.0, seeds, alpha=alpha) - wanted, 0.0, 1.0, halvings=30)


def detectable(spread: float, seeds: int, *, alpha: float = ALPHA, wanted: float = POWER) -> float:
    """The true difference of two means that the test finds with power ``wanted``."""
    return spread * _detectable(seeds, alpha, wanted)


MOST_SEEDS = 2000


def seeds_for(difference: float, spread: float, *, alpha: float = ALPHA, wanted: float = POWER) -> int | None:
    """Seeds on each side with which ``difference`` is found with power ``wanted``; None above ``MOST_SEEDS``."""
    low, high = 1, 2
    while power(difference, spread, high, alpha=alpha) < wanted:
        if high >= MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        if power(difference, spread, middle, alpha=alpha) < wanted:
            low = middle
        else:
            high = middle
    return high


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


_POINTS = 120


def _over_chi(freedom: int, of: Callable[[float], float]) -> float:
    """The mean of ``of(u)`` for u = sqrt(chi²/freedom), by Simpson's rule; exact to some 1e-6."""
    half = 9.0 / math.sqrt(2.0 * freedom)  # nine standard deviations of u
    low, high = max(0.0, 1.0 - half), 1.0 + half
    constant = math.log(2.0) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    step = (high - low) / _POINTS
    total = 0.0
    for i in range(_POINTS + 1):
        u = low + i * step
        if u <= 0.0:
            density = math.exp(constant) if freedom == 1 else 0.0
        else:
            density = math.exp(constant + (freedom - 1) * math.log(u) - freedom * u * u / 2)
        total += (1 if i in (0, _POINTS) else 4 if i % 2 else 2) * density * of(u)
    return total * step / 3
