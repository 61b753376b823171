"""Radii that change while training.

A hyper-parameter that takes a schedule takes any function of the step, which counts from 1, or one
of the classes here. The optimizer asks for the value at the beginning of every step and writes it
into the parameter group. Steps are counted in the groups, so that a checkpoint goes on where it
ended; the schedule itself is given to the constructor again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from wsam_fused.arguments import number


class InverseSqrt:
    """rho / sqrt(t), for which the convergence of WSAM is shown.

    Reference: Yue et al., KDD 2023, Corollaries 5.2 and 5.4.

    Args:
        rho: Value of the first step, >= 0.
    """

    def __init__(self, rho: float) -> None:
        self.rho = number("rho", rho, 0.0)

    def __call__(self, step: int) -> float:
        """Return the value of a step, which counts from 1."""
        return self.rho / math.sqrt(step)


class ProportionalToLR:
    """Go from ``high`` to ``low`` as the learning rate of the group goes from its own high to low.

    Math:
        value = low + (high - low) (lr - lr_low) / (lr_high - lr_low)

    held between low and high, and high where both learning rates are the same. The learning rate is
    that of the step in progress.

    Reference: Zhuang et al., ICLR 2022 (GSAM), for rho; their code begins at the low end, whatever
    the first learning rate is.

    Args:
        high: Value at the highest learning rate, >= 0.
        low: Value at the lowest one, from 0 to ``high``.
        lr_high: Highest learning rate.
        lr_low: Lowest learning rate.
    """

    def __init__(self, high: float, low: float, *, lr_high: float, lr_low: float = 0.0) -> None:
        self.high = number("high", high, 0.0)
        self.low = number("low", low, 0.0, self.high)
        self.lr_high = number("lr_high", lr_high, 0.0)
        self.lr_low = number("lr_low", lr_low, 0.0, self.lr_high)

    def at_learning_rate(self, lr: float) -> float:
        """Return the value for a learning rate."""
        if self.lr_high == self.lr_low:
            return self.high
        share = (lr - self.lr_low) / (self.lr_high - self.lr_low)
        return self.low + (self.high - self.low) * min(max(share, 0.0), 1.0)


Schedule = Callable[[int], float] | ProportionalToLR


def is_schedule(value: Any) -> bool:
    """Whether a hyper-parameter is a schedule and not a number."""
    return callable(value) or isinstance(value, ProportionalToLR)


def value_at(schedule: Schedule, step: int, lr: Any) -> Any:
    """Return what a schedule gives, unchecked.

    Args:
        schedule: The schedule.
        step: Counts from 1.
        lr: Of the parameter group.
    """
    if isinstance(schedule, ProportionalToLR):
        return schedule.at_learning_rate(float(lr))
    return schedule(step)
