"""Whether fused and eager runs of SGD with WSAM end in the same weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.paper.convergence.logistic import Array, LogisticRegression
from benchmarks.paper.convergence.sgd_with_wsam import Record, Setting, run

_UNIT = float(np.finfo(np.float64).eps) / 2.0


@dataclass(frozen=True)
class Agreement:
    """How far two runs were apart, and how far they may be.

    Attributes:
        steps: Of both.
        difference: Largest difference of a weight after any step.
        tolerance: See :func:`tolerance`.
    """

    steps: int
    difference: float
    tolerance: float


def agreement(
    problem: LogisticRegression, setting: Setting, start: Array, *, steps: int, seed: int
) -> Agreement:
    """Compare the fused backend of this machine with the eager one over a whole run.

    Args:
        problem: Whose loss is minimised.
        setting: Of the algorithm.
        start: w_1, shape [n].
        steps: Number of steps, >= 1.
        seed: Of the batches.
    """
    fused = run(problem, setting, start, steps=steps, seed=seed)
    eager = run(problem, setting, start, steps=steps, seed=seed, backend="eager")
    return Agreement(steps, _apart(fused, eager), tolerance(problem, setting, fused, seed))


def tolerance(problem: LogisticRegression, setting: Setting, record: Record, seed: int) -> float:
    """Return how far rounding may lead two right runs apart, in float64 with unit roundoff u.

    In a step, the perturbed weights, their way back and the update are rounded some four times
    each. With a = gamma / (1 - gamma) that is 4 u of |w| + rho_t; of alpha_t a eta (|w| + rho_t),
    by which perturbed weights that are off change the second gradient; and of alpha_t (|1 - a| + a)
    G, the terms of the update. What a step adds then grows as much as a start that is off by one
    rounding does, which is measured.

    Args:
        problem: Whose loss is minimised.
        setting: Of the algorithm.
        record: Of a run.
        seed: Of its batches.
    """
    steps = len(record.points)
    weight = setting.sharpness_factor
    reach = np.abs(record.points).max(axis=1) + setting.radii(steps)
    smoothness = problem.batch_smoothness(record.batches)
    gradients = np.abs(record.gradients).max(axis=(1, 2))
    rates = setting.learning_rates(steps)
    added = reach * (1.0 + rates * weight * smoothness)
    added += rates * (abs(1.0 - weight) + weight) * gradients
    return float(4.0 * _UNIT * added.sum()) * _growth(problem, setting, record, seed)


def _growth(problem: LogisticRegression, setting: Setting, record: Record, seed: int) -> float:
    """Return by how much a difference of the start grows within a run, at least 1."""
    start = record.points[0]
    nudge = 2.0 * _UNIT * max(1.0, float(np.abs(start).max()))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=start.shape)
    nudged = run(problem, setting, start + nudge * signs, steps=len(record.points), seed=seed)
    return max(1.0, _apart(nudged, record) / nudge)


def _apart(left: Record, right: Record) -> float:
    after = np.abs(left.end - right.end).max()
    return float(max(np.abs(left.points - right.points).max(), after))
