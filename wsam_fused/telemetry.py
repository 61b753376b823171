"""What the last step knew anyway, readable without disturbing the next one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wsam_fused.engine import StepEngine
from wsam_fused.plan import Slot


class LastStep:
    """Figures of the last completed step, as scalars on the device of the parameters.

    Reading one is lazy and launches at most a few small operations; nothing waits for the device
    until the value is used on the host. Norms are those of the step in progress while there is
    one. What a step did not form for its own sake is None.

    With ``perturb_scope="local"`` losses are those of the rank, and the norm of g1 is that of the
    mean over the ranks where the update uses it, and else that of the rank's own.

    Attributes:
        loss: Loss at the weights; None unless the step was given a closure.
        perturbed_loss: Loss at the ascent point; None unless the step was given a closure.
    """

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.perturbed_loss: Tensor | None = None
        self._engine: StepEngine | None = None

    def begin(self, engine: StepEngine) -> None:
        """Forget the losses, and read what the engine knows of the step."""
        self.loss = self.perturbed_loss = None
        self._engine = engine

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
        """Norm of g1 over all parameters, before clipping; float64 scalar."""
        return self._norm(0)

    @property
    def second_grad_norm(self) -> Tensor | None:
        """Norm of g2, before clipping; float64 scalar."""
        return self._norm(1)

    @property
    def third_grad_norm(self) -> Tensor | None:
        """Norm of g3, before clipping; float64 scalar."""
        return self._norm(2)

    @property
    def cosine(self) -> Tensor | None:
        """Cosine of the angle between g1 and g2; float64 scalar, NaN where one of them is 0."""
        if self._engine is None or not self._engine.knows_dot:
            return None
        sums = self._engine.scalars
        return sums[Slot.DOT12] / (sums[Slot.GRAD1_SQ] * sums[Slot.GRAD2_SQ]).sqrt()

    def _norm(self, evaluation: int) -> Tensor | None:
        if self._engine is None or evaluation not in self._engine.known:
            return None
        scalars = self._engine.scalars
        norm = scalars[Slot.GRAD1_SQ + evaluation].sqrt()
        return norm * scalars[Slot.INV_SCALE1 + evaluation]


def _scalar(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach() if value.numel() == 1 else None
    return torch.tensor(float(value)) if isinstance(value, (int, float)) else None
