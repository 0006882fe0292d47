"""Student's t distribution, for intervals over many channels at once."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

__all__ = ["student_quantile"]


@cache
def student_quantile(tail: float, freedom: int) -> float:
    """The t beyond which so much of Student's distribution lies.

    Args:
        tail: the probability above t, more than 0 and at most 0.5.
        freedom: the degrees of freedom, at least 1. Right to 1e-8 relative for all that are below
            100,000; from there on the normal distribution is taken, which is right to 1e-3 where
            the tail is at least 1e-9.
    """
    if not 0 < tail <= 0.5 or freedom < 1:
        raise ValueError(f"No t has the tail {tail} with {freedom} degrees of freedom.")
    if freedom >= 100_000:
        return -NormalDist().inv_cdf(tail)
    low, high = 0.0, 1.0
    while _tail(high, freedom) > tail:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _tail(middle, freedom) > tail else (low, middle)
    return (low + high) / 2


def _tail(t: float, freedom: int) -> float:
    """The probability above t: half the incomplete beta function at freedom / (freedom + t²)."""
    a, b, square = freedom / 2, 0.5, t * t
    x, rest = freedom / (freedom + square), square / (freedom + square)
    if rest == 0:
        return 0.5
    front = math.exp(
        math.lgamma(a + b)
        - math.lgamma(a)
        - math.lgamma(b)
        - a * math.log1p(square / freedom)
        + b * math.log(rest)
    )
    # The continued fraction converges fast on one side only; the other is the complement.
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(x, a, b) / a / 2
    return (1 - front * _fraction(rest, b, a) / b) / 2


def _fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 1000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + step * d or tiny)
            c = 1 + step / c or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value
