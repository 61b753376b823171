"""GNP: penalizing the gradient norm."""

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
class GNP(SharpnessAwareOptimizer):
    """Penalize the norm of the gradient, by a finite difference along the gradient.

    Math:
        e  = rho M g1 / (sqrt(sum of M g1^2) + eps)     M: the geometry's metric
        g2 = gradient at w + e
        w  <- base(w, (1 - alpha) g1 + alpha g2)        row: the same

    The penalty's weight is lambda = alpha rho. alpha = 1 is SAM; alpha = gamma / (1 - gamma) is
    Coupled-WSAM, which also goes beyond 1.

    Args:
        {common_arguments}
        alpha: Share of the perturbed gradient, in [0, 1]. 0 is the base optimizer, 1 is SAM. A
            group key.
        {common_options}

    Differs from the authors' code:
        That is written in JAX; it was read, not run. It clips the norm of the combined gradient,
        this that of each.

    Reference:
        Zhao, Zhang, Hu: Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
        Learning. ICML 2022. arXiv:2202.03599.

    Example:
        >>> model, loss_of = torch.nn.Linear(3, 1), torch.nn.functional.mse_loss
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> opt = GNP(model.parameters(), torch.optim.SGD, rho=0.05, alpha=0.8, lr=0.1)
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
        rho: float | Schedule = 0.1,
        alpha: float = 0.8,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, {"rho": rho, "alpha": alpha}, **kwargs)

    @classmethod
    def _check_own(cls, own: dict[str, Any]) -> None:
        super()._check_own(own)
        number("alpha", own["alpha"], 0.0, 1.0)

    def row(self, group: dict[str, Any]) -> Row:
        """Return the coefficients for the group's alpha."""
        alpha = number("alpha", self.own(group, "alpha"), 0.0, 1.0)
        return Row(evaluations=2, h=(1.0 - alpha, alpha, 0.0))
