"""WSAM: sharpness as a weighted regularizer, decoupled from the base optimizer or not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from wsam_fused.arguments import number
from wsam_fused.bases import BaseOptimizer
from wsam_fused.documentation import documented
from wsam_fused.optimizer import SharpnessAwareOptimizer
from wsam_fused.row import Row
from wsam_fused.schedules import Schedule


@documented
class WSAM(SharpnessAwareOptimizer):
    """Add the sharpness L(w + e) - L(w) to the loss with the weight gamma / (1 - gamma).

    Math:
        a  = gamma / (1 - gamma)
        e  = rho M g1 / (sqrt(sum of M g1^2) + eps)     M: the geometry's metric
        g2 = gradient at w + e
        w  <- base(w, g1) - lr a (g2 - g1)              decoupled, Algorithm 2
        w  <- base(w, (1 - a) g1 + a g2)                coupled, Algorithm 4

    Args:
        {common_arguments}
        gamma: Weight of the sharpness, in [0, 1). 0 is the base optimizer; 1/2 weighs loss and
            sharpness alike, which is SAM if coupled; the authors advise 0.8 to 0.95.
        decouple: Keep the sharpness term out of the base optimizer's moments and
            preconditioner. False is Coupled-WSAM.
        {common_options}

    Differs from the authors' code:
        w is not restored by subtracting e. Both gradients are clipped by a norm over the
        parameters of this optimizer, not of the model. ``gamma`` is a group key that may be
        changed while training. The closure is evaluated twice with cleared gradients, whatever
        was left in ``.grad``. Checkpoints hold the base optimizer's state and no scratch.

    Reference:
        Yue, Jiang, Ye, Gao, Liu, Zhang: Sharpness-Aware Minimization Revisited: Weighted Sharpness
        as a Regularization Term. KDD 2023. arXiv:2305.15817.

    Example:
        >>> model, loss_of = torch.nn.Linear(3, 1), torch.nn.functional.mse_loss
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> opt = WSAM(model.parameters(), torch.optim.AdamW, rho=0.05, gamma=0.9, lr=1e-3)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = loss_of(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = opt.step(closure)
    """

    takes_microbatches = True

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer = torch.optim.SGD,
        *,
        rho: float | Schedule = 0.05,
        gamma: float = 0.9,
        decouple: bool = True,
        **kwargs: Any,
    ) -> None:
        self.decouple = bool(decouple)
        super().__init__(params, base_optimizer, {"rho": rho, "gamma": gamma}, **kwargs)

    @classmethod
    def _check_own(cls, own: dict[str, Any]) -> None:
        super()._check_own(own)
        number("gamma", own["gamma"], 0.0, 1.0, high_included=False)

    def row(self, group: dict[str, Any]) -> Row:
        """Return the coefficients for the group's gamma."""
        gamma = number("gamma", self.own(group, "gamma"), 0.0, 1.0, high_included=False)
        weight = gamma / (1.0 - gamma)
        if self.decouple:
            return Row(evaluations=2, h=(1.0, 0.0, 0.0), d=(-weight, weight, 0.0))
        return Row(evaluations=2, h=(1.0 - weight, weight, 0.0))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "decouple": self.decouple}
