"""RW-SAM: reweighted sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from wsam_fused.arguments import number
from wsam_fused.bases import BaseOptimizer
from wsam_fused.documentation import documented
from wsam_fused.per_sample import (
    LossesFn,
    PerSampleOptimizer,
    losses_of,
    losses_with_graph,
)
from wsam_fused.precision import LOW_PRECISION
from wsam_fused.random_state import RandomState
from wsam_fused.schedules import Schedule

_TOO_COARSE = "too coarse for the difference of two losses that RWSAM takes"


@documented
class RWSAM(PerSampleOptimizer):
    """Ascend mostly along the samples whose gradients are large.

    Their norms are estimated by one more forward, at w + delta z with z of random signs, made from
    the seed wherever it is needed and never stored.

    Math:
        n_i = |loss_i(w + delta z) - loss_i(w)| / delta     E n_i^2 is about |gradient of loss_i|^2
        p   = softmax(lam n)                                over the samples of the batch (*)
        g1  = gradient at w of sum of p_i loss_i
        e   = rho M g1 / (sqrt(sum of M g1^2) + eps)        M: the geometry's metric
        g2  = gradient at w + e of the mean loss
        w   <- base(w, g2)                                  row: h = g2

    (*) With ``model`` or ``process_group`` saying which ranks share a perturbation, over the
    samples of all of them; else over those of the rank.

    Args:
        {common_arguments}
        lam: Inverse temperature of the weights, >= 0. 0 is SAM. A group key, of which the first
            group's counts.
        delta: Step of the finite difference, > 0. Too small, and the rounding of the losses
            dominates (in float32 by about 1e-7 / delta times the loss); too large, and their
            curvature does: the length of the step is delta sqrt(number of parameters). A group
            key, likewise.
        seed: Of the signs, a whole number >= 0, the same on all ranks. A group key, likewise.
        {common_options}

    Parameters and losses have to be float32 or float64. An autocast forward of 16 bits makes the
    weights noise.

    Differs from the authors' code:
        That was not available; this follows their description, and the defaults of ``lam`` and
        ``delta`` are ours. Both losses of a difference come from the same dropout masks, and with
        ``model`` the extra forward leaves the BatchNorm statistics alone as well.

    Reference:
        Luo, Harandi, Phung, Le: Unveiling m-Sharpness Through the Structure of Stochastic Gradient
        Noise. NeurIPS 2025. arXiv:2509.18001.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> opt = RWSAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        >>> def losses_fn(index=None):
        ...     inputs, targets = (x, y) if index is None else (x[index], y[index])
        ...     return (model(inputs) - targets).square().sum(1)
        >>> loss = opt.step(losses_fn)
    """

    required = 0b11

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer = torch.optim.SGD,
        *,
        rho: float | Schedule = 0.05,
        lam: float = 0.5,
        delta: float = 1e-3,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        own = {"rho": rho, "lam": lam, "delta": delta, "seed": seed}
        super().__init__(params, base_optimizer, own, **kwargs)

    @classmethod
    def _check_own(cls, own: dict[str, Any]) -> None:
        super()._check_own(own)
        number("lam", own["lam"], 0.0)
        number("delta", own["delta"], 0.0, low_included=False)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for param in group["params"]:
            if param.dtype in LOW_PRECISION:
                raise ValueError(f"a parameter is {param.dtype}, {_TOO_COARSE}")

    def _places(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**super()._places(group), "delta": self.own(self.param_groups[0], "delta")}

    def _sharpness_aware_step(self, losses_fn: LossesFn) -> tuple[Tensor, Tensor]:
        probed = self._probe(losses_fn)
        group = self.param_groups[0]
        with self._evaluation(0):
            losses = losses_with_graph(losses_fn, count=len(probed))
            norms = (probed - losses.detach()).abs() / self.own(group, "delta")
            weights, ranks = self._replicas.softmax(self.own(group, "lam") * norms)
            self._backward(torch.dot(ranks * weights, losses))
        self._go_to_ascent_point()
        with self._evaluation(1):
            second = losses_with_graph(losses_fn, count=len(probed)).mean()
            self._backward(second)
        self._finish()
        return losses.detach().mean(), second.detach()

    @torch.no_grad()
    def _probe(self, losses_fn: LossesFn) -> Tensor:
        """Return the losses at w + delta z."""
        randomness = RandomState(self._params())
        engine = self._begin_without_gradients()
        self._batch_norm.save()
        engine.probe(self._seed())
        with randomness.replayed():
            losses = losses_of(losses_fn)
        if losses.dtype in LOW_PRECISION:
            raise ValueError(f"losses_fn returned {losses.dtype}, {_TOO_COARSE}")
        self._batch_norm.restore()
        engine.return_to_weights()
        return losses
