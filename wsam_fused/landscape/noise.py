"""The noise of stochastic gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from wsam_fused.landscape.as_found import as_found
from wsam_fused.landscape.evaluation import (
    Loss,
    evaluate,
    gradients,
    loss_functions,
    number_of,
    require_finite_gradient,
    trainable,
)


def gradient_noise_trace(model: nn.Module, losses: Sequence[Loss]) -> float:
    """Return the trace of the covariance of the gradients of single samples.

    Math:
        tr C = (1/n) sum over i of ||g_i||^2 - ||(1/n) sum over i of g_i||^2

    The gradient of a batch of b samples, drawn independently, has the b-th part of it. It is summed
    up in float64 as squares of differences from the running mean, which cannot cancel.

    Args:
        model: In the mode in which it shall be evaluated; see :mod:`wsam_fused.landscape`.
        losses: For each of at least 2 samples a function that returns its loss, evaluated one after
            the other. With dropout in training mode all have the same masks.

    Raises:
        TypeError: ``model`` is no module or has DTensors, or ``losses`` are no functions that
            return a scalar tensor.
        ValueError: There are fewer than 2, or a loss or gradient is not finite, or a loss does not
            depend on the parameters.

    Reference:
        Luo et al.: RW-SAM, 2025, arXiv:2509.18001, whose analysis of m-sharpness rests on this
        covariance.
    """
    functions = loss_functions("losses", losses, at_least=2)
    params = list(trainable(model).values())
    mean = [torch.zeros_like(param, dtype=torch.float64).detach() for param in params]
    total = 0.0
    with as_found(model) as start:
        for seen, function in enumerate(functions):
            with start.evaluation(), torch.enable_grad():
                value = evaluate(function)
                grads = gradients(value, params)
            require_finite_gradient(grads, number_of(value))
            square = 0.0
            for average, grad in zip(mean, grads, strict=True):
                difference = -average if grad is None else grad.double() - average
                square += float(difference.square().sum())
                average += difference / (seen + 1)
            total += square * seen / (seen + 1)
    return total / len(functions)
