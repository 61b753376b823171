"""SGD with WSAM as the convergence theorems have it, with a record of all that they speak of.

Source: Yue et al., KDD 2023, Algorithm 3, Theorems 5.1 and 5.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.paper.convergence.logistic import Array, Indices, LogisticRegression
from wsam_fused import WSAM
from wsam_fused.schedules import InverseSqrt


@dataclass(frozen=True)
class Setting:
    """How Algorithm 3 is run.

    Attributes:
        gamma: Weight of the sharpness, in [0, 1).
        batch: Samples of a step.
        alpha: Learning rate of the first step; that of step t is alpha / sqrt(t).
        rho: Radius of the first step.
        constant_rho: Keep the radius, instead of rho / sqrt(t).
        box: Half the width of the box that each step is projected onto, None for none.
    """

    gamma: float
    batch: int = 8
    alpha: float = 1.0
    rho: float = 1.0
    constant_rho: bool = False
    box: float | None = None

    def learning_rates(self, steps: int) -> Array:
        """Return alpha_t of the steps 1 to ``steps``."""
        return self.alpha / np.sqrt(np.arange(1, steps + 1))

    def radii(self, steps: int) -> Array:
        """Return rho_t of the steps 1 to ``steps``."""
        radii = np.full(steps, self.rho)
        return radii if self.constant_rho else radii / np.sqrt(np.arange(1, steps + 1))

    @property
    def square_factor(self) -> float:
        """Factor of squared gradients in the bounds: (5 gamma^2 - 4 gamma + 1) / (1 - gamma)^2."""
        gamma = self.gamma
        return (5.0 * gamma * gamma - 4.0 * gamma + 1.0) / (1.0 - gamma) ** 2

    @property
    def sharpness_factor(self) -> float:
        """Factor of the sharpness: gamma / (1 - gamma)."""
        return self.gamma / (1.0 - self.gamma)


@dataclass(frozen=True)
class Record:
    """What a run did.

    Attributes:
        points: w_t at the beginning of each step, shape [T, n].
        end: The weights after the last step, shape [n].
        batches: Indices of the samples of each step, shape [T, b].
        gradients: Of the batch at w_t and at the perturbed weights, shape [T, 2, n].
    """

    points: Array
    end: Array
    batches: Indices
    gradients: Array


def run(
    problem: LogisticRegression,
    setting: Setting,
    start: Array,
    *,
    steps: int,
    seed: int,
    backend: str = "auto",
) -> Record:
    """Run Algorithm 3 in float64.

    Args:
        problem: Whose loss is minimised.
        setting: Of the algorithm.
        start: w_1, shape [n].
        steps: Number T of steps, >= 1.
        seed: Of the batches, whose samples are drawn with replacement.
        backend: ``"auto"`` or ``"eager"``.
    """
    drawn = np.random.default_rng(seed)
    batches = drawn.integers(len(problem.samples), size=(steps, setting.batch))
    weights = torch.nn.Parameter(torch.from_numpy(start.copy()))
    rho = setting.rho if setting.constant_rho else InverseSqrt(setting.rho)
    # Over plain SGD the decoupled WSAM is Algorithm 3.
    optimizer = WSAM([weights], torch.optim.SGD, rho=rho, gamma=setting.gamma, backend=backend)
    point = weights.detach().numpy()  # the same memory
    points = np.empty((steps, problem.size))
    gradients = np.empty((steps, 2, problem.size))
    # Two evaluations a step, on the same batch.
    twice = np.repeat(batches, 2, axis=0)
    evaluations = zip(twice, gradients.reshape(2 * steps, -1), strict=True)

    def closure() -> None:
        batch, kept = next(evaluations)
        kept[:] = problem.gradient(point, problem.samples[batch])
        weights.grad = torch.from_numpy(kept.copy())

    for step in range(steps):
        points[step] = point
        optimizer.param_groups[0]["lr"] = setting.alpha / math.sqrt(step + 1)
        optimizer.step(closure)
        if setting.box is not None:
            np.clip(point, -setting.box, setting.box, out=point)
    return Record(points, point.copy(), batches, gradients)
