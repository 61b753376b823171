"""What runs of one setting say about a bound and a rate."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.paper.convergence.convex import Regret
from benchmarks.paper.convergence.nonconvex import Gradients, Stationarity
from benchmarks.paper.convergence.sgd_with_wsam import Setting
from benchmarks.paper.experiment import AGREES, CANNOT_TELL, DISAGREES
from benchmarks.paper.statistics import Interval, half_width


def exponent(
    steps: Sequence[int],
    runs: Sequence[Sequence[float]],
    rate: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> Interval | None:
    """Return the slope of log(value) over log(rate(T)) in the last decade of T, mean over runs.

    Args:
        steps: T, ascending.
        runs: The values of each run at these T; at least two runs.
        rate: That the values are compared with.

    Returns:
        None if a value is not positive, and so has no logarithm.
    """
    last = np.array(steps) * 10 >= steps[-1]
    values = np.array(runs)[:, last]
    if not (values > 0.0).all():
        return None
    over = np.log(rate(np.array(steps, float)[last]))
    slopes = [float(np.polyfit(over, np.log(run), 1)[0]) for run in values]
    mean, half = statistics.mean(slopes), half_width(slopes)
    return Interval(mean, mean - half, mean + half)


def log_over_root(steps: np.ndarray) -> np.ndarray:
    """Return log(T) / sqrt(T)."""
    return np.log(steps) / np.sqrt(steps)


@dataclass(frozen=True)
class ConvexOutcome:
    """Runs of a setting on the convex problem.

    Attributes:
        setting: Of the algorithm.
        runs: Of each seed, the regret at the same numbers of steps.
    """

    setting: Setting
    runs: Sequence[Sequence[Regret]]

    @property
    def steps(self) -> list[int]:
        """The numbers of steps."""
        return [regret.steps for regret in self.runs[0]]

    def regrets(self, index: int) -> list[float]:
        """Return the regret of every seed at one number of steps."""
        return [run[index].regret for run in self.runs]

    @property
    def largest_ratio(self) -> float:
        """The largest quotient of regret and bound."""
        return max(regret.regret / regret.bound for run in self.runs for regret in run)

    @property
    def exponent(self) -> Interval | None:
        """That of T in the regret, over the last decade."""
        return exponent(self.steps, [[regret.regret for regret in run] for run in self.runs])


@dataclass(frozen=True)
class NonconvexOutcome:
    """Runs of a setting on the problem that is not convex.

    Attributes:
        setting: Of the algorithm.
        runs: Of each seed.
        found: The means of the theorem at some numbers of steps.
    """

    setting: Setting
    runs: Sequence[Gradients]
    found: Sequence[Stationarity]

    @property
    def steps(self) -> list[int]:
        """The numbers of steps."""
        return [at.steps for at in self.found]

    @property
    def largest_ratio(self) -> float:
        """The largest quotient of the weighted average, which is above the minimum, and bound."""
        return max(at.average / at.bound for at in self.found)

    @property
    def exponent(self) -> Interval | None:
        """That of log(T) / sqrt(T) in each run's own minimum, over the last decade."""
        index = np.array(self.steps) - 1
        least = [np.minimum.accumulate(run.squared_norms)[index] for run in self.runs]
        return exponent(self.steps, least, log_over_root)


def bound_verdict(ratios: Sequence[float]) -> str:
    """Return the verdict about a bound, given quotients of what was found and the bound."""
    return AGREES if max(ratios) <= 1.0 else DISAGREES


def rate_verdict(agrees: Sequence[bool], bound_holds: bool) -> str:
    """Return the verdict about a rate, which is what happens for many steps.

    Args:
        agrees: For each setting, whether the confidence interval of the exponent is on the side
            that the rate allows.
        bound_holds: As long as a bound holds, a wrong exponent does not refute it: the curve may
            have far to go until it reaches the bound.
    """
    if all(agrees):
        return AGREES
    return CANNOT_TELL if bound_holds else DISAGREES
