"""Student's t distribution, for intervals over many channels at once."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

__all__ = ["student_quantile"]

# From so many degrees of freedom on, the distribution is nearly normal.
_MANY = 1_000


@cache
def student_quantile(tail: float, freedom: int) -> float:
    """The t beyond which so much of Student's distribution lies.

    Args:
        tail: the probability above t, at least 1e-9 and below 0.5.
        freedom: the degrees of freedom, at least 1.

    Returns:
        t, right to 1e-6 relative.
    """
    if freedom >= _MANY:  # Abramowitz and Stegun, 26.7.5
        z = -NormalDist().inv_cdf(tail)
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    low, high = 0.0, 1.0
    while _tail(high, freedom) > tail:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _tail(middle, freedom) > tail else (low, middle)
    return high


def _tail(t: float, freedom: int) -> float:
    """The probability above t: a finite sum, 26.7.3 and 26.7.4 of Abramowitz and Stegun."""
    odd, square = freedom % 2, freedom / (freedom + t * t)  # of the cosine of atan(t / √freedom)
    term = math.sqrt(square) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    total *= t / math.sqrt(freedom + t * t)
    return (math.atan2(math.sqrt(freedom), t) - total) / math.pi if odd else (1 - total) / 2
