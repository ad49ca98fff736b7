"""Means over seeds and whether two of them differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev, variance

LEVEL = 0.05


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1 in the denominator; None for a single value)."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Two-sided p-value of Welch's t-test for equal means, without equal variances.

    ``t = (m1 - m2) / sqrt(v1/n1 + v2/n2)`` against Student's t with the degrees of freedom of Welch and Satterthwaite
    (B. L. Welch, Biometrika 34, 1947).

    Args:
        first: values of one side, one per seed.
        second: values of the other side.

    Returns:
        The p-value; None where a side has fewer than two values, or neither side has any spread, as nothing can then
        be tested.
    """
    if min(len(first), len(second)) < 2:
        return None
    errors = [variance(values) / len(values) for values in (first, second)]
    total = sum(errors)
    if total == 0:
        return None
    from scipy.special import stdtr

    freedom = total**2 / sum(e**2 / (len(v) - 1) for e, v in zip(errors, (first, second), strict=True))
    return float(2 * stdtr(freedom, -abs(fmean(first) - fmean(second)) / math.sqrt(total)))
