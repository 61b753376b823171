"""SAM: sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from wsam_fused.bases import BaseOptimizer
from wsam_fused.documentation import documented
from wsam_fused.optimizer import SharpnessAwareOptimizer
from wsam_fused.row import Row
from wsam_fused.schedules import Schedule

_ROW = Row(evaluations=2, h=(0.0, 1.0, 0.0))


@documented
class SAM(SharpnessAwareOptimizer):
    """Step a base optimizer with the gradient at the worst-case neighbour.

    Math:
        e  = rho M g1 / (sqrt(sum of M g1^2) + eps)     M: the geometry's metric
        g2 = gradient at w + e
        w  <- base(w, g2)                               row: h = g2, d = 0

    Args:
        {common_arguments}
        {common_options}

    Differs from the authors' code:
        The norm is accumulated in float64. A step whose gradient norm is not finite is skipped.
        The adaptive geometry applies to every parameter, in the ASAM authors' code only to those
        whose name contains "weight" (``only_weights=True``), with eps 1e-16; their class has the
        paper's eta of 0.01, their training script 0. No code by the authors of Fisher SAM is
        public; its F here is the square of the mini-batch's mean gradient.

    Reference:
        Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving
        Generalization. ICLR 2021. arXiv:2010.01412.
        Kwon, Kim, Park, Choi: ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
        Learning of Deep Neural Networks. ICML 2021. arXiv:2102.11600.
        Kim, Li, Hu, Hospedales: Fisher SAM: Information Geometry and Sharpness Aware Minimisation.
        ICML 2022. arXiv:2206.04920.

    Example:
        >>> model, loss_of = torch.nn.Linear(3, 1), torch.nn.functional.mse_loss
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = loss_of(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = opt.step(closure)
    """

    uses_first_gradient = False
    takes_microbatches = True

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer = torch.optim.SGD,
        *,
        rho: float | Schedule = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, {"rho": rho}, **kwargs)

    def row(self, group: dict[str, Any]) -> Row:
        """Return the coefficients: h = g2."""
        return _ROW
