"""Looks at what a framework made of an optimizer, and of its losses."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from wsam_fused.coefficients import clip_factor
from wsam_fused.methods import METHODS
from wsam_fused.optimizer import SharpnessAwareOptimizer


def sharpness_aware(optimizer: Any, where: str) -> SharpnessAwareOptimizer:
    """Return the optimizer itself or the one that it wraps as its attribute ``optimizer``.

    Args:
        optimizer: What a framework uses as its optimizer.
        where: What to call it in an error.

    Raises:
        TypeError: There is none of this package, or one that wants a loss for every sample.
    """
    found = optimizer
    while not isinstance(found, SharpnessAwareOptimizer):
        if not hasattr(found, "optimizer"):
            names = ", ".join(method.__name__ for method in METHODS)
            raise TypeError(
                f"{where} is {type(optimizer).__name__}, expected an optimizer of wsam_fused "
                f"({names})"
            )
        found = found.optimizer
    if found.instead_of_calls is not None:
        raise TypeError(
            f"{where} is {type(found).__name__}, which needs the loss of every sample; frameworks "
            "that call backward() themselves cannot give it"
        )
    return found


def clip_scaled(optimizer: SharpnessAwareOptimizer, limit: float, scaler: GradScaler) -> None:
    """Clip gradients that are multiplied by a loss scale to the norm ``limit`` without it.

    Nothing waits for the device, and gradients that are not finite stay so.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad for param in params if param.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    torch._foreach_mul_(grads, clip_factor(limit, norm / scaler.scale(torch.ones_like(norm))))
