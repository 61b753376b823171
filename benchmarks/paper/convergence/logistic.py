"""Logistic regression on real data, with formulas for all that convergence theorems ask about."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.datasets import load_breast_cancer

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

# Points whose gradients are computed at once; each takes 569 sums.
_CHUNK = 1000


@functools.cache
def _signed_samples() -> Array:
    """Return y x of each sample, y = -1 or 1: the logistic loss depends on nothing else."""
    inputs, labels = load_breast_cancer(return_X_y=True)
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    with_one = np.column_stack([inputs, np.ones(len(inputs))])
    signed: Array = with_one * (2.0 * labels - 1.0)[:, None]
    signed.flags.writeable = False
    return signed


@dataclass(frozen=True)
class LogisticRegression:
    """Mean logistic loss on the breast cancer data, the features standardised and a one added.

    With s = y x: mean of log(1 + exp(-s . w)) + lambda sum of w_j^2 / (1 + w_j^2). The second term
    is smooth, bounded and not convex.

    Attributes:
        penalty: lambda >= 0.
    """

    penalty: float = 0.0

    @property
    def samples(self) -> Array:
        """The product y x of each sample, shape [m, n]."""
        return _signed_samples()

    @property
    def size(self) -> int:
        """Number n of weights."""
        return int(self.samples.shape[1])

    def gradient(self, weights: Array, samples: Array) -> Array:
        """Return the gradient of the mean loss of some samples.

        Args:
            weights: Shape [n].
            samples: Rows of :attr:`samples`, shape [b, n].
        """
        grad: Array = expit(-(samples @ weights)) @ samples / -len(samples)
        return grad + self._penalty_gradient(weights) if self.penalty else grad

    def _penalty_gradient(self, weights: Array) -> Array:
        grad: Array = 2.0 * self.penalty * weights / (1.0 + weights * weights) ** 2
        return grad

    def full_gradients(self, points: Array) -> Array:
        """Return the gradient on all samples at each of some points, both of shape [T, n]."""
        found = np.empty_like(points)
        for begin in range(0, len(points), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            residuals = expit(-(points[part] @ self.samples.T))
            found[part] = residuals @ self.samples / -len(self.samples)
        return found + self._penalty_gradient(points)

    def full_loss(self, weights: Array) -> float:
        """Return the loss on all samples."""
        squares = weights * weights
        loss = np.logaddexp(0.0, -(self.samples @ weights)).mean()
        return float(loss + self.penalty * (squares / (1.0 + squares)).sum())

    def batch_losses(self, points: Array, batches: Indices) -> Array:
        """Return the loss of each batch at its point, shape [T], without the penalty.

        Args:
            points: Shape [T, n].
            batches: Indices of samples, shape [T, b].
        """
        margins = np.einsum("tbn,tn->tb", self.samples[batches], points)
        losses: Array = np.logaddexp(0.0, -margins).mean(axis=1)
        return losses

    def batch_smoothness(self, batches: Indices) -> Array:
        """Return the best smoothness constant of the loss of each batch, shape [T].

        The Hessian is the mean of p (1 - p) s s' and the penalty's, whose curvature is between
        -lambda / 2 and 2 lambda. Both are largest at w = 0: eigenvalue of the mean of s s' / 4,
        and 2 lambda. No curvature is more negative than that.

        Args:
            batches: Indices of samples, shape [T, b].
        """
        rows = self.samples[batches]
        # The nonzero eigenvalues of A' A are those of A A', which is b by b.
        gram = rows @ rows.transpose(0, 2, 1)
        largest: Array = np.linalg.eigvalsh(gram)[:, -1]
        return largest / (4.0 * batches.shape[1]) + 2.0 * self.penalty

    def full_smoothness(self) -> float:
        """Return the best smoothness constant of the loss on all samples."""
        second_moment = self.samples.T @ self.samples / len(self.samples)
        return float(np.linalg.eigvalsh(second_moment)[-1] / 4.0 + 2.0 * self.penalty)

    def least_curvature(self, weights: Array) -> float:
        """Return the smallest eigenvalue of the Hessian on all samples at a point."""
        slopes = expit(self.samples @ weights)
        weighted = self.samples * (slopes * (1.0 - slopes))[:, None]
        hessian = weighted.T @ self.samples / len(self.samples)
        squares = weights * weights
        diagonal = 2.0 * self.penalty * (1.0 - 3.0 * squares) / (1.0 + squares) ** 3
        return float(np.linalg.eigvalsh(hessian + np.diag(diagonal))[0])
