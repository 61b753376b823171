"""What the minimum is like that a run has found."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.paper.data import Split
from wsam_fused import landscape

SHARPNESS_RHO = 0.1
# Samples that the curvature is computed from: all of a small training set, of a large one the first
# (its order has been drawn), because each of some dozens of products takes a pass over them.
_SAMPLES, _NOISE_SAMPLES, _BATCH = 5000, 500, 500


def measure(net: nn.Module, split: Split) -> tuple[float, float, float]:
    """Return sharpness, largest Hessian eigenvalue and trace of the gradient noise.

    Args:
        net: Is put into evaluation mode.
        split: The training set.
    """
    net.eval()

    def loss_of(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        return functools.partial(_loss, net, x, y)

    count = min(_SAMPLES, len(split.y) // _BATCH * _BATCH or len(split.y))
    parts = zip(split.x[:count].split(_BATCH), split.y[:count].split(_BATCH), strict=True)
    loss = [loss_of(x, y) for x, y in parts]
    samples = [
        loss_of(split.x[i : i + 1], split.y[i : i + 1])
        for i in range(min(_NOISE_SAMPLES, len(split.y)))
    ]
    return (
        landscape.sharpness(net, loss, SHARPNESS_RHO),
        landscape.hessian_max_eigenvalue(net, loss),
        landscape.gradient_noise_trace(net, samples),
    )


def _loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(net(x), y)
