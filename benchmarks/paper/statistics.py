"""Means, their confidence intervals, and what a difference says about a claim."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from benchmarks.paper.experiment import AGREES, CANNOT_TELL, DISAGREES

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the number and its interval."""
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return the mean and the sample standard deviation as papers write them."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the confidence interval of the mean (Student)."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)) * error


def difference(left: Sequence[float], right: Sequence[float]) -> Interval:
    """Return mean(left) - mean(right) with its confidence interval (Welch).

    Args:
        left: One value for each seed, at least two.
        right: Likewise.
    """
    value = statistics.mean(left) - statistics.mean(right)
    errors = [statistics.variance(values) / len(values) for values in (left, right)]
    if sum(errors) == 0.0:
        return Interval(value, value, value)
    # Welch and Satterthwaite; scipy's ttest_ind warns where one of the two has no variance.
    parts = [error**2 / (len(v) - 1) for error, v in zip(errors, (left, right), strict=True)]
    freedom = sum(errors) ** 2 / sum(parts)
    width = float(stats.t.ppf((1 + _CONFIDENCE) / 2, freedom)) * sum(errors) ** 0.5
    return Interval(value, value - width, value + width)


def less(left: Sequence[float], right: Sequence[float]) -> tuple[str, Interval]:
    """Return the verdict about the claim mean(left) < mean(right), and the difference."""
    found = difference(left, right)
    if found.high < 0.0:
        return AGREES, found
    return (DISAGREES if found.low > 0.0 else CANNOT_TELL), found


def alike(left: Sequence[float], right: Sequence[float], margin: float) -> tuple[str, Interval]:
    """Return the verdict about the claim that two means differ by less than a margin.

    Agrees if the whole confidence interval is within the margin, disagrees if all of it is beyond.
    """
    found = difference(left, right)
    if -margin < found.low and found.high < margin:
        return AGREES, found
    beyond = found.low > margin or found.high < -margin
    return (DISAGREES if beyond else CANNOT_TELL), found
