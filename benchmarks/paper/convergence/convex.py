"""Regret of WSAM on a convex stochastic problem, and the bound of Theorem 5.1.

Source: Yue et al., KDD 2023, Theorem 5.1 and Corollary 5.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize
from scipy.special import expit

from benchmarks.paper.convergence.logistic import Array, Indices, LogisticRegression
from benchmarks.paper.convergence.sgd_with_wsam import Setting, run

PROBLEM = LogisticRegression()
# Half the width of the domain. The data are all but separable: without a box there is no minimum.
BOX = 1.0


@dataclass(frozen=True)
class Regret:
    """The regret after some steps, and the bound with all that is in it.

    Attributes:
        steps: T.
        regret: Sum of l_t(w_t) - l_t(w*), w* the best point of the box for these T batches.
        bound: C1 sqrt(T) + C2 sum of rho_t.
        distance: D_inf, the largest |w_t - w*| of a coordinate.
        gradient: G_inf, the largest coordinate of a gradient, at w_t or perturbed.
        smoothness: eta, the largest of the batches.
    """

    steps: int
    regret: float
    bound: float
    distance: float
    gradient: float
    smoothness: float


def regrets(setting: Setting, seed: int, horizons: Sequence[int]) -> list[Regret]:
    """Run Algorithm 3 from the middle of the box and return the regret at some numbers of steps.

    Args:
        setting: Its ``box`` is not None.
        seed: Of the batches.
        horizons: Ascending; the last is the length of the run.
    """
    record = run(PROBLEM, setting, np.zeros(PROBLEM.size), steps=horizons[-1], seed=seed)
    losses = np.cumsum(PROBLEM.batch_losses(record.points, record.batches))
    largest = np.maximum.accumulate(np.abs(record.gradients).max(axis=(1, 2)))
    smoothest = np.maximum.accumulate(PROBLEM.batch_smoothness(record.batches))
    found = []
    for steps in horizons:
        best, best_loss = best_in_hindsight(record.batches[:steps], setting.box)
        distance = float(np.abs(record.points[:steps] - best).max())
        gradient, smoothness = float(largest[steps - 1]), float(smoothest[steps - 1])
        limit = bound(setting, steps, distance, gradient, smoothness)
        regret = float(losses[steps - 1]) - best_loss
        found.append(Regret(steps, regret, limit, distance, gradient, smoothness))
    return found


def bound(
    setting: Setting, steps: int, distance: float, gradient: float, smoothness: float
) -> float:
    """Return the bound of Theorem 5.1.

    The second term of C1 has the factor alpha that its proof has and its statement lacks. The two
    are the same for alpha = 1; below that this bound is the lower one.

    Args:
        setting: Of the algorithm.
        steps: T.
        distance: D_inf.
        gradient: G_inf.
        smoothness: eta.
    """
    n = PROBLEM.size
    first = n * distance**2 / (2.0 * setting.alpha)
    first += 2.0 * setting.square_factor * n * gradient**2 * setting.alpha
    second = n**0.5 * distance * smoothness * setting.sharpness_factor
    return float(first * steps**0.5 + second * setting.radii(steps).sum())


def best_in_hindsight(batches: Indices, box: float | None) -> tuple[Array, float]:
    """Return the point of the box with the least sum of the batches' losses, and that sum.

    Args:
        batches: Indices of samples, shape [T, b].
        box: Half its width.

    Raises:
        RuntimeError: The minimisation has failed.
    """
    samples = PROBLEM.samples
    times = np.bincount(batches.ravel(), minlength=len(samples)) / batches.shape[1]

    def loss_and_gradient(weights: Array) -> tuple[float, Array]:
        margins = samples @ weights
        return float(times @ np.logaddexp(0.0, -margins)), (times * expit(-margins)) @ -samples

    found = optimize.minimize(
        loss_and_gradient,
        np.zeros(PROBLEM.size),
        jac=True,
        method="L-BFGS-B",
        bounds=[(None if box is None else -box, box)] * PROBLEM.size,
        # The regret is a difference of two sums: neither error shows in it.
        options={"maxiter": 10_000, "maxfun": 100_000, "ftol": 1e-13, "gtol": 1e-8},
    )
    if not found.success:
        raise RuntimeError(f"no best point found for {len(batches)} batches: {found.message}")
    return found.x, float(found.fun)
