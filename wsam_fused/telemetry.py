"""What the last step knew anyway, readable without disturbing the next one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wsam_fused.plan import Slot


class LastStep:
    """Figures of the last completed step, as scalars on the device of the parameters.

    Reading one is lazy and launches at most one small operation; nothing waits for the device
    until the value is used on the host. The norm is that of the step in progress while there is
    one.

    Attributes:
        loss: Loss at the weights; None unless the step was given a closure.
        perturbed_loss: Loss at the ascent point; None unless the step was given a closure.
    """

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.perturbed_loss: Tensor | None = None
        self.sums: Tensor | None = None

    def set_losses(self, loss: Any, perturbed_loss: Any) -> None:
        """Keep the losses that a closure returned, if they are scalars."""
        self.loss = _scalar(loss)
        self.perturbed_loss = _scalar(perturbed_loss)

    @property
    def sharpness(self) -> Tensor | None:
        """Perturbed loss minus loss, the quantity that SAM bounds; None if unknown."""
        if self.loss is None or self.perturbed_loss is None:
            return None
        return self.perturbed_loss - self.loss

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of g1 over all parameters, before clipping; float64 scalar, None before a step."""
        return None if self.sums is None else self.sums[Slot.GRAD1_SQ].sqrt()


def _scalar(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach() if value.numel() == 1 else None
    return torch.tensor(float(value)) if isinstance(value, (int, float)) else None
