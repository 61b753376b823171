"""The optimizers of the toy example, and the paths that they take.

Source: Yue et al., KDD 2023, section 4.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.paper.toy import loss as toy_loss
from wsam_fused import SAM, WSAM
from wsam_fused.optimizer import SharpnessAwareOptimizer

START = (-6.0, 10.0)
STEPS = 150
RHO = 2.0
LR = 5.0
MOMENTUM = 0.9

Point = tuple[float, float]
Array = NDArray[np.floating]


@dataclass(frozen=True)
class Contender:
    """An optimizer of the toy example.

    Attributes:
        name: In tables and in the picture.
        algorithm: Number in the paper.
        gamma: Weight of the sharpness; 1/2 is SAM.
        claimed: Minimum that the paper says it reaches.
        make: Builds it, given the parameters.
    """

    name: str
    algorithm: int
    gamma: float
    claimed: str
    make: Callable[..., SharpnessAwareOptimizer]


def _wsam(algorithm: int, gamma: float, claimed: str) -> Contender:
    name = f"{'WSAM' if algorithm == 2 else 'Coupled-WSAM'} {gamma:g}"
    make = functools.partial(WSAM, gamma=gamma, decouple=algorithm == 2)
    return Contender(name, algorithm, gamma, claimed, make)


# The paper speaks of WSAM, which is Algorithm 2; Algorithm 4 is here to see what it changes.
CONTENDERS = (
    Contender("SAM", 1, 0.5, toy_loss.SHARP, SAM),
    _wsam(2, 0.6, toy_loss.SHARP),
    _wsam(4, 0.6, toy_loss.SHARP),
    _wsam(2, 0.95, toy_loss.FLAT),
    _wsam(4, 0.95, toy_loss.FLAT),
)


def path(
    contender: Contender,
    start: Point = START,
    *,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    backend: str = "auto",
) -> Array:
    """Return where an optimizer is after each step, in an array of shape [steps + 1, 2].

    The gradients are those of :func:`benchmarks.paper.toy.loss.gradient`; for two numbers a graph
    would cost more than all the rest.

    Args:
        contender: The optimizer.
        start: mu and sigma.
        steps: Number of steps, >= 0.
        dtype: Of the parameters and of all that is computed, float32 or float64.
        backend: ``"auto"`` or ``"eager"``.
    """
    params = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = contender.make(
        [params], torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM, backend=backend
    )
    # The same memory: NumPy's scalars are what is fast on two numbers.
    point = params.detach().numpy()

    def closure() -> float:
        grad = np.array(toy_loss.gradient(point[0], point[1]), point.dtype)
        params.grad = torch.from_numpy(grad)
        return float(toy_loss.loss(point[0], point[1]))

    visited = np.empty((steps + 1, 2), point.dtype)
    visited[0] = point
    for step in range(1, steps + 1):
        optimizer.step(closure)
        visited[step] = point
    return visited


def jittered_starts(count: int, reach: float = 0.5) -> list[Point]:
    """Return starts drawn evenly from the square around the paper's, always the same ones.

    Args:
        count: How many, >= 0.
        reach: Half the side of the square.
    """
    drawn = np.random.default_rng(0).uniform(-reach, reach, (count, 2)) + START
    return [(mu, sigma) for mu, sigma in drawn.tolist()]
