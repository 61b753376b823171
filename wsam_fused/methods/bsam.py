"""BSAM: bilateral sharpness-aware minimization."""

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
class BSAM(SharpnessAwareOptimizer):
    """Flatten the loss on both sides: above the weights and below them.

    Besides the rise to the worst neighbour it also lowers the fall to the best one, for which it
    evaluates the gradient a third time.

    Math:
        e     = rho M g1 / (sqrt(sum of M g1^2) + eps)      M: the geometry's metric
        e_min = rho_min M g1 / (sqrt(sum of M g1^2) + eps)
        g2 = gradient at w + e,   g3 = gradient at w - e_min
        w  <- base(w, g1 + g2 - |g2| / |g3| g3)             g3 drops out where it is 0

        row: h = g1 + g2 - (|g2| / |g3|) g3, formed on the device

    Call by call it is ``first_step``, ``second_step``, ``third_step``, with a backward before each.

    Args:
        {common_arguments}
        rho_min: Radius of the descent point, >= 0, or a schedule like that of ``rho``; its authors
            let it go from 0.05 to 0 with the learning rate. A group key.
        as_published: Start the base optimizer's step from w - e_min instead of from w, as the
            authors' code does: it never restores w, and the published results contain that.
        {common_options}

    Differs from the authors' code:
        w is restored, unless ``as_published``. A vanishing g3 makes no NaN. The authors' code
        ignores the adaptive geometry.

    Reference:
        Deng, Pang, Zhang, Huang: Bilateral Sharpness-Aware Minimization for Flatter Minima. 2024.
        arXiv:2409.13173.

    Example:
        >>> model, loss_of = torch.nn.Linear(3, 1), torch.nn.functional.mse_loss
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> opt = BSAM(model.parameters(), torch.optim.SGD, rho=0.05, rho_min=0.05, lr=0.1)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = loss_of(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = opt.step(closure)
    """

    evaluations = 3
    required = 0b111
    scheduled = ("rho", "rho_min")

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer = torch.optim.SGD,
        *,
        rho: float | Schedule = 0.05,
        rho_min: float | Schedule = 0.05,
        as_published: bool = False,
        **kwargs: Any,
    ) -> None:
        self.as_published = bool(as_published)
        super().__init__(params, base_optimizer, {"rho": rho, "rho_min": rho_min}, **kwargs)
        if self.as_published and self._replicas.perturb_apart:
            raise ValueError(
                "as_published is True and perturb_scope is 'local', expected 'global': the steps "
                "of replicas would start from weights of their own"
            )

    @classmethod
    def _check_own(cls, own: dict[str, Any]) -> None:
        super()._check_own(own)
        number("rho_min", own["rho_min"], 0.0)

    def row(self, group: dict[str, Any]) -> Row:
        """Return the coefficients, the last of which is derived."""
        return Row(evaluations=3, h=(1.0, 1.0, DERIVED), derive=_derive)

    def _keeps_point(self) -> bool:
        return self.as_published

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "as_published": self.as_published}


def _derive(sums: Sums) -> Mapping[str, Tensor]:
    return {"h3": -torch.where(sums.norm3 > 0, sums.norm2 / sums.norm3, 0.0)}
