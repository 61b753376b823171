"""GSAM: surrogate gap guided sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from wsam_fused.arguments import number
from wsam_fused.bases import BaseOptimizer
from wsam_fused.documentation import documented
from wsam_fused.optimizer import SharpnessAwareOptimizer
from wsam_fused.row import DERIVED, Row, Sums
from wsam_fused.schedules import Schedule


@documented
class GSAM(SharpnessAwareOptimizer):
    """Also ascend along what of the gradient is orthogonal to the perturbed one.

    That part lowers the loss and not the perturbed loss; going against it closes the gap between
    them, which is what is sharp.

    Math:
        e    = rho M g1 / (sqrt(sum of M g1^2) + eps)     M: the geometry's metric
        g2   = gradient at w + e
        cos  = g1 . g2 / (|g1| |g2| + eps)                plain norms, whatever the geometry
        g1_o = g1 - cos |g1| g2 / (|g2| + eps)            orthogonal to g2
        w    <- base(w, g2 - alpha g1_o)

        row: h = -alpha g1 + (1 + alpha cos |g1| / (|g2| + eps)) g2, formed on the device

    Args:
        {common_arguments} Its authors let it go with the learning rate:
            ``schedules.ProportionalToLR``.
        alpha: Weight of the orthogonal part, >= 0. 0 is SAM. A group key.
        {common_options}

    Differs from the authors' code:
        w is not restored by subtracting e, and a tensor without a gradient is left alone. Their
        schedule gives the low end at the first step, ours what belongs to its learning rate.

    Reference:
        Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu: Surrogate Gap Minimization
        Improves Sharpness-Aware Training. ICLR 2022. arXiv:2203.08065.

    Example:
        >>> model, loss_of = torch.nn.Linear(3, 1), torch.nn.functional.mse_loss
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> opt = GSAM(model.parameters(), torch.optim.SGD, rho=0.05, alpha=0.4, lr=0.1)
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
        alpha: float = 0.4,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, {"rho": rho, "alpha": alpha}, **kwargs)

    @classmethod
    def _check_own(cls, own: dict[str, Any]) -> None:
        super()._check_own(own)
        number("alpha", own["alpha"], 0.0)

    def row(self, group: dict[str, Any]) -> Row:
        """Return the coefficients for the group's alpha."""
        alpha = number("alpha", self.own(group, "alpha"), 0.0)

        def derive(sums: Sums) -> Mapping[str, Tensor]:
            cosine = sums.dot12 / (sums.norm1 * sums.norm2 + sums.eps)
            along = cosine * sums.norm1 / (sums.norm2 + sums.eps)
            # Without eps nothing would be divided by nothing where a gradient vanishes.
            along = torch.where((sums.norm1 > 0) & (sums.norm2 > 0), along, 0.0)
            return {"h2": 1.0 + alpha * along}

        return Row(evaluations=2, h=(-alpha, DERIVED, 0.0), derive=derive, needs_dot=True)
