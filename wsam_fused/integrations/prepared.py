"""Looks at what a framework made of an optimizer, and of its losses."""

from __future__ import annotations

from typing import Any

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


def refuse_loss_scaling(scaler: object, setting: str) -> None:
    """Raise a ValueError if a framework has a GradScaler, of which g2 would not know.

    Args:
        scaler: The GradScaler, None if there is none.
        setting: What was set, and what is expected.
    """
    if scaler is not None:
        raise ValueError(f"{setting}; float16 with a GradScaler is not supported yet")
