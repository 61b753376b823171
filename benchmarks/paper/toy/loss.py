"""The toy loss of the WSAM paper, its minima, and whose basin a point is in.

Source: Yue et al., KDD 2023, section 4.2. The parameters are the mean and the standard deviation of
a normal distribution; the loss mixes its divergences from two given ones.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import differentiate, optimize

SHARP, FLAT, NEITHER = "sharp", "flat", "neither"


class _Component(NamedTuple):
    """A term of the loss: weight exp(-K / width^2), K the divergence from N(mu, sigma)."""

    weight: float
    mu: float
    sigma: float
    width: float


_COMPONENTS = (_Component(0.7, 20.0, 30.0, 1.8), _Component(0.3, -20.0, 10.0, 1.2))
# The logarithm needs sigma > 0; no path gets near this.
_SMALLEST_SIGMA = 1e-3
# A descent that ends farther than this from both minima has ended in neither. The descents below
# end within 1e-4, the minima are 40 apart.
_AT_MINIMUM = 0.01


def loss(mu: Any, sigma: Any) -> Any:
    """Return the loss.

    Args:
        mu: A number or an array; float32 numbers are computed with in float32.
        sigma: Likewise, > 0; arrays broadcast.
    """
    return -np.log(sum(_terms(mu, sigma)))


def gradient(mu: Any, sigma: Any) -> tuple[Any, Any]:
    """Return the derivatives with respect to mu and sigma; arguments as for :func:`loss`.

    With L = -log(sum of s_i), s_i = a_i exp(-K_i / v_i^2): grad L = sum of p_i grad K_i / v_i^2,
    where p_i = s_i / (sum of s_j).
    """
    terms = _terms(mu, sigma)
    total = sum(terms)
    by_mu = by_sigma = 0.0
    for term, component in zip(terms, _COMPONENTS, strict=True):
        share = term / total / component.width**2
        by_mu = by_mu + share * (mu - component.mu) / component.sigma**2
        by_sigma = by_sigma + share * (sigma / component.sigma**2 - 1.0 / sigma)
    return by_mu, by_sigma


def _terms(mu: Any, sigma: Any) -> list[Any]:
    return [
        component.weight * np.exp(-_divergence(mu, sigma, component) / component.width**2)
        for component in _COMPONENTS
    ]


def _divergence(mu: Any, sigma: Any, component: _Component) -> Any:
    """Return KL(N(mu, sigma^2) || N(mu_i, sigma_i^2))."""
    squares = sigma * sigma + (mu - component.mu) ** 2
    return np.log(component.sigma / sigma) + squares / (2.0 * component.sigma**2) - 0.5


@dataclass(frozen=True)
class Minimum:
    """A minimum of the loss.

    Attributes:
        name: ``"sharp"`` or ``"flat"``, by the larger eigenvalue.
        mu: Where it is.
        sigma: Where it is.
        loss: There.
        eigenvalues: Of the Hessian, ascending.
    """

    name: str
    mu: float
    sigma: float
    loss: float
    eigenvalues: tuple[float, float]


@functools.cache
def minima() -> dict[str, Minimum]:
    """Find the two minima, by descents from the centres of the two components.

    Raises:
        RuntimeError: A Hessian has not converged.
    """
    found = []
    for component in _COMPONENTS:
        mu, sigma = _descend(component.mu, component.sigma)
        at = np.array([mu, sigma])
        hessian = differentiate.jacobian(lambda w: np.stack(gradient(w[0], w[1])), at)
        if not hessian.success.all():
            raise RuntimeError(f"the Hessian at ({mu}, {sigma}) has not converged: {hessian}")
        low, high = np.linalg.eigvalsh((hessian.df + hessian.df.T) / 2.0).tolist()
        found.append((mu, sigma, float(loss(mu, sigma)), (low, high)))
    found.sort(key=lambda minimum: minimum[-1][1])
    return {name: Minimum(name, *at) for name, at in zip((FLAT, SHARP), found, strict=True)}


def basin(mu: float, sigma: float) -> str:
    """Return the name of the minimum that a descent from a point ends in.

    Args:
        mu: Of the point.
        sigma: Likewise, > 0.

    Returns:
        ``"sharp"``, ``"flat"``, or ``"neither"``: the descent has ended somewhere else.
    """
    end = np.array(_descend(mu, sigma))
    for minimum in minima().values():
        if np.linalg.norm(end - (minimum.mu, minimum.sigma)) < _AT_MINIMUM:
            return minimum.name
    return NEITHER


def _descend(mu: float, sigma: float) -> tuple[float, float]:
    """Return where a descent in small steps ends: it must not jump over a ridge."""
    end = optimize.minimize(
        lambda w: float(loss(w[0], w[1])),
        np.array([mu, sigma], np.float64),
        jac=lambda w: np.array(gradient(w[0], w[1])),
        method="L-BFGS-B",
        bounds=[(None, None), (_SMALLEST_SIGMA, None)],
        # As far as float64 goes.
        options={"ftol": 0.0, "gtol": 1e-12},
    )
    return float(end.x[0]), float(end.x[1])
