"""Gradients of WSAM on a problem that is not convex, and the bound of Theorem 5.3.

Source: Yue et al., KDD 2023, Theorem 5.3 and Corollary 5.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.paper.convergence.logistic import Array, LogisticRegression
from benchmarks.paper.convergence.sgd_with_wsam import Setting, run

PROBLEM = LogisticRegression(penalty=0.1)
# Of the normal numbers that the weights begin with: most are where the penalty is concave.
_START_SCALE = 3.0


@dataclass(frozen=True)
class Gradients:
    """What one run contributes.

    Attributes:
        squared_norms: ||grad L(w_t)||^2 of the whole loss, shape [T].
        largest: G_inf up to each step: the largest coordinate of a batch's gradients, at w_t or
            perturbed, and of grad L(w_t); shape [T].
        end_curvature: Smallest eigenvalue of the Hessian of L after the last step.
    """

    squared_norms: Array
    largest: Array
    end_curvature: float


@dataclass(frozen=True)
class Stationarity:
    """How near to a stationary point runs have come, and the bound with what is in it.

    Attributes:
        steps: T.
        least: min over t <= T of the mean over runs of ||grad L(w_t)||^2.
        average: Their mean over t weighted with alpha_t. The proof bounds this, which is larger.
        bound: Of both.
        gradient: G_inf.
        smoothness: eta.
    """

    steps: int
    least: float
    average: float
    bound: float
    gradient: float
    smoothness: float


def start() -> Array:
    """Return w_1, shape [n], the same for every run: L(w_1) is in the bound."""
    return _START_SCALE * np.random.default_rng(0).standard_normal(PROBLEM.size)


def gradients(setting: Setting, seed: int, steps: int) -> Gradients:
    """Run Algorithm 3, without a box, and return what the theorem asks about.

    Args:
        setting: Its ``box`` is None.
        seed: Of the batches.
        steps: T.
    """
    record = run(PROBLEM, setting, start(), steps=steps, seed=seed)
    full = PROBLEM.full_gradients(record.points)
    of_batches = np.abs(record.gradients).max(axis=(1, 2))
    largest = np.maximum(of_batches, np.abs(full).max(axis=1))
    return Gradients(
        np.einsum("tn,tn->t", full, full),
        np.maximum.accumulate(largest),
        PROBLEM.least_curvature(record.end),
    )


def stationarity(
    setting: Setting, runs: Sequence[Gradients], horizons: Sequence[int]
) -> list[Stationarity]:
    """Return the outcome of runs of one setting at some numbers of steps.

    Args:
        setting: Of the runs.
        runs: At least one.
        horizons: Each from 2 to the length of the runs.
    """
    mean = np.mean([run.squared_norms for run in runs], axis=0)
    least = np.minimum.accumulate(mean)
    rates = setting.learning_rates(len(mean))
    average = np.cumsum(rates * mean) / np.cumsum(rates)
    largest = np.max([run.largest for run in runs], axis=0)
    smoothness = PROBLEM.full_smoothness()
    return [
        Stationarity(
            steps,
            float(least[steps - 1]),
            float(average[steps - 1]),
            bound(setting, steps, float(largest[steps - 1]), smoothness),
            float(largest[steps - 1]),
            smoothness,
        )
        for steps in horizons
    ]


def bound(setting: Setting, steps: int, gradient: float, smoothness: float) -> float:
    """Return the bound of Theorem 5.3; that of Corollary 5.4 is above it.

    Args:
        setting: Of the algorithm.
        steps: T >= 2.
        gradient: G_inf.
        smoothness: eta.
    """
    n, alpha = PROBLEM.size, setting.alpha
    third = PROBLEM.full_loss(start()) / (2.0 * alpha)
    fourth = n**0.5 * gradient * smoothness * setting.sharpness_factor / (2.0 * alpha)
    fifth = setting.square_factor * n * gradient**2 * smoothness * alpha / 2.0
    moved = float((setting.learning_rates(steps) * setting.radii(steps)).sum())
    total = third + fifth + fourth * moved + fifth * math.log(steps)
    return total / (math.sqrt(steps) - 1.0)
